"""The chunked head's backward pass from recomputed logits, vocabulary slice by vocabulary slice."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ._common import compute_dtype
from ._head_math import (
    Slices,
    accumulate,
    bias_part,
    cap_slope,
    gemm_precision,
    gradient_dot,
    gradient_dtype,
    logits,
    put,
    rows_with_targets,
    target_logits,
)
from ._low_rank import Factors, times
from ._online import UNDERFLOW
from .plan import hidden_grad_fits


def backward(
    grad_logps, grad_entropy, hidden, weight, targets, bias, norm, entropy, head, ignore_index,
    needs, rows, tile, spare, adapter=None,
):  # fmt: skip
    """Return (dHidden, dWeight, dBias, dLow, dUp) from recomputed logits.

    Those that ``needs`` says not are None.
    """
    kept = rows_with_targets(targets, ignore_index)
    if targets.is_cuda:
        # Rows cannot be dropped without a host sync; a masked row must add 0, also from NaN.
        live = targets != ignore_index
        hidden = hidden.masked_fill(~live[:, None], 0)
        grad_logps, grad_entropy = (
            None if g is None else g.masked_fill(~live, 0) for g in (grad_logps, grad_entropy)
        )

    def run(first, last, *grads):
        _backward_tiles(
            grad_logps, grad_entropy, hidden, weight, targets, bias, norm, entropy, head, tile,
            kept, rows, first, last, *grads, adapter,
        )  # fmt: skip

    with gemm_precision(hidden):
        return arrange_backward(run, hidden, weight, bias, adapter, needs, kept, rows, spare)


def arrange_backward(run, hidden, weight, bias, adapter, needs, kept, rows, spare):
    """Allocate the gradients and sum each where float32 sums fit.

    ``run(first, last, dh, dw, db, dlow, dup)`` goes over vocabulary slices outside, row chunks
    inside: a slice of dWeight (and of dUp) is summed in float32 over all rows, cast and written
    once. dHidden is summed in float32 over all slices: in the output, in a float32 copy where
    ``spare`` bytes hold it, else row chunk by row chunk in a pass of its own. dLow, as wide as its
    sums, is made beside dHidden.
    """
    need_h, need_w, need_b, need_low, need_up = needs
    N, D = hidden.shape
    dtype = compute_dtype(hidden)
    dh = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need_h else None
    dw = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_w else None
    db = torch.zeros_like(bias) if need_b else None
    dlow = torch.zeros_like(adapter.low) if need_low else None
    dup = torch.zeros_like(adapter.up) if need_up else None
    total = N if kept is None else kept.numel()
    if total == 0:
        return dh, dw, db, dlow, dup
    if need_h and dh.dtype == dtype:
        run(0, total, dh, dw, db, dlow, dup)
    elif need_h and hidden_grad_fits(total, D, hidden.dtype, spare):
        sums = hidden.new_zeros(total, D, dtype=dtype)
        run(0, total, sums, dw, db, dlow, dup)
        _store_rows(dh, sums, kept, 0, total, rows)
    else:
        if need_h:
            block = hidden.new_empty(min(rows, total), D, dtype=dtype)
            for start in range(0, total, rows):
                end = min(start + rows, total)
                sums = block[: end - start].zero_()
                run(start, end, sums, None, None, dlow, None)
                _store_rows(dh, sums, kept, start, end, rows)
        if need_w or need_b or need_up or not need_h:
            run(0, total, None, dw, db, None if need_h else dlow, dup)
    return dh, dw, db, dlow, dup


def _store_rows(out, sums, kept, start, end, rows):
    """Cast float32 sums into ``out``'s rows, in chunks, since a cast makes a temporary."""
    for lo in range(start, end, rows):
        hi = min(lo + rows, end)
        index = slice(lo, hi) if kept is None else kept[lo:hi]
        out[index] = sums[lo - start : hi - start].to(out.dtype)


def _backward_tiles(
    grad_logps, grad_entropy, hidden, weight, targets, bias, norm, entropy, head, tile, kept, rows,
    first, last, dh, dw, db, dlow=None, dup=None, adapter=None,
):  # fmt: skip
    """Add the gradients of rows ``first`` to ``last`` (of those kept) to those that are not None.

    ``dh`` has either all of hidden's rows, or just these; ``dlow`` has all.
    """
    V, D = weight.shape
    dtype = compute_dtype(hidden)
    rows = min(rows, last - first)
    k = head.scale / head.temperature
    scattered = dh is not None and kept is not None and dh.shape[0] == hidden.shape[0]
    narrow = gradient_dtype(weight)
    slices = Slices(weight, dtype, tile)
    factors = Factors(adapter, hidden) if adapter else None
    low = up = None
    at_target = norm.new_empty(last - first)
    for start, end, index in _row_chunks(first, last, rows, kept):
        here = adapter.at(index) if adapter else None
        zy = target_logits(hidden[index].to(dtype), weight, targets[index], bias, head, here)
        at_target[start - first : end - first] = _target_grads(
            zy, norm[:, index], _rows(grad_logps, index, zy), _rows(grad_entropy, index, zy),
            _rows(entropy, index, zy), head,
        )  # fmt: skip
    copy_w = dw is not None and dw.dtype != dtype
    dw_buffer = weight.new_empty(tile, D, dtype=dtype) if copy_w else None
    for lo in range(0, V, tile):
        hi = min(lo + tile, V)
        v = hi - lo
        w = slices(lo, hi)
        if dw is not None:
            dw_slice = dw_buffer[:v].zero_() if copy_w else dw[lo:hi]
        db_slice = None if db is None else weight.new_zeros(v, dtype=dtype)
        if adapter:
            up = factors.entries(lo, hi)
            dup_slice = None if dup is None else weight.new_zeros(v, dup.shape[1], dtype=dtype)
        for start, end, index in _row_chunks(first, last, rows, kept):
            h = hidden[index].to(dtype)
            if adapter:
                low = factors.rows(index)
            z = logits(h, w, bias_part(bias, lo, hi), head, low, up)
            dz = _logit_grads(
                z, norm[:, index], _rows(grad_logps, index, z), _rows(grad_entropy, index, z),
                _rows(entropy, index, z), head,
            )  # fmt: skip
            local = targets[index] - lo
            inside = (local >= 0) & (local < v)
            local = local.clamp_(0, v - 1)[:, None]
            put(dz, local, inside, 0)  # the targets' entries go apart: large, and not rounded
            hit = inside.nonzero()[:, 0]
            entries = local[hit, 0]
            g = at_target[start - first : end - first][hit].mul_(k)[:, None]
            if db is not None:
                db_slice.add_(dz.sum(0), alpha=k)
                _add_rows(db_slice, entries, g[:, 0])
            if dup is not None:
                dup_slice.add_(times(dz.T, low), alpha=k)
                _add_rows(dup_slice, entries, adapter.at(index).low[hit] * g)
            if dlow is not None:
                dlow[index] += times(dz, up).mul_(k)
            if dw is not None:
                g = h[hit].mul_(g)
            if narrow != dtype:
                dz, h, z = dz.to(narrow), hidden[index], None
            if dw is not None:
                accumulate(dw_slice, gradient_dot(dz.T, h.T), k)
                _add_rows(dw_slice, entries, g)
            if dh is not None:
                part = gradient_dot(dz, (w if narrow == dtype else weight[lo:hi]).T)
                if scattered:
                    dh.index_add_(0, index, part.to(dtype), alpha=k)
                else:
                    accumulate(dh[start - first : end - first], part, k)
            del z, dz
        if copy_w:
            dw[lo:hi] = dw_slice
        if db is not None:
            db[lo:hi] = db_slice
        if dup is not None:
            dup[lo:hi] = dup_slice
    if dlow is not None:
        for start, end, index in _row_chunks(first, last, rows, kept):
            part = adapter.up[targets[index].clamp(0, V - 1)].to(dtype)
            dlow[index] += part.mul_(at_target[start - first : end - first, None]).mul_(k)
    if dh is not None:
        for start, end, index in _row_chunks(first, last, rows, kept):
            part = weight[targets[index].clamp(0, V - 1)].to(dtype)
            part.mul_(at_target[start - first : end - first, None])
            if scattered:
                dh.index_add_(0, index, part, alpha=k)
            else:
                dh[start - first : end - first].add_(part, alpha=k)


def _add_rows(out: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """Add ``rows`` to those of ``out`` that ``index`` names, in order, repeated ones too."""
    if out.is_cuda:
        out.index_put_((index,), rows, accumulate=True)  # sorts, where index_add_ has atomics
    else:
        out.index_add_(0, index, rows)


def _row_chunks(first: int, last: int, rows: int, kept: torch.Tensor | None) -> Iterator[tuple]:
    """(start, end, index into all rows) of each chunk."""
    for start in range(first, last, rows):
        end = min(start + rows, last)
        yield start, end, slice(start, end) if kept is None else kept[start:end]


def _rows(values: torch.Tensor | None, index, like: torch.Tensor) -> torch.Tensor | None:
    return None if values is None else values[index].to(like.dtype)


def _target_grads(zy, norm, g, g_entropy, entropy, head):
    """Gradient by the GEMM's result at each row's target, up to k, [n]."""
    m, s = norm
    logp = (zy - m) - s.log()
    grads = torch.zeros_like(zy) if g is None else -g * torch.expm1(logp)
    if g_entropy is not None:
        grads -= g_entropy * logp.exp() * (logp.clamp(min=UNDERFLOW) + entropy)
    return grads if head.softcap is None else grads * cap_slope(zy, head, torch.empty_like(zy))


def _logit_grads(z, norm, g, g_entropy, entropy, head):
    """Gradient by the GEMM's result up to k, in ``z``'s buffer, as if no entry were the target.

    f'(z)·(-g·p - g_entropy·p·(log p + entropy)); 0·log 0 is 0.
    """
    m, s = norm
    g = torch.zeros_like(m) if g is None else g
    slope = None if head.softcap is None else cap_slope(z, head, torch.empty_like(z))
    z.sub_(m[:, None])
    if g_entropy is None:
        dz = z.exp_().mul_((-g / s)[:, None])
    else:
        e = torch.exp(z)
        z.clamp_(min=UNDERFLOW).add_((entropy - s.log())[:, None])
        z.mul_((-g_entropy / s)[:, None]).sub_((g / s)[:, None])
        dz = z.mul_(e)
    return dz if slope is None else dz.mul_(slope)
