"""Pair losses straight from token log-probabilities: one launch forward, one launch backward.

Responses lie end to end, chosen and rejected in turn: pair b is the sequences 2b and 2b + 1 of
``cu_seqlens``. With ``sums[s]`` the sum over the tokens t of sequence s that count, ``ref`` the
same under the reference model, and l a row of ``losses.LOSSES``::

    chosen = sums[2b] - ref[2b]          rejected = sums[2b + 1] - ref[2b + 1]
    margins[b] = chosen - rejected       losses[b] = weights[b] * l(beta * margins[b])
    d losses[b] / d token_logps[t] = +slopes[b] in 2b, -slopes[b] in 2b + 1, 0 where masked
    slopes[b] = weights[b] * beta * l'(beta * margins[b])

Shapes: ``token_logps`` is ``[N]``, ``cu_seqlens`` ``[2B + 1]``. A program has one pair. The forward
pass reads 4 bytes a token (8 with the reference's tokens, 12 with the extrapolated ones, 1 more
with a mask), adds as often, and writes about 48 bytes a pair; the backward pass writes 4 bytes a
token. What it replaces, ``sequence_logps`` and ``preference_loss`` over strided views, is two
launches forward and five backward, with ``[2B]`` tensors written and read between them.

Each sequence is summed on its own, in ``sequence_logps``' order: bit for bit its sums, whatever
the other sequences hold.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import (
    INTEGERS,
    check_choice,
    check_number,
    check_tensor,
    compute_dtype,
    jit,
    on_device,
    resolve_impl,
    store_rounded,
    tl,
)
from .losses import LOSSES
from .sequence_logps import BLOCK_T, _check_spans, sequence_logps_reference

NOISE_AWARE = "noise_aware"
PAIR_LOSSES = (*LOSSES, NOISE_AWARE)


class PairLosses(NamedTuple):
    """Losses of B pairs, differentiable in the token log-probs, and detached statistics.

    ``margins`` are in nats, the rewards scaled by beta; ``sums`` and ``counts`` are of the 2B
    sequences. The last two are None unless the loss is ``"noise_aware"``.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    sums: Tensor
    counts: Tensor
    is_noisy: Tensor | None = None
    confidences: Tensor | None = None


def pair_loss_head_reference(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    extrapolated_token_logps: Tensor | None,
    mask: Tensor | None,
    weights: Tensor | None,
    alpha: Tensor | None,
    threshold: Tensor | None,
    loss: str,
    beta: float,
    label_smoothing: float,
) -> PairLosses:
    """Return everything by eager PyTorch, in the dtype given; ``ref_logps`` are the 2B sums."""
    sums, counts = sequence_logps_reference(token_logps, cu_seqlens, mask)
    chosen, rejected = (sums - ref_logps).view(-1, 2).unbind(-1)
    smoothing, is_noisy, confidences = label_smoothing, None, None
    if loss == NOISE_AWARE:
        beyond = sequence_logps_reference(extrapolated_token_logps, cu_seqlens, mask).sums
        c, r = (beyond - ref_logps).detach().view(-1, 2).unbind(-1)
        confidences = (beta * (c - r)).sigmoid()
        is_noisy = confidences < threshold
        smoothing = is_noisy.to(confidences.dtype) * alpha
    margins = chosen - rejected
    losses = LOSSES["sigmoid" if loss == NOISE_AWARE else loss].value(beta * margins, smoothing)
    losses = losses if weights is None else weights * losses
    rewards = (beta * x.detach() for x in (chosen, rejected))
    return PairLosses(
        losses, *rewards, margins.detach(), sums.detach(), counts, is_noisy, confidences
    )


# Triton: program b has pair b; in the backward pass program s has sequence s.


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
    ref = tl.sum(reference, axis=0)
    if not REF_TOKENS:
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
    REF_TOKENS: tl.constexpr,
    NOISE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    LOSS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Take one pair from its tokens to its loss, rewards and derivative by the margin."""
    b = tl.program_id(0).to(tl.int64)
    pc, rc, ec, nc = _sequence(
        2 * b, logps_ptr, ref_ptr, extrapolated_ptr, mask_ptr, cu_ptr, N, stride_l, stride_r,
        stride_e, stride_m, REF_TOKENS, NOISE, HAS_MASK, BLOCK_T,
    )  # fmt: skip
    pr, rr, er, nr = _sequence(
        2 * b + 1, logps_ptr, ref_ptr, extrapolated_ptr, mask_ptr, cu_ptr, N, stride_l, stride_r,
        stride_e, stride_m, REF_TOKENS, NOISE, HAS_MASK, BLOCK_T,
    )  # fmt: skip
    chosen = pc - rc
    rejected = pr - rr
    margin = chosen - rejected
    smoothing = label_smoothing
    if NOISE:
        z = beta * ((ec - rc) - (er - rr))
        tail = tl.exp(-tl.abs(z))
        confidence = tl.where(z >= 0.0, 1.0, tail) / (1.0 + tail)
        is_noisy = confidence < tl.load(threshold_ptr)
        smoothing = tl.where(is_noisy, tl.load(alpha_ptr), 0.0)
        tl.store(is_noisy_ptr + b, is_noisy)
        tl.store(confidences_ptr + b, confidence)
    value, slope = LOSS(beta * margin, smoothing)
    slope *= beta
    if HAS_WEIGHTS:
        w = tl.load(weights_ptr + b * stride_w).to(tl.float32)
        value *= w
        slope *= w
    tl.store(losses_ptr + b, value)
    tl.store(chosen_rewards_ptr + b, beta * chosen)
    tl.store(rejected_rewards_ptr + b, beta * rejected)
    tl.store(margins_ptr + b, margin)
    tl.store(slopes_ptr + b, slope)
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
    pair = seq // 2
    upstream = tl.load(grad_losses_ptr + pair * stride_gl).to(tl.float32)
    upstream *= tl.load(slopes_ptr + pair)
    upstream = tl.where(seq % 2 == 0, upstream, -upstream)
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


def _forward_triton(tensors, cu_seqlens, weights, scalars, ref_tokens, loss, numbers, outputs):
    token_logps, _, _, mask = tensors
    noise = loss == NOISE_AWARE
    _forward_kernel[(outputs[0].numel(),)](
        *tensors,
        cu_seqlens,
        weights,
        *scalars,
        *outputs,
        token_logps.shape[0],
        *(_stride(t) for t in (*tensors, weights)),
        *numbers,
        REF_TOKENS=ref_tokens,
        NOISE=noise,
        HAS_MASK=mask is not None,
        HAS_WEIGHTS=weights is not None,
        LOSS=LOSSES["sigmoid" if noise else loss].device,
        BLOCK_T=BLOCK_T,
        num_warps=4,
    )


def _backward_triton(grad, grad_losses, slopes, cu_seqlens, mask):
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


# Chunked torch


def margin_losses(sums, ref, loss, beta, smoothing, weights):
    """Return losses, chosen and rejected rewards, margins and slopes ``[B]`` of sums ``[2B]``."""
    chosen, rejected = (sums - ref).view(-1, 2).unbind(-1)
    margins = chosen - rejected
    row, z = LOSSES[loss], beta * margins
    value, slope = row.value(z, smoothing), beta * row.slope(z, smoothing)
    if weights is not None:
        value, slope = weights * value, weights * slope
    return value, beta * chosen, beta * rejected, margins, slope


def _sums(token_logps, spans, mask, dtype):
    values = token_logps.to(dtype)
    values = values if mask is None else torch.where(mask, values, 0)
    values = values.contiguous()  # torch.sum's order follows the strides
    return torch.stack([values[start:end].sum() for start, end in spans])


def _forward_chunked(tensors, cu_seqlens, weights, scalars, ref_tokens, loss, numbers, outputs):
    token_logps, ref, extrapolated, mask = tensors
    losses, *_, sums, counts, slopes, is_noisy, confidences = outputs
    dtype = losses.dtype
    beta, smoothing = numbers
    spans = list(pairwise(cu_seqlens.tolist()))
    sums.copy_(_sums(token_logps, spans, mask, dtype))
    for s, (start, end) in enumerate(spans):
        counts[s] = end - start if mask is None else mask[start:end].sum()
    ref = _sums(ref, spans, mask, dtype) if ref_tokens else ref.to(dtype)
    if loss == NOISE_AWARE:
        alpha, threshold = scalars
        c, r = (_sums(extrapolated, spans, mask, dtype) - ref).view(-1, 2).unbind(-1)
        torch.sigmoid(beta * (c - r), out=confidences)
        torch.lt(confidences, threshold, out=is_noisy)
        loss, smoothing = "sigmoid", torch.where(is_noisy, alpha, 0)
    weights = None if weights is None else weights.to(dtype)
    *found, slope = margin_losses(sums, ref, loss, beta, smoothing, weights)
    for out, value in zip(outputs[:4], found, strict=True):
        out.copy_(value)
    slopes.copy_(slope)


def _backward_chunked(grad, grad_losses, slopes, cu_seqlens, mask):
    pairs = grad_losses * slopes
    signed = torch.stack([pairs, -pairs], -1).flatten()
    tokens = signed.repeat_interleave(cu_seqlens.diff(), output_size=grad.shape[0])
    grad.copy_(tokens if mask is None else torch.where(mask, tokens, 0))


# The op


def _allocate(token_logps, ref_logps, extrapolated, cu_seqlens, weights, loss):
    """Return the op's outputs, not yet written, in the order of its kernel."""
    dtype = compute_dtype(token_logps, ref_logps, extrapolated, weights)
    sequences = cu_seqlens.shape[0] - 1
    pairs = sequences // 2
    noisy = pairs if loss == NOISE_AWARE else 0
    return (
        *(token_logps.new_empty(pairs, dtype=dtype) for _ in range(4)),
        token_logps.new_empty(sequences, dtype=dtype),
        token_logps.new_empty(sequences, dtype=torch.int64),
        token_logps.new_empty(pairs, dtype=dtype),
        token_logps.new_empty(noisy, dtype=torch.bool),
        token_logps.new_empty(noisy, dtype=dtype),
    )


@torch.library.custom_op("prefalign::pair_loss_head", mutates_args=())
def _pair_loss_head(
    token_logps: Tensor,
    ref_logps: Tensor,
    extrapolated: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    alpha: Tensor | None,
    threshold: Tensor | None,
    ref_tokens: bool,
    loss: str,
    beta: float,
    label_smoothing: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_spans(cu_seqlens, token_logps.shape[0])
    outputs = _allocate(token_logps, ref_logps, extrapolated, cu_seqlens, weights, loss)
    if outputs[0].numel():
        forward = _forward_triton if impl == "triton" else _forward_chunked
        with on_device(token_logps):
            forward(
                (token_logps, ref_logps, extrapolated, mask), cu_seqlens, weights,
                (alpha, threshold), ref_tokens, loss, (beta, label_smoothing), outputs,
            )  # fmt: skip
    return outputs


@_pair_loss_head.register_fake
def _(token_logps, ref_logps, extrapolated, mask, cu_seqlens, weights, alpha, threshold,
      ref_tokens, loss, beta, label_smoothing, impl):  # fmt: skip
    return _allocate(token_logps, ref_logps, extrapolated, cu_seqlens, weights, loss)


@torch.library.custom_op("prefalign::pair_loss_head_backward", mutates_args=())
def _pair_loss_head_backward(
    grad_losses: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    tokens: int,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    if not slopes.numel():
        return slopes.new_zeros(tokens, dtype=dtype)
    grad = slopes.new_empty(tokens, dtype=dtype)
    if tokens:
        backward = _backward_triton if impl == "triton" else _backward_chunked
        with on_device(grad):
            backward(grad, grad_losses, slopes, cu_seqlens, mask)
    return grad


@_pair_loss_head_backward.register_fake
def _(grad_losses, slopes, cu_seqlens, mask, tokens, dtype, impl):
    return slopes.new_empty(tokens, dtype=dtype)


def _setup_context(ctx, inputs, output):
    token_logps, _, _, mask, cu_seqlens, *_ = inputs
    _, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(output[6], cu_seqlens, mask)
    ctx.constants = token_logps.shape[0], token_logps.dtype, inputs[-1]


def _backward(ctx, grad_losses, *_):
    grad = None
    if ctx.needs_input_grad[0] and grad_losses is not None:
        grad = _pair_loss_head_backward(grad_losses, *ctx.saved_tensors, *ctx.constants)
    return grad, *[None] * 12


_pair_loss_head.register_autograd(_backward, setup_context=_setup_context)


def check_pair_bounds(cu_seqlens: Tensor, like: tuple[str, Tensor]) -> int:
    """Check the type and shape of ``cu_seqlens`` and return B."""
    check_tensor("cu_seqlens", cu_seqlens, dtypes=INTEGERS, ndim=1, like=like)
    if cu_seqlens.shape[0] % 2 == 0:
        raise ValueError(
            "cu_seqlens: expected [2B + 1], a chosen and a rejected sequence for each pair, "
            f"got {cu_seqlens.shape[0]} elements"
        )
    return cu_seqlens.shape[0] // 2


def check_loss(loss, label_smoothing, alpha, threshold, like, dtype):
    """Check what a loss takes; return (label_smoothing, alpha, threshold), the last two tensors."""
    check_choice("loss", loss, PAIR_LOSSES)
    label_smoothing = check_number("label_smoothing", label_smoothing, low=0, high=0.5)
    if loss == NOISE_AWARE:
        if label_smoothing:
            raise ValueError(
                f"label_smoothing: expected 0 with loss='noise_aware', whose smoothing is alpha, "
                f"got {label_smoothing}"
            )
        if threshold is None:
            raise ValueError("threshold: expected a number with loss='noise_aware', got None")
        alpha = 0.1 if alpha is None else alpha
        return 0.0, *(
            _scalar(name, value, like, dtype)
            for name, value in (("alpha", alpha), ("threshold", threshold))
        )
    for name, value in (("alpha", alpha), ("threshold", threshold)):
        if value is not None:
            raise ValueError(f"{name}: expected None, only 'noise_aware' takes it, got {value}")
    return label_smoothing, None, None


def _scalar(name, value, like, dtype):
    """Return a number in [0, 1] as a 0-dim tensor on the device of ``like``, with no host sync."""
    if isinstance(value, Tensor):
        check_tensor(name, value, ndim=0, like=like, constant=True)
        return value.to(dtype)
    number = check_number(name, value, low=0, high=1)
    return torch.full((), number, dtype=dtype, device=like[1].device)


def pair_loss_head(
    token_logps: Tensor,
    *,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None = None,
    ref_token_logps: Tensor | None = None,
    extrapolated_token_logps: Tensor | None = None,
    mask: Tensor | None = None,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    alpha: float | Tensor | None = None,
    threshold: float | Tensor | None = None,
    weights: Tensor | None = None,
    impl: str = "auto",
) -> PairLosses:
    """Return the preference loss of each pair from the log-probs of its tokens.

    Equivalent PyTorch::

        sums = torch.stack([s.sum() for s in token_logps.split(cu_seqlens.diff().tolist())])
        chosen, rejected = (sums - ref_logps).view(-1, 2).unbind(-1)
        z = beta * (chosen - rejected)
        losses = -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)

    With ``loss="noise_aware"`` the smoothing of a pair is ``alpha`` where
    ``sigmoid(beta * margin) < threshold`` for the margin of ``extrapolated_token_logps``, else 0.

    Args:
        token_logps: ``[N]``, any float dtype and stride: log-prob of each token of the responses,
            in nats, packed chosen, rejected, chosen, rejected, and so on.
        cu_seqlens: ``[2B + 1]``, int32 or int64, on the same device: pair b is the sequences 2b
            (chosen) and 2b + 1 (rejected), sequence s the tokens
            ``cu_seqlens[s]:cu_seqlens[s + 1]``. From 0 to N, checked on a CPU only.
        ref_logps: ``[2B]``, float: the sums under the reference model. A constant: one that
            requires grad is refused. So are all that follow.
        ref_token_logps: ``[N]``, float: its tokens, summed here. Exactly one of the two.
        extrapolated_token_logps: ``[N]``, float: for ``"noise_aware"`` alone, which needs it.
        mask: ``[N]``, bool or integer, 0 where a token does not count: it may hold NaN, and its
            gradient is exactly 0. Default None: every token counts.
        loss: a name in ``losses.LOSSES``, or ``"noise_aware"``. Default ``"sigmoid"``, DPO.
        beta: scale of the margin, per nat. Above 0, default 0.1.
        label_smoothing: probability that a label is flipped, in [0, 0.5]. Default 0; must be 0
            with ``"noise_aware"``.
        alpha: label smoothing of noisy pairs, in [0, 1]: a number, or a 0-dim tensor on the device
            whose value is not checked. Default 0.1. ``"noise_aware"`` alone takes it.
        threshold: a pair is noisy when its confidence is strictly below; in [0, 1], likewise.
        weights: ``[B]``, float, multiplies the losses. Default None, all 1.
        impl: ``"auto"``, ``"triton"``, ``"chunked"`` or ``"reference"``. Default ``"auto"``. The
            last two read ``cu_seqlens`` on the host: on a GPU, a sync.

    Returns:
        ``PairLosses``: losses, chosen and rejected rewards (times beta) and margins (nats) ``[B]``,
        sums and counts ``[2B]``; ``is_noisy`` and ``confidences`` ``[B]``, or None. float32
        (float64 if an input is; the inputs' dtype from the reference), counts int64. Only the
        losses are differentiable, once, in ``token_logps``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, a device or ``cu_seqlens`` that does not fit, a number out of range,
            an option that the loss does not take, or a constant that requires grad.

    Numerics:
        float32 sums, by lanes and then a tree, as in ``sequence_logps``; a pair's numbers do not
        depend on the others bit for bit. Where the reference's tokens equal the policy's the loss
        is float32(log 2) exactly. No overflow at any margin. No atomics, no host sync on a GPU.

    Source:
        DPO: Rafailov et al., arXiv 2305.18290, equation 7. Noise-aware: SPA, Kim et al., arXiv
        2406.04412, equations 11 and 12.
    """
    check_tensor("token_logps", token_logps, ndim=1)
    like = ("token_logps", token_logps)
    pairs = check_pair_bounds(cu_seqlens, like)
    if (ref_logps is None) == (ref_token_logps is None):
        got = "neither" if ref_logps is None else "both"
        raise ValueError(f"ref_logps, ref_token_logps: expected exactly one of them, got {got}")
    shape = token_logps.shape
    for name, value, size in (
        ("ref_logps", ref_logps, (2 * pairs,)),
        ("ref_token_logps", ref_token_logps, shape),
        ("extrapolated_token_logps", extrapolated_token_logps, shape),
        ("weights", weights, (pairs,)),
    ):
        if value is not None:
            check_tensor(name, value, shape=size, like=like, constant=True)
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool, *INTEGERS), shape=shape, like=like)
        mask = mask if mask.dtype == torch.bool else mask != 0
    beta = check_number("beta", beta, above=0)
    ref = ref_token_logps if ref_logps is None else ref_logps
    dtype = compute_dtype(token_logps, ref, extrapolated_token_logps, weights)
    label_smoothing, alpha, threshold = check_loss(
        loss, label_smoothing, alpha, threshold, like, dtype
    )
    if (extrapolated_token_logps is None) == (loss == NOISE_AWARE):
        raise ValueError(
            "extrapolated_token_logps: expected a tensor with loss='noise_aware' and None with "
            f"any other, got {type(extrapolated_token_logps).__name__} with {loss!r}"
        )
    impl = resolve_impl(impl, token_logps.device, dtype)
    cu_seqlens = cu_seqlens.contiguous()
    if impl == "reference":
        if not torch.compiler.is_compiling():
            _check_spans(cu_seqlens, shape[0])
        if ref_logps is None:
            ref = sequence_logps_reference(ref_token_logps, cu_seqlens, mask).sums
        return pair_loss_head_reference(
            token_logps, cu_seqlens, ref, extrapolated_token_logps, mask, weights, alpha,
            threshold, loss, beta, label_smoothing,
        )  # fmt: skip
    *outputs, _, is_noisy, confidences = _pair_loss_head(
        token_logps, ref, extrapolated_token_logps, mask, cu_seqlens, weights, alpha, threshold,
        ref_logps is None, loss, beta, label_smoothing, impl,
    )  # fmt: skip
    return PairLosses(*outputs, *((is_noisy, confidences) if loss == NOISE_AWARE else ()))
