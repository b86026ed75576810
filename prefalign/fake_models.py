"""Models without numbers: built from a configuration alone, in no time and no memory.

Their tensors are torch's fake ones, on the CPU whatever device is planned for, so that nothing
depends on what this machine has. What the device would do otherwise is put in here: its packed
attention, and 4-bit weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable
from transformers import AutoConfig, AutoModelForCausalLM

from .attention import causal_lm, use_packed_attention
from .attention_backends import PLANNED, PackedCall, attend_merged, exact_backend
from .config import ModelSettings
from .errors import ModelError
from .loading import adapter_config, add_adapter, checked_path, first_line
from .memory_trace import ATTENTION, labelled
from .packing import PackedBatch

# Bytes a weight in NF4 with twice-quantised constants: 4 bits, and 8.13 bits for 64 weights.
_FOUR_BIT = 0.5 + (8 + 32 / 256) / 64 / 8


class FakeModel:
    """A model and the mode under which its tensors live; use it inside ``active``.

    Args:
        model: Its tensors are fake.
        mode: Theirs.
    """

    def __init__(self, model: nn.Module, mode: FakeTensorMode):
        self.model = model
        self.mode = mode

    @contextmanager
    def active(self, device: str) -> Iterator[FakeModel]:
        """Run under the model's mode, with the attention of a ``cpu`` or a ``cuda`` device."""
        token = PLANNED.set(_on_cpu if device == "cpu" else _on_gpu)
        try:
            with self.mode:
                yield self
        finally:
            PLANNED.reset(token)

    def batch(self, batch: PackedBatch) -> PackedBatch:
        """Return a batch of fake tensors; what it says on the host stays."""
        return batch.map(self.mode.from_tensor)


def fake_from_config(settings: ModelSettings) -> FakeModel:
    """Build a model from its configuration: no weights are read.

    Raises:
        ModelError: There is no such configuration, it is no causal language model's, or PEFT is
            missing.
    """
    name, adapter = checked_path(settings.path), settings.lora
    if saved := adapter_config(name):
        name, adapter = checked_path(str(saved.base_model_name_or_path)), saved
        saved.inference_mode = False  # it is trained on
    try:
        config = AutoConfig.from_pretrained(name)
        dtype = config.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    except Exception as error:
        # huggingface_hub has errors of its own, without a common base.
        raise ModelError(f"{name}: cannot plan for this model: {first_line(error)}") from error
    with torch.device("meta"):
        if settings.load_in_4bit:
            _quantise(model)
        model = add_adapter(model.eval(), adapter, name)
    use_packed_attention(model)
    mode = FakeTensorMode()
    _put_on_cpu(model, mode)
    return FakeModel(model, mode)


def _put_on_cpu(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace meta tensors by fake ones on the CPU; PEFT adds adapters to the former alone."""
    made: dict[int, Any] = {}  # tied weights stay tied
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, old in tensors.items():
                    if old is not None and id(old) not in made:
                        new: Tensor = torch.empty(old.shape, dtype=old.dtype)
                        if isinstance(old, nn.Parameter):
                            new = nn.Parameter(new, requires_grad=old.requires_grad)
                        made[id(old)] = new
                    if old is not None:
                        tensors[name] = made[id(old)]


# What a device does otherwise


class _FlashLike(torch.autograd.Function):
    """What packed flash attention keeps for backward, and holds during it.

    On a GPU its backward sums the queries' gradient in float32.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sums: bool) -> Tensor:
        ctx.sums = sums
        with labelled(ATTENTION):
            out = query.new_empty((*query.shape[:2], value.shape[2]))
            lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        query, key, value, _, lse = ctx.saved_tensors
        with labelled(ATTENTION):
            sums = [torch.empty_like(query, dtype=torch.float32), lse.clone()] if ctx.sums else []
            grads = tuple(torch.empty_like(x) for x in (query, key, value))
        del sums
        return *grads, None


def _on_gpu(call: PackedCall) -> Tensor:
    with labelled(ATTENTION):
        gathered = [x.contiguous() for x in call.gathered()]
        return _FlashLike.apply(call.query.contiguous(), *gathered, True)


def _on_cpu(call: PackedCall) -> Tensor:
    backend = exact_backend(call)
    if backend is attend_merged:  # its many small calls hold nothing that lasts
        return _FlashLike.apply(call.query, call.key, call.value, False)
    with labelled(ATTENTION):
        return backend(call)


class _FourBitLinear(nn.Linear):
    """A linear layer whose weight takes as many bytes as bitsandbytes' NF4 and is used as such."""

    compute_dtype: torch.dtype

    @classmethod
    def of(cls, layer: nn.Linear) -> _FourBitLinear:
        new = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        new.bias = layer.bias
        size = int(layer.weight.numel() * _FOUR_BIT)
        new.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
        new.compute_dtype = layer.weight.dtype
        return new

    def forward(self, input: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        return _DequantisedProduct.apply(input.to(self.compute_dtype), self.bias, shape)


class _DequantisedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return nn.functional.linear(x, x.new_empty(shape), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        return grad @ grad.new_empty(ctx.shape), None, None


def _quantise(model: nn.Module) -> None:
    head = causal_lm(model).get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer is not head:
                setattr(parent, name, _FourBitLinear.of(layer))
