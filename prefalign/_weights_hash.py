"""What a model's log-probs depend on, as hashes (see ``logp_cache``)."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from .attention import causal_lm
from .errors import ModelError
from .models import device_of
from .references import Reference

_HASHING_THREADS = 4

# What a configuration holds besides what the model computes without dropout.
_NOT_COMPUTED = {
    "architectures", "chunk_size_feed_forward", "dtype", "id2label", "initializer_range",
    "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states", "problem_type",
    "return_dict", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_NOT_COMPUTED_ENDS = ("_token_id", "dropout", "_pdrop")
# Under which name PEFT's wrappers hold the module that they wrap.
_WRAPPED = ("base_layer", "original_module")


def tokens_hash(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> bytes:
    """Return a hash of a response's tokens behind a prompt's, each apart from the other."""
    parts = array("q", [len(prompt_ids), *prompt_ids, *response_ids])
    return hashlib.sha256(parts.tobytes()).digest()


def computing_dtype(model: nn.Module) -> dict[str, Any]:
    """Return what a forward pass computes in, here and now, besides the weights' own dtypes."""
    device = device_of(model)
    autocast = None
    if torch.is_autocast_enabled(device.type):
        autocast = str(torch.get_autocast_dtype(device.type))
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return {"autocast": autocast, "tf32": tf32}


@torch.no_grad()
def weights_hash(model: nn.Module | Reference) -> str:
    """Return a hash of all that a model computes with, as it stands: SHA-256, in hexadecimal.

    That is its parameters and buffers, by name, shape, dtype and bytes, and its configuration, but
    for what changes no log-prob. Of a PEFT model it is the base model's weights under their own
    names, so that a model with its adapter off has the hash that it has without any, and those of
    the active adapters and their scaling, whatever the adapters are called.

    Reads every weight once.

    Raises:
        ModelError: Weights are sharded, offloaded, or have an adapter merged into them.
    """
    if isinstance(model, Reference):
        with model.use() as used:
            return weights_hash(used)
    lm = causal_lm(model)
    tensors = dict(_taking_part(lm))
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        digests = pool.map(_digest, tensors.values())
        weights = [
            (name, str(tensor.dtype), list(tensor.shape), digest)
            for (name, tensor), digest in zip(tensors.items(), digests, strict=True)
        ]
    config = {
        name: value
        for name, value in lm.config.get_text_config().to_dict().items()
        if name not in _NOT_COMPUTED
        and not name.startswith("_")
        and not name.endswith(_NOT_COMPUTED_ENDS)
    }
    scalings = {
        place: [layer.scaling.get(name) for name in _active_adapters(layer)]
        for place, layer in _adapted(lm).items()
        if _active_adapters(layer) and hasattr(layer, "scaling")
    }
    parts = [type(lm).__name__, config, scalings, sorted(weights)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def _taking_part(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a forward pass uses, under the names that they have without PEFT."""
    adapted = _adapted(lm)
    # The state alone has what a quantised weight keeps beside it; the buffers, what is not saved.
    for name, tensor in {**lm.state_dict(), **dict(lm.named_buffers())}.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device.type == "meta" or hasattr(tensor, "to_local"):
            raise ModelError(
                f"the weight {name} is sharded or offloaded: log-probs are kept for models that "
                "are whole in this process's memory"
            )
        place = _place(name.split("."), adapted)
        if place is not None:
            yield place, tensor


def _adapted(lm: nn.Module) -> dict[str, Any]:
    """Return the modules that PEFT has put around others, by name."""
    found: dict[str, Any] = {}
    for name, module in lm.named_modules():
        if hasattr(module, "disable_adapters") and any(x in module._modules for x in _WRAPPED):
            if getattr(module, "merged", False):
                raise ModelError(
                    f"{name} has an adapter merged into its weights: call unmerge_adapter() first"
                )
            found[name] = module
    return found


def _active_adapters(layer: Any) -> list[str]:
    return [] if layer.disable_adapters else list(layer.active_adapters)


def _place(parts: list[str], adapted: dict[str, Any]) -> str | None:
    """Return a tensor's name without what PEFT adds, or None where it takes no part."""
    kept: list[str] = []
    for i, part in enumerate(parts):
        layer = adapted.get(".".join(parts[:i])) if i else None
        if layer is not None and part in _WRAPPED:
            continue
        kept.append(part)
        if layer is not None and len(parts) > i + 1 and part in layer.adapter_layer_names:
            # lora_A.<adapter>.weight
            active = _active_adapters(layer)
            if parts[i + 1] not in active:
                return None
            return ".".join([*kept, str(active.index(parts[i + 1])), *parts[i + 2 :]])
    return ".".join(kept)
