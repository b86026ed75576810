"""What ``preference_loss`` and ``noise_aware_loss`` share: one kernel, one chunked path, checks.

Both take ``[B]`` log-probs of policy and reference to losses, rewards and the derivative by the
margin, from which the backward pass is one product. They differ in where a pair's label smoothing
comes from: a number, or the confidence of a third model's log-probs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import check_number, check_tensor, compute_dtype, jit, on_device, tl, triton
from .losses import LOSSES, confidence_device

BLOCK_B = 128


@jit
def _forward_kernel(
    policy_chosen_ptr,
    policy_rejected_ptr,
    reference_chosen_ptr,
    reference_rejected_ptr,
    extrapolated_chosen_ptr,
    extrapolated_rejected_ptr,
    weights_ptr,
    alpha_ptr,
    threshold_ptr,
    losses_ptr,
    chosen_rewards_ptr,
    rejected_rewards_ptr,
    slopes_ptr,
    is_noisy_ptr,
    confidences_ptr,
    stride_pc,
    stride_pr,
    stride_rc,
    stride_rr,
    stride_ec,
    stride_er,
    stride_w,
    B,
    beta,
    label_smoothing,
    NOISE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    LOSS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Take one block of pairs from log-probs to losses, rewards and derivatives, and flags."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = offs < B
    pc = tl.load(policy_chosen_ptr + offs * stride_pc, mask=mask, other=0.0).to(tl.float32)
    pr = tl.load(policy_rejected_ptr + offs * stride_pr, mask=mask, other=0.0).to(tl.float32)
    rc = tl.load(reference_chosen_ptr + offs * stride_rc, mask=mask, other=0.0).to(tl.float32)
    rr = tl.load(reference_rejected_ptr + offs * stride_rr, mask=mask, other=0.0).to(tl.float32)
    smoothing = label_smoothing
    if NOISE:
        offs_ec, offs_er = offs * stride_ec, offs * stride_er
        ec = tl.load(extrapolated_chosen_ptr + offs_ec, mask=mask, other=0.0).to(tl.float32)
        er = tl.load(extrapolated_rejected_ptr + offs_er, mask=mask, other=0.0).to(tl.float32)
        confidence = confidence_device(beta * ((ec - rc) - (er - rr)))
        is_noisy = confidence < tl.load(threshold_ptr)
        smoothing = tl.where(is_noisy, tl.load(alpha_ptr), 0.0)
        tl.store(is_noisy_ptr + offs, is_noisy, mask=mask)
        tl.store(confidences_ptr + offs, confidence, mask=mask)
    chosen = pc - rc
    rejected = pr - rr
    value, slope = LOSS(beta * (chosen - rejected), smoothing)
    slope *= beta
    if HAS_WEIGHTS:
        w = tl.load(weights_ptr + offs * stride_w, mask=mask, other=0.0).to(tl.float32)
        value *= w
        slope *= w
    tl.store(losses_ptr + offs, value, mask=mask)
    tl.store(chosen_rewards_ptr + offs, beta * chosen, mask=mask)
    tl.store(rejected_rewards_ptr + offs, beta * rejected, mask=mask)
    tl.store(slopes_ptr + offs, slope, mask=mask)


def allocate(*inputs: Tensor | None) -> list[Tensor]:
    """Return losses, chosen and rejected rewards and slopes, not yet written."""
    like, dtype = inputs[0], compute_dtype(*inputs)
    return [like.new_empty(like.shape, dtype=dtype) for _ in range(4)]


def allocate_noisy(*inputs: Tensor | None) -> list[Tensor]:
    """Return the same, flags and confidences."""
    outputs = allocate(*inputs)
    return [*outputs, torch.empty_like(outputs[0], dtype=torch.bool), torch.empty_like(outputs[0])]


def forward(
    pairs: tuple[Tensor, ...],
    extrapolated: tuple[Tensor, Tensor] | None,
    weights: Tensor | None,
    loss: str,
    beta: float,
    label_smoothing: float,
    scalars: tuple[Tensor | None, Tensor | None],
    impl: str,
) -> tuple[Tensor, ...]:
    """Return losses, rewards and slopes; with ``extrapolated`` also flags and confidences.

    ``pairs`` are the four log-probs of policy and reference. ``scalars`` are alpha and threshold,
    which make the smoothing where there are ``extrapolated``.
    """
    inputs = (*pairs, *(extrapolated or (None, None)), weights)
    noise = extrapolated is not None
    if impl == "triton":
        outputs = (allocate_noisy if noise else allocate)(*inputs)
        count = pairs[0].numel()
        if count:
            with on_device(pairs[0]):
                _forward_kernel[(triton.cdiv(count, BLOCK_B),)](
                    *inputs,
                    *scalars,
                    *(outputs if noise else (*outputs, None, None)),
                    *(0 if t is None else t.stride(0) for t in inputs),
                    count,
                    beta,
                    label_smoothing,
                    NOISE=noise,
                    HAS_WEIGHTS=weights is not None,
                    LOSS=LOSSES[loss].device,
                    BLOCK_B=BLOCK_B,
                    num_warps=4,
                )
        return tuple(outputs)
    dtype = compute_dtype(*inputs)
    pc, pr, rc, rr, ec, er, w = (None if t is None else t.to(dtype) for t in inputs)
    flags: tuple[Tensor, ...] = ()
    smoothing: float | Tensor = label_smoothing
    if noise:
        alpha, threshold = scalars
        confidences = (beta * ((ec - rc) - (er - rr))).sigmoid()
        is_noisy = confidences < threshold
        smoothing, flags = torch.where(is_noisy, alpha, 0), (is_noisy, confidences)
    chosen, rejected = pc - rc, pr - rr
    row, z = LOSSES[loss], beta * (chosen - rejected)
    value, slope = row.value(z, smoothing), beta * row.slope(z, smoothing)
    if w is not None:
        value, slope = w * value, w * slope
    return value, beta * chosen, beta * rejected, slope, *flags


def setup_context(ctx, inputs, output):
    """Keep the slopes; only the losses are differentiable."""
    _losses, chosen_rewards, rejected_rewards, slopes, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(chosen_rewards, rejected_rewards, slopes, *others)
    ctx.save_for_backward(slopes)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.constants = len(inputs) - 2


@once_differentiable
def backward(ctx, grad_losses, *_):
    """Return the gradients of the two policy log-probs: opposite, and one product each."""
    chosen = rejected = None
    if grad_losses is not None:
        grad = grad_losses * ctx.saved_tensors[0]
        chosen = grad.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        rejected = (-grad).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
    return chosen, rejected, *[None] * ctx.constants


def check_pairs(policy: dict[str, Tensor], constants: dict[str, Tensor | None]) -> None:
    """Check that all are ``[B]`` on one device, and that only the policy's require grad."""
    first = next(iter(policy))
    check_tensor(first, policy[first], ndim=1)
    like = (first, policy[first])
    for name, tensor in {**policy, **constants}.items():
        if tensor is not None:
            check_tensor(name, tensor, shape=like[1].shape, like=like, constant=name in constants)


def check_scalar(name: str, value: float | Tensor, like: tuple[str, Tensor], dtype) -> Tensor:
    """Return a number in [0, 1] as a 0-dim tensor on the pairs' device, without a host sync."""
    if isinstance(value, Tensor):
        check_tensor(name, value, ndim=0, like=like, constant=True)
        return value.to(dtype)
    number = check_number(name, value, low=0, high=1)
    return torch.full((), number, dtype=dtype, device=like[1].device)
