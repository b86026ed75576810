"""Triton kernels of the linear head, shared by ``linear_token_logps`` and its triple.

Forward, for a chunk of rows, in float32 from the accumulator on:

    1. _logits_kernel    (row block, split of V): z tile by tile, online (m, s, z_y, extras)
    2. _combine_kernel   (row block, model): folds the splits into the running state, in their order
    3. _weights_kernel   exp(z - m)·f' in the GEMM's dtype           } only for the row Jacobian,
    4. _gemm_kernel      A = exp(m_old - m)·A + weights @ slice      } slice by slice of V
    5. _jacobian_kernel  J = k·(f'_y·weight[y] - A / s), rounded once

Backward: per slice 1 (logits only), 3 (dz instead) and 4 twice, for dHidden and for dWeight.

The splits of V are the same with and without a Jacobian, so the log-probs are the same bits. No
atomics: every sum has one order. Blocks come from a table, not from a timing run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ._common import INTERPRETED, jit, on_device, tanh, tl, triton
from ._linear_chunked import LOWEST, arrange_backward, finish_stats


class Config(NamedTuple):
    """Block sizes of one launch. ``split_tiles``: vocabulary tiles per split, at most."""

    block_n: int
    block_v: int
    block_d: int
    split_tiles: int
    num_warps: int
    num_stages: int


# The logits kernel of the 16-bit triple holds two accumulators and nine statistics per row: with
# 64 x 64 blocks on 8 warps it spills nothing; 128 x 64 and 64 x 128 spill up to 100 bytes, 128 x
# 128 up to 800. One configuration for the single op and the triple makes their
# log-probs the same bits. float32 is multiplied on the plain cores, with narrower tiles. The
# interpreter pays per operation, and its small blocks let small tests straddle their edges.
_LOGITS = {2: Config(64, 64, 32, 16, 8, 3), 4: Config(64, 32, 16, 32, 8, 2)}
_GEMM = {2: Config(128, 128, 32, 1, 8, 3), 4: Config(64, 64, 32, 1, 8, 2)}
_INTERPRETED = Config(16, 32, 16, 2, 4, 1)


def config_for(dtype: torch.dtype, gemm: bool = False) -> Config:
    """Return the blocks for operands of ``dtype``: of the logits kernel, or of the plain GEMM."""
    if INTERPRETED:
        return _INTERPRETED
    config = (_GEMM if gemm else _LOGITS)[dtype.itemsize]
    # More than one stage of the GEMM comes near the 64 KiB of a CDNA 3 compute unit.
    return config._replace(num_stages=1) if torch.version.hip else config


@jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:  # Triton's interpreter multiplies bfloat16 operands as raw integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def _store(ptr, x, mask, UPCAST: tl.constexpr):
    """Store x in ptr's dtype, rounded to nearest even; the interpreter truncates to bfloat16."""
    if UPCAST:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@jit
def _logit(x, bias_ptr, offs_v, mask_v, pre, post, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    if HAS_BIAS:
        x += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    return tanh(x * pre) * post if SOFTCAP else x * pre


@jit
def _online(z, m, s, zy, hit):
    m_new = tl.maximum(m, tl.max(z, 1))
    e = tl.exp(z - m_new[:, None])
    s_new = s * tl.exp(m - m_new) + tl.sum(e, 1)
    zy += tl.sum(tl.where(hit, z, 0.0), 1)
    return e, m_new, s_new, zy


@jit
def _logits_kernel(
    x_ptr, ref_x_ptr, w_ptr, ref_w_ptr, bias_ptr, ref_bias_ptr, targets_ptr, part_ptr, z_ptr,
    N, V_begin, V_end, D, split_size, stride_part,
    stride_xn, stride_xd, stride_rn, stride_rd, stride_wv, stride_wd, stride_sv, stride_sd,
    stride_zn, pre, post, extrapolation,
    HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    TRIPLE: tl.constexpr, SHARED: tl.constexpr, EXTRAS: tl.constexpr, STATS: tl.constexpr,
    STORE_Z: tl.constexpr, UPCAST: tl.constexpr, LOWEST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid_n = tl.program_id(0)
    split = tl.program_id(1)
    # Scalars reach a block in int64; inside it offsets are 32-bit, or they fill the registers.
    in_n = tl.arange(0, BLOCK_N)
    in_v = tl.arange(0, BLOCK_V)
    in_d = tl.arange(0, BLOCK_D)
    first = pid_n.to(tl.int64) * BLOCK_N
    mask_n = in_n < N - first
    y = tl.load(targets_ptr + first + in_n, mask=mask_n, other=-1).to(tl.int32)
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    zy = tl.zeros((BLOCK_N,), tl.float32)
    if EXTRAS:
        total = tl.zeros((BLOCK_N,), tl.float32)
        t = tl.zeros((BLOCK_N,), tl.float32)
        q = tl.zeros((BLOCK_N,), tl.float32)
    if TRIPLE:
        ref_m, ref_s, ref_zy = m, s, zy
        ext_m, ext_s, ext_zy = m, s, zy
    begin = split * split_size
    end = tl.minimum(V_begin + begin + split_size, V_end)
    v_first = begin.to(tl.int64) + V_begin
    x_offs = in_n[:, None] * stride_xn + in_d[None, :] * stride_xd
    w_offs = in_v[None, :] * stride_wv + in_d[:, None] * stride_wd
    w_block = w_ptr + v_first * stride_wv
    if TRIPLE:
        ref_x_offs = in_n[:, None] * stride_rn + in_d[None, :] * stride_rd
        if not SHARED:
            ref_w_offs = in_v[None, :] * stride_sv + in_d[:, None] * stride_sd
            ref_w_block = ref_w_ptr + v_first * stride_sv
    if STORE_Z:
        z_block = z_ptr + first * stride_zn + begin
    for lo in range(V_begin + begin, end, BLOCK_V):
        offs_v = lo + in_v
        mask_v = offs_v < end
        acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        x_at = x_ptr + first * stride_xn
        w_at = w_block
        if TRIPLE:
            ref_acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            ref_x_at = ref_x_ptr + first * stride_rn
            if not SHARED:
                ref_w_at = ref_w_block
        for d in range(0, D, BLOCK_D):
            mask_d = in_d < D - d
            mask_nd = mask_n[:, None] & mask_d[None, :]
            mask_dv = mask_d[:, None] & mask_v[None, :]
            w = tl.load(w_at + w_offs, mask=mask_dv, other=0.0)
            acc = _dot(tl.load(x_at + x_offs, mask=mask_nd, other=0.0), w, acc, UPCAST)
            x_at += BLOCK_D * stride_xd
            w_at += BLOCK_D * stride_wd
            if TRIPLE:
                ref_x = tl.load(ref_x_at + ref_x_offs, mask=mask_nd, other=0.0)
                ref_x_at += BLOCK_D * stride_rd
                if SHARED:
                    ref_acc = _dot(ref_x, w, ref_acc, UPCAST)
                else:
                    ref_w = tl.load(ref_w_at + ref_w_offs, mask=mask_dv, other=0.0)
                    ref_w_at += BLOCK_D * stride_sd
                    ref_acc = _dot(ref_x, ref_w, ref_acc, UPCAST)
        w_block += BLOCK_V * stride_wv
        if TRIPLE and not SHARED:
            ref_w_block += BLOCK_V * stride_sv
        z = _logit(acc, bias_ptr, offs_v, mask_v, pre, post, HAS_BIAS, SOFTCAP)
        valid = mask_v[None, :]
        if STORE_Z:
            z_offs = in_n[:, None] * stride_zn + in_v[None, :]
            tl.store(z_block + z_offs, z, mask=mask_n[:, None] & valid)
            z_block += BLOCK_V
        if STATS:
            hit = offs_v[None, :] == y[:, None]
            if TRIPLE:
                ref_z = _logit(
                    ref_acc, ref_bias_ptr, offs_v, mask_v, pre, post, HAS_REF_BIAS, SOFTCAP
                )  # fmt: skip
                ext = (1.0 + extrapolation) * z - extrapolation * ref_z
                ext = tl.where(valid & (z != -float("inf")), ext, -float("inf"))
                ref_z = tl.where(valid, ref_z, -float("inf"))
                _, ref_m, ref_s, ref_zy = _online(ref_z, ref_m, ref_s, ref_zy, hit)
                _, ext_m, ext_s, ext_zy = _online(ext, ext_m, ext_s, ext_zy, hit)
            if EXTRAS:
                total += tl.sum(z, 1)  # columns past the vocabulary: 0, from masked loads
            z = tl.where(valid, z, -float("inf"))
            e, m_new, s_new, zy = _online(z, m, s, zy, hit)
            if EXTRAS:
                step = m - m_new
                r = tl.exp(step)
                # 0·log 0 is 0: exp of -1e4 is 0, and 0 times it too, where -inf would give NaN.
                x = tl.maximum(z - m_new[:, None], -1e4)
                t = r * (t + s * step) + tl.sum(e * x, 1)
                q = r * r * q + tl.sum(e * e, 1)
            m, s = m_new, s_new
    if STATS:
        NUM: tl.constexpr = 6 if EXTRAS else 3
        base = part_ptr + split.to(tl.int64) * N + first + in_n
        tl.store(base, m, mask=mask_n)
        tl.store(base + stride_part, s, mask=mask_n)
        tl.store(base + 2 * stride_part, zy, mask=mask_n)
        if EXTRAS:
            tl.store(base + 3 * stride_part, total, mask=mask_n)
            tl.store(base + 4 * stride_part, t, mask=mask_n)
            tl.store(base + 5 * stride_part, q, mask=mask_n)
        if TRIPLE:
            tl.store(base + NUM * stride_part, ref_m, mask=mask_n)
            tl.store(base + (NUM + 1) * stride_part, ref_s, mask=mask_n)
            tl.store(base + (NUM + 2) * stride_part, ref_zy, mask=mask_n)
            tl.store(base + 2 * NUM * stride_part, ext_m, mask=mask_n)
            tl.store(base + (2 * NUM + 1) * stride_part, ext_s, mask=mask_n)
            tl.store(base + (2 * NUM + 2) * stride_part, ext_zy, mask=mask_n)


@jit
def _combine_kernel(
    part_ptr, state_ptr, scale_ptr, N, num_splits, stride_part,
    EXTRAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fold ``part [models, NUM, splits, N]`` into ``state [models, NUM, N]``, split after split.

    ``scale [N]`` receives exp(m_old - m_new) of the policy: what the Jacobian's sums shrink by.
    """
    NUM: tl.constexpr = 6 if EXTRAS else 3
    model = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    state = state_ptr + model * NUM * N + offs_n
    m_old = tl.load(state, mask=mask, other=0.0)
    m = m_old
    s = tl.load(state + N, mask=mask, other=0.0)
    zy = tl.load(state + 2 * N, mask=mask, other=0.0)
    if EXTRAS:
        total = tl.load(state + 3 * N, mask=mask, other=0.0)
        t = tl.load(state + 4 * N, mask=mask, other=0.0)
        q = tl.load(state + 5 * N, mask=mask, other=0.0)
    part = part_ptr + model * NUM * stride_part + offs_n
    for i in range(0, num_splits):
        at = part + i * N
        m_i = tl.load(at, mask=mask, other=0.0)
        s_i = tl.load(at + stride_part, mask=mask, other=0.0)
        m_new = tl.maximum(m, m_i)
        a = tl.exp(m - m_new)
        b = tl.exp(m_i - m_new)
        zy += tl.load(at + 2 * stride_part, mask=mask, other=0.0)
        if EXTRAS:
            total += tl.load(at + 3 * stride_part, mask=mask, other=0.0)
            t_i = tl.load(at + 4 * stride_part, mask=mask, other=0.0)
            q_i = tl.load(at + 5 * stride_part, mask=mask, other=0.0)
            t = a * (t + s * (m - m_new)) + b * (t_i + s_i * (m_i - m_new))
            q = a * a * q + b * b * q_i
        s = a * s + b * s_i
        m = m_new
    tl.store(state, m, mask=mask)
    tl.store(state + N, s, mask=mask)
    tl.store(state + 2 * N, zy, mask=mask)
    if EXTRAS:
        tl.store(state + 3 * N, total, mask=mask)
        tl.store(state + 4 * N, t, mask=mask)
        tl.store(state + 5 * N, q, mask=mask)
    if model == 0:
        tl.store(scale_ptr + offs_n, tl.exp(m_old - m), mask=mask)


@jit
def _weights_kernel(
    z_ptr, out_ptr, m_ptr, s_ptr, g_ptr, g_entropy_ptr, entropy_ptr, targets_ptr,
    N, V_begin, V_size, stride_zn, ignore_index, slope_scale,
    SOFTCAP: tl.constexpr, BACKWARD: tl.constexpr, HAS_G: tl.constexpr, ENTROPY: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write exp(z - m)·f' or, for BACKWARD, f'·(g·(1[y] - p) - g_entropy·p·(log p + entropy))."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_v < V_size)[None, :]
    offs = offs_n.to(tl.int64)[:, None] * stride_zn + offs_v[None, :]
    z = tl.load(z_ptr + offs, mask=mask, other=0.0)
    m = tl.load(m_ptr + offs_n, mask=mask_n, other=0.0)
    x = z - m[:, None]
    out = tl.exp(x)
    if BACKWARD:
        s = tl.load(s_ptr + offs_n, mask=mask_n, other=1.0)
        y = tl.load(targets_ptr + offs_n, mask=mask_n, other=0)
        g = tl.zeros((BLOCK_N,), tl.float32)
        if HAS_G:
            g = tl.load(g_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        factor = (-g / s)[:, None] + tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        if ENTROPY:
            g_h = tl.load(g_entropy_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            h = tl.load(entropy_ptr + offs_n, mask=mask_n, other=0.0)
            log_p = tl.maximum(x, -1e4) - tl.log(s)[:, None]
            factor -= (g_h / s)[:, None] * (log_p + h[:, None])
        hit = (V_begin + offs_v).to(tl.int64)[None, :] == y[:, None]
        out = out * factor + tl.where(hit, g[:, None], 0.0)
        out = tl.where((y != ignore_index)[:, None], out, 0.0)
    if SOFTCAP:
        u = z * slope_scale
        out *= 1.0 - u * u
    _store(out_ptr + offs, out, mask, UPCAST)


@jit
def _gemm_kernel(
    a_ptr, b_ptr, c_ptr, row_scale_ptr, targets_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_cm, alpha, ignore_index,
    ACCUMULATE: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, MASK_K: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """C = row_scale·C + alpha·A @ B, summed in float32 and rounded once, to C's dtype.

    MASK_K: the inner index is a row of hidden states; rows without a target are read as 0, since
    0 times a NaN that they may hold would be NaN.
    """
    in_m = tl.arange(0, BLOCK_M)
    in_n = tl.arange(0, BLOCK_N)
    in_k = tl.arange(0, BLOCK_K)
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    first_n = tl.program_id(1).to(tl.int64) * BLOCK_N
    mask_m = in_m < M - first_m
    mask_n = in_n < N - first_n
    a_offs = in_m[:, None] * stride_am + in_k[None, :] * stride_ak
    b_offs = in_k[:, None] * stride_bk + in_n[None, :] * stride_bn
    a_at = a_ptr + first_m * stride_am
    b_at = b_ptr + first_n * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = in_k < K - k
        a = tl.load(a_at + a_offs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        live = mask_k
        if MASK_K:
            y = tl.load(targets_ptr + k + in_k, mask=mask_k, other=ignore_index)
            live = mask_k & (y != ignore_index)
        b = tl.load(b_at + b_offs, mask=live[:, None] & mask_n[None, :], other=0.0)
        acc = _dot(a, b, acc, UPCAST)
        a_at += BLOCK_K * stride_ak
        b_at += BLOCK_K * stride_bk
    acc *= alpha
    c = c_ptr + first_m * stride_cm + first_n + (in_m[:, None] * stride_cm + in_n[None, :])
    mask = mask_m[:, None] & mask_n[None, :]
    if ACCUMULATE:
        old = tl.load(c, mask=mask, other=0.0).to(tl.float32)
        if HAS_ROW_SCALE:
            old *= tl.load(row_scale_ptr + first_m + in_m, mask=mask_m, other=0.0)[:, None]
        acc += old
    _store(c, acc, mask, UPCAST and c_ptr.dtype.element_ty == tl.bfloat16)


@jit
def _jacobian_kernel(
    acc_ptr, w_ptr, s_ptr, zy_ptr, targets_ptr, out_ptr, N, V, D, stride_wv, stride_wd,
    stride_on, k, slope_scale, ignore_index,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """J = k·(f'_y·weight[y] - acc / s); 0 in rows without a target."""
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    y = tl.load(targets_ptr + offs_n, mask=mask_n, other=ignore_index)
    live = (y != ignore_index) & (y >= 0) & (y < V)
    w_offs = y[:, None] * stride_wv + offs_d[None, :] * stride_wd
    w = tl.load(w_ptr + w_offs, mask=mask & live[:, None], other=0.0).to(tl.float32)
    if SOFTCAP:
        u = tl.load(zy_ptr + offs_n, mask=mask_n, other=0.0) * slope_scale
        w *= (1.0 - u * u)[:, None]
    acc = tl.load(acc_ptr + offs_n[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    s = tl.load(s_ptr + offs_n, mask=mask_n, other=1.0)
    out = tl.where(live[:, None], k * (w - acc / s[:, None]), 0.0)
    at = out_ptr + offs_n[:, None] * stride_on + offs_d[None, :]
    _store(at, out, mask, UPCAST)


def _grid(rows: int, columns: int, config: Config) -> tuple[int, int]:
    return triton.cdiv(rows, config.block_n), triton.cdiv(columns, config.block_v)


def _split_size(V: int, tile: int, config: Config) -> tuple[int, int]:
    """Return (tile, split): a slice of V is whole splits, and a split is whole blocks."""
    blocks = max(1, min(tile, V) // config.block_v)
    return blocks * config.block_v, math.gcd(blocks, config.split_tiles) * config.block_v


def _launch_logits(x, weight, bias, y, head, lo, hi, split, config, part, z, extras, ref=None):
    """Run _logits_kernel on entries lo to hi; ``part`` or ``z`` may be None: not wanted."""
    pre = head.scale / (head.temperature if head.softcap is None else head.softcap)
    post = 1.0 if head.softcap is None else head.softcap / head.temperature
    shared = ref is None or ref.weight is None
    ref_w = weight if shared else ref.weight
    ref_x = x if ref is None else ref.hidden
    ref_bias = None if ref is None else ref.bias
    n, splits = x.shape[0], triton.cdiv(hi - lo, split)
    _logits_kernel[(triton.cdiv(n, config.block_n), splits)](
        x, ref_x, weight, ref_w, x if bias is None else bias, x if ref_bias is None else ref_bias,
        y, x if part is None else part, x if z is None else z,
        n, lo, hi, x.shape[1], split, splits * n,
        *x.stride(), *ref_x.stride(), *weight.stride(), *ref_w.stride(),
        0 if z is None else z.stride(0), pre, post, 0.0 if ref is None else ref.extrapolation,
        HAS_BIAS=bias is not None, HAS_REF_BIAS=ref_bias is not None,
        SOFTCAP=head.softcap is not None, TRIPLE=ref is not None, SHARED=shared, EXTRAS=extras,
        STATS=part is not None, STORE_Z=z is not None, UPCAST=_upcast(x), LOWEST=LOWEST,
        BLOCK_N=config.block_n, BLOCK_V=config.block_v, BLOCK_D=config.block_d,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _upcast(x: torch.Tensor) -> bool:
    return INTERPRETED and x.dtype == torch.bfloat16


def _launch_weights(z, out, m, s, y, head, lo, size, ignore_index, config, grads=None):
    """Run _weights_kernel; ``grads`` is (by logps, by entropy, entropy) for backward, or None."""
    g, g_entropy, entropy = (None, None, None) if grads is None else grads
    slope = 1.0 if head.softcap is None else head.temperature / head.softcap
    _weights_kernel[_grid(z.shape[0], size, config)](
        z, out, m, s, m if g is None else g, m if g_entropy is None else g_entropy,
        m if g_entropy is None else entropy, y,
        z.shape[0], lo, size, z.stride(0), ignore_index, slope,
        SOFTCAP=head.softcap is not None, BACKWARD=grads is not None, HAS_G=g is not None,
        ENTROPY=g_entropy is not None, UPCAST=_upcast(out),
        BLOCK_N=config.block_n, BLOCK_V=config.block_v, num_warps=config.num_warps,
    )  # fmt: skip


def _gemm(a, b, c, *, alpha=1.0, accumulate=True, row_scale=None, targets=None, ignore=0):
    """Compute c = row_scale·c + alpha·a @ b (or without c); ``targets`` masks b's rows."""
    M, K = a.shape
    N = b.shape[1]
    config = config_for(a.dtype, gemm=True)
    _gemm_kernel[(triton.cdiv(M, config.block_n), triton.cdiv(N, config.block_v))](
        a, b, c, c if row_scale is None else row_scale, c if targets is None else targets,
        M, N, K, *a.stride(), *b.stride(), c.stride(0), alpha, ignore,
        ACCUMULATE=accumulate, HAS_ROW_SCALE=row_scale is not None, MASK_K=targets is not None,
        UPCAST=_upcast(a), BLOCK_M=config.block_n, BLOCK_N=config.block_v, BLOCK_K=config.block_d,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def forward(
    hidden, weight, targets, bias, head, ignore_index, extras, jacobian, rows, tile, reference=None
):
    """Return ({name: [N] statistic}, norm [2, N], J [N, D] or None), as the chunked path does."""
    (N, D), V = hidden.shape, weight.shape[0]
    config = config_for(hidden.dtype)
    names = ("logps", "lse", *extras) + (("reference", "extrapolated") if reference else ())
    models, num = 3 if reference else 1, 6 if extras else 3
    state = hidden.new_zeros(models, num, N, dtype=torch.float32)
    state[:, 0] = LOWEST
    J = torch.empty_like(hidden, memory_format=torch.contiguous_format) if jacobian else None
    tile, split = _split_size(V, tile, config)
    step = tile if jacobian else V
    with on_device(hidden):
        for start in range(0, N, rows):
            chunk = slice(start, start + rows)
            x, y = hidden[chunk], targets[chunk]
            ref = None if reference is None else reference._replace(hidden=reference.hidden[chunk])
            n = x.shape[0]
            stats = state[:, :, chunk].contiguous()
            part = stats.new_empty(models, num, triton.cdiv(min(step, V), split), n)
            scale = stats.new_empty(n)
            if jacobian:
                z = stats.new_empty(n, min(tile, V))
                p = torch.empty_like(z, dtype=hidden.dtype)
                acc = stats.new_zeros(n, D)
            for lo in range(0, V, step):
                hi = min(lo + step, V)
                _launch_logits(
                    x, weight, bias, y, head, lo, hi, split, config, part,
                    z if jacobian else None, bool(extras), ref,
                )  # fmt: skip
                splits = triton.cdiv(hi - lo, split)
                _combine_kernel[(triton.cdiv(n, 128), models)](
                    part, stats, scale, n, splits, splits * n, EXTRAS=bool(extras), BLOCK_N=128
                )
                if jacobian:
                    _launch_weights(
                        z, p, stats[0, 0], scale, y, head, lo, hi - lo, ignore_index, config
                    )
                    _gemm(p[:, : hi - lo], weight[lo:hi], acc, row_scale=scale)
            state[:, :, chunk] = stats
            if jacobian:
                slope = 1.0 if head.softcap is None else head.temperature / head.softcap
                _jacobian_kernel[(triton.cdiv(n, 16), triton.cdiv(D, 128))](
                    acc, weight, stats[0, 1], stats[0, 2], y, J[chunk], n, V, D,
                    *weight.stride(), D, head.scale / head.temperature, slope, ignore_index,
                    SOFTCAP=head.softcap is not None, UPCAST=_upcast(x), BLOCK_N=16, BLOCK_D=128,
                )  # fmt: skip
    rest = dict(zip(("mean_logits", "entropy", "log_sum_sq_probs"), state[0, 3:], strict=False))
    out = finish_stats(*state[0, :3], {name: rest.get(name) for name in extras}, V)
    for model, name in enumerate(("reference", "extrapolated") if reference else (), 1):
        out[name] = finish_stats(*state[model, :3], {}, V)["logps"]
    dead = targets == ignore_index
    result = {name: out[name].masked_fill(dead, 0) for name in names}
    return result, state[0, :2].masked_fill(dead, 1), J


def backward(
    grad_logps, grad_entropy, hidden, weight, targets, bias, norm, entropy, head, ignore_index,
    needs, rows, tile, spare,
):  # fmt: skip
    """Return (dHidden, dWeight, dBias), None where ``needs`` says so, from recomputed logits."""
    V, D = weight.shape
    config = config_for(hidden.dtype)
    tile, split = _split_size(V, tile, config)
    k = head.scale / head.temperature
    if grad_logps is not None:
        grad_logps = grad_logps.contiguous()
    if grad_entropy is not None:
        grad_entropy = grad_entropy.contiguous()

    def run(first, last, dh, dw, db):
        n = min(rows, last - first)
        z_buffer = norm.new_empty(n, min(tile, V))
        dz_buffer = torch.empty_like(z_buffer, dtype=hidden.dtype)
        # One row chunk writes its slice of dWeight at once; several sum it in float32 first.
        several = last - first > n and weight.dtype != torch.float32
        dw_buffer = norm.new_empty(min(tile, V), D) if dw is not None and several else None
        for lo in range(0, V, tile):
            hi = min(lo + tile, V)
            w = weight[lo:hi]
            if dw is not None:
                dw_slice = dw[lo:hi] if dw_buffer is None else dw_buffer[: hi - lo]
            db_sum = norm.new_zeros(hi - lo) if db is not None else None
            for start in range(first, last, rows):
                chunk = slice(start, min(start + rows, last))
                x, y = hidden[chunk], targets[chunk]
                z, dz = z_buffer[: x.shape[0]], dz_buffer[: x.shape[0]]
                _launch_logits(x, weight, bias, y, head, lo, hi, split, config, None, z, False)
                grads = (v if v is None else v[chunk] for v in (grad_logps, grad_entropy, entropy))
                m, s = norm[:, chunk]
                _launch_weights(
                    z, dz, m, s, y, head, lo, hi - lo, ignore_index, config, tuple(grads)
                )
                dz = dz[:, : hi - lo]
                if dh is not None:
                    _gemm(dz, w, dh[start - first : chunk.stop - first], alpha=k)
                if dw is not None:
                    _gemm(
                        dz.T, x, dw_slice, alpha=k, accumulate=start > first, targets=y,
                        ignore=ignore_index,
                    )  # fmt: skip
                if db is not None:
                    db_sum.add_(dz.sum(0, dtype=torch.float32), alpha=k)
            if dw is not None and dw_buffer is not None:
                dw[lo:hi] = dw_slice
            if db is not None:
                db[lo:hi] = db_sum

    with on_device(hidden):
        return arrange_backward(run, hidden, weight, bias, needs, None, rows, spare)
