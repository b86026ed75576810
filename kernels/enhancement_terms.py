"""PLE's loss of one pair: the two branches, their derivatives and the table of ranking losses.

A pair is a plain response y and a principle-guided one, both scored after the plain query. With
S the summed log-prob of a response, T its tokens, R its reward, t the temperature, and s(.) and
x(.) either S or the mean S / T::

    gap = R_guided - R_plain             is_ranked = gap > threshold
    w_guided = sigmoid(gap / t)          w_plain = sigmoid(-gap / t)      (the softmax of R / t)
    loss = ranking(s_plain, s_guided)                          where is_ranked
           -(w_plain * x_plain + w_guided * x_guided)          elsewhere: weighted SFT

Everything is there twice: ``enhancement_terms`` in torch, and ``enhancement_device`` for any
Triton kernel that has the two sums in registers. A new ranking loss is a new row of ``RANKINGS``.

No 0 times infinity: a weight of 0 leaves no trace of an infinite log-prob, the mean of an empty
response is 0 with derivative 0, and two responses of log-prob -inf are a tie with derivative 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import jit, log1p, tl
from .loss_rows import scaled

SFT = ("mean", "sum")


class Ranking(NamedTuple):
    """A ranking loss of the scores of a plain and a guided response, and its two derivatives.

    The scores are mean log-probs where ``per_token``, else sums. ``device`` returns the loss and
    both derivatives.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    slopes: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    device: Callable
    per_token: bool
    source: str


def hinge_value(plain: Tensor, guided: Tensor) -> Tensor:
    """Return ``max(0, plain - guided)``; NaN stays NaN."""
    return (plain - guided).masked_fill(plain <= guided, 0)


def hinge_slopes(plain: Tensor, guided: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives of ``hinge_value``: at a tie, of all subgradients, 0."""
    slope = torch.ones_like(plain).masked_fill(plain <= guided, 0)
    return slope, -slope


@jit
def hinge_device(plain, guided):
    """Return the hinge and its derivatives."""
    slope = tl.where(plain <= guided, 0.0, 1.0)
    return tl.where(plain <= guided, 0.0, plain - guided), slope, -slope


def probability_value(plain: Tensor, guided: Tensor) -> Tensor:
    """Return the hinge of the probabilities, ``max(0, exp(plain) - exp(guided))``."""
    return hinge_value(plain.exp(), guided.exp())


def probability_slopes(plain: Tensor, guided: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives of ``probability_value``."""
    plain, guided = plain.exp(), guided.exp()
    of_plain, of_guided = hinge_slopes(plain, guided)
    return of_plain * plain, of_guided * guided


@jit
def probability_device(plain, guided):
    """Return the hinge of the probabilities and its derivatives."""
    plain = tl.exp(plain)
    guided = tl.exp(guided)
    value, of_plain, of_guided = hinge_device(plain, guided)
    return value, of_plain * plain, of_guided * guided


def _gap(plain: Tensor, guided: Tensor) -> tuple[Tensor, Tensor]:
    both_infinite = (plain == guided) & plain.isinf()
    return (plain - guided).masked_fill(both_infinite, 0), both_infinite


def logistic_value(plain: Tensor, guided: Tensor) -> Tensor:
    """Return ``log(1 + exp(plain - guided))`` with no overflow."""
    return -F.logsigmoid(-_gap(plain, guided)[0])


def logistic_slopes(plain: Tensor, guided: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives of ``logistic_value``."""
    gap, both_infinite = _gap(plain, guided)
    slope = gap.sigmoid().masked_fill(both_infinite, 0)
    return slope, -slope


@jit
def logistic_device(plain, guided):
    """Return the logistic loss and its derivatives."""
    both_infinite = (plain == guided) & (tl.abs(plain) == float("inf"))
    gap = tl.where(both_infinite, 0.0, plain - guided)
    tail = tl.exp(-tl.abs(gap))
    slope = tl.where(gap >= 0.0, 1.0, tail) / (1.0 + tail)
    slope = tl.where(both_infinite, 0.0, slope)
    return tl.maximum(gap, 0.0) + log1p(tail), slope, -slope


_PAPER = "PLE, arXiv 2408.02599: "

RANKINGS: dict[str, Ranking] = {
    "mean": Ranking(
        hinge_value, hinge_slopes, hinge_device, True, _PAPER + "its hinge, of mean log-probs"
    ),
    "sum": Ranking(
        hinge_value, hinge_slopes, hinge_device, False, _PAPER + "its hinge, of summed log-probs"
    ),
    "probability": Ranking(
        probability_value,
        probability_slopes,
        probability_device,
        False,
        _PAPER + "its hinge as printed, of probabilities",
    ),
    "logistic": Ranking(
        logistic_value,
        logistic_slopes,
        logistic_device,
        True,
        "not in the paper: the hinge of mean log-probs made smooth",
    ),
}


class EnhancementTerms(NamedTuple):
    """What ``enhancement_terms`` gives, ``[B]`` each; slopes are by the summed log-probs."""

    losses: Tensor
    is_ranked: Tensor
    plain_weights: Tensor
    guided_weights: Tensor
    plain_slopes: Tensor
    guided_slopes: Tensor


def mean_logps(sums: Tensor, lengths: Tensor) -> Tensor:
    """Return ``sums / lengths``, and 0, with no gradient, where a length is below 1."""
    return (sums / lengths.clamp(min=1)).masked_fill(lengths < 1, 0)


def needs_lengths(ranking: str, sft: str) -> bool:
    """Return whether a pair's loss depends on how many tokens its responses have."""
    return RANKINGS[ranking].per_token or sft == "mean"


def gap_weights(gap: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the weights of the plain and of the guided response: a softmax of two rewards."""
    z = gap / temperature
    return (-z).sigmoid(), z.sigmoid()


def enhancement_terms(
    plain_sums: Tensor,
    guided_sums: Tensor,
    plain_lengths: Tensor | None,
    guided_lengths: Tensor | None,
    plain_rewards: Tensor,
    guided_rewards: Tensor,
    threshold: Tensor,
    ranking: str,
    sft: str,
    temperature: float,
) -> EnhancementTerms:
    """Return the losses of B pairs and their derivatives, for floats ``[B]`` of one dtype.

    Lengths are integers ``[B]``, or None where ``needs_lengths`` says that none is read;
    ``threshold`` is 0-dim. Autograd is not needed: the derivatives are written out.
    """
    row = RANKINGS[ranking]
    sums, lengths = (plain_sums, guided_sums), (plain_lengths, guided_lengths)
    means, scales = sums, (torch.ones_like(plain_sums),) * 2
    if needs_lengths(ranking, sft):
        means = tuple(mean_logps(s, n) for s, n in zip(sums, lengths, strict=True))
        scales = tuple(mean_logps(one, n) for one, n in zip(scales, lengths, strict=True))
    gap = guided_rewards - plain_rewards
    is_ranked = gap > threshold
    weights = gap_weights(gap, temperature)

    scores = means if row.per_token else sums
    slopes = row.slopes(*scores)
    if row.per_token:
        slopes = tuple(slope * scale for slope, scale in zip(slopes, scales, strict=True))

    logps = means if sft == "mean" else sums
    tuned = -(scaled(weights[0], logps[0]) + scaled(weights[1], logps[1]))
    tuned_slopes = tuple(
        -weight * scale if sft == "mean" else -weight
        for weight, scale in zip(weights, scales, strict=True)
    )
    return EnhancementTerms(
        torch.where(is_ranked, row.value(*scores), tuned),
        is_ranked,
        *weights,
        *(torch.where(is_ranked, a, b) for a, b in zip(slopes, tuned_slopes, strict=True)),
    )


@jit
def enhancement_device(
    plain_sum,
    guided_sum,
    plain_length,
    guided_length,
    plain_reward,
    guided_reward,
    threshold,
    temperature,
    RANKING: tl.constexpr,
    RANKS_MEANS: tl.constexpr,
    TUNES_MEANS: tl.constexpr,
):
    """Return the six ``EnhancementTerms`` of pairs in registers, lengths as float32 too.

    RANKING is a row's ``device``, RANKS_MEANS its ``per_token``, TUNES_MEANS ``sft == "mean"``.
    """
    plain_scale = tl.where(plain_length < 1.0, 0.0, 1.0 / tl.maximum(plain_length, 1.0))
    guided_scale = tl.where(guided_length < 1.0, 0.0, 1.0 / tl.maximum(guided_length, 1.0))
    # A quotient, not sum * scale: one rounding, and no 0 * inf.
    plain_mean = tl.where(plain_length < 1.0, 0.0, plain_sum / tl.maximum(plain_length, 1.0))
    guided_mean = tl.where(guided_length < 1.0, 0.0, guided_sum / tl.maximum(guided_length, 1.0))

    gap = guided_reward - plain_reward
    is_ranked = gap > threshold
    z = gap / temperature
    tail = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + tail)
    smaller = tail / (1.0 + tail)
    plain_weight = tl.where(z >= 0.0, smaller, larger)
    guided_weight = tl.where(z >= 0.0, larger, smaller)

    if RANKS_MEANS:
        value, plain_slope, guided_slope = RANKING(plain_mean, guided_mean)
        plain_slope *= plain_scale
        guided_slope *= guided_scale
    else:
        value, plain_slope, guided_slope = RANKING(plain_sum, guided_sum)

    plain_tuned = -plain_weight
    guided_tuned = -guided_weight
    if TUNES_MEANS:
        plain_x = plain_mean
        guided_x = guided_mean
        plain_tuned *= plain_scale
        guided_tuned *= guided_scale
    else:
        plain_x = plain_sum
        guided_x = guided_sum
    # A weight that underflows to 0 must not turn a log-prob of -inf into NaN.
    plain_part = tl.where(plain_weight == 0.0, 0.0, plain_weight * plain_x)
    guided_part = tl.where(guided_weight == 0.0, 0.0, guided_weight * guided_x)

    return (
        tl.where(is_ranked, value, -(plain_part + guided_part)),
        is_ranked,
        plain_weight,
        guided_weight,
        tl.where(is_ranked, plain_slope, plain_tuned),
        tl.where(is_ranked, guided_slope, guided_tuned),
    )
