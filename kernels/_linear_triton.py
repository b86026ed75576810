"""Triton kernels of the linear head, shared by ``linear_token_logps`` and its triple.

Forward, for a chunk of rows, in float32 from the accumulator on:

    1. _logits_kernel    (row block, split of V): z tile by tile, online (m, s, z_y, extras)
    2. _combine_kernel   (row block, model): folds the splits into the running state, in their order
    3. _weights_kernel   exp(z - m)·f' in the GEMM's dtype           } only for the row Jacobian,
    4. _gemm_kernel      A = exp(m_old - m)·A + weights @ slice      } slice by slice of V
    5. _jacobian_kernel  J = k·(f'_y·(1 - p_y)·weight[y] - A / s), rounded once

Backward: per slice 1 (logits only), 3 (dz instead) and 4 twice, for dHidden and for dWeight.

The splits of V are the same with and without a Jacobian, so the log-probs are the same bits. No
atomics: every sum has one order. Blocks come from a table (``configs``), not from a timing run.
"""

from __future__ import annotations

import torch

from . import _autotune
from ._common import INTERPRETED, on_device, triton
from ._gemm_kernel import _gemm_kernel
from ._head_math import NARROW_VOCAB, Head
from ._linear_chunked_backward import arrange_backward
from ._linear_kernels import (
    _combine_kernel,
    _jacobian_kernel,
    _logits_kernel,
    _weights_kernel,
)
from ._low_rank import Adapter, fold, parts
from ._online import LOWEST, finish_stats
from .configs import Blocks, architecture, blocks_for, row_for, split_sizes

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

# Elementwise over a logits tile: 16 float32 a thread, in rows long enough for 16-byte accesses.
WEIGHTS_BLOCK = (16, 32) if INTERPRETED else (16, 256)
COMBINE_ROWS = 32


def described(tensors: tuple[torch.Tensor, ...], blocks: Blocks) -> bool:
    """Whether a launch reads ``tensors`` through descriptors; else all go through pointers.

    The copy engine wants rows at multiples of 16 bytes (and ours do not overlap).
    """
    return (
        blocks.tma
        and TensorDescriptor is not None
        and all(
            x.dtype.itemsize == 2
            and x.numel() > 0
            and x.stride(1) == 1
            and x.stride(0) >= x.shape[1]
            and x.stride(0) % 8 == 0
            and x.data_ptr() % 16 == 0
            for x in tensors
        )
    )


def _describe(x: torch.Tensor, block: list[int]):
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def _launch_logits(
    x, weight, bias, y, head, lo, hi, split, blocks, part, z, extras, ref=None, adapter=None
):
    """Run _logits_kernel on entries lo to hi; ``part`` or ``z`` may be None: not wanted."""
    pre = head.scale / (head.temperature if head.softcap is None else head.softcap)
    post = 1.0 if head.softcap is None else head.softcap / head.temperature
    shared = ref is None or ref.weight is None
    ref_w = weight if shared else ref.weight
    ref_x = x if ref is None else ref.hidden
    ref_bias = None if ref is None else ref.bias
    n, splits = x.shape[0], triton.cdiv(hi - lo, split)
    strides = (*x.stride(), *ref_x.stride(), *weight.stride(), *ref_w.stride())
    operands = (x, ref_x, weight, ref_w)
    use_tma = described(operands, blocks)
    if use_tma:
        rows, columns = [blocks.block_n, blocks.block_d], [blocks.block_v, blocks.block_d]
        operands = map(_describe, operands, (rows, rows, columns, columns))
    else:
        blocks = blocks.by_pointers()
    if adapter is not None:
        blocks = blocks.with_adapter()
    # Six statistics a row and two accumulators do not fit the registers.
    pair = blocks.pair and ref is None and not extras and split >= 2 * blocks.block_v
    _logits_kernel[(triton.cdiv(n, blocks.block_n) * splits,)](
        *operands, y if bias is None else bias, y if ref_bias is None else ref_bias,
        y, y if part is None else part, y if z is None else z,
        *((y, y) if adapter is None else adapter),
        n, lo, hi, x.shape[1], splits, split, splits * n, *strides,
        0 if z is None else z.stride(0), pre, post, 0.0 if ref is None else ref.extrapolation,
        HAS_BIAS=bias is not None, HAS_REF_BIAS=ref_bias is not None,
        SOFTCAP=head.softcap is not None, TRIPLE=ref is not None, SHARED=shared, EXTRAS=extras,
        STATS=part is not None, STORE_Z=z is not None,
        RANK=0 if adapter is None else adapter.up.shape[1], CUT=x.dtype.itemsize == 2,
        UPCAST=_upcast(x), LOWEST=LOWEST, USE_TMA=use_tma, PAIR=pair, PIECES=blocks.pieces,
        GROUP=row_for(x.device).group,
        BLOCK_N=blocks.block_n, BLOCK_V=blocks.block_v, BLOCK_D=blocks.block_d,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip


def _upcast(x: torch.Tensor) -> bool:
    return INTERPRETED and x.dtype == torch.bfloat16


def _launch_weights(z, out, m, s, y, head, lo, size, ignore_index, grads=None):
    """Run _weights_kernel; ``grads`` is (by logps, by entropy, entropy) for backward, or None."""
    g, g_entropy, entropy = (None, None, None) if grads is None else grads
    slope = 1.0 if head.softcap is None else head.temperature / head.softcap
    block_n, block_v = WEIGHTS_BLOCK
    _weights_kernel[(triton.cdiv(z.shape[0], block_n), triton.cdiv(size, block_v))](
        z, out, m, s, m if g is None else g, m if g_entropy is None else g_entropy,
        m if g_entropy is None else entropy, y,
        z.shape[0], lo, size, z.stride(0), ignore_index, slope,
        SOFTCAP=head.softcap is not None, BACKWARD=grads is not None, HAS_G=g is not None,
        ENTROPY=g_entropy is not None, BLOCK_N=block_n, BLOCK_V=block_v, num_warps=8,
    )  # fmt: skip


def _launch_jacobian(acc, matrix, stats, y, out, head, ignore_index):
    """Run _jacobian_kernel on the sums of ``matrix``'s rows, the weight's or the adapter's."""
    (V, width), n = matrix.shape, y.shape[0]
    slope = 1.0 if head.softcap is None else head.temperature / head.softcap
    _jacobian_kernel[(triton.cdiv(n, 16), triton.cdiv(width, 128))](
        acc, matrix, *stats[0, :3], y, out, n, V, width,
        *matrix.stride(), width, head.scale / head.temperature, slope, ignore_index,
        SOFTCAP=head.softcap is not None, BLOCK_N=16, BLOCK_D=128,
    )  # fmt: skip


def _gemm(a, b, c, *, alpha=1.0, accumulate=True, row_scale=None, targets=None, ignore=0):
    """Compute c = row_scale·c + alpha·a @ b (or without c); ``targets`` masks b's rows."""
    M, K = a.shape
    N = b.shape[1]
    blocks = blocks_for(a, gemm=True).for_columns(N)
    operands, strides = (a, b), (*a.stride(), *b.stride())
    use_tma = targets is None and described(operands, blocks)
    if use_tma:
        sizes = [blocks.block_n, blocks.block_d], [blocks.block_d, blocks.block_v]
        operands = map(_describe, operands, sizes)
    else:
        blocks = blocks.by_pointers()
    _gemm_kernel[(triton.cdiv(M, blocks.block_n) * triton.cdiv(N, blocks.block_v),)](
        *operands, c, c if row_scale is None else row_scale, c if targets is None else targets,
        M, N, K, *strides, c.stride(0), alpha, ignore,
        ACCUMULATE=accumulate, HAS_ROW_SCALE=row_scale is not None, MASK_K=targets is not None,
        UPCAST=_upcast(a), USE_TMA=use_tma, GROUP=row_for(a.device).group, PIECES=blocks.pieces,
        BLOCK_M=blocks.block_n, BLOCK_N=blocks.block_v, BLOCK_K=blocks.block_d,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip


def _operand_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a GEMM that only feeds a gradient takes its operands.

    Rounded probabilities average out over a large vocabulary; a small one costs little as it is.
    """
    return weight.dtype if weight.shape[0] >= NARROW_VOCAB else torch.float32


def _cut(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """Return a factor as an operand of a gradient's GEMM, in two parts where ``dtype`` has 16 bits.

    Two parts carry 16 bits of a factor that the other operand, 8 bits wide, is multiplied by.
    """
    found = parts(x, dtype, 2)
    return (found[0] if len(found) == 1 else torch.cat(found, 1)).contiguous(), len(found)


def _contiguous(adapter: Adapter | None) -> Adapter | None:
    return None if adapter is None else Adapter(*(x.contiguous() for x in adapter))


def _tile_buffers(like, rows, width, dtype):
    """Return float32 logits and ``dtype`` weights [rows, width], their rows 16-byte aligned."""
    stride = triton.cdiv(width, 16) * 16
    z = like.new_empty(rows, stride, dtype=torch.float32)
    return z[:, :width], like.new_empty(rows, stride, dtype=dtype)[:, :width]


def _tuned(hidden, weight, targets, ignore_index, rows, tile, blocks):
    """Return the fastest variant of ``blocks`` for a lone head of this card and shape."""
    (N, D), V = hidden.shape, weight.shape[0]
    arch, kind = architecture(hidden.device), str(hidden.dtype).removeprefix("torch.")
    key = f"head {arch} {kind} N<={triton.next_power_of_2(N)} V={V} D={D}"

    def measure(choice: Blocks) -> float:
        run = (hidden, weight, targets, None, Head(1.0, None, 1.0), ignore_index, (), False)
        with on_device(hidden):
            return triton.testing.do_bench(
                lambda: forward(*run, rows, tile, blocks=choice), return_mode="median"
            )

    return _autotune.best(key, blocks, measure)


def forward(
    hidden,
    weight,
    targets,
    bias,
    head,
    ignore_index,
    extras,
    jacobian,
    rows,
    tile,
    reference=None,
    adapter=None,
    blocks=None,
):
    """Return ({name: [N] statistic}, norm [2, N], J [N, D], J [N, r]), as the chunked path does."""
    adapter = _contiguous(adapter)
    (N, D), V = hidden.shape, weight.shape[0]
    if blocks is None:
        blocks = blocks_for(hidden)
        if _autotune.enabled() and N and not reference and not extras:
            blocks = _tuned(hidden, weight, targets, ignore_index, rows, tile, blocks)
    operand = _operand_dtype(weight)
    names = ("logps", "lse", *extras) + (("reference", "extrapolated") if reference else ())
    models, num = 3 if reference else 1, 6 if extras else 3
    state = hidden.new_zeros(models, num, N, dtype=torch.float32)
    state[:, 0] = LOWEST
    J = torch.empty_like(hidden, memory_format=torch.contiguous_format) if jacobian else None
    J_low = torch.empty_like(adapter.low) if jacobian and adapter else None
    tile, split = split_sizes(min(rows, N), V, tile, blocks, row_for(hidden.device))
    step = tile if jacobian else V
    with on_device(hidden):
        for start in range(0, N, rows):
            chunk = slice(start, start + rows)
            x, y = hidden[chunk], targets[chunk]
            ref = None if reference is None else reference._replace(hidden=reference.hidden[chunk])
            here = adapter.at(chunk) if adapter else None
            n = x.shape[0]
            stats = state[:, :, chunk].contiguous()
            part = stats.new_empty(models, num, triton.cdiv(min(step, V), split), n)
            scale = stats.new_empty(n)
            if jacobian:
                z, p = _tile_buffers(hidden, n, min(tile, V), operand)
                acc, acc_low = stats.new_zeros(n, D), None
            for lo in range(0, V, step):
                hi = min(lo + step, V)
                _launch_logits(
                    x, weight, bias, y, head, lo, hi, split, blocks, part,
                    z if jacobian else None, bool(extras), ref, here,
                )  # fmt: skip
                splits = triton.cdiv(hi - lo, split)
                _combine_kernel[(triton.cdiv(n, COMBINE_ROWS), models)](
                    part, stats, scale, n, splits, splits * n, EXTRAS=bool(extras),
                    BLOCK_N=COMBINE_ROWS, num_warps=1,
                )  # fmt: skip
                if jacobian:
                    _launch_weights(z, p, stats[0, 0], scale, y, head, lo, hi - lo, ignore_index)
                    _gemm(p[:, : hi - lo], weight[lo:hi].to(operand), acc, row_scale=scale)
                    if adapter:
                        up, count = _cut(adapter.up[lo:hi], operand)
                        if acc_low is None:
                            acc_low = stats.new_zeros(n, up.shape[1])
                        _gemm(p[:, : hi - lo], up, acc_low, row_scale=scale)
            state[:, :, chunk] = stats
            if jacobian:
                _launch_jacobian(acc, weight, stats, y, J[chunk], head, ignore_index)
                if adapter:
                    sums = fold(acc_low, count)
                    _launch_jacobian(sums, adapter.up, stats, y, J_low[chunk], head, ignore_index)
    rest = dict(zip(("mean_logits", "entropy", "log_sum_sq_probs"), state[0, 3:], strict=False))
    out = finish_stats(*state[0, :3], {name: rest.get(name) for name in extras}, V)
    for model, name in enumerate(("reference", "extrapolated") if reference else (), 1):
        out[name] = finish_stats(*state[model, :3], {}, V)["logps"]
    dead = targets == ignore_index
    result = {name: out[name].masked_fill(dead, 0) for name in names}
    return result, state[0, :2].masked_fill(dead, 1), J, J_low


def backward(
    grad_logps, grad_entropy, hidden, weight, targets, bias, norm, entropy, head, ignore_index,
    needs, rows, tile, spare, adapter=None,
):  # fmt: skip
    """Return (dHidden, dWeight, dBias, dLow, dUp) from recomputed logits.

    Those that ``needs`` says not are None.
    """
    adapter = _contiguous(adapter)
    V, D = weight.shape
    operand = _operand_dtype(weight)
    blocks = blocks_for(hidden)
    most = min(rows, hidden.shape[0])
    tile, split = split_sizes(most, V, tile, blocks, row_for(hidden.device))
    k = head.scale / head.temperature
    if grad_logps is not None:
        grad_logps = grad_logps.contiguous()
    if grad_entropy is not None:
        grad_entropy = grad_entropy.contiguous()

    def run(first, last, dh, dw, db, dlow, dup):
        n = min(rows, last - first)
        z_buffer, dz_buffer = _tile_buffers(hidden, n, min(tile, V), operand)
        # One row chunk writes its slice of dWeight at once; several sum it in float32 first.
        several = last - first > n and weight.dtype != torch.float32
        dw_buffer = norm.new_empty(min(tile, V), D) if dw is not None and several else None
        for lo in range(0, V, tile):
            hi = min(lo + tile, V)
            w = weight[lo:hi].to(operand)
            if dw is not None:
                dw_slice = dw[lo:hi] if dw_buffer is None else dw_buffer[: hi - lo]
            db_sum = norm.new_zeros(hi - lo) if db is not None else None
            dup_sum = None
            if dlow is not None:
                up, count = _cut(adapter.up[lo:hi], operand)
            for start in range(first, last, rows):
                chunk = slice(start, min(start + rows, last))
                x, y = hidden[chunk], targets[chunk]
                z, dz = z_buffer[: x.shape[0]], dz_buffer[: x.shape[0]]
                here = adapter.at(chunk) if adapter else None
                _launch_logits(
                    x, weight, bias, y, head, lo, hi, split, blocks, None, z, False, None, here
                )
                grads = (v if v is None else v[chunk] for v in (grad_logps, grad_entropy, entropy))
                m, s = norm[:, chunk]
                _launch_weights(z, dz, m, s, y, head, lo, hi - lo, ignore_index, tuple(grads))
                dz = dz[:, : hi - lo]
                if dh is not None:
                    _gemm(dz, w, dh[start - first : chunk.stop - first], alpha=k)
                if dw is not None:
                    _gemm(
                        dz.T, x.to(operand), dw_slice, alpha=k, accumulate=start > first, targets=y,
                        ignore=ignore_index,
                    )  # fmt: skip
                if dlow is not None:
                    product = norm.new_empty(dz.shape[0], up.shape[1])
                    _gemm(dz, up, product, alpha=k, accumulate=False)
                    dlow[chunk] += fold(product, count)
                if dup is not None:
                    low, low_count = _cut(here.low, operand)
                    if dup_sum is None:
                        dup_sum = norm.new_zeros(hi - lo, low.shape[1])
                    _gemm(dz.T, low, dup_sum, alpha=k, targets=y, ignore=ignore_index)
                if db is not None:
                    db_sum.add_(dz.sum(0, dtype=torch.float32), alpha=k)
            if dw is not None and dw_buffer is not None:
                dw[lo:hi] = dw_slice
            if db is not None:
                db[lo:hi] = db_sum
            if dup is not None:
                dup[lo:hi] = fold(dup_sum, low_count)

    with on_device(hidden):
        return arrange_backward(run, hidden, weight, bias, adapter, needs, None, rows, spare)
