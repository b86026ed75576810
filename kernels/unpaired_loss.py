"""Losses of responses that are desirable or not, each on its own, from sequence log-probabilities.

With ``r = policy - reference``, ``s`` 1 for a desirable response and -1 for an undesirable one,
``w`` the weight of its kind, and a baseline that is never differentiated, ``"kto"`` is::

    z = s * beta * (r - baseline)
    losses = weights * w * (1 - sigmoid(z))
    d losses / d policy = -weights * w * s * beta * sigmoid(z) * sigmoid(-z)

Shapes: every tensor but the baseline, a scalar, is ``[S]``. One pass reads two or three numbers
and a flag a response and writes three: the loss, the reward and the derivative, from which the
backward pass is one product. Which loss it is, is a row of
``unpaired_losses.UNPAIRED_LOSSES``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._autograd import differentiable
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
from .unpaired_losses import UNPAIRED_LOSSES, UnpairedRow

BLOCK_S = 128


class UnpairedLoss(NamedTuple):
    """Each response's loss, differentiable in the policy, and its detached reward."""

    losses: Tensor
    rewards: Tensor


def _scalars(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    baseline: Tensor | None,
    weights: Tensor | None,
    row: UnpairedRow,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return z, its sign, the weight and the reward of each response.

    Where the weight is 0 so is z: the loss is 0 and not 0 times infinity.
    """
    ratios = policy_logps - reference_logps
    rewards = shifted = beta * ratios
    if row.baseline == "log-ratio":
        shifted = beta * (ratios - baseline)
    elif row.baseline == "reward":
        shifted = rewards - baseline
    signs = torch.full_like(ratios, -1).masked_fill(desirable, 1)
    weight = torch.full_like(ratios, undesirable_weight).masked_fill(desirable, desirable_weight)
    weight = weight if weights is None else weight * weights
    return (signs * shifted).masked_fill(weight == 0, 0), signs, weight, rewards.detach()


def unpaired_loss_reference(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    loss_type: str = "kto",
    baseline: Tensor | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights: Tensor | None = None,
) -> UnpairedLoss:
    """Return the losses and the rewards by eager PyTorch, in the dtype given."""
    row, kinds = UNPAIRED_LOSSES[loss_type], (beta, desirable_weight, undesirable_weight)
    tensors = policy_logps, reference_logps, desirable, baseline, weights
    z, _, weight, rewards = _scalars(*tensors, row, *kinds)
    return UnpairedLoss(weight * row.value(z), rewards)


# Triton


@jit
def _forward_kernel(
    policy_ptr,
    reference_ptr,
    desirable_ptr,
    baseline_ptr,
    weights_ptr,
    losses_ptr,
    rewards_ptr,
    slopes_ptr,
    stride_p,
    stride_r,
    stride_d,
    stride_w,
    S,
    beta,
    desirable_weight,
    undesirable_weight,
    OF_RATIO: tl.constexpr,
    OF_REWARD: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    LOSS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Take one block of responses from log-probs to losses, rewards and derivatives."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = offs < S
    policy = tl.load(policy_ptr + offs * stride_p, mask=mask, other=0.0).to(tl.float32)
    reference = tl.load(reference_ptr + offs * stride_r, mask=mask, other=0.0).to(tl.float32)
    desirable = tl.load(desirable_ptr + offs * stride_d, mask=mask, other=0) != 0
    ratio = policy - reference
    reward = beta * ratio
    z = reward
    if OF_RATIO:
        z = beta * (ratio - tl.load(baseline_ptr))
    if OF_REWARD:
        z = reward - tl.load(baseline_ptr)
    sign = tl.where(desirable, 1.0, -1.0)
    weight = tl.where(desirable, desirable_weight, undesirable_weight)
    if HAS_WEIGHTS:
        weight *= tl.load(weights_ptr + offs * stride_w, mask=mask, other=0.0).to(tl.float32)
    # A weight of 0 must not turn an infinite loss into 0 * inf.
    value, slope = LOSS(tl.where(weight == 0.0, 0.0, sign * z))
    tl.store(losses_ptr + offs, weight * value, mask=mask)
    tl.store(rewards_ptr + offs, reward, mask=mask)
    tl.store(slopes_ptr + offs, weight * sign * beta * slope, mask=mask)


def _forward_triton(policy, reference, desirable, baseline, weights, row, numbers):
    losses, rewards, slopes = _allocate(policy, reference, weights)
    count = policy.numel()
    if count:
        with on_device(policy):
            _forward_kernel[(triton.cdiv(count, BLOCK_S),)](
                policy,
                reference,
                desirable,
                baseline,
                weights,
                losses,
                rewards,
                slopes,
                *(0 if t is None else t.stride(0) for t in (policy, reference, desirable, weights)),
                count,
                *numbers,
                OF_RATIO=row.baseline == "log-ratio",
                OF_REWARD=row.baseline == "reward",
                HAS_WEIGHTS=weights is not None,
                LOSS=row.device,
                BLOCK_S=BLOCK_S,
                num_warps=4,
            )
    return losses, rewards, slopes


# Chunked torch


def _forward_chunked(policy, reference, desirable, baseline, weights, row, numbers):
    dtype = compute_dtype(policy, reference, weights)
    policy, reference = policy.to(dtype), reference.to(dtype)
    weights = None if weights is None else weights.to(dtype)
    z, signs, weight, rewards = _scalars(
        policy, reference, desirable, baseline, weights, row, *numbers
    )
    return weight * row.value(z), rewards, weight * signs * numbers[0] * row.slope(z)


# The op


def _allocate(policy: Tensor, reference: Tensor, weights: Tensor | None) -> tuple[Tensor, ...]:
    """Return losses, rewards and slopes, not yet written."""
    dtype = compute_dtype(policy, reference, weights)
    return tuple(policy.new_empty(policy.shape, dtype=dtype) for _ in range(3))


@torch.library.custom_op("prefalign::unpaired_loss", mutates_args=())
def _unpaired_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    baseline: Tensor | None,
    weights: Tensor | None,
    loss_type: str,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    forward = _forward_triton if impl == "triton" else _forward_chunked
    tensors = policy_logps, reference_logps, desirable, baseline, weights
    numbers = beta, desirable_weight, undesirable_weight
    return forward(*tensors, UNPAIRED_LOSSES[loss_type], numbers)


@_unpaired_loss.register_fake
def _(policy, reference, desirable, baseline, weights, loss_type, beta, desirable_weight,
      undesirable_weight, impl):  # fmt: skip
    return _allocate(policy, reference, weights)


def _setup_context(ctx, inputs, output):
    """Keep the slopes; only the losses are differentiable."""
    _losses, rewards, slopes = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rewards, slopes)
    ctx.save_for_backward(slopes)
    ctx.dtype, ctx.constants = inputs[0].dtype, len(inputs) - 1


def _backward(ctx, grad_losses, *_):
    grad = None
    if grad_losses is not None and ctx.needs_input_grad[0]:
        grad = (grad_losses * ctx.saved_tensors[0]).to(ctx.dtype)
    return grad, *[None] * ctx.constants


_unpaired_loss = differentiable(_unpaired_loss, _backward, _setup_context)


def _check_baseline(
    baseline: float | Tensor | None, loss_type: str, like: tuple[str, Tensor], dtype: torch.dtype
) -> Tensor | None:
    """Return the baseline as a 0-dim tensor on the device, without a host sync, or None."""
    kind = UNPAIRED_LOSSES[loss_type].baseline
    if kind is None:
        if baseline is not None:
            raise ValueError(
                f"baseline: expected None with loss_type={loss_type!r}, which takes none, "
                f"got {type(baseline).__name__}"
            )
        return None
    if baseline is None:
        maker = "kl_baseline" if kind == "log-ratio" else "RunningShift"
        raise ValueError(
            f"baseline: expected a number or a 0-dim tensor with loss_type={loss_type!r} "
            f"({maker} makes it), got None"
        )
    if isinstance(baseline, Tensor):
        check_tensor("baseline", baseline, ndim=0, like=like, constant=True)
        return baseline.detach().to(dtype)
    number = check_number("baseline", baseline)
    return torch.full((), number, dtype=dtype, device=like[1].device)


def unpaired_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    *,
    loss_type: str = "kto",
    baseline: float | Tensor | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights: Tensor | None = None,
    impl: str = "auto",
) -> UnpairedLoss:
    """Return the loss and the implicit reward of each response, labelled desirable or not.

    Equivalent PyTorch::

        ratios = policy_logps - reference_logps
        signs = torch.where(desirable, 1.0, -1.0)
        losses = 1 - torch.sigmoid(signs * beta * (ratios - baseline))  # "kto"
        losses = 1 - torch.sigmoid(signs * beta * ratios)  # "apo_zero_unpaired"
        losses = -F.logsigmoid(signs * (beta * ratios - baseline))  # "bco"
        losses = weights * torch.where(desirable, desirable_weight, undesirable_weight) * losses
        rewards = beta * ratios.detach()

    Args:
        policy_logps: ``[S]``, any float dtype and stride: log-prob of each response under the
            policy, in nats, summed over its tokens.
        reference_logps: ``[S]``, under the reference model. A constant: one that requires grad is
            refused.
        desirable: ``[S]``, bool: whether the response is one to learn. Any number of them may be.
        loss_type: a name in ``UNPAIRED_LOSSES``: ``"kto"`` (the default), ``"apo_zero_unpaired"``
            or ``"bco"``.
        baseline: what a response is compared with, a number or a 0-dim float tensor on the device,
            whose value is not checked. For ``"kto"`` the estimate z0 of the KL divergence from
            policy to reference, in nats (``kl_baseline``); for ``"bco"`` the reward shift delta,
            in rewards, that is, times beta (``RunningShift``). A constant. Default None, which
            those two refuse and ``"apo_zero_unpaired"`` asks for.
        beta: scale of the log-ratio, per nat. Above 0, default 0.1.
        desirable_weight: multiplies the losses of the desirable responses. At least 0, default 1.
        undesirable_weight: likewise of the others.
        weights: ``[S]``, float, multiplies the losses. A constant. Default None, all 1. BCO's
            matching of the two kinds' distributions is such a weight.
        impl: ``"auto"``, ``"triton"``, ``"chunked"`` or ``"reference"``. Default ``"auto"``.

    Returns:
        ``UnpairedLoss(losses, rewards)``, each ``[S]``, float32 (float64 if any input is; the
        inputs' dtype from the reference). Losses are differentiable in ``policy_logps``, once;
        rewards are detached and have no baseline subtracted.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or device that does not fit, a number out of range, an unknown loss, a
            baseline that is missing or not taken, or a constant that requires grad.

    Numerics:
        float32 inside, where the baseline is rounded to it. Where a response is at the baseline,
        the loss is exactly one half (``"bco"``: float32(log 2)) times its weights. No overflow at
        any log-ratio; a weight of 0 gives 0 even where that is infinite or NaN. No host sync.

    Source:
        KTO: Ethayarajh et al., arXiv 2402.01306, equation 7 of version 1. APO-zero: D'Oosterlinck
        et al., arXiv 2408.06266, equation 7. BCO: Jung et al., arXiv 2404.04656.
    """
    check_tensor("policy_logps", policy_logps, ndim=1)
    like, shape = ("policy_logps", policy_logps), policy_logps.shape
    check_tensor("reference_logps", reference_logps, shape=shape, like=like, constant=True)
    check_tensor("desirable", desirable, dtypes=(torch.bool,), shape=shape, like=like)
    if weights is not None:
        check_tensor("weights", weights, shape=shape, like=like, constant=True)
    check_choice("loss_type", loss_type, tuple(UNPAIRED_LOSSES))
    numbers = (
        check_number("beta", beta, above=0),
        check_number("desirable_weight", desirable_weight, low=0),
        check_number("undesirable_weight", undesirable_weight, low=0),
    )
    dtype = compute_dtype(policy_logps, reference_logps, weights)
    impl = resolve_impl(impl, policy_logps.device, dtype)
    baseline = _check_baseline(baseline, loss_type, like, dtype)
    tensors = policy_logps, reference_logps, desirable
    if impl == "reference":
        return unpaired_loss_reference(*tensors, loss_type, baseline, *numbers, weights)
    losses, rewards, _ = _unpaired_loss(*tensors, baseline, weights, loss_type, *numbers, impl)
    return UnpairedLoss(losses, rewards)
