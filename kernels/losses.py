"""The loss functions of a scaled margin: one table, read by every op and every implementation.

A row gives a loss and its derivative as pure functions of ``z = beta * margin`` and of the label
smoothing (a number, or one per pair), twice: in torch, for the chunked path, and as a Triton
device function that returns both, for any kernel that has ``z`` in registers. A new loss is a new
row; nothing else names a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import jit, log1p, tl


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


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(
        sigmoid_value,
        sigmoid_slope,
        sigmoid_device,
        "DPO, arXiv 2305.18290, equation 7; label smoothing (cDPO): Mitchell, "
        '"A note on DPO with noisy preferences" (2023)',
    ),
}
