"""Attention over packed sequences, plugged into transformers under one name.

A packed forward lays sequences end to end in one row of tokens. Attention is the only place where
they could see each other, so this module registers ``"prefalign_packed"`` with transformers'
``AttentionInterface``: queries of segment s see the keys of segment s, causally, and nothing else.

    out[q0:q1] = softmax(scale * Q[q0:q1] K[k0:k1]^T + mask) V[k0:k1]      for every segment

The keys of a segment may be more than its own: with a shared prompt they are its parent's, then its
own (``key_rows`` lists them), and the causal mask is aligned to their end. Positions go on after
the parent's, so a sliding window reaches into it as far as it would into a repeated prompt.
``attention_backends`` has the kernels.

On a CPU a segment's result depends on its own tokens only, bit for bit.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from .attention_backends import PackedCall, backend_for
from .errors import ModelError
from .packing import PackedBatch, Segments

logger = logging.getLogger(__name__)

PACKED_ATTENTION = "prefalign_packed"
"""The name under which transformers knows this attention."""

_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
_ALIBI_MODEL_TYPES = {"bloom", "mpt"}
# Arguments that change the scores and that no backend here applies.
_UNSUPPORTED = {
    "attention_mask": "a mask of its own",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "alibi": "an ALiBi bias",
    "head_mask": "a head mask",
}


def unwrap(model: Any) -> Any:
    """Return the model inside wrappers for parallel or compiled execution (PEFT's stays)."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel) or (
            type(model).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine")
        ):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def causal_lm(model: Any) -> Any:
    """Return the transformers model inside all wrappers, PEFT's included."""
    model = unwrap(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Return the keyword arguments of a model's forward that lay ``batch`` out for attention.

    Equivalent to::

        dict(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None],
             cu_seq_lens_q=batch.cu_seqlens, cu_seq_lens_k=batch.cu_seqlens,
             max_length_q=batch.max_seqlen, max_length_k=batch.max_seqlen,
             segments=batch.segments, use_cache=False)

    Where prompts are shared, ``key_rows`` ``[T_k]`` lists every segment's keys, its parent's rows
    first, ``cu_seq_lens_k`` and ``max_length_k`` count those, and ``parents`` comes along. All was
    made with the batch: nothing here reads the device.
    """
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
        "segments": batch.segments,
        "use_cache": False,
    }
    if batch.shares_prompts:
        inputs["cu_seq_lens_k"] = batch.cu_keys
        inputs["max_length_k"] = batch.max_keys
        inputs["key_rows"] = batch.key_rows
        inputs["parents"] = batch.parents
    return inputs


def padded_inputs(batch: PackedBatch) -> tuple[dict[str, Any], Tensor]:
    """Return the keyword arguments of an ordinary forward pass, each segment in a row of its own.

    Args:
        batch: T tokens and S segments without parents.

    Returns:
        ``input_ids`` and ``attention_mask`` ``[S, L]``, padded at the end; and where each of the T
        tokens is in the rows laid end to end, int64 ``[T]``.
    """
    starts, ends = batch.cu_seqlens[:-1, None].long(), batch.cu_seqlens[1:, None].long()
    offsets = torch.arange(batch.max_seqlen, device=starts.device)
    there = starts + offsets < ends
    # What pads is hidden from every token and has no target: any token will do.
    ids = batch.input_ids[torch.minimum(starts + offsets, ends - 1)]
    tokens = torch.arange(batch.num_tokens, device=starts.device)
    segment = torch.searchsorted(ends[:, 0], tokens, right=True)
    rows = segment * batch.max_seqlen + batch.position_ids
    return {"input_ids": ids, "attention_mask": there.long(), "use_cache": False}, rows


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    key_rows: Tensor | None = None,
    parents: Tensor | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each segment of a packed row, as transformers' attention interface asks.

    Args:
        module: The layer's attention module; read for ``is_causal`` and ``training``.
        query: ``[1, H, T, E]``.
        key: ``[1, H_kv, T, E]``; H is a multiple of H_kv.
        value: ``[1, H_kv, T, E_v]``.
        attention_mask: Must be None: the segments say what is seen.
        scaling: Factor of the scores; ``E ** -0.5`` by default.
        dropout: Probability with which an attention weight is dropped; only while training.
        sliding_window: How many keys a query sees, itself included; all by default.
        softcap: Scores z become ``softcap * tanh(z / softcap)``.
        is_causal: Whether later keys are hidden; the module's own by default.
        cu_seq_lens_q: Segment s is ``cu_seq_lens_q[s]:cu_seq_lens_q[s + 1]`` of the queries, int32.
        cu_seq_lens_k: The same of the keys, after ``key_rows``; as the queries by default.
        max_length_q: Queries in the longest segment.
        max_length_k: Keys in the longest segment.
        key_rows: Rows of ``key`` and ``value``, int64 ``[T_k]``, segment after segment, or None
            where every segment sees its own only.
        parents: The same as the segment that each sees before itself, int32 ``[S]``, or -1.
        segments: The segments' lengths and parents on the host, so that no backend reads them.
        kwargs: Whatever else a model passes; refused where it would change the result.

    Returns:
        ``[1, T, H, E_v]`` and None (attention weights are never kept).

    Raises:
        ModelError: The call is not a packed one, or asks for what would be left out silently.
    """
    name = type(module).__name__
    for argument, meaning in _UNSUPPORTED.items():
        if (attention_mask if argument == "attention_mask" else kwargs.get(argument)) is not None:
            raise ModelError(f"{name} passes {meaning} ({argument}), which packing cannot honour")
    if cu_seq_lens_q is None or query.shape[0] != 1:
        raise ModelError(
            f"{name} was called without packed sequences while {PACKED_ATTENTION!r} is set: use "
            "prefalign.attention.generation_attention(model) around ordinary forward passes"
        )
    if dropout and not module.training:
        raise ModelError(f"{name} asks for attention dropout {dropout} outside training")

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if key_rows is not None and not causal:
        raise ModelError(f"{name} attends to later tokens, so its prompts cannot be shared")

    dtype = _compute_dtype(query, value)
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    cu_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
    if max_length_q is None:
        max_length_q = int(cu_seq_lens_q.diff().max())
    if max_length_k is None:
        max_length_k = int(cu_k.diff().max())
    call = PackedCall(
        query=query,
        key=key,
        value=value,
        cu_q=cu_seq_lens_q,
        cu_k=cu_k,
        max_q=max_length_q,
        max_k=max_length_k,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=None if not sliding_window or sliding_window >= max_length_k else sliding_window,
        softcap=softcap,
        causal=causal,
        dropout=dropout,
        key_rows=key_rows,
        parents=parents,
        segments=segments,
    )
    return backend_for(call)(call)[None], None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def _compute_dtype(query: Tensor, value: Tensor) -> torch.dtype:
    """Return what to attend in: rotary factors or norms in float32 widen queries and keys."""
    if query.dtype == torch.float32 and torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return value.dtype


def use_packed_attention(model: nn.Module) -> None:
    """Make every later forward pass of ``model`` a packed one, or say why it cannot be.

    A model with ALiBi keeps its own attention: its sequences go in padded rows, one each, which a
    warning says.

    Raises:
        ModelError: The architecture carries state from token to token outside attention, hides keys
            in ways that only a mask tells, or does not take its attention from transformers'
            ``AttentionInterface``.
    """
    lm = causal_lm(model)
    name = type(lm).__name__
    config = lm.config.get_text_config() if hasattr(lm, "config") else None
    if config is None or not hasattr(lm, "set_attn_implementation"):
        raise ModelError(f"{name}: expected a transformers model")
    active = getattr(unwrap(model), "active_peft_config", None)
    if getattr(active, "is_prompt_learning", False):
        raise ModelError(f"{name} has an adapter of virtual tokens, which cannot be packed")
    if getattr(lm, "_is_stateful", False):
        raise ModelError(
            f"{name} has recurrent layers, which carry state from one packed sequence into the next"
        )
    if _has_alibi(config):
        if not uses_padded_rows(lm):
            lm._prefalign_padded = True
            logger.warning(
                "%s uses ALiBi, which packed attention cannot honour: its sequences are padded, "
                "one to a row",
                name,
            )
        return
    odd = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if getattr(config, "attention_chunk_size", None):
        odd.add("chunked_attention")
    if getattr(config, "use_bidirectional_attention", False):
        odd.add("bidirectional_attention")
    if odd:
        raise ModelError(f"{name} has {', '.join(sorted(odd))} layers, which cannot be packed")
    if not getattr(lm, "_supports_attention_backend", False):
        raise ModelError(
            f"{name} does not take its attention from transformers' AttentionInterface, so its "
            "sequences cannot be packed"
        )
    lm.set_attn_implementation(PACKED_ATTENTION)
    if not uses_packed_attention(lm):
        raise ModelError(f"{name} did not accept {PACKED_ATTENTION!r} as its attention")


def _has_alibi(config: Any) -> bool:
    return bool(getattr(config, "alibi", False)) or config.model_type in _ALIBI_MODEL_TYPES


def sharing_obstacle(model: nn.Module) -> str | None:
    """Return why no two responses can share a prompt in ``model``, from what it says of itself.

    None where nothing speaks against it; ``models.can_share_prompts`` then tries it.
    """
    lm = causal_lm(model)
    name = type(lm).__name__
    config = lm.config.get_text_config()
    if _has_alibi(config):
        return f"{name} uses ALiBi"
    if getattr(lm, "_is_stateful", False):
        return f"{name} has recurrent layers"
    if getattr(config, "num_kv_shared_layers", None):
        return f"{name} has layers that use the keys and values of earlier ones"
    if "position_ids" not in inspect.signature(type(lm).forward).parameters:
        return f"{name} takes no positions"
    if not uses_packed_attention(lm):
        return f"{name} has no packed attention"
    return None


def uses_packed_attention(model: nn.Module) -> bool:
    """Return whether ``model``'s forward passes are packed ones."""
    config = causal_lm(model).config.get_text_config()
    return config._attn_implementation == PACKED_ATTENTION


def uses_padded_rows(model: nn.Module) -> bool:
    """Return whether ``model`` was found unfit for packing and takes padded rows instead."""
    return getattr(causal_lm(model), "_prefalign_padded", False)


@contextmanager
def generation_attention(model: nn.Module) -> Iterator[None]:
    """Use transformers' own attention inside the block: for generation and padded batches.

    SDPA, or the eager form for models that cap their attention scores or do not support SDPA. What
    was set before is set again afterwards.
    """
    lm = causal_lm(model)
    before = lm.config._attn_implementation
    softcap = getattr(lm.config.get_text_config(), "attn_logit_softcapping", None)
    eager = softcap is not None or not getattr(lm, "_supports_sdpa", False)
    lm.set_attn_implementation("eager" if eager else "sdpa")
    try:
        yield
    finally:
        lm.set_attn_implementation(before)
