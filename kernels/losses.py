"""The losses, by name: of a scaled margin, and of what a pair's two sequences add up to.

``LOSSES`` holds losses of ``z = beta * margin`` and of the label smoothing (a number, or one per
pair): a value and a derivative in torch, for the chunked path, and a Triton device function that
returns both, for any kernel that has ``z`` in registers.

``PAIR_LOSSES`` is the table of the ops that see whole pairs, ``pair_loss_head`` and
``linear_preference_loss``. Its losses depend on each sequence's own policy sum, reference sum and
number of tokens, and have two derivatives: by the chosen and by the rejected policy sum. A loss of
the margin is the case where these are opposite, and every row of ``LOSSES`` has a row here.
A new loss is a new row; nothing else names a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import jit, log1p, tl

# Losses of a scaled margin.


class Loss(NamedTuple):
    """A loss of the scaled margin ``z``, its derivative by ``z``, and where it comes from."""

    value: Callable[[Tensor, float | Tensor], Tensor]
    slope: Callable[[Tensor, float | Tensor], Tensor]
    device: Callable
    source: str


def scaled(weight: float | Tensor, values: Tensor) -> Tensor:
    """Return ``weight * values``, where a weight of 0 makes 0 of an infinity too."""
    if isinstance(weight, Tensor):
        return (weight * values).masked_fill(weight == 0, 0)
    return weight * values if weight else torch.zeros_like(values)


def sigmoid_value(z: Tensor, label_smoothing: float | Tensor) -> Tensor:
    """Return ``-(1 - e) * log sigmoid(z) - e * log sigmoid(-z)``, e the label smoothing.

    As ``log(1 + exp(-|z|)) + (e * z if z > 0 else (e - 1) * z)``: the same, with nothing that
    cancels, not even infinities, and exactly log 2 at ``z = 0`` for every e.
    """
    positive = z > 0  # and not relu and abs, whose derivatives at 0 are those of neither side
    size = torch.where(positive, z, -z)
    tilt = scaled(label_smoothing, size.masked_fill(~positive, 0))
    tilt = tilt + scaled(1 - label_smoothing, size.masked_fill(positive, 0))
    return tilt - F.logsigmoid(size)


def sigmoid_slope(z: Tensor, label_smoothing: float | Tensor) -> Tensor:
    """Return the derivative of ``sigmoid_value`` by ``z``."""
    return label_smoothing - (-z).sigmoid()


@jit
def sigmoid_device(z, label_smoothing):
    """Return the value and the slope of the sigmoid loss."""
    tail = tl.exp(-tl.abs(z))
    # A weight of 0 must not turn an infinite margin into 0 * inf.
    flip = tl.where(label_smoothing == 0.0, 0.0, label_smoothing * tl.maximum(z, 0.0))
    keep = tl.where(label_smoothing == 1.0, 0.0, (1.0 - label_smoothing) * tl.maximum(-z, 0.0))
    value = log1p(tail) + (flip + keep)
    slope = label_smoothing - tl.where(z >= 0.0, tail, 1.0) / (1.0 + tail)
    return value, slope


@jit
def confidence_device(z):
    """Return sigmoid(z) with no overflow, SPA's confidence in a label."""
    tail = tl.exp(-tl.abs(z))
    return tl.where(z >= 0.0, 1.0, tail) / (1.0 + tail)


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(
        sigmoid_value,
        sigmoid_slope,
        sigmoid_device,
        "DPO, arXiv 2305.18290, equation 7; label smoothing (cDPO): Mitchell, "
        '"A note on DPO with noisy preferences" (2023)',
    ),
}


# Losses of a pair's two sequences.


class Side(NamedTuple):
    """The chosen or the rejected sequences of B pairs: ``[B]`` each, in nats and in tokens."""

    policy: Tensor
    reference: Tensor
    counts: Tensor


class PairLoss(NamedTuple):
    """A loss of two sequences, and its derivatives by the policy's sum of each.

    ``value(chosen, rejected, beta, label_smoothing)`` takes two ``Side``s and returns ``[B]``;
    autograd goes through it in the reference. ``slopes`` takes the same and returns two ``[B]``.
    ``device(pc, rc, nc, pr, rr, nr, beta, label_smoothing, INNER)`` is Triton's: policy sum,
    reference sum (float32) and tokens (int64) of the chosen and of the rejected sequence; it
    returns value, chosen and rejected slope. ``INNER`` is the row's ``inner``, a device function
    that it builds on, or None. Weights are multiplied outside.
    """

    value: Callable[[Side, Side, float, float | Tensor], Tensor]
    slopes: Callable[[Side, Side, float, float | Tensor], tuple[Tensor, Tensor]]
    device: Callable
    inner: Callable | None
    source: str


def sides(sums: Tensor, reference: Tensor, counts: Tensor) -> tuple[Side, Side]:
    """Return the chosen and the rejected sequences of ``[2B]`` sums and counts in turn."""
    both = (x.view(-1, 2).unbind(-1) for x in (sums, reference, counts))
    chosen, rejected = zip(*both, strict=True)
    return Side(*chosen), Side(*rejected)


def margins_of(chosen: Side, rejected: Side) -> Tensor:
    """Return how much further the policy prefers each chosen sequence than the reference does."""
    return (chosen.policy - chosen.reference) - (rejected.policy - rejected.reference)


@jit
def margin_device(pc, rc, nc, pr, rr, nr, beta, label_smoothing, INNER: tl.constexpr):
    """Return a margin loss and its two slopes, which are opposite."""
    value, slope = INNER(beta * ((pc - rc) - (pr - rr)), label_smoothing)
    slope *= beta
    return value, slope, -slope


def margin_loss(loss: Loss) -> PairLoss:
    """Return a loss of the scaled margin as one of a pair's sequences."""

    def value(chosen, rejected, beta, label_smoothing):
        return loss.value(beta * margins_of(chosen, rejected), label_smoothing)

    def slopes(chosen, rejected, beta, label_smoothing):
        slope = beta * loss.slope(beta * margins_of(chosen, rejected), label_smoothing)
        return slope, -slope

    return PairLoss(value, slopes, margin_device, loss.device, loss.source)


PAIR_LOSSES: dict[str, PairLoss] = {name: margin_loss(loss) for name, loss in LOSSES.items()}


class PairValues(NamedTuple):
    """What a head makes of its sums: ``[B]`` each, but for the slopes of the 2B sequences."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    slopes: Tensor


def pair_values(
    loss: str,
    sums: Tensor,
    reference: Tensor,
    counts: Tensor,
    beta: float,
    label_smoothing: float | Tensor,
    weights: Tensor | None,
) -> PairValues:
    """Return losses, statistics, and the losses' derivative by each of the ``[2B]`` sums."""
    row, pair = PAIR_LOSSES[loss], sides(sums, reference, counts)
    losses = row.value(*pair, beta, label_smoothing)
    slopes = torch.stack(row.slopes(*pair, beta, label_smoothing), -1)
    if weights is not None:
        losses, slopes = weights * losses, weights[:, None] * slopes
    rewards = (beta * (side.policy - side.reference) for side in pair)
    return PairValues(losses, *rewards, margins_of(*pair), slopes.flatten())


# From tokens to sums, and back.


def sequence_sums(values: Tensor, ends: Sequence[int]) -> Tensor:
    """Return the sum of each of the spans between ``ends``; ``values`` begin at the first."""
    first = ends[0]
    return torch.stack([values[a - first : b - first].sum() for a, b in pairwise(ends)])


def per_token(scalars: Tensor, ends: Tensor, tokens: int) -> Tensor:
    """Spread a scalar of each span between ``ends`` over its tokens."""
    return scalars.repeat_interleave(ends.diff(), output_size=tokens)
