"""TDPO: DPO whose margin also weighs how far the policy is from the reference at every token.

With the log-ratio r of a response, and D its sequential KL, the sum over its tokens of
KL(reference || policy) over the vocabulary (``linear_token_kl``)::

    TDPO1   z = beta * ((r_chosen + D_chosen) - (r_rejected + D_rejected))
    TDPO2   z = beta * ((r_chosen + alpha * stop(D_chosen)) - (r_rejected + alpha * D_rejected))
    losses = -log sigmoid(z)

which is the paper's u - delta and u - alpha * delta_2: DPO with shifted sums of the policy, and
one call of ``preference_loss``. Both directions of the gradient are the loss's slope: the rejected
response's D is pushed down. TDPO1 raises the chosen one's too; TDPO2 stops that. Shapes: ``[B]``.
"""

from __future__ import annotations

from torch import Tensor

from ._common import check_choice, check_number, check_tensor, compute_dtype
from .preference_loss import PreferenceLoss, preference_loss

VARIANTS = ("tdpo1", "tdpo2")


def tdpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: float | Tensor = 0.1,
    alpha: float | None = None,
    variant: str = "tdpo2",
    impl: str = "auto",
) -> PreferenceLoss:
    """Return TDPO's loss and the implicit rewards of each pair.

    Equivalent PyTorch::

        chosen = policy_chosen_logps - reference_chosen_logps
        rejected = policy_rejected_logps - reference_rejected_logps
        shift = alpha * (chosen_kl.detach() - rejected_kl)  # tdpo1: chosen_kl - rejected_kl
        losses = -logsigmoid(beta * (chosen - rejected + shift))
        rewards = beta * chosen.detach(), beta * rejected.detach()

    Args:
        policy_chosen_logps: ``[B]``, any float dtype and stride: log-prob of each chosen response
            under the policy, in nats, summed over its tokens.
        policy_rejected_logps: ``[B]``, likewise for the rejected response.
        reference_chosen_logps: ``[B]``, under the reference model. A constant.
        reference_rejected_logps: ``[B]``, likewise.
        chosen_kl: ``[B]``, float: the sum over the chosen response's tokens of
            KL(reference || policy), in nats; ``sequence_logps`` of ``linear_token_kl``.
        rejected_kl: ``[B]``, likewise for the rejected response.
        beta: scale of the margin, per nat. Above 0, default 0.1. Or a tensor, ``[]`` or ``[B]``, as
            in ``preference_loss``.
        alpha: weight of the KL in TDPO2, at least 0; 0 is DPO. Default 0.5. TDPO1 takes none.
        variant: ``"tdpo1"`` or ``"tdpo2"``. Default ``"tdpo2"``.
        impl: as in ``preference_loss``. Default ``"auto"``.

    Returns:
        ``PreferenceLoss(losses, chosen_rewards, rejected_rewards)``, each ``[B]``, float32 (float64
        if any input is). Losses are differentiable in the policy's log-probs and in the KLs, once
        (``"tdpo2"``: not in ``chosen_kl``); rewards are DPO's, without the KL (the paper's code
        adds it to what it logs), and detached.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or device that does not fit, a number out of range, an ``alpha`` with
            ``"tdpo1"``, an unknown variant, or a reference that requires grad.

    Numerics:
        float32 inside. Where policy and reference are equal both KLs are 0 and the loss is
        float32(log 2) exactly.

    Source:
        TDPO: Zeng et al., arXiv 2404.11999: the losses of TDPO1 and TDPO2.
    """
    check_choice("variant", variant, VARIANTS)
    if variant == "tdpo2":
        alpha = check_number("alpha", 0.5 if alpha is None else alpha, low=0)
    elif alpha is not None:
        raise ValueError(f"alpha: expected None with variant='tdpo1', got {alpha!r}")
    check_tensor("policy_chosen_logps", policy_chosen_logps, ndim=1)
    like = ("policy_chosen_logps", policy_chosen_logps)
    for name, value in (
        ("policy_rejected_logps", policy_rejected_logps),
        ("reference_chosen_logps", reference_chosen_logps),
        ("reference_rejected_logps", reference_rejected_logps),
        ("chosen_kl", chosen_kl),
        ("rejected_kl", rejected_kl),
    ):
        check_tensor(name, value, shape=policy_chosen_logps.shape, like=like)
    policy = policy_chosen_logps, policy_rejected_logps
    reference = reference_chosen_logps, reference_rejected_logps
    dtype = compute_dtype(*policy, *reference, chosen_kl, rejected_kl)
    shifts = (x.to(dtype) for x in (chosen_kl, rejected_kl))
    if variant == "tdpo2":
        shifts = (alpha * x for x in (chosen_kl.detach().to(dtype), rejected_kl.to(dtype)))
    shifted = (sums.to(dtype) + shift for sums, shift in zip(policy, shifts, strict=True))
    losses = preference_loss(*shifted, *reference, beta=beta, impl=impl).losses
    rewards = (
        beta * (sums.detach().to(dtype) - constant.to(dtype))
        for sums, constant in zip(policy, reference, strict=True)
    )
    return PreferenceLoss(losses, *rewards)
