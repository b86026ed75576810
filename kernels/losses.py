"""The table of preference losses: small pure functions of a pair's two scores, by name.

A *score* says how much a model likes a sequence: the policy's log-prob over the reference's, in
nats, or f' of that ratio under another f-divergence (``divergences.py``), or the policy's log-prob
alone; of the whole sequence, or per token. A row of ``LOSSES`` says which, and gives the loss of
the chosen score a and the rejected score b, its two derivatives, a Triton device function that
returns all three, and the paper. Every op and every implementation of it goes through this table;
a new loss is a new row, and nothing else names one. The functions are in ``loss_rows.py``; sums of
rows, and losses that compare a whole batch, in ``preference_loss.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import loss_rows as rows
from ._common import jit, tl
from .divergences import DIVERGENCES
from .loss_rows import Number


class PairLoss(NamedTuple):
    """A loss of a pair's two scores, its derivatives, what it takes and where it comes from.

    ``value(a, b, beta, label_smoothing, extra)`` returns ``[B]``, autograd goes through it in the
    reference; ``slopes`` takes the same and returns two ``[B]``, by a and by b.
    ``device(a, b, beta, label_smoothing, extra, INNER)`` is Triton's and returns all three;
    ``inner``, a device function that it builds on, or None. A row without one runs everywhere but
    in Triton. Weights are multiplied outside.
    """

    value: Callable[[Tensor, Tensor, Number, Number, float], Tensor]
    slopes: Callable[[Tensor, Tensor, Number, Number, float], tuple[Tensor, Tensor]]
    device: Callable | None
    source: str
    inner: Callable | None = None
    reference: bool = True
    """Whether a score is against the reference; else it is the policy's log-prob."""
    per_token: bool = False
    """Whether a score is divided by the sequence's tokens."""
    divergence: bool = False
    """Whether the paper's loss has a form for other f-divergences."""
    smoothing: str | None = None
    """Which label smoothings it takes: ``"any"`` up to 1/2, ``"positive"``, ``"below 1/2"``."""
    extra: tuple[str, float] | None = None
    """Name and default of the number that it takes besides, in ``loss_options``; not below 0."""


@jit
def margin_device(a, b, beta, label_smoothing, extra, INNER: tl.constexpr):
    """Return a loss of the scaled margin and its two slopes, which are opposite."""
    value, slope = INNER(beta * (a - b), beta, label_smoothing, extra)
    slope *= beta
    return value, slope, -slope


def _of_margin(value: Callable, slope: Callable, device: Callable, source: str, **takes):
    """Return the row of a loss of ``z = beta * (a - b)``."""

    def of_scores(a, b, beta, label_smoothing, extra):
        return value(beta * (a - b), beta, label_smoothing, extra)

    def slopes(a, b, beta, label_smoothing, extra):
        turn = beta * slope(beta * (a - b), beta, label_smoothing, extra)
        return turn, -turn

    return PairLoss(of_scores, slopes, margin_device, source, inner=device, **takes)


_SIGMOID = rows.sigmoid_value, rows.sigmoid_slope, rows.sigmoid_device
_HINGE = rows.hinge_value, rows.hinge_slope, rows.hinge_device
_CDPO = 'cDPO: Mitchell, "A note on DPO with noisy preferences" (2023)'

LOSSES: dict[str, PairLoss] = {
    # Of the scaled margin of log-ratios
    "sigmoid": _of_margin(
        *_SIGMOID,
        f"DPO, arXiv 2305.18290, equation 7; with label smoothing {_CDPO}",
        divergence=True,
        smoothing="any",
    ),
    "cdpo": _of_margin(*_SIGMOID, _CDPO, divergence=True, smoothing="positive"),
    "hinge": _of_margin(
        *_HINGE,
        "RSO, arXiv 2309.06657, the hinge-norm loss; SLiC's on log-ratios",
        divergence=True,
        extra=("hinge_margin", 1.0),
    ),
    "robust": _of_margin(
        rows.robust_value,
        rows.robust_slope,
        rows.robust_device,
        "rDPO, arXiv 2403.00409",
        divergence=True,
        smoothing="below 1/2",
    ),
    "exo_pair": _of_margin(
        rows.exo_value,
        rows.exo_slope,
        rows.exo_device,
        "EXO, arXiv 2402.00856, equation 16",
        divergence=True,
        smoothing="positive",
    ),
    "discopop": _of_margin(
        rows.discopop_value,
        rows.discopop_slope,
        rows.discopop_device,
        "DiscoPOP (log-ratio modulated loss), arXiv 2406.08414, equation 5",
        divergence=True,
        extra=("discopop_tau", 0.05),
    ),
    # Of the margin of log-ratios per token
    "ipo": _of_margin(
        rows.squared_value,
        rows.squared_slope,
        rows.squared_device,
        "IPO, arXiv 2310.12036, equation 17, per token as its authors report it",
        divergence=True,
        per_token=True,
    ),
    "sigmoid_norm": _of_margin(
        *_SIGMOID,
        "length-normalised DPO: Tulu 3, arXiv 2411.15124",
        divergence=True,
        per_token=True,
        smoothing="any",
    ),
    # Of the two log-ratios
    "nca_pair": PairLoss(
        rows.nca_value, rows.nca_slopes, rows.nca_device, "NCA, arXiv 2402.05369, for two responses"
    ),
    "bco_pair": PairLoss(
        rows.bco_value,
        rows.bco_slopes,
        rows.bco_device,
        "BCO, arXiv 2404.04656, on pairs and without its reward shift",
    ),
    "sppo_hard": PairLoss(
        rows.sppo_value,
        rows.sppo_slopes,
        rows.sppo_device,
        "SPPO, arXiv 2405.00675, equation 4.7 with win probabilities 1 and 0",
    ),
    "apo_zero": PairLoss(
        rows.apo_zero_value,
        rows.apo_zero_slopes,
        rows.apo_zero_device,
        "APO-zero, arXiv 2408.06266, equation 7",
    ),
    "apo_down": PairLoss(
        rows.apo_down_value,
        rows.apo_down_slopes,
        rows.apo_down_device,
        "APO-down, arXiv 2408.06266, equation 8",
    ),
    # Of the policy alone
    "policy_sigmoid": _of_margin(
        *_SIGMOID,
        "CPO's preference term, arXiv 2401.08417",
        reference=False,
        smoothing="any",
    ),
    "simpo": _of_margin(
        rows.simpo_value,
        rows.simpo_slope,
        rows.simpo_device,
        "SimPO, arXiv 2405.14734, equation 6",
        reference=False,
        per_token=True,
        smoothing="any",
        extra=("simpo_gamma", 0.5),
    ),
    "policy_hinge": _of_margin(
        *_HINGE,
        "SLiC-HF's calibration term, arXiv 2305.10425",
        reference=False,
        extra=("slic_delta", 1.0),
    ),
    "odds_ratio": PairLoss(
        rows.odds_ratio_value,
        rows.odds_ratio_slopes,
        rows.odds_ratio_device,
        "ORPO's odds ratio, arXiv 2403.07691, equation 7; beta is its lambda",
        reference=False,
        per_token=True,
    ),
    "rank": PairLoss(
        rows.rank_value,
        rows.rank_slopes,
        rows.rank_device,
        "RRHF's ranking of two responses, arXiv 2304.05302, equation 2",
        reference=False,
        per_token=True,
    ),
    "nll": PairLoss(
        rows.nll_value,
        rows.nll_slopes,
        rows.nll_device,
        "negative log-likelihood of the chosen sequence, a sum over its tokens",
        reference=False,
    ),
}


class Objective(NamedTuple):
    """A row of the table with its numbers; ``divergence`` and its ``power`` are resolved names."""

    loss: str
    beta: float
    label_smoothing: float = 0.0
    extra: float = 0.0
    divergence: str = "reverse_kl"
    power: float = 0.0

    @property
    def row(self) -> PairLoss:
        """The row of ``LOSSES``."""
        return LOSSES[self.loss]


# From sums to scores, in torch and in Triton


def scores(
    objective: Objective, policy: Tensor, reference: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return scores and their derivative by the policy's sums (None: 1); autograd goes through."""
    row = objective.row
    values, slopes = policy, None
    if row.reference:
        assert reference is not None
        values = values - reference
        if objective.divergence != "reverse_kl":
            divergence = DIVERGENCES[objective.divergence]
            slopes = divergence.slope(values.detach(), objective.power)
            values = divergence.value(values, objective.power)
    if row.per_token:
        assert counts is not None
        counts = counts.clamp(min=1).to(values.dtype)
        values, slopes = values / counts, (1 if slopes is None else slopes) / counts
    return values, slopes


@jit
def score_device(
    policy,
    reference,
    count,
    power,
    REFERENCE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Return a sequence's score and its derivative by the policy's sum."""
    value = policy
    if REFERENCE:
        value = policy - reference
    slope = 1.0
    if DIVERGENCE is not None:
        value, slope = DIVERGENCE(value, power)
    if PER_TOKEN:
        tokens = tl.maximum(count, 1).to(tl.float32)
        value = value / tokens
        slope = slope / tokens
    return value, slope


def device_options(objective: Objective) -> dict[str, object]:
    """Return the constexprs that make a kernel one of this row: its functions and its score."""
    row = objective.row
    other = objective.divergence != "reverse_kl"
    return {
        "REFERENCE": row.reference,
        "PER_TOKEN": row.per_token,
        "DIVERGENCE": DIVERGENCES[objective.divergence].device if other else None,
        "LOSS": row.device,
        "INNER": row.inner,
    }


# What the ops make of a table's row


class PairValues(NamedTuple):
    """What an op makes of B pairs' sums: ``[B]`` each, slopes by the policy's two sums."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    chosen_slopes: Tensor
    rejected_slopes: Tensor


def pair_values(
    objective: Objective,
    policy: Sequence[Tensor],
    reference: Sequence[Tensor | None],
    counts: Sequence[Tensor | None],
    label_smoothing: Number,
    weights: Tensor | None,
    beta: Number | None = None,
) -> PairValues:
    """Return losses, statistics and slopes of ``(chosen, rejected)`` sums, ``[B]`` each.

    ``label_smoothing``, and ``beta`` if given, stand in the place of the objective's numbers.
    """
    row, beta = objective.row, objective.beta if beta is None else beta
    (a, turn_a), (b, turn_b) = (
        scores(objective, *side) for side in zip(policy, reference, counts, strict=True)
    )
    numbers = beta, label_smoothing, objective.extra
    losses, slopes = row.value(a, b, *numbers), row.slopes(a, b, *numbers)
    slope_c, slope_r = (
        slope if turn is None else slope * turn
        for slope, turn in zip(slopes, (turn_a, turn_b), strict=True)
    )
    if weights is not None:
        losses, slope_c, slope_r = weights * losses, weights * slope_c, weights * slope_r
    chosen, rejected = log_ratios(policy, reference)
    return PairValues(losses, beta * chosen, beta * rejected, chosen - rejected, slope_c, slope_r)


def log_ratios(policy: Sequence[Tensor], reference: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the log-ratios of both sequences, or the policy's sums where there is no reference."""
    return [p if r is None else p - r for p, r in zip(policy, reference, strict=True)]


def sides(values: Tensor | None) -> tuple:
    """Return the chosen and the rejected ones of ``[2B]`` in turn, or two None."""
    return (None, None) if values is None else values.view(-1, 2).unbind(-1)


def pair_slopes(
    objective: Objective,
    sums: Tensor,
    reference: Tensor | None,
    counts: Tensor,
    weights: Tensor | None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return losses and both rewards, and the losses' derivative by each of the ``[2B]`` sums."""
    found = pair_values(
        objective, sides(sums), sides(reference), sides(counts), objective.label_smoothing, weights
    )
    return found[:3], torch.stack(found[4:], -1).flatten()


# From tokens to sums, and back


def sequence_sums(values: Tensor, ends: Sequence[int]) -> Tensor:
    """Return the sum of each of the spans between ``ends``; ``values`` begin at the first."""
    first = ends[0]
    return torch.stack([values[a - first : b - first].sum() for a, b in pairwise(ends)])


def per_token(scalars: Tensor, ends: Tensor, tokens: int) -> Tensor:
    """Spread a scalar of each span between ``ends`` over its tokens."""
    return scalars.repeat_interleave(ends.diff(), output_size=tokens)
