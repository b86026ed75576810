"""The pieces of the chunked head: GEMMs in the right precision, logits, tiles.

Everything here works on one tile: rows of hidden states against a slice of the vocabulary.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ._common import compute_dtype
from ._low_rank import Adapter, add_product


class Head(NamedTuple):
    """The scalars between a GEMM's result x and a logit: cap·tanh(scale·x / cap) / temperature."""

    scale: float
    softcap: float | None
    temperature: float


class Reference(NamedTuple):
    """The second model of the triple; ``weight`` is None when the policy's serves both."""

    hidden: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    extrapolation: float


_precision_lock = threading.Lock()
_precision_users = 0
_precision_before = ""


@contextlib.contextmanager
def gemm_precision(tensor: torch.Tensor) -> Iterator[None]:
    """Let float32 GEMMs of bfloat16-valued inputs on a CPU use oneDNN's bfloat16 products.

    2 to 2.4 times faster than the float32 GEMM where it was measured. The switch is global, hence
    counted: the first user sets it, the last one restores it. Without the switch (an older torch,
    a build without oneDNN) the GEMM is plain float32: slower, and as accurate.
    """
    global _precision_users, _precision_before
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    if tensor.dtype != torch.bfloat16 or tensor.is_cuda or not hasattr(switch, "fp32_precision"):
        yield
        return
    with _precision_lock:
        if _precision_users == 0:
            _precision_before = switch.fp32_precision
            switch.fp32_precision = "bf16"
        _precision_users += 1
    try:
        yield
    finally:
        with _precision_lock:
            _precision_users -= 1
            if _precision_users == 0:
                switch.fp32_precision = _precision_before


# torch.mm's float32 GEMM is MKL's, which on an AMD Zen 5 runs at 220 GFLOP/s where oneDNN's runs at
# 480. This op is the way to oneDNN's; it takes any strides. It adds D products in one row: errors
# 1.5 (D 896) to 2.1 (D 2048) times MKL's, hence ``target_logits``.
_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# Rounded probabilities average out over a large vocabulary; a small one has no time to save.
NARROW_VOCAB = 4096
_onednn_has_bf16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)


def dot(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x @ w.T``."""
    if _onednn_linear is None or x.dtype != torch.float32 or x.is_cuda:
        return torch.mm(x, w.T)
    return _onednn_linear(x, w, None, "none", [], "")


def gradient_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype in which GEMMs that only feed a gradient take their operands."""
    if (
        weight.dtype == torch.bfloat16
        and weight.shape[0] >= NARROW_VOCAB
        and (weight.is_cuda or _onednn_has_bf16())
    ):
        return torch.bfloat16
    return compute_dtype(weight)


def gradient_dot(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x @ w.T`` in ``w``'s dtype, to be summed in float32."""
    return torch.mm(x.to(w.dtype), w.T) if w.dtype == torch.bfloat16 else dot(x, w)


def accumulate(sums: torch.Tensor, part: torch.Tensor, alpha: float = 1.0) -> None:
    """Add ``part``, in blocks where it must be cast, since the cast makes a temporary."""
    step = len(sums) if part.dtype == sums.dtype else 256
    for lo in range(0, len(sums), step):
        sums[lo : lo + step].add_(part[lo : lo + step], alpha=alpha)


class Tiles:
    """Preallocated [rows, tile] buffers, handed out as contiguous [n, v] views."""

    def __init__(self, like: torch.Tensor, dtype: torch.dtype, rows: int, tile: int, count: int):
        self.flat = [like.new_empty(rows * tile, dtype=dtype) for _ in range(count)]

    def view(self, which: int, n: int, v: int) -> torch.Tensor:
        return self.flat[which][: n * v].view(n, v)


class Slices:
    """Slices of a weight in the computing dtype: a view, or a copy in one reused buffer."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, tile: int):
        self.weight = weight
        same = weight.dtype == dtype
        self.buffer = None if same else weight.new_empty(tile, weight.shape[1], dtype=dtype)

    def __call__(self, start: int, end: int) -> torch.Tensor:
        part = self.weight[start:end]
        return part if self.buffer is None else self.buffer[: end - start].copy_(part)


def logits(h, w, bias, head: Head, low=None, up=None) -> torch.Tensor:
    out = dot(h, w)
    if low is not None:
        add_product(out, low, up)
    return cap(out if bias is None else out.add_(bias), head)


def cap(out: torch.Tensor, head: Head) -> torch.Tensor:
    if head.softcap is None:
        scale = head.scale / head.temperature
        return out if scale == 1.0 else out.mul_(scale)
    out.mul_(head.scale / head.softcap).tanh_()
    return out.mul_(head.softcap / head.temperature)


def target_logits(h, weight, y, bias, head: Head, adapter: Adapter | None = None) -> torch.Tensor:
    """The logits of each row's own target, [n], to put in the place of the GEMM's.

    The target's error goes straight into the log-prob, that of the others is averaged. A GEMM adds
    D products one after another, ``sum`` adds them pairwise.
    """
    y = y.clamp(0, weight.shape[0] - 1)
    u = weight[y].to(h.dtype).mul_(h).sum(1)
    if adapter is not None:
        u += adapter.up[y].to(h.dtype).mul_(adapter.low).sum(1)
    return cap(u if bias is None else u.add_(bias[y]), head)


def cap_slope(z: torch.Tensor, head: Head, out: torch.Tensor) -> torch.Tensor:
    """dz/du up to the factor 1 / temperature: 1 - tanh², from the logit itself."""
    t = head.temperature / head.softcap
    return torch.mul(z, z, out=out).mul_(-t * t).add_(1.0)


def put(tile: torch.Tensor, local, inside, values) -> None:
    """Write ``values`` ([n] or a number) at the rows' targets, where those lie inside the tile."""
    kept = tile.gather(1, local)[:, 0]
    tile.scatter_(1, local, torch.where(inside, values, kept).to(tile.dtype)[:, None])


def bias_part(bias: torch.Tensor | None, lo: int, hi: int) -> torch.Tensor | None:
    return None if bias is None else bias[lo:hi]


def rows_with_targets(targets: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
    """Indices of the rows to compute; None means all, in place, with no gather.

    Dropping rows needs to know how many are left, which on a GPU is a host sync: there every row
    is computed and the ignored ones are masked at the end.
    """
    if targets.is_cuda:
        return None
    keep = targets != ignore_index
    return None if keep.all() else keep.nonzero()[:, 0]
