"""Preference losses of pairs, from sequence log-probabilities.

With ``chosen = policy_chosen - reference_chosen``, ``rejected`` likewise and
``z = beta * (chosen - rejected)``, the default ``"sigmoid"`` is, for a label smoothing of e::

    losses = weights * (-(1 - e) * log sigmoid(z) - e * log sigmoid(-z))
    d losses / d policy_chosen = weights * beta * (e - sigmoid(-z)) = -d losses / d policy_rejected

Shapes: every tensor is ``[B]``. One pass reads four or five numbers a pair and writes four: the
loss, the two rewards and the derivative by the margin, from which the backward pass is one
product. Which loss it is, is a row of ``losses.LOSSES``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import (
    check_choice,
    check_number,
    check_tensor,
    compute_dtype,
    jit,
    on_device,
    resolve_impl,
    tl,
    triton,
)
from .losses import LOSSES, scaled

BLOCK_B = 128


class PreferenceLoss(NamedTuple):
    """Per-pair losses, differentiable in the policy, and detached rewards."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def preference_loss_reference(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float | Tensor = 0.0,
    weights: Tensor | None = None,
) -> PreferenceLoss:
    """Return the sigmoid loss and the rewards by eager PyTorch, in the dtype given."""
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    z = beta * (chosen - rejected)
    losses = -scaled(1 - label_smoothing, F.logsigmoid(z))
    losses = losses - scaled(label_smoothing, F.logsigmoid(-z))
    losses = losses if weights is None else weights * losses
    return PreferenceLoss(losses, beta * chosen.detach(), beta * rejected.detach())


@jit
def _forward_kernel(
    policy_chosen_ptr,
    policy_rejected_ptr,
    reference_chosen_ptr,
    reference_rejected_ptr,
    weights_ptr,
    losses_ptr,
    chosen_rewards_ptr,
    rejected_rewards_ptr,
    slopes_ptr,
    stride_pc,
    stride_pr,
    stride_rc,
    stride_rr,
    stride_w,
    B,
    beta,
    label_smoothing,
    HAS_WEIGHTS: tl.constexpr,
    LOSS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Take one block of pairs from log-probs to losses, rewards and derivatives."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = offs < B
    pc = tl.load(policy_chosen_ptr + offs * stride_pc, mask=mask, other=0.0).to(tl.float32)
    pr = tl.load(policy_rejected_ptr + offs * stride_pr, mask=mask, other=0.0).to(tl.float32)
    rc = tl.load(reference_chosen_ptr + offs * stride_rc, mask=mask, other=0.0).to(tl.float32)
    rr = tl.load(reference_rejected_ptr + offs * stride_rr, mask=mask, other=0.0).to(tl.float32)
    chosen = pc - rc
    rejected = pr - rr
    value, slope = LOSS(beta * (chosen - rejected), label_smoothing)
    slope *= beta
    if HAS_WEIGHTS:
        w = tl.load(weights_ptr + offs * stride_w, mask=mask, other=0.0).to(tl.float32)
        value *= w
        slope *= w
    tl.store(losses_ptr + offs, value, mask=mask)
    tl.store(chosen_rewards_ptr + offs, beta * chosen, mask=mask)
    tl.store(rejected_rewards_ptr + offs, beta * rejected, mask=mask)
    tl.store(slopes_ptr + offs, slope, mask=mask)


@torch.library.custom_op("prefalign::preference_loss", mutates_args=())
def _preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    weights: Tensor | None,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        weights,
    )
    loss = LOSSES[loss_type]
    if impl == "triton":
        outputs = allocate_pairs(*inputs)
        pairs = policy_chosen_logps.numel()
        if pairs:
            with on_device(policy_chosen_logps):
                _forward_kernel[(triton.cdiv(pairs, BLOCK_B),)](
                    *inputs,
                    *outputs,
                    *(0 if t is None else t.stride(0) for t in inputs),
                    pairs,
                    beta,
                    label_smoothing,
                    HAS_WEIGHTS=weights is not None,
                    LOSS=loss.device,
                    BLOCK_B=BLOCK_B,
                    num_warps=4,
                )
        return outputs
    pc, pr, rc, rr, w = (None if t is None else t.to(compute_dtype(*inputs)) for t in inputs)
    chosen, rejected = pc - rc, pr - rr
    z = beta * (chosen - rejected)
    value, slope = loss.value(z, label_smoothing), beta * loss.slope(z, label_smoothing)
    if w is not None:
        value, slope = w * value, w * slope
    return value, beta * chosen, beta * rejected, slope


def allocate_pairs(*inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return losses, chosen and rejected rewards and slopes, not yet written."""
    like, dtype = inputs[0], compute_dtype(*inputs)
    return tuple(like.new_empty(like.shape, dtype=dtype) for _ in range(4))


@_preference_loss.register_fake
def _(pc, pr, rc, rr, weights, loss_type, beta, label_smoothing, impl):
    return allocate_pairs(pc, pr, rc, rr, weights)


def setup_pair_context(ctx, inputs, output):
    """Keep the slopes; only the losses are differentiable."""
    _losses, chosen_rewards, rejected_rewards, slopes, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(chosen_rewards, rejected_rewards, slopes, *others)
    ctx.save_for_backward(slopes)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.constants = len(inputs) - 2


@once_differentiable
def pair_backward(ctx, grad_losses, *_):
    """Return the gradients of the two policy log-probs: opposite, and one product each."""
    chosen = rejected = None
    if grad_losses is not None:
        grad = grad_losses * ctx.saved_tensors[0]
        chosen = grad.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        rejected = (-grad).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
    return chosen, rejected, *[None] * ctx.constants


_preference_loss.register_autograd(pair_backward, setup_context=setup_pair_context)


def check_pairs(policy: dict[str, Tensor], constants: dict[str, Tensor | None]) -> None:
    """Check that all are ``[B]`` on one device, and that only the policy's require grad."""
    first = next(iter(policy))
    check_tensor(first, policy[first], ndim=1)
    like = (first, policy[first])
    for name, tensor in {**policy, **constants}.items():
        if tensor is not None:
            check_tensor(name, tensor, shape=like[1].shape, like=like, constant=name in constants)


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    impl: str = "auto",
) -> PreferenceLoss:
    """Return the preference loss and the implicit rewards of each pair.

    Equivalent PyTorch::

        chosen = policy_chosen_logps - reference_chosen_logps
        rejected = policy_rejected_logps - reference_rejected_logps
        z = beta * (chosen - rejected)
        losses = -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)
        losses, rewards = weights * losses, (beta * chosen.detach(), beta * rejected.detach())

    Args:
        policy_chosen_logps: ``[B]``, any float dtype and stride: log-prob of each chosen response
            under the policy, in nats, summed over its tokens.
        policy_rejected_logps: ``[B]``, likewise for the rejected response.
        reference_chosen_logps: ``[B]``, under the reference model. A constant: one that requires
            grad is refused.
        reference_rejected_logps: ``[B]``, likewise.
        loss_type: a name in ``losses.LOSSES``. Default ``"sigmoid"``, which is DPO.
        beta: scale of the margin, per nat. Above 0, default 0.1.
        label_smoothing: the probability that a label is flipped, in [0, 0.5]. Default 0. Above 0
            the sigmoid loss is cDPO.
        weights: ``[B]``, float, multiplies the losses. A constant. Default None, all 1.
        impl: ``"auto"``, ``"triton"``, ``"chunked"`` or ``"reference"``. Default ``"auto"``.

    Returns:
        ``PreferenceLoss(losses, chosen_rewards, rejected_rewards)``, each ``[B]``, float32 (float64
        if any input is; the inputs' dtype from the reference). Losses are differentiable in the
        policy's log-probs, once; rewards, ``beta * (policy - reference)``, are detached.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or device that does not fit, a number out of range, an unknown loss, or
            a constant that requires grad.

    Numerics:
        float32 inside. Where policy and reference are equal the loss is float32(log 2) exactly,
        at every smoothing. No overflow at any margin.

    Source:
        DPO: Rafailov et al., arXiv 2305.18290, equation 7. cDPO: Mitchell, "A note on DPO with
        noisy preferences" (2023).
    """
    policy = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
    }
    constants = {
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
        "weights": weights,
    }
    check_pairs(policy, constants)
    check_choice("loss_type", loss_type, tuple(LOSSES))
    beta = check_number("beta", beta, above=0)
    label_smoothing = check_number("label_smoothing", label_smoothing, low=0, high=0.5)
    inputs = (
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    impl = resolve_impl(impl, policy_chosen_logps.device, compute_dtype(*inputs, weights))
    if impl == "reference":
        return preference_loss_reference(*inputs, beta, label_smoothing, weights)
    losses, chosen_rewards, rejected_rewards, _ = _preference_loss(
        *inputs, weights, loss_type, beta, label_smoothing, impl
    )
    return PreferenceLoss(losses, chosen_rewards, rejected_rewards)
