"""Access to a causal language model: its head, its hidden states, its scores.

A model's own forward pass ends in ``[T, V]`` logits. Nothing here makes them: hidden states after
the final norm are taken at the rows that have a target, and the head's weight goes to the fused
log-prob op, with whatever the architecture puts between the head and its logits (``Head``).
``verify_head`` compares the two once, at start.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._head import Head, head_arguments, read_head, refuse_head_adapter, with_head
from .attention import (
    causal_lm,
    generation_attention,
    packed_inputs,
    padded_inputs,
    sharing_obstacle,
    unwrap,
    uses_packed_attention,
    uses_padded_rows,
)
from .attention_backends import take_rows
from .errors import ModelError
from .kernels.linear_token_logps import linear_token_logps
from .kernels.sequence_logps import sequence_logps
from .loading import check_finite, first_line, load_model, load_tokenizer
from .packing import Group, PackedBatch, pack
from .passes import pack_parts, split_by_tokens
from .references import Reference, modules_in_eval, reference_of, snapshot_reference

__all__ = [
    "Head",
    "Reference",
    "can_share_prompts",
    "check_finite",
    "device_of",
    "head_arguments",
    "load_model",
    "load_tokenizer",
    "prompts_are_shared",
    "read_head",
    "reference_of",
    "refuse_head_adapter",
    "response_token_logps",
    "score",
    "snapshot_reference",
    "sum_tokens",
    "target_hidden",
    "token_scores",
    "verify_head",
    "with_head",
]

logger = logging.getLogger(__name__)

# Hidden states and log-probs


def target_hidden(model: nn.Module, batch: PackedBatch, *, through_wrapper: bool = False) -> Tensor:
    """Return the hidden states, after the final norm, that predict ``batch``'s targets.

    Equivalent to ``model(batch, output_hidden_states=True).hidden_states[-1][target_rows]``.

    The parts of a batch that has them are run one after the other, the largest last. With gradients
    the activations of that one alone are kept: those of the others are computed again in backward,
    where each part's are freed before the next part's are made, under the same random numbers and
    autocast. So the model must be left as it is, adapters included, until backward is done.

    Args:
        model: The model, wrapped or not, with packed attention.
        batch: T tokens and N targets, on the model's device.
        through_wrapper: Run the outermost module's own forward pass, as gradients under DDP and
            FSDP need; the head then gets no rows and gives no logits. Otherwise the backbone runs
            alone, with PEFT's adapters in it; under autocast, open the context around the call.

    Returns:
        ``[N, D]`` in the model's dtype.

    Raises:
        ModelError: The model lacks packed attention, ``logits_to_keep`` or a backbone of its own.
    """
    if not batch.parts:
        return _target_hidden(model, batch, through_wrapper)
    # DDP prepares its reducer in every forward pass, for the one backward after it: it sees only
    # the last part's. The gradients of all parts arrive together, at the parameters.
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    last = max(range(len(batch.parts)), key=lambda i: batch.parts[i].num_tokens)
    hidden: dict[int, Tensor] = {}
    for i, part in enumerate(batch.parts):
        if i != last:
            run = partial(_hidden_from_ids, inner, part, through_wrapper)
            # The ids are an argument since random states are kept for the devices of arguments.
            hidden[i] = checkpoint(run, part.input_ids, use_reentrant=False)
    hidden[last] = _target_hidden(model, batch.parts[last], through_wrapper)
    return torch.cat([hidden[i] for i in range(len(batch.parts))])


def _hidden_from_ids(
    model: nn.Module, batch: PackedBatch, through_wrapper: bool, input_ids: Tensor
) -> Tensor:
    return _target_hidden(model, replace(batch, input_ids=input_ids), through_wrapper)


def _target_hidden(model: nn.Module, batch: PackedBatch, through_wrapper: bool) -> Tensor:
    """Return the hidden states at the targets of a batch without parts."""
    lm = causal_lm(model)
    name = type(lm).__name__
    padded = uses_padded_rows(lm)
    if not padded and not uses_packed_attention(lm):
        raise ModelError(f"{name} has no packed attention: call use_packed_attention(model) first")
    if batch.shares_prompts and (obstacle := sharing_obstacle(lm)):
        raise ModelError(f"{obstacle}, so its prompts cannot be shared")
    rows = batch.target_rows
    if padded:
        inputs, places = padded_inputs(batch)
        rows = places[rows]
    else:
        inputs = packed_inputs(batch)
    if through_wrapper or _is_fsdp2(unwrap(model)):
        if not _accepts(lm, "logits_to_keep"):
            raise ModelError(f"{name}'s forward pass has no logits_to_keep argument")
        none = torch.empty(0, dtype=torch.int64, device=batch.input_ids.device)
        outputs = model(
            **inputs, logits_to_keep=none, output_hidden_states=_LAST_STATE, return_dict=True
        )
        hidden = outputs.hidden_states[-1]
    else:
        backbone = lm.base_model
        if backbone is lm:
            raise ModelError(f"{name} has no backbone apart from its head")
        hidden = backbone(**inputs, return_dict=True).last_hidden_state
    hidden = hidden.flatten(0, 1)
    # A shared prompt's last row is there once for each response.
    return take_rows(hidden, rows) if batch.shares_prompts else hidden.index_select(0, rows)


def _last_state_selector() -> bool | list[int]:
    """Return what asks for the last hidden state alone, where transformers can do that."""
    try:
        from transformers.utils.output_capturing import selected_hidden_states  # noqa: F401
    except ImportError:
        return True
    return [-1]


_LAST_STATE = _last_state_selector()


def _accepts(lm: nn.Module, argument: str) -> bool:
    # The class's forward: accelerate replaces the instance's by one without a signature.
    return argument in inspect.signature(type(lm).forward).parameters


def _is_fsdp2(model: nn.Module) -> bool:
    # A backbone that runs first on its own would become FSDP2's root.
    return any(base.__name__ == "FSDPModule" for base in type(model).__mro__)


def response_token_logps(
    model: nn.Module,
    batch: PackedBatch,
    *,
    through_wrapper: bool = False,
    temperature: float = 1.0,
    outputs: Sequence[str] = (),
) -> Any:
    """Return the log-prob of every target of ``batch``, float32 ``[N]``.

    Args:
        model: As for ``target_hidden``.
        batch: As for ``target_hidden``.
        through_wrapper: As for ``target_hidden``.
        temperature: Divides the logits.
        outputs: Extras of ``linear_token_logps``; with any, its named tuple is returned.
    """

    def logps(hidden: Tensor, head: Head) -> Any:
        return linear_token_logps(
            hidden,
            targets=batch.targets,
            temperature=temperature,
            outputs=outputs,
            **head_arguments(head, hidden),
        )

    hidden = target_hidden(model, batch, through_wrapper=through_wrapper)
    return with_head(model, hidden, logps)


def score(
    model: nn.Module,
    groups: Iterable[Group],
    *,
    max_tokens: int,
    share_prompts: bool = True,
    lookahead: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Iterator[list[float]]:
    """Yield each group's response log-probs, summed over tokens, in the order of the groups.

    Streams, as ``token_scores`` does, from which the sums are (``sum_tokens``).

    Args:
        model: As for ``target_hidden``.
        groups: G prompts with K responses each, K free to differ.
        max_tokens: Tokens in one forward pass. A longer group is divided between its responses; a
            longer response makes a pass of its own.
        share_prompts: Compute a prompt once for all its responses, where ``can_share_prompts``.
        lookahead: Groups held at a time: more pack more tightly.
        progress: Called with the number of groups that a pass has finished.

    Yields:
        One list of K floats for each group: float32 sums.
    """
    tokens = token_scores(
        model,
        groups,
        max_tokens=max_tokens,
        share_prompts=share_prompts,
        lookahead=lookahead,
        progress=progress,
    )
    while window := list(islice(tokens, lookahead)):
        yield from sum_tokens(window, device_of(model))


def token_scores(
    model: nn.Module,
    groups: Iterable[Group],
    *,
    max_tokens: int,
    share_prompts: bool = True,
    temperature: float = 1.0,
    lookahead: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Iterator[list[Tensor]]:
    """Yield each group's response log-probs, token by token, in the order of the groups.

    Streams: ``lookahead`` groups are read, packed into passes of at most ``max_tokens`` tokens, and
    scored without gradients in eval mode; nothing of that outlasts the passes.

    Args:
        model: As for ``target_hidden``.
        groups: As for ``score``.
        max_tokens: As for ``score``.
        share_prompts: As for ``score``.
        temperature: Divides the logits.
        lookahead: As for ``score``.
        progress: As for ``score``.

    Yields:
        K tensors for each group, on the CPU, each with a log-prob for every token of its response:
        float32 (float64 of a float64 model).
    """
    groups = iter(groups)
    while window := list(islice(groups, lookahead)):
        shared = share_prompts and any(len(group.response_ids) > 1 for group in window)
        shared = shared and prompts_are_shared(model)
        yield from _score_window(model, window, max_tokens, shared, temperature, progress)


@torch.no_grad()
def _score_window(
    model: nn.Module,
    groups: list[Group],
    max_tokens: int,
    shared: bool,
    temperature: float,
    progress: Callable[[int], None] | None,
) -> list[list[Tensor]]:
    lengths = [group.tokens_laid(share_prompts=shared) for group in groups]
    passes = split_by_tokens(lengths, max_tokens)
    scores: list[list[Tensor]] = [[] for _ in groups]
    with modules_in_eval(model):
        for indices in passes:
            chosen = [groups[i] for i in indices]
            batch = pack_parts(chosen, max_tokens, share_prompts=shared).to(device_of(model))
            logps = response_token_logps(model, batch, temperature=temperature)
            sizes = [len(ids) for group in chosen for ids in group.response_ids]
            responses = iter(logps.cpu().split(sizes))
            for i in indices:
                scores[i] = list(islice(responses, len(groups[i].response_ids)))
            if progress is not None:
                progress(len(indices))
    return scores


def sum_tokens(tokens: Sequence[Sequence[Tensor]], device: torch.device | str) -> list[list[float]]:
    """Return the sums of what ``token_scores`` yields: the one way from tokens to responses.

    The sums are ``sequence_logps``' on ``device``, as training's are, so that the same tokens give
    the same bits, whatever they are summed beside and wherever they were kept in between.

    Args:
        tokens: G groups of K responses of log-probs, on any device.
        device: Where the model is that they are to be compared with.
    """
    flat = [logps for group in tokens for logps in group]
    if not flat:
        return [[] for _ in tokens]
    ends = torch.tensor([0, *accumulate(map(len, flat))], dtype=torch.int32, device=device)
    sums = iter(sequence_logps(torch.cat(flat).to(device), cu_seqlens=ends).sums.tolist())
    return [list(islice(sums, len(group))) for group in tokens]


def device_of(model: nn.Module) -> torch.device:
    """Return the device that ``model``'s input goes to."""
    return causal_lm(model).get_input_embeddings().weight.device


@torch.no_grad()
def verify_head(model: nn.Module, *, atol: float | None = None, seed: int = 0) -> float:
    """Check, once at start, that the library reproduces ``model``'s own log-probs.

    Two short sequences of random tokens are scored packed and fused, then one at a time through the
    model's ordinary forward pass and attention. This catches a head that is misread, attention that
    crosses sequences and architectures that cannot be packed. It is the one place that makes logits
    (32 rows of them); windows longer than 16 tokens are beyond it.

    Args:
        model: The model, wrapped or not, with packed attention.
        atol: Largest difference allowed. By default ``8 * eps`` times the largest logit or
            log-prob, or 1, and a quarter of that in the mean: a logit carries a relative rounding
            of the computing dtype's eps (bfloat16 ``2**-7``, TF32 ``2**-10``), once from the hidden
            state and once from the model's own rounding of it; both paths carry it, and layers add
            to it.
        seed: Seed of the tokens.

    Returns:
        The largest difference found.

    Raises:
        ModelError: The difference is above the tolerance, or the model refuses packed input.
    """
    lm = causal_lm(model)
    name = type(lm).__name__
    head = read_head(model)
    device = head.weight.device
    vocab = min(head.weight.shape[0], lm.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (32,), generator=generator).tolist()
    groups = [Group(ids[:4], [ids[4:17]]), Group(ids[17:20], [ids[20:]])]
    batch = pack(groups).to(device)
    with modules_in_eval(model):
        try:
            fused = response_token_logps(model, batch)
            hidden = [target_hidden(model, batch, through_wrapper=way) for way in (True, False)]
        except TypeError as error:
            raise ModelError(f"{name} does not take packed input: {first_line(error)}") from error
        own, largest = [], 1.0
        with generation_attention(model):
            for group in groups:
                prompt, response = list(group.prompt_ids), list(group.response_ids[0])
                tokens = torch.tensor([prompt + response], device=device)
                logits = unwrap(model)(input_ids=tokens, use_cache=False).logits[
                    0, len(prompt) - 1 : -1
                ]
                logps = torch.log_softmax(logits.to(fused.dtype), dim=-1)
                own.append(logps.gather(1, tokens[0, len(prompt) :, None])[:, 0])
                largest = max(largest, logits.abs().max().item(), own[-1].abs().max().item())
    gaps = [(fused - torch.cat(own)).abs(), (hidden[0] - hidden[1]).abs().float()]
    limit = 8 * _epsilon(hidden[0]) * largest if atol is None else atol
    found = gaps[0].max().item()
    # Written so that NaN fails.
    if not (found <= limit and gaps[0].mean().item() <= (limit / 4 if atol is None else limit)):
        raise ModelError(
            f"{name}: packed, fused log-probs differ from the model's own by up to {found:.3g} "
            f"(allowed: {limit:.3g}), so its head or its attention is not understood"
        )
    if not gaps[1].max().item() <= limit:
        raise ModelError(
            f"{name}: hidden_states[-1] is not what its head receives (difference "
            f"{gaps[1].max().item():.3g})"
        )
    return found


# Whether prompts can be shared

_TRIED: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
_SAID: set[str] = set()


def can_share_prompts(model: nn.Module) -> str | None:
    """Return why ``model``'s responses cannot share their prompt, or None where they can.

    What the architecture says of itself decides first. Then, once for each model object, responses
    of random tokens are scored with their prompts shared and each on its own: the log-probs must
    agree to rounding. Windows longer than these 19 tokens are beyond that.

    Args:
        model: The model, wrapped or not, with packed attention.

    Raises:
        ModelError: The model takes no packed batch at all.
    """
    lm = causal_lm(model)
    if reason := sharing_obstacle(lm):
        return reason
    if hasattr(lm.get_input_embeddings().weight, "ds_id"):
        return f"{type(lm).__name__} was divided by ZeRO-3 before it could be tried"
    if lm not in _TRIED:
        _TRIED[lm] = _sharing_error(model)
    return _TRIED[lm]


def prompts_are_shared(model: nn.Module) -> bool:
    """Return whether ``model``'s prompts can be shared, and warn once where they cannot."""
    reason = can_share_prompts(model)
    if reason is not None and reason not in _SAID:
        _SAID.add(reason)
        logger.warning("%s: prompts are not shared, each response is computed with its own", reason)
    return reason is None


@torch.no_grad()
def _sharing_error(model: nn.Module) -> str | None:
    lm = causal_lm(model)
    embedding = lm.get_input_embeddings().weight
    vocab = min(embedding.shape[0], read_head(model).weight.shape[0])
    ids = torch.randint(vocab, (39,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = [
        Group(ids[:7], [ids[7:12], ids[12:24], ids[24:25]]),
        Group(ids[25:27], [ids[27:31], ids[31:]]),
    ]
    alone = [Group(g.prompt_ids, [response]) for g in groups for response in g.response_ids]

    def logps(batch: PackedBatch) -> Any:
        return response_token_logps(model, batch.to(embedding.device), outputs=["lse"])

    # Autocast computes in a dtype that the results do not show.
    with modules_in_eval(model), torch.autocast(embedding.device.type, enabled=False):
        shared = logps(pack(groups, share_prompts=True))
        separate = [logps(pack([group])) for group in alone]
        epsilon = _epsilon(target_hidden(model, pack(alone[:1]).to(embedding.device)))
    expected = torch.cat([x.logps for x in separate])
    lse = torch.cat([x.lse for x in separate])
    gaps = (shared.logps - expected).abs()
    # As in verify_head; these logits are the targets' and the log-sum-exp, which bounds the others.
    limit = 8 * epsilon * max(1.0, lse.abs().max().item(), (expected + lse).abs().max().item())
    if gaps.max().item() <= limit and gaps.mean().item() <= limit / 4:  # false for NaN
        return None
    return (
        f"{type(lm).__name__}: log-probs behind a shared prompt differ from those of separate "
        f"sequences by up to {gaps.max().item():.3g} (allowed: {limit:.3g})"
    )


def _epsilon(tensor: Tensor) -> float:
    """Return the relative rounding of a model that computes in ``tensor``'s dtype."""
    # Whatever the dtype, transformers computes norms and eager softmaxes in float32.
    epsilon = max(torch.finfo(tensor.dtype).eps, torch.finfo(torch.float32).eps)
    if tensor.dtype == torch.float32 and tensor.is_cuda:
        if torch.get_float32_matmul_precision() != "highest":
            return max(epsilon, 2.0**-10)
    return epsilon
