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

from . import _pair_losses
from ._autograd import differentiable
from ._common import check_number, compute_dtype, resolve_impl
from .losses import Objective
from .preference_loss import preference_loss_reference


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
    policy = policy_chosen_logps, policy_rejected_logps
    reference = reference_chosen_logps, reference_rejected_logps
    smoothing = is_noisy.to(confidences.dtype) * alpha
    pairs = _pair_losses.Pairs(policy, reference, weights=weights)
    found = preference_loss_reference(pairs, Objective("sigmoid", beta), smoothing)
    return NoiseAwareLoss(*found, is_noisy, confidences)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs = _pair_losses.Pairs(
        (policy_chosen_logps, policy_rejected_logps),
        (reference_chosen_logps, reference_rejected_logps),
        (extrapolated_chosen_logps, extrapolated_rejected_logps),
        weights=weights,
    )
    return _pair_losses.forward(pairs, Objective("sigmoid", beta), (alpha, threshold), impl)


@_noise_aware_loss.register_fake
def _(pc, pr, rc, rr, ec, er, weights, alpha, threshold, beta, impl):
    pairs = _pair_losses.Pairs((pc, pr), (rc, rr), (ec, er), weights=weights)
    return tuple(_pair_losses.allocate(pairs))


_noise_aware_loss = differentiable(
    _noise_aware_loss, _pair_losses.backward, _pair_losses.setup_context
)


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
    _pair_losses.check_pairs(policy, constants)
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
    alpha = _pair_losses.check_scalar("alpha", alpha, like, dtype)
    threshold = _pair_losses.check_scalar("threshold", threshold, like, dtype)
    if impl == "reference":
        return noise_aware_loss_reference(*inputs, beta, alpha, threshold, weights)
    *found, _, _, is_noisy, confidences = _noise_aware_loss(
        *inputs, weights, alpha, threshold, beta, impl
    )
    return NoiseAwareLoss(*found, is_noisy, confidences)
