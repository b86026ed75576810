"""The KL of two heads' vocabularies in plain torch, tile by tile, and its gradients.

For a chunk of rows and a tile of vocabulary entries, ``over`` the distribution that the mean is
taken in and ``under`` the other::

    z, z_ref = f(hidden @ weight.T + bias), the same of the reference        two GEMMs
    m', s'   = each one's online log-sum-exp;  r = exp(m - m')
    c'       = r·c + sum_v exp(z_over - m'_over)·(z_over - z_under)
    at the end: gap = lse_under - lse_over,  KL = c / s_over + gap

The gap is taken from the maxima and from the ratio of the sums, so that it is exactly 0 where both
are equal and keeps its digits nearby. Backward makes both logits again.
"""

from __future__ import annotations

import torch

from ._common import compute_dtype
from ._head_math import (
    Head,
    Slices,
    Tiles,
    accumulate,
    bias_part,
    cap_slope,
    gemm_precision,
    gradient_dot,
    gradient_dtype,
    logits,
)
from ._linear_chunked_backward import _row_chunks, arrange_backward
from ._online import LOWEST
from .plan import default_workspace, head_tiles

_LEAST = 16  # vocabulary entries


def plan_tiles(N: int, V: int, D: int, like: torch.Tensor, budget: int) -> tuple[int, int, int]:
    """Return (rows, vocabulary entries, bytes left) of a tile in ``budget`` bytes (0: the default).

    Held at a time: three [rows, tile] of logits, one more in bfloat16; three [rows, D]; a
    [tile, D] of the weight's gradient, and for 16-bit inputs its float32 sum and two slices.
    """
    budget = budget or default_workspace(like.device)
    half = like.dtype.itemsize == 2
    rows, tile = head_tiles(N, V, D, like.dtype, like.device, budget)
    sums = 4 * N * D if half and 4 * N * D <= budget // 2 else 0  # of hidden's gradient

    def held() -> int:
        wide = 8 if like.dtype == torch.float64 else 4
        logits, heads = (3 + 0.5 * half) * rows * tile, (1 + 3 * half) * tile * D
        return int(wide * (logits + 3 * rows * D + heads))

    # Halve the side that takes more bytes: GEMMs want both to be wide.
    while held() > budget - sums and (rows > 1 or tile > _LEAST):
        if tile > _LEAST and (rows == 1 or (1 + 3 * half) * tile >= 3 * rows):
            tile = max(_LEAST, tile // 2)
        else:
            rows = (rows + 1) // 2
    return rows, tile, budget - held()


def _kept(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return the rows to compute, None for all: on a GPU their number would be a host sync."""
    if mask is None or mask.is_cuda or mask.all():
        return None
    return mask.nonzero()[:, 0]


class _Sums:
    """A running log-sum-exp of rows."""

    def __init__(self, like: torch.Tensor, n: int, dtype: torch.dtype):
        self.m = like.new_full((n,), LOWEST, dtype=dtype)
        self.s = like.new_zeros(n, dtype=dtype)

    def update(self, z: torch.Tensor) -> torch.Tensor:
        """Take in a tile, which becomes exp(z - m); return what sums so far shrink by."""
        m = torch.maximum(self.m, z.amax(1))
        r = (self.m - m).exp_()
        z.sub_(m[:, None]).exp_()
        self.s.mul_(r).add_(z.sum(1))
        self.m = m
        return r


def _gap(norm: torch.Tensor) -> torch.Tensor:
    """Return lse - lse_ref from (m, s, m_ref, s_ref) [4, n]."""
    m, s, ref_m, ref_s = norm
    return (m - ref_m) + (s / ref_s).log()


class _Pair:
    """Both heads, slice by slice; one slice serves both where they share the weight."""

    def __init__(self, weight, ref_weight, bias, ref_bias, head, dtype, tile):
        self.biases, self.head = (bias, ref_bias), head
        self.slices = Slices(weight, dtype, tile)
        self.ref_slices = None if ref_weight is None else Slices(ref_weight, dtype, tile)
        # Only a bias makes a logit of -inf (a padded vocabulary).
        self.biased = bias is not None or ref_bias is not None

    def at(self, lo: int, hi: int) -> None:
        """Move to a slice of the vocabulary."""
        self.w = self.slices(lo, hi)
        self.ref_w = self.w if self.ref_slices is None else self.ref_slices(lo, hi)
        self.parts = [bias_part(bias, lo, hi) for bias in self.biases]

    def logits(self, h, ref_h) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both tiles of logits."""
        return (
            logits(h, self.w, self.parts[0], self.head),
            logits(ref_h, self.ref_w, self.parts[1], self.head),
        )


def forward(
    hidden, ref_hidden, weight, ref_weight, bias, ref_bias, mask, head: Head, forward_kl: bool,
    budget: int,
):  # fmt: skip
    """Return the KLs [N], and (m, s, m_ref, s_ref) [4, N] to make probabilities from again."""
    N, D = hidden.shape
    V = weight.shape[0]
    dtype = compute_dtype(hidden)
    kl = hidden.new_zeros(N, dtype=dtype)
    norm = hidden.new_ones(4, N, dtype=dtype)
    kept = _kept(mask)
    total = N if kept is None else kept.numel()
    if total == 0:
        return kl, norm
    rows, tile, _ = plan_tiles(total, V, D, hidden, budget)
    pair = _Pair(weight, ref_weight, bias, ref_bias, head, dtype, tile)
    tiles = Tiles(hidden, dtype, rows, tile, 1)
    with gemm_precision(hidden):
        for start, end, index in _row_chunks(0, total, rows, kept):
            n = end - start
            h, ref_h = hidden[index].to(dtype), ref_hidden[index].to(dtype)
            sums, ref_sums = (_Sums(hidden, n, dtype) for _ in range(2))
            cross = hidden.new_zeros(n, dtype=dtype)
            for lo in range(0, V, tile):
                hi = min(lo + tile, V)
                pair.at(lo, hi)
                z, ref_z = pair.logits(h, ref_h)
                over, under = (ref_z, z) if forward_kl else (z, ref_z)
                apart = torch.sub(over, under, out=tiles.view(0, n, hi - lo))
                r, ref_r = sums.update(z), ref_sums.update(ref_z)
                apart.mul_(over)
                if pair.biased:  # 0·(-inf - x) is 0
                    apart.masked_fill_(over == 0, 0)
                cross.mul_(ref_r if forward_kl else r).add_(apart.sum(1))
                del z, ref_z, over, under  # before the next tiles are made
            norm[:, index] = found = torch.stack([sums.m, sums.s, ref_sums.m, ref_sums.s])
            gap = _gap(found)
            mean = cross / ref_sums.s + gap if forward_kl else cross / sums.s - gap
            kl[index] = mean.clamp_(min=0)
    if mask is not None and mask.is_cuda:
        kl.masked_fill_(~mask, 0)
        norm.masked_fill_(~mask, 1)
    return kl, norm


def backward(
    grad, kl, norm, hidden, ref_hidden, weight, ref_weight, bias, ref_bias, mask, head: Head,
    forward_kl: bool, needs, budget: int,
):  # fmt: skip
    """Return (dHidden, dWeight, dBias) from recomputed logits, None where ``needs`` says so."""
    kept = _kept(mask)
    if mask is not None and mask.is_cuda:
        # Rows cannot be dropped without a host sync; a masked row must add 0, also from NaN.
        hidden, ref_hidden = (x.masked_fill(~mask[:, None], 0) for x in (hidden, ref_hidden))
        grad = grad.masked_fill(~mask, 0)
    total = hidden.shape[0] if kept is None else kept.numel()
    V, D = weight.shape
    rows, tile, spare = plan_tiles(total, V, D, hidden, budget)

    def run(first, last, dh, dw, db, _low, _up):
        pair = _Pair(weight, ref_weight, bias, ref_bias, head, compute_dtype(hidden), tile)
        _backward_tiles(
            grad, kl, norm, hidden, ref_hidden, weight, pair, forward_kl, tile, kept, rows, first,
            last, dh, dw, db,
        )  # fmt: skip

    with gemm_precision(hidden):
        return arrange_backward(
            run, hidden, weight, bias, None, (*needs, False, False), kept, rows, spare
        )[:3]


def _backward_tiles(
    grad, kl, norm, hidden, ref_hidden, weight, pair, forward_kl, tile, kept, rows, first, last,
    dh, dw, db,
):  # fmt: skip
    """Add the gradients of rows ``first`` to ``last`` (of those kept) to those that are not None.

    ``dh`` has either all of hidden's rows, or just these.
    """
    V, D = weight.shape
    dtype = compute_dtype(hidden)
    head = pair.head
    k = head.scale / head.temperature
    narrow = gradient_dtype(weight)
    scattered = dh is not None and kept is not None and dh.shape[0] == hidden.shape[0]
    copy_w = dw is not None and dw.dtype != dtype
    dw_buffer = weight.new_empty(tile, D, dtype=dtype) if copy_w else None
    for lo in range(0, V, tile):
        hi = min(lo + tile, V)
        v = hi - lo
        pair.at(lo, hi)
        if dw is not None:
            dw_slice = dw_buffer[:v].zero_() if copy_w else dw[lo:hi]
        db_slice = None if db is None else weight.new_zeros(v, dtype=dtype)
        for start, end, index in _row_chunks(first, last, rows, kept):
            h, ref_h = hidden[index].to(dtype), ref_hidden[index].to(dtype)
            dz = _logit_grads(
                *pair.logits(h, ref_h), grad[index].to(dtype), kl[index], norm[:, index], head,
                forward_kl, pair.biased,
            )  # fmt: skip
            del ref_h
            if db is not None:
                db_slice.add_(dz.sum(0), alpha=k)
            if narrow != dtype:
                dz, h = dz.to(narrow), hidden[index]
            if dw is not None:
                accumulate(dw_slice, gradient_dot(dz.T, h.T), k)
            if dh is not None:
                part = gradient_dot(dz, (pair.w if narrow == dtype else weight[lo:hi]).T)
                if scattered:
                    dh.index_add_(0, index, part.to(dtype), alpha=k)
                else:
                    accumulate(dh[start - first : end - first], part, k)
                del part
            del dz
        if copy_w:
            dw[lo:hi] = dw_slice
        if db is not None:
            db[lo:hi] = db_slice


def _logit_grads(z, ref_z, grad, kl, norm, head, forward_kl, biased):
    """Gradient by the policy's GEMM's result up to k; both tiles' buffers are used up.

    By the logits: p - p_ref, or p·(log p - log p_ref - KL) of the reverse direction. Both are
    exactly 0 where both models' logits are equal.
    """
    m, s, ref_m, ref_s = (x[:, None] for x in norm)
    slope = None if head.softcap is None else cap_slope(z, head, torch.empty_like(z))
    if forward_kl:
        dz = z.sub_(m).exp_().div_(s)
        dz.sub_(ref_z.sub_(ref_m).exp_().div_(ref_s)).mul_(grad[:, None])
    else:
        dz = ref_z.neg_().add_(z).sub_((_gap(norm) + kl)[:, None])
        p = z.sub_(m).exp_().mul_(grad[:, None] / s)
        dz.mul_(p)
        if biased:
            dz.masked_fill_(p == 0, 0)
    return dz if slope is None else dz.mul_(slope)
