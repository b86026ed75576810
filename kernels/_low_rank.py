"""What the linear head's chunked and Triton paths share about a low-rank adapter's two factors.

The op gets ``low`` [N, r] = scaling·hidden @ a.T and ``up`` [V, r] = b, and adds low @ up.T to its
logits tile by tile. ``low`` is float32 (float64), ``up`` often is: a GEMM that takes bfloat16
operands would round them, and with them the log-probs. So a factor is cut into bfloat16 parts whose
sum is the factor, to 8 bits a part, and parts are multiplied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._common import compute_dtype


class Adapter(NamedTuple):
    """The adapter as the op sees it: ``low`` [N, r] of the rows, ``up`` [V, r]."""

    low: torch.Tensor
    up: torch.Tensor

    def at(self, index) -> Adapter:
        """Return the adapter of the rows at ``index``."""
        return Adapter(self.low[index], self.up)


def parts(x: torch.Tensor, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    """Return at most ``count`` tensors of ``dtype`` that add up to ``x``, largest first."""
    if x.dtype == dtype or dtype.itemsize > 2:
        return [x.to(dtype)]
    rest, found = x.float(), []
    for _ in range(count):
        found.append(rest.to(dtype))
        rest = rest - found[-1].float()
    return found


class Factors:
    """Both factors for float32 GEMMs that may round their operands to bfloat16, as a CPU's do."""

    def __init__(self, adapter: Adapter, hidden: torch.Tensor):
        self.adapter = adapter
        self.dtype = compute_dtype(hidden)
        self.cut = hidden.dtype == torch.bfloat16 and not hidden.is_cuda

    def _parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = parts(x, torch.bfloat16, 3) if self.cut else [x]
        return [part.to(self.dtype) for part in found]

    def rows(self, index) -> list[torch.Tensor]:
        """Return the parts of ``low`` at ``index``."""
        return self._parts(self.adapter.low[index])

    def entries(self, lo: int, hi: int) -> list[torch.Tensor]:
        """Return the parts of ``up`` from ``lo`` to ``hi``."""
        return self._parts(self.adapter.up[lo:hi])


def add_product(out: torch.Tensor, low: list[torch.Tensor], up: list[torch.Tensor]) -> None:
    """Add low @ up.T to ``out``, in float32's precision: 3 x 3 parts make 6 products."""
    pairs = [(x, y) for i, x in enumerate(low) for j, y in enumerate(up) if i + j < len(low)]
    left, right = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in zip(*pairs, strict=True))
    out.addmm_(left, right.T)


def times(x: torch.Tensor, factor: list[torch.Tensor]) -> torch.Tensor:
    """Return ``x @ factor``; of the two, only ``x`` may be rounded. It feeds a gradient."""
    if len(factor) == 1:
        return torch.mm(x, factor[0])
    return fold(torch.mm(x, torch.cat(factor, 1)), len(factor))


def fold(product: torch.Tensor, count: int) -> torch.Tensor:
    """Add up the parts [n, count·r] of a product: [n, r]."""
    return product.view(len(product), count, -1).sum(1)
