"""A LoRA adapter on the linear head, whose weight plus ``b @ a`` is never formed.

    u = logit_scale·(hidden @ weight.T + scaling·(hidden @ a.T) @ b.T + bias)

hidden [N, D], a [r, D], b [V, r]. ``low`` [N, r] = scaling·hidden @ a.T is made here, by ordinary
autograd; the op of ``linear_token_logps`` adds low @ b.T to each tile of logits, 2·N·r·V FLOP.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

from ._common import FLOATS, check_number, check_tensor, compute_dtype
from ._low_rank import Adapter


class HeadAdapter(NamedTuple):
    """A low-rank adapter of a linear head [V, D]: what PEFT's LoRA holds for it.

    Attributes:
        a: [r, D], float16, bfloat16 or float32 (float64 with a float64 head), often wider than the
            head's weight; PEFT's ``lora_A.weight``.
        b: [V, r], the dtype of ``a``; PEFT's ``lora_B.weight``.
        scaling: factor on their product; default 1.

    Source: LoRA (Hu et al., 2021), section 4.1.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float = 1.0


def check_adapter(adapter: HeadAdapter, a, b, hidden, weight) -> HeadAdapter:
    """Check ``adapter`` and return it with ``a`` and ``b``, which autocast may have cast."""
    if not isinstance(adapter, HeadAdapter):
        raise TypeError(f"adapter: expected a HeadAdapter or None, got {type(adapter).__name__}")
    V, D = weight.shape
    dtypes = FLOATS if hidden.dtype == torch.float64 else FLOATS[:3]
    check_tensor("adapter.a", a, dtypes=dtypes, ndim=2, like=("hidden", hidden))
    if a.shape[0] < 1 or a.shape[1] != D:
        raise ValueError(
            f"adapter.a: expected shape [r, {D}] with r above 0, as weight {(V, D)} has it, "
            f"got {tuple(a.shape)}"
        )
    check_tensor("adapter.b", b, dtypes=(a.dtype,), shape=(V, a.shape[0]), like=("hidden", hidden))
    return HeadAdapter(a, b, check_number("adapter.scaling", adapter.scaling))


def project(
    hidden: torch.Tensor, adapter: HeadAdapter, targets: torch.Tensor, ignore_index: int
) -> Adapter:
    """Return scaling·hidden @ a.T [N, r] in float32 (float64), and b, as the op takes them.

    Rows without a target are 0: they may hold NaN, which 0 times would carry into a's gradient.
    """
    dtype = compute_dtype(hidden)
    kind = hidden.device.type
    wide = contextlib.nullcontext()
    if kind != "meta" and torch.is_autocast_enabled(kind):
        wide = torch.autocast(kind, enabled=False)
    with wide:
        rows = hidden.masked_fill((targets == ignore_index)[:, None], 0).to(dtype)
        return Adapter(torch.mm(rows, adapter.a.to(dtype).T) * adapter.scaling, adapter.b)
