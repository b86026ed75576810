"""SPA's self-refined DPO loss: labels that the model doubts are smoothed, and only those.

With ``z = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))``
and ``z'`` the same from extrapolated log-probs in place of the policy's::

    confidence = sigmoid(z')             noisy = confidence < threshold
    losses = weights * (-(1 - a) * log sigmoid(z) - a * log sigmoid(-z)),  a = alpha if noisy else 0
    d losses / d policy_chosen = weights * beta * (a - sigmoid(-z)) = -d losses / d policy_rejected

Shapes: every tensor is ``[B]``; ``alpha`` and ``threshold`` are scalars. One pass reads six or
seven numbers a pair and writes six; the backward pass is one product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._common import (
    check_number,
    check_tensor,
    compute_dtype,
    jit,
    on_device,
    resolve_impl,
    tl,
    triton,
)
from .losses import sigmoid_device, sigmoid_slope, sigmoid_value
from .preference_loss import (
    BLOCK_B,
    allocate_pairs,
    check_pairs,
    pair_backward,
    preference_loss_reference,
    setup_pair_context,
)


class NoiseAwareLoss(NamedTuple):
    """Per-pair losses, detached rewards, which pairs were judged noisy, and how surely."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    is_noisy: Tensor
    confidences: Tensor


def noise_aware_loss_reference(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    extrapolated_chosen_logps: Tensor,
    extrapolated_rejected_logps: Tensor,
    beta: float,
    alpha: float | Tensor,
    threshold: float | Tensor,
    weights: Tensor | None = None,
) -> NoiseAwareLoss:
    """Return every output by eager PyTorch, in the dtype given."""
    chosen = extrapolated_chosen_logps - reference_chosen_logps
    rejected = extrapolated_rejected_logps - reference_rejected_logps
    confidences = (beta * (chosen - rejected)).detach().sigmoid()
    is_noisy = confidences < threshold
    pairs = (
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    smoothing = is_noisy.to(confidences.dtype) * alpha
    return NoiseAwareLoss(
        *preference_loss_reference(*pairs, beta, smoothing, weights), is_noisy, confidences
    )


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
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Take one block of pairs from log-probs to losses, rewards, flags and derivatives."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = offs < B
    pc = tl.load(policy_chosen_ptr + offs * stride_pc, mask=mask, other=0.0).to(tl.float32)
    pr = tl.load(policy_rejected_ptr + offs * stride_pr, mask=mask, other=0.0).to(tl.float32)
    rc = tl.load(reference_chosen_ptr + offs * stride_rc, mask=mask, other=0.0).to(tl.float32)
    rr = tl.load(reference_rejected_ptr + offs * stride_rr, mask=mask, other=0.0).to(tl.float32)
    ec = tl.load(extrapolated_chosen_ptr + offs * stride_ec, mask=mask, other=0.0).to(tl.float32)
    er = tl.load(extrapolated_rejected_ptr + offs * stride_er, mask=mask, other=0.0).to(tl.float32)
    alpha = tl.load(alpha_ptr)
    threshold = tl.load(threshold_ptr)
    z_extrapolated = beta * ((ec - rc) - (er - rr))
    tail = tl.exp(-tl.abs(z_extrapolated))
    confidence = tl.where(z_extrapolated >= 0.0, 1.0, tail) / (1.0 + tail)
    is_noisy = confidence < threshold
    chosen = pc - rc
    rejected = pr - rr
    value, slope = sigmoid_device(beta * (chosen - rejected), tl.where(is_noisy, alpha, 0.0))
    slope *= beta
    if HAS_WEIGHTS:
        w = tl.load(weights_ptr + offs * stride_w, mask=mask, other=0.0).to(tl.float32)
        value *= w
        slope *= w
    tl.store(losses_ptr + offs, value, mask=mask)
    tl.store(chosen_rewards_ptr + offs, beta * chosen, mask=mask)
    tl.store(rejected_rewards_ptr + offs, beta * rejected, mask=mask)
    tl.store(slopes_ptr + offs, slope, mask=mask)
    tl.store(is_noisy_ptr + offs, is_noisy, mask=mask)
    tl.store(confidences_ptr + offs, confidence, mask=mask)


@torch.library.custom_op("prefalign::noise_aware_loss", mutates_args=())
def _noise_aware_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    extrapolated_chosen_logps: Tensor,
    extrapolated_rejected_logps: Tensor,
    weights: Tensor | None,
    alpha: Tensor,
    threshold: Tensor,
    beta: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        extrapolated_chosen_logps,
        extrapolated_rejected_logps,
        weights,
    )
    if impl == "triton":
        outputs = _allocate(*inputs)
        pairs = policy_chosen_logps.numel()
        if pairs:
            with on_device(policy_chosen_logps):
                _forward_kernel[(triton.cdiv(pairs, BLOCK_B),)](
                    *inputs,
                    alpha,
                    threshold,
                    *outputs,
                    *(0 if t is None else t.stride(0) for t in inputs),
                    pairs,
                    beta,
                    HAS_WEIGHTS=weights is not None,
                    BLOCK_B=BLOCK_B,
                    num_warps=4,
                )
        return outputs
    dtype = compute_dtype(*inputs)
    pc, pr, rc, rr, ec, er, w = (None if t is None else t.to(dtype) for t in inputs)
    confidences = (beta * ((ec - rc) - (er - rr))).sigmoid()
    is_noisy = confidences < threshold
    smoothing = torch.where(is_noisy, alpha, 0)
    chosen, rejected = pc - rc, pr - rr
    z = beta * (chosen - rejected)
    value, slope = sigmoid_value(z, smoothing), beta * sigmoid_slope(z, smoothing)
    if w is not None:
        value, slope = w * value, w * slope
    return value, beta * chosen, beta * rejected, slope, is_noisy, confidences


def _allocate(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    outputs = allocate_pairs(*inputs)
    flags = torch.empty_like(outputs[0], dtype=torch.bool)
    return *outputs, flags, torch.empty_like(outputs[0])


@_noise_aware_loss.register_fake
def _(pc, pr, rc, rr, ec, er, weights, alpha, threshold, beta, impl):
    return _allocate(pc, pr, rc, rr, ec, er, weights)


_noise_aware_loss.register_autograd(pair_backward, setup_context=setup_pair_context)


def _scalar(name: str, value: float | Tensor, like: tuple[str, Tensor], dtype) -> Tensor:
    """Return a number in [0, 1] as a 0-dim tensor on the pairs' device, without a host sync."""
    if isinstance(value, Tensor):
        check_tensor(name, value, ndim=0, like=like, constant=True)
        return value.to(dtype)
    number = check_number(name, value, low=0, high=1)
    return torch.full((), number, dtype=dtype, device=like[1].device)


def noise_aware_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    extrapolated_chosen_logps: Tensor,
    extrapolated_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    alpha: float | Tensor = 0.1,
    threshold: float | Tensor,
    weights: Tensor | None = None,
    impl: str = "auto",
) -> NoiseAwareLoss:
    """Return SPA's loss of each pair: DPO, and cDPO where the label looks noisy.

    Equivalent PyTorch::

        extrapolated = (extrapolated_chosen_logps - reference_chosen_logps) - (
            extrapolated_rejected_logps - reference_rejected_logps)
        confidences = torch.sigmoid(beta * extrapolated)
        is_noisy = confidences < threshold
        smoothing = torch.where(is_noisy, alpha, 0.0)
        losses = -(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)  # z as in DPO

    Args:
        policy_chosen_logps: ``[B]``, any float dtype and stride: log-prob of each chosen response
            under the policy, in nats, summed over its tokens.
        policy_rejected_logps: ``[B]``, likewise for the rejected response.
        reference_chosen_logps: ``[B]``, under the reference model. A constant: one that requires
            grad is refused. So are all that follow.
        reference_rejected_logps: ``[B]``, likewise.
        extrapolated_chosen_logps: ``[B]``, under the logits extrapolated from the reference's
            through the policy's.
        extrapolated_rejected_logps: ``[B]``, likewise.
        beta: scale of both margins, per nat. Above 0, default 0.1.
        alpha: label smoothing of noisy pairs, in [0, 1]: a number, or a 0-dim float tensor on the
            device, whose value is not checked. Default 0.1.
        threshold: a pair is noisy when its confidence is strictly below; in [0, 1], a number or
            a 0-dim tensor likewise. 0 flags none.
        weights: ``[B]``, float, multiplies the losses. A constant. Default None, all 1.
        impl: ``"auto"``, ``"triton"``, ``"chunked"`` or ``"reference"``. Default ``"auto"``.

    Returns:
        ``NoiseAwareLoss(losses, chosen_rewards, rejected_rewards, is_noisy, confidences)``, each
        ``[B]``: float32 (float64 if any input is; the inputs' dtype from the reference), and bool
        ``is_noisy``. Only the losses are differentiable, once, in the policy's log-probs.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or device that does not fit, a number out of range, or a constant that
            requires grad.

    Numerics:
        float32 inside; ``alpha`` and ``threshold`` are rounded to it. Where policy and reference
        are equal the loss is float32(log 2) exactly, noisy or not. No host sync.

    Source:
        SPA: Kim et al., arXiv 2406.04412: self-refinement, with the confidence of equations 11
        and 12.
    """
    policy = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
    }
    constants = {
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
        "extrapolated_chosen_logps": extrapolated_chosen_logps,
        "extrapolated_rejected_logps": extrapolated_rejected_logps,
        "weights": weights,
    }
    check_pairs(policy, constants)
    beta = check_number("beta", beta, above=0)
    like = ("policy_chosen_logps", policy_chosen_logps)
    inputs = (
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        extrapolated_chosen_logps,
        extrapolated_rejected_logps,
    )
    dtype = compute_dtype(*inputs, weights)
    impl = resolve_impl(impl, policy_chosen_logps.device, dtype)
    alpha = _scalar("alpha", alpha, like, dtype)
    threshold = _scalar("threshold", threshold, like, dtype)
    if impl == "reference":
        return noise_aware_loss_reference(*inputs, beta, alpha, threshold, weights)
    losses, chosen_rewards, rejected_rewards, _, is_noisy, confidences = _noise_aware_loss(
        *inputs, weights, alpha, threshold, beta, impl
    )
    return NoiseAwareLoss(losses, chosen_rewards, rejected_rewards, is_noisy, confidences)
