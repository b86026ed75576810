"""Preference losses of pairs, from sequence log-probabilities.

With ``chosen = policy_chosen - reference_chosen``, ``rejected`` likewise and
``z = beta * (chosen - rejected)``, the default ``"sigmoid"`` is, for a label smoothing of e::

    losses = weights * (-(1 - e) * log sigmoid(z) - e * log sigmoid(-z))
    d losses / d policy_chosen = weights * beta * (e - sigmoid(-z)) = -d losses / d policy_rejected

Any other is a row of ``losses.LOSSES``, a loss of the whole batch, or a weighted sum: what the
names mean is resolved in ``objectives.py``, the functions are in ``loss_rows.py``.

Shapes: every tensor is ``[B]``. One pass reads two to seven numbers a pair and writes five: the
loss, the two rewards and the derivatives by the policy's two log-probs, from which the backward
pass is one product each. Each summand of a sum is one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _pair_losses
from ._autograd import differentiable
from ._common import FLOATS, INTEGERS, check_number, check_tensor, compute_dtype, resolve_impl
from .loss_rows import Number
from .losses import Objective, log_ratios, scores
from .objectives import Term, impl_of, resolve


class PreferenceLoss(NamedTuple):
    """Per-pair losses, differentiable in the policy, and detached rewards."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def preference_loss_reference(
    pairs: _pair_losses.Pairs, objective: Objective, label_smoothing: Number | None = None
) -> PreferenceLoss:
    """Return a row's loss and the rewards by eager PyTorch and autograd, in the dtype given."""
    beta = objective.beta if pairs.betas is None else pairs.betas
    smoothing = objective.label_smoothing if label_smoothing is None else label_smoothing
    sides = zip(pairs.policy, pairs.reference, pairs.counts, strict=True)
    a, b = (scores(objective, *side)[0] for side in sides)
    losses = objective.row.value(a, b, beta, smoothing, objective.extra)
    losses = losses if pairs.weights is None else pairs.weights * losses
    chosen, rejected = log_ratios([x.detach() for x in pairs.policy], pairs.reference)
    return PreferenceLoss(losses, beta * chosen, beta * rejected)


@torch.library.custom_op("prefalign::preference_loss", mutates_args=())
def _preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    chosen_counts: Tensor | None,
    rejected_counts: Tensor | None,
    weights: Tensor | None,
    betas: Tensor | None,
    loss: str,
    beta: float,
    label_smoothing: float,
    extra: float,
    divergence: str,
    power: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs = _pairs(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
        reference_rejected_logps, chosen_counts, rejected_counts, weights, betas,
    )  # fmt: skip
    objective = Objective(loss, beta, label_smoothing, extra, divergence, power)
    return _pair_losses.forward(pairs, objective, (None, None), impl)


def _pairs(pc, pr, rc, rr, nc, nr, weights, betas) -> _pair_losses.Pairs:
    return _pair_losses.Pairs((pc, pr), (rc, rr), (None, None), (nc, nr), weights, betas)


@_preference_loss.register_fake
def _(pc, pr, rc, rr, nc, nr, weights, betas, *_):
    return tuple(_pair_losses.allocate(_pairs(pc, pr, rc, rr, nc, nr, weights, betas)))


_preference_loss = differentiable(
    _preference_loss, _pair_losses.backward, _pair_losses.setup_context
)


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float | Tensor = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 1.0,
    loss_options: Mapping[str, float] | None = None,
    chosen_counts: Tensor | None = None,
    rejected_counts: Tensor | None = None,
    weights: Tensor | None = None,
    impl: str = "auto",
) -> PreferenceLoss:
    """Return the preference loss and the implicit rewards of each pair.

    Equivalent PyTorch, by default::

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
            grad is refused. None for losses without a reference; given with one of those, it
            counts for the rewards alone.
        reference_rejected_logps: ``[B]``, likewise.
        loss_type: one of ``objectives.loss_names()``, or several whose weighted sum is taken.
            Default ``"sigmoid"``, which is DPO.
        loss_weights: a number for each of several losses. Default None, all 1.
        beta: scale of the margin, per nat. Above 0, default 0.1. Or a tensor, ``[]`` or ``[B]``,
            whose values are not checked: a constant.
        label_smoothing: the probability that a label is flipped, in [0, 0.5]. Default 0. Above 0
            the sigmoid loss is cDPO. In a sum, it goes to the losses that have one.
        f_divergence_type: ``"reverse_kl"`` (default), ``"forward_kl"``, ``"js_divergence"`` or
            ``"alpha_divergence"``: what stands in the place of the log-ratio.
        f_alpha_divergence_coef: alpha of the last. Default 1, its limit, the reverse KL.
        loss_options: numbers that single losses take, by name: ``discopop_tau`` (default 0.05),
            ``simpo_gamma`` (0.5), ``slic_delta`` (1), ``hinge_margin`` (1). Default None.
        chosen_counts: ``[B]``, number of tokens of each chosen response, for losses that need it:
            those per token and ``"sft"``. A constant.
        rejected_counts: ``[B]``, likewise.
        weights: ``[B]``, float, multiplies the losses. A constant. Default None, all 1.
        impl: ``"auto"``, ``"triton"``, ``"chunked"`` or ``"reference"``. Default ``"auto"``.

    Returns:
        ``PreferenceLoss(losses, chosen_rewards, rejected_rewards)``, each ``[B]``, float32 (float64
        if any input is; the inputs' dtype from the reference). Losses are differentiable in the
        policy's log-probs, once; rewards, ``beta * (policy - reference)`` of whole sequences, are
        detached, and ``beta * policy`` without a reference. ``"sft"``, ``"aot"`` and
        ``"aot_unpaired"`` depend on the batch: their mean over the pairs is the loss.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or device that does not fit, a number out of range, an unknown loss, an
            option that none of the losses takes, an input that one needs and that is missing, or a
            constant that requires grad.

    Numerics:
        float32 inside. Where policy and reference are equal the sigmoid loss is float32(log 2)
        exactly, at every smoothing. No overflow of the sigmoid loss at any margin.

    Source:
        DPO: Rafailov et al., arXiv 2305.18290, equation 7. Every other row names its own.
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
    counts = {"chosen_counts": chosen_counts, "rejected_counts": rejected_counts}
    like = ("policy_chosen_logps", policy_chosen_logps)
    for name, value in counts.items():
        if value is not None:
            dtypes, shape = (*INTEGERS, *FLOATS), like[1].shape
            check_tensor(name, value, dtypes=dtypes, shape=shape, like=like, constant=True)
    number, betas = _check_beta(beta, like)
    terms = resolve(
        loss_type,
        loss_weights=loss_weights,
        beta=number,
        label_smoothing=label_smoothing,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        loss_options=loss_options,
    )
    check_needs(terms, {**constants, **counts})
    inputs = _pair_losses.Pairs(
        tuple(policy.values()),
        (reference_chosen_logps, reference_rejected_logps),
        counts=tuple(counts.values()),
        weights=weights,
        betas=betas,
    )
    floats = (*inputs.policy, *inputs.reference, weights, betas)
    found = resolve_impl(impl, policy_chosen_logps.device, compute_dtype(*floats))
    return of_terms(inputs, terms, impl_of(terms, impl, found))


def _check_beta(beta: Any, like: tuple[str, Tensor]) -> tuple[float, Tensor | None]:
    """Return beta as a number and as a tensor, of which the second counts if there is one."""
    if not isinstance(beta, Tensor):
        return check_number("beta", beta, above=0), None
    check_tensor("beta", beta, shape=like[1].shape if beta.ndim else (), like=like, constant=True)
    return 1.0, beta


def check_needs(terms: Sequence[Term], given: Mapping[str, Any]) -> None:
    """Check that what a summand needs is given, and that tensors of the two sides come together.

    ``given`` has the arguments by name, None where absent, those of a side in pairs.
    """
    for kind, needs in (
        ("reference", [term.objective.loss for term in terms if term.objective.row.reference]),
        ("counts", [term.objective.loss for term in terms if term.needs_counts]),
    ):
        names = [name for name in given if kind in name]
        absent = [name for name in names if given[name] is None]
        if absent and (needs or len(absent) < len(names)):
            why = f"with loss {needs[0]!r}" if needs else f"beside {names[0]} and its like"
            raise ValueError(f"{absent[0]}: expected a tensor {why}, got None")


def of_terms(pairs: _pair_losses.Pairs, terms: Sequence[Term], impl: str) -> PreferenceLoss:
    """Return the weighted sum of several losses of the same pairs, and the rewards."""
    losses, rewards = None, None
    for term in terms:
        matched = _matched(pairs, term.kind)
        out = _of_one(matched, term.objective, impl)
        if term.kind == "sft":
            tokens = pairs.counts[0].sum().clamp(min=1).to(out.losses.dtype)
            out = out._replace(losses=out.losses * (out.losses.numel() / tokens))
        if matched is pairs:
            rewards = out[1:]
        part = out.losses if term.weight == 1 else term.weight * out.losses
        losses = part if losses is None else losses + part
    if rewards is None:
        detached = [x.detach().to(losses.dtype) for x in pairs.policy]
        beta = terms[0].objective.beta if pairs.betas is None else pairs.betas
        rewards = tuple(beta * x for x in log_ratios(detached, pairs.reference))
    return PreferenceLoss(losses, *rewards)


def _of_one(pairs: _pair_losses.Pairs, objective: Objective, impl: str) -> PreferenceLoss:
    if impl == "reference":
        return preference_loss_reference(pairs, objective)
    return PreferenceLoss(
        *_preference_loss(
            *pairs.policy, *pairs.reference, *pairs.counts, pairs.weights, pairs.betas, *objective,
            impl,
        )[:3]
    )  # fmt: skip


def _matched(pairs: _pair_losses.Pairs, kind: str) -> _pair_losses.Pairs:
    """Return the pairs that AOT compares: what stands at the same rank of two sorted batches."""
    if kind not in ("aot", "aot_unpaired"):
        return pairs
    (pc, pr), (rc, rr) = pairs.policy, pairs.reference
    pc, pr = pc.detach(), pr.detach()
    if kind == "aot":
        match = _same_rank(pc - pr, rc - rr)
        return pairs._replace(reference=(rc[match], rr[match]))
    match = _same_rank(pc - rc, pr - rr)
    return pairs._replace(
        policy=(pairs.policy[0], pairs.policy[1][match]), reference=(rc, rr[match])
    )


def _same_rank(a: Tensor, b: Tensor) -> Tensor:
    """Return for each of ``a`` the index of the element of ``b`` at the same rank."""
    return torch.empty_like(order := a.argsort(stable=True)).scatter_(
        0, order, b.argsort(stable=True)
    )
