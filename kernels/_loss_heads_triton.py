"""The Triton kernels of ``pair_loss_head`` and their launchers.

Forward, program b has pair b; backward, program s has sequence s. What is computed is said in
``loss_heads.py``.
"""

from __future__ import annotations

from torch import Tensor

from ._common import jit, store_rounded, tl
from .loss_rows import confidence_device
from .losses import device_options, score_device
from .sequence_logps import BLOCK_T


@jit
def _bounds(cu_ptr, seq, N):
    """Return where a sequence begins and ends, within the N tokens whatever cu says."""
    start = tl.minimum(tl.maximum(tl.load(cu_ptr + seq).to(tl.int64), 0), N)
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + seq + 1).to(tl.int64), start), N)
    return start, end


@jit
def _sequence(
    seq,
    logps_ptr,
    ref_ptr,
    extrapolated_ptr,
    mask_ptr,
    cu_ptr,
    N,
    stride_l,
    stride_r,
    stride_e,
    stride_m,
    HAS_REFERENCE: tl.constexpr,
    REF_TOKENS: tl.constexpr,
    NOISE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sum one sequence under each model: a partial sum per lane, then a tree over the lanes."""
    start, end = _bounds(cu_ptr, seq, N)
    policy = tl.zeros([BLOCK_T], tl.float32)
    reference = tl.zeros([BLOCK_T], tl.float32)
    extrapolated = tl.zeros([BLOCK_T], tl.float32)
    count = tl.zeros([BLOCK_T], tl.int32)
    for begin in range(start, end, BLOCK_T):
        offs_t = begin + tl.arange(0, BLOCK_T).to(tl.int64)
        kept = offs_t < end
        if HAS_MASK:
            kept = kept & (tl.load(mask_ptr + offs_t * stride_m, mask=kept, other=0) != 0)
        policy += tl.load(logps_ptr + offs_t * stride_l, mask=kept, other=0.0).to(tl.float32)
        if REF_TOKENS:
            reference += tl.load(ref_ptr + offs_t * stride_r, mask=kept, other=0.0).to(tl.float32)
        if NOISE:
            more = tl.load(extrapolated_ptr + offs_t * stride_e, mask=kept, other=0.0)
            extrapolated += more.to(tl.float32)
        count += kept.to(tl.int32)
    ref = tl.sum(reference, axis=0)  # 0 where there is none
    if HAS_REFERENCE and not REF_TOKENS:
        ref = tl.load(ref_ptr + seq * stride_r).to(tl.float32)
    return (
        tl.sum(policy, axis=0),
        ref,
        tl.sum(extrapolated, axis=0),
        tl.sum(count, axis=0).to(tl.int64),
    )


@jit
def _forward_kernel(
    logps_ptr,
    ref_ptr,
    extrapolated_ptr,
    mask_ptr,
    cu_ptr,
    weights_ptr,
    alpha_ptr,
    threshold_ptr,
    losses_ptr,
    chosen_rewards_ptr,
    rejected_rewards_ptr,
    margins_ptr,
    sums_ptr,
    counts_ptr,
    slopes_ptr,
    is_noisy_ptr,
    confidences_ptr,
    N,
    stride_l,
    stride_r,
    stride_e,
    stride_m,
    stride_w,
    beta,
    label_smoothing,
    extra,
    power,
    HAS_REFERENCE: tl.constexpr,
    REF_TOKENS: tl.constexpr,
    NOISE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    REFERENCE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    LOSS: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Take one pair from its tokens to its loss, rewards and derivatives by its two sums."""
    b = tl.program_id(0).to(tl.int64)
    pc, rc, ec, nc = _sequence(
        2 * b, logps_ptr, ref_ptr, extrapolated_ptr, mask_ptr, cu_ptr, N, stride_l, stride_r,
        stride_e, stride_m, HAS_REFERENCE, REF_TOKENS, NOISE, HAS_MASK, BLOCK_T,
    )  # fmt: skip
    pr, rr, er, nr = _sequence(
        2 * b + 1, logps_ptr, ref_ptr, extrapolated_ptr, mask_ptr, cu_ptr, N, stride_l, stride_r,
        stride_e, stride_m, HAS_REFERENCE, REF_TOKENS, NOISE, HAS_MASK, BLOCK_T,
    )  # fmt: skip
    smoothing = label_smoothing
    if NOISE:
        confidence = confidence_device(beta * ((ec - rc) - (er - rr)))
        is_noisy = confidence < tl.load(threshold_ptr)
        smoothing = tl.where(is_noisy, tl.load(alpha_ptr), 0.0)
        tl.store(is_noisy_ptr + b, is_noisy)
        tl.store(confidences_ptr + b, confidence)
    own, turn_a = score_device(pc, rc, nc, power, REFERENCE, PER_TOKEN, DIVERGENCE)
    other, turn_b = score_device(pr, rr, nr, power, REFERENCE, PER_TOKEN, DIVERGENCE)
    value, slope_c, slope_r = LOSS(own, other, beta, smoothing, extra, INNER)
    slope_c *= turn_a
    slope_r *= turn_b
    if HAS_WEIGHTS:
        w = tl.load(weights_ptr + b * stride_w).to(tl.float32)
        value *= w
        slope_c *= w
        slope_r *= w
    chosen = pc - rc
    rejected = pr - rr
    tl.store(losses_ptr + b, value)
    tl.store(chosen_rewards_ptr + b, beta * chosen)
    tl.store(rejected_rewards_ptr + b, beta * rejected)
    tl.store(margins_ptr + b, chosen - rejected)
    tl.store(slopes_ptr + 2 * b, slope_c)
    tl.store(slopes_ptr + 2 * b + 1, slope_r)
    tl.store(sums_ptr + 2 * b, pc)
    tl.store(sums_ptr + 2 * b + 1, pr)
    tl.store(counts_ptr + 2 * b, nc)
    tl.store(counts_ptr + 2 * b + 1, nr)


@jit
def _backward_kernel(
    grad_ptr,
    grad_losses_ptr,
    slopes_ptr,
    cu_ptr,
    mask_ptr,
    N,
    S,
    stride_gl,
    stride_m,
    HAS_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write one sequence's scalar to its tokens; the first and last also what lies outside."""
    seq = tl.program_id(0).to(tl.int64)
    start, end = _bounds(cu_ptr, seq, N)
    upstream = tl.load(grad_losses_ptr + seq // 2 * stride_gl).to(tl.float32)
    upstream *= tl.load(slopes_ptr + seq)
    first = tl.where(seq == 0, 0, start)
    last = tl.where(seq == S - 1, N, end)
    for begin in range(first, last, BLOCK_T):
        offs_t = begin + tl.arange(0, BLOCK_T).to(tl.int64)
        written = offs_t < last
        kept = (offs_t >= start) & (offs_t < end)
        if HAS_MASK:
            kept = kept & (tl.load(mask_ptr + offs_t * stride_m, mask=kept, other=0) != 0)
        store_rounded(grad_ptr + offs_t, tl.where(kept, upstream, 0.0), written)


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def forward(tensors, cu_seqlens, weights, scalars, ref_tokens, objective, noise, outputs):
    """Write ``outputs``; ``noise`` says whether the smoothing comes from the extrapolated."""
    token_logps, ref_logps, _, mask = tensors
    _forward_kernel[(outputs[0].numel(),)](
        *tensors,
        cu_seqlens,
        weights,
        *scalars,
        *outputs,
        token_logps.shape[0],
        *(_stride(t) for t in (*tensors, weights)),
        objective.beta,
        objective.label_smoothing,
        objective.extra,
        objective.power,
        HAS_REFERENCE=ref_logps is not None,
        REF_TOKENS=ref_tokens,
        NOISE=noise,
        HAS_MASK=mask is not None,
        HAS_WEIGHTS=weights is not None,
        **device_options(objective),
        BLOCK_T=BLOCK_T,
        num_warps=4,
    )


def backward(grad, grad_losses, slopes, cu_seqlens, mask):
    """Write the gradient of every token."""
    sequences = cu_seqlens.shape[0] - 1
    _backward_kernel[(sequences,)](
        grad,
        grad_losses,
        slopes,
        cu_seqlens,
        mask,
        grad.shape[0],
        sequences,
        grad_losses.stride(0),
        _stride(mask),
        HAS_MASK=mask is not None,
        BLOCK_T=BLOCK_T,
        num_warps=4,
    )
