"""The plain GEMM of the linear head's gradients, and what it shares with the logits kernel.

A 16-bit operand is read through pointers or, where USE_TMA says so, through the tensor descriptor
that is passed in the pointer's place: the copy engine of sm_90 and later then computes addresses
and bounds, and zeros what lies outside.
"""

from __future__ import annotations

from ._common import jit, store_rounded, tl


@jit
def _grouped(pid, rows, columns, GROUP: tl.constexpr):
    """Return (row, column) of a program: GROUP rows share each column before the next one.

    The programs that run at once then read GROUP blocks of hidden rows, which stay in the L2
    cache, and the same few weight tiles, rather than as many row blocks as there are processors.
    """
    in_group = GROUP * columns
    first = pid // in_group * GROUP
    height = tl.minimum(rows - first, GROUP)
    pid = pid % in_group
    return first + pid % height, pid // height


@jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:  # Triton's interpreter multiplies bfloat16 operands as raw integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def _halves(acc):
    """Return the left and the right half of a tile's columns."""
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


@jit
def _write_c(
    acc, c, offs_m, mask_m, first, end, scale, alpha, ACCUMULATE: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """Store scale·C + alpha·acc (or alpha·acc) over columns ``first`` on, in PIECES pieces."""
    if PIECES > 1:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = _halves(acc)
        _write_c(left, c, offs_m, mask_m, first, end, scale, alpha, ACCUMULATE, PIECES // 2)
        _write_c(right, c, offs_m, mask_m, first + HALF, end, scale, alpha, ACCUMULATE, PIECES // 2)
    else:
        offs_n = first + tl.arange(0, acc.shape[1])
        mask = mask_m[:, None] & (offs_n < end)[None, :]
        c += offs_m[:, None] + offs_n[None, :]
        acc *= alpha
        if ACCUMULATE:
            acc += tl.load(c, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
        store_rounded(c, acc, mask)


@jit
def _gemm_kernel(
    a_ptr, b_ptr, c_ptr, row_scale_ptr, targets_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_cm, alpha, ignore_index,
    ACCUMULATE: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, MASK_K: tl.constexpr,
    UPCAST: tl.constexpr, USE_TMA: tl.constexpr, GROUP: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """C = row_scale·C + alpha·A @ B, summed in float32 and rounded once, to C's dtype.

    MASK_K: the inner index is a row of hidden states; rows without a target are read as 0, since
    0 times a NaN that they may hold would be NaN.
    """
    pid_m, pid_n = _grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    in_m = tl.arange(0, BLOCK_M)
    in_n = tl.arange(0, BLOCK_N)
    in_k = tl.arange(0, BLOCK_K)
    first_m = pid_m.to(tl.int64) * BLOCK_M
    first_n = pid_n.to(tl.int64) * BLOCK_N
    mask_m = in_m < M - first_m
    if not USE_TMA:
        mask_n = in_n < N - first_n
        a_offs = in_m[:, None] * stride_am + in_k[None, :] * stride_ak
        b_offs = in_k[:, None] * stride_bk + in_n[None, :] * stride_bn
        a_at = a_ptr + first_m * stride_am
        b_at = b_ptr + first_n * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if USE_TMA:
            a = a_ptr.load([pid_m * BLOCK_M, k])
            b = b_ptr.load([k, pid_n * BLOCK_N])
        else:
            mask_k = in_k < K - k
            a = tl.load(a_at + a_offs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            live = mask_k
            if MASK_K:
                y = tl.load(targets_ptr + k + in_k, mask=mask_k, other=ignore_index)
                live = mask_k & (y != ignore_index)
            b = tl.load(b_at + b_offs, mask=live[:, None] & mask_n[None, :], other=0.0)
            a_at += BLOCK_K * stride_ak
            b_at += BLOCK_K * stride_bk
        acc = _dot(a, b, acc, UPCAST)
    if HAS_ROW_SCALE:
        scale = tl.load(row_scale_ptr + first_m + in_m, mask=mask_m, other=0.0)
    else:
        scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    c = c_ptr + first_m * stride_cm + first_n
    _write_c(acc, c, in_m * stride_cm, mask_m, 0, N - first_n, scale, alpha, ACCUMULATE, PIECES)
