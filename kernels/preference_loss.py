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

from . import _pair_losses
from ._common import check_choice, check_number, compute_dtype, resolve_impl
from .losses import LOSSES, scaled


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
    pairs = (
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    numbers = loss_type, beta, label_smoothing
    return _pair_losses.forward(pairs, None, weights, *numbers, (None, None), impl)


@_preference_loss.register_fake
def _(pc, pr, rc, rr, weights, loss_type, beta, label_smoothing, impl):
    return tuple(_pair_losses.allocate(pc, pr, rc, rr, weights))


_preference_loss.register_autograd(_pair_losses.backward, setup_context=_pair_losses.setup_context)


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
    _pair_losses.check_pairs(policy, constants)
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
