"""From the arguments that name a preference loss to the rows of the table that it is made of.

``preference_loss``, ``pair_loss_head`` and ``linear_preference_loss`` share these arguments::

    loss_type                   a name, or several whose weighted sum it is
    loss_weights                their weights
    beta, label_smoothing
    f_divergence_type           the regulariser: a name in ``divergences.DIVERGENCES``
    f_alpha_divergence_coef     its alpha
    loss_options                the numbers that single losses take, by name

A name is a row of ``losses.LOSSES``, a loss of a whole batch (``COUPLED``), or a published sum of
those (``RECIPES``). What none of the losses takes is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ._common import check_choice, check_number
from .divergences import DIVERGENCES, resolve_divergence
from .losses import LOSSES, Objective

COUPLED: dict[str, tuple[str, str]] = {
    "aot": (
        "sigmoid",
        "AOT, arXiv 2406.05882: the policy's and the reference's margins, each in their order",
    ),
    "aot_unpaired": (
        "sigmoid",
        "AOT, arXiv 2406.05882: the chosen and the rejected log-ratios, each in their order",
    ),
    "sft": ("nll", "negative log-likelihood of the chosen, a mean over the tokens of the batch"),
}
"""Losses whose value for a pair depends on the batch: the row they are made with, and a source."""

RECIPES: dict[str, tuple[tuple[tuple[str, float], ...], str]] = {
    "cpo": ((("policy_sigmoid", 1.0), ("sft", 1.0)), "CPO, arXiv 2401.08417"),
    "orpo": ((("sft", 1.0), ("odds_ratio", 1.0)), "ORPO, arXiv 2403.07691, equation 6"),
    "slic": ((("policy_hinge", 1.0), ("nll", 1.0)), "SLiC-HF, arXiv 2305.10425"),
    "rrhf": ((("rank", 1.0), ("nll", 1.0)), "RRHF, arXiv 2304.05302, of two responses"),
}
"""Published sums of losses: (name, weight) each, and the source."""


def loss_names() -> tuple[str, ...]:
    """Return every name that ``loss_type`` may have."""
    return (*LOSSES, *COUPLED, *RECIPES)


class Term(NamedTuple):
    """One summand: a row with its numbers, a weight, and how pairs are made of the batch.

    ``kind`` is ``"pairs"``, as they come, or a name in ``COUPLED``.
    """

    objective: Objective
    weight: float = 1.0
    kind: str = "pairs"

    @property
    def needs_counts(self) -> bool:
        """Whether the summand depends on numbers of tokens."""
        return self.objective.row.per_token or self.kind == "sft"


def needs_reference(terms: Sequence[Term]) -> bool:
    """Return whether a summand compares the policy with a reference."""
    return any(term.objective.row.reference for term in terms)


def couples_batch(terms: Sequence[Term]) -> bool:
    """Return whether a pair's loss depends on the other pairs of its batch."""
    return any(term.kind in COUPLED for term in terms)


def impl_of(terms: Sequence[Term], asked: str, impl: str) -> str:
    """Return the implementation: where none was ``asked`` for, chunked for rows without a kernel.

    Raises:
        ValueError: Triton was asked for, and a row has no function for it.
    """
    for objective in (term.objective for term in terms):
        if impl == "triton" and objective.row.device is None:
            if asked == "auto":
                return "chunked"
            raise ValueError(f"impl: 'triton' needs a device function, {objective.loss!r} has none")
    return impl


def resolve(
    loss_type: str | Sequence[str],
    *,
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 1.0,
    loss_options: Mapping[str, float] | None = None,
    name: str = "loss_type",
) -> tuple[Term, ...]:
    """Return the summands, after every check that needs no tensor. ``name`` is that of the losses.

    Raises:
        TypeError, ValueError: An argument that is of the wrong type, unknown, out of range, or
            taken by none of the losses.
    """
    parts = _parts(name, loss_type, loss_weights)
    label_smoothing = check_number("label_smoothing", label_smoothing, low=0, high=0.5)
    divergence = _divergence(name, parts, f_divergence_type, f_alpha_divergence_coef)
    options = _options(name, parts, loss_options)
    _check_smoothing(name, parts, label_smoothing)
    terms = []
    for loss, weight in parts:
        key = COUPLED[loss][0] if loss in COUPLED else loss
        row = LOSSES[key]
        objective = Objective(
            key,
            beta,
            label_smoothing if row.smoothing else 0.0,
            options[row.extra[0]] if row.extra else 0.0,
            *(divergence if row.reference else ("reverse_kl", 0.0)),
        )
        terms.append(Term(objective, weight, loss if loss in COUPLED else "pairs"))
    return tuple(terms)


def _parts(name: str, loss_type: Any, loss_weights: Any) -> list[tuple[str, float]]:
    """Return the names of rows and of coupled losses, each with its weight."""
    names = (loss_type,) if isinstance(loss_type, str) else loss_type
    if not isinstance(names, Sequence):
        raise TypeError(f"{name}: expected a name or several, got {type(loss_type).__name__}")
    if not names:
        raise ValueError(f"{name}: expected at least one name, got none")
    for one in names:
        check_choice(name, one, loss_names())
    if loss_weights is None:
        loss_weights = [1.0] * len(names)
    if isinstance(loss_weights, str) or not isinstance(loss_weights, Sequence):
        raise TypeError(f"loss_weights: expected numbers, got {type(loss_weights).__name__}")
    if len(loss_weights) != len(names):
        raise ValueError(
            f"loss_weights: expected a number for each of {len(names)} losses, "
            f"got {len(loss_weights)}"
        )
    parts = []
    for index, (one, weight) in enumerate(zip(names, loss_weights, strict=True)):
        number = check_number(f"loss_weights[{index}]", weight)
        recipe = RECIPES[one][0] if one in RECIPES else ((one, 1.0),)
        parts += [(part, number * share) for part, share in recipe]
    return parts


def _takes_divergence(loss: str) -> bool:
    """Return whether a loss has a form for other f-divergences, or no reference at all."""
    if loss in COUPLED:
        return not LOSSES[COUPLED[loss][0]].reference
    return LOSSES[loss].divergence or not LOSSES[loss].reference


def _divergence(name, parts, kind: Any, alpha: Any) -> tuple[str, float]:
    check_choice("f_divergence_type", kind, tuple(DIVERGENCES))
    alpha = check_number("f_alpha_divergence_coef", alpha)
    if kind != "alpha_divergence" and alpha != 1:
        raise ValueError(
            f"f_alpha_divergence_coef: expected 1 unless f_divergence_type='alpha_divergence', "
            f"got {alpha} with {kind!r}"
        )
    divergence = resolve_divergence(kind, alpha)
    for loss, _ in parts:
        if divergence[0] != "reverse_kl" and not _takes_divergence(loss):
            raise ValueError(
                f"f_divergence_type: expected 'reverse_kl' with {name} {loss!r}, got {kind!r}"
            )
    return divergence


def _options(name, parts, given: Any) -> dict[str, float]:
    rows = [LOSSES[loss] for loss, _ in parts if loss in LOSSES]
    options = dict(row.extra for row in rows if row.extra)
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"loss_options: expected a mapping, got {type(given).__name__}")
    for key, value in (given or {}).items():
        if key not in options:
            known = ", ".join(map(repr, options)) or "none"
            losses = ", ".join(repr(loss) for loss, _ in parts)
            raise ValueError(f"loss_options: {name} {losses} takes {known}, got {key!r}")
        options[key] = check_number(f"loss_options[{key!r}]", value, low=0)
        if key == "discopop_tau":  # it divides
            check_number(f"loss_options[{key!r}]", value, above=0)
    return options


def _check_smoothing(name, parts, value: float) -> None:
    rows = {loss: LOSSES[COUPLED[loss][0] if loss in COUPLED else loss] for loss, _ in parts}
    takes = {loss: row.smoothing for loss, row in rows.items()}
    for loss, kind in takes.items():
        if kind == "positive" and not value:
            raise ValueError(f"label_smoothing: expected above 0 with {name} {loss!r}, got 0")
        if kind == "below 1/2" and value == 0.5:
            raise ValueError(f"label_smoothing: expected below 0.5 with {name} {loss!r}, got 0.5")
    if value and not any(takes.values()):
        losses = ", ".join(map(repr, takes))
        raise ValueError(f"label_smoothing: expected 0 with {name} {losses}, got {value}")
