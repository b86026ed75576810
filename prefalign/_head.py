"""A causal language model's output head, as the fused ops take it (see ``models``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from .attention import causal_lm
from .errors import ModelError
from .kernels.head_adapter import HeadAdapter

# What configs call the numbers between the head and the logits. Cohere, FalconH1 and Muse multiply;
# Granite divides; MiniCPM3 divides the hidden states, which is the same.
_LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_LOGIT_DIVISORS = ("logits_scaling",)
# Model types that multiply where the others divide.
_DIVISOR_IS_FACTOR = {"hyperclovax"}

T = TypeVar("T")


@dataclass(frozen=True)
class Head:
    """What turns a hidden state h into logits: ``cap(logit_scale * (weight h + bias))``.

    With an adapter, its ``scaling * b (a h)`` is added to the weight's product.

    Attributes:
        weight: ``[V, D]``, the model's own parameter: gradients flow to it.
        bias: ``[V]`` or None.
        logit_scale: The factor before the cap.
        softcap: z becomes ``softcap * tanh(z / softcap)``, or None.
        adapter: PEFT's LoRA on the head, its own parameters, or None.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    adapter: HeadAdapter | None = None


def read_head(model: nn.Module) -> Head:
    """Return ``model``'s output head; with FSDP2, call it after the forward pass.

    FSDP2's shards are gathered. ZeRO-3's are not: the parameters are whole in ``with_head`` alone.

    Raises:
        ModelError: The head is missing, quantised, sharded or not on a device, or has an adapter
            other than one plain LoRA.
    """
    lm = causal_lm(model)
    name = type(lm).__name__
    layer, lora = _head_layers(lm)
    if not (isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward):
        raise ModelError(
            f"{name}'s output head is a {type(layer).__module__}.{type(layer).__name__}, expected "
            "a plain torch.nn.Linear, or PEFT's LoRA on one: leave it out of quantisation"
        )
    weight, bias = _whole(layer.weight), None if layer.bias is None else _whole(layer.bias)
    if weight.device.type == "meta" or not (_is_whole(weight) or hasattr(weight, "ds_id")):
        raise ModelError(
            f"{name}'s output head is not in this process's memory (offloaded, or sharded by "
            "FSDP1); use FSDP2 or ZeRO-3"
        )
    adapter = None
    if lora is not None:
        a, b, scaling = lora
        adapter = HeadAdapter(_whole(a.weight), _whole(b.weight), scaling)
    config = lm.config.get_text_config()
    scale = 1.0
    for field in _LOGIT_FACTORS:
        if (factor := getattr(config, field, None)) is not None:
            scale *= factor
    for field in _LOGIT_DIVISORS:
        if (divisor := getattr(config, field, None)) is not None:
            scale *= divisor if config.model_type in _DIVISOR_IS_FACTOR else 1 / divisor
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(weight, bias, float(scale), None if not softcap else float(softcap), adapter)


def with_head(model: nn.Module, hidden: Tensor, use: Callable[[Tensor, Head], T]) -> T:
    """Return ``use(hidden, read_head(model))``, with the head in memory whatever holds its shards.

    FSDP2's is whole, or gathered by ``read_head``. DeepSpeed's ZeRO-3 gathers a layer's weights for
    the layer's own forward and backward passes: there ``use`` runs as the forward pass of the head.

    Args:
        model: The model, wrapped or not, after its forward pass.
        hidden: Hidden states, ``[N, D]``.
        use: Called once; returns a tensor or a tuple of them.
    """

    def run(hidden: Tensor) -> T:
        return use(hidden, read_head(model))

    layer, lora = _head_layers(causal_lm(model))
    for each in (layer, *(() if lora is None else lora[:2])):
        if hasattr(getattr(each, "weight", None), "ds_id"):
            run = partial(_as_forward_pass, each, run)
    return run(hidden)


def _as_forward_pass(layer: nn.Module, run: Callable[[Tensor], T], hidden: Tensor) -> T:
    """Call ``layer``, hooks and all, with ``run`` in the place of its forward pass."""
    layer.forward = run
    try:
        return layer(hidden)
    finally:
        del layer.forward


def head_arguments(head: Head, hidden: Tensor) -> dict[str, Any]:
    """Return ``head`` as keyword arguments of the fused ops, the weight in ``hidden``'s dtype.

    ``adapter`` is among them where there is one: ``linear_token_logps`` takes it.

    Raises:
        ModelError: ZeRO-3 has divided the head, and this is not within ``with_head``.
    """
    if not _is_whole(head.weight):
        raise ModelError("the output head is divided by ZeRO-3, expected it within with_head")
    adapter = {} if head.adapter is None else {"adapter": head.adapter}
    return adapter | {
        "weight": head.weight.to(hidden.dtype),
        "bias": head.bias,
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
    }


def refuse_head_adapter(model: nn.Module, user: str) -> None:
    """Refuse a model whose head has LoRA, active or not, on behalf of ``user``, which takes none.

    Raises:
        ModelError: It has.
    """
    lm = causal_lm(model)
    if hasattr(_saved_module(lm.get_output_embeddings()), "lora_A"):
        raise ModelError(
            f"{type(lm).__name__}'s output head has a LoRA adapter, which {user} cannot use: leave "
            "it out of LoRA's target modules"
        )


def _head_layers(lm: Any) -> tuple[Any, tuple[Any, Any, float] | None]:
    """Return the head's own layer, and of PEFT's active LoRA on it both layers and the scaling."""
    name = type(lm).__name__
    layer = _saved_module(getattr(lm, "get_output_embeddings", lambda: None)())
    if layer is None:
        raise ModelError(f"{name} has no output head")
    try:
        from peft.tuners.lora.layer import Linear as LoraLinear
    except ImportError:
        return layer, None
    if _own_class(layer) is not LoraLinear:
        return layer, None
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its own forward pass does
    active = [x for x in layer.active_adapters if x in layer.lora_A]
    if layer.disable_adapters or layer.merged or not active:
        return layer.base_layer, None
    refused = {
        f"{len(active)} active adapters ({', '.join(active)})": len(active) > 1,
        "a variant of LoRA, such as DoRA": any(x in layer.lora_variant for x in active),
        "a bias in its LoRA": any(layer.lora_bias.get(x) for x in active),
        "dropout in its LoRA while training": any(
            layer.lora_dropout[x].training and getattr(layer.lora_dropout[x], "p", 0) > 0
            for x in active
        ),
    }
    for what, there in refused.items():
        if there:
            raise ModelError(
                f"{name}'s output head has {what}, expected one plain LoRA adapter without "
                "dropout: change that, or leave the head out of LoRA's target modules"
            )
    factors = layer.lora_A[active[0]], layer.lora_B[active[0]]
    return layer.base_layer, (*factors, float(layer.scaling[active[0]]))


def _own_class(layer: nn.Module) -> type:
    """Return the class of a layer, beneath the one that FSDP2 puts in its place."""
    classes = type(layer).__mro__
    return classes[2] if classes[1].__name__ == "FSDPModule" else classes[0]


def _saved_module(layer: Any) -> Any:
    """Return the module behind PEFT's ``modules_to_save``, as its active adapter has it."""
    copies = getattr(layer, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return layer
    if layer.disable_adapters or not layer.active_adapters:
        return layer.original_module
    return copies[layer.active_adapters[0]]


def _is_whole(weight: Tensor) -> bool:
    return weight.ndim == 2 and weight.numel() > 0


def _whole(weight: Tensor) -> Tensor:
    """Return a sharded weight whole; its gradient is averaged over the processes, as FSDP's are."""
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(weight, DTensor):
        return weight
    mesh = weight.device_mesh
    whole = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole
