"""The loss functions of a scaled margin: one table, read by every op and every implementation.

A row gives a loss and its derivative as pure functions of ``z = beta * margin`` and of the label
smoothing (a number, or one per pair), twice: in torch, for the chunked path, and as a Triton
device function that returns both, for any kernel that has ``z`` in registers. A new loss is a new
row; nothing else names a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ._common import jit, log1p, tl


class Loss(NamedTuple):
    """A loss of the scaled margin ``z``, its derivative by ``z``, and where it comes from."""

    value: Callable[[Tensor, float | Tensor], Tensor]
    slope: Callable[[Tensor, float | Tensor], Tensor]
    device: Callable
    source: str


def sigmoid_value(z: Tensor, label_smoothing: float | Tensor) -> Tensor:
    """Return ``-(1 - e) * log sigmoid(z) - e * log sigmoid(-z)``, e the label smoothing.

    As ``-log sigmoid(z) + e * z``, which is the same and exactly log 2 at ``z = 0`` for every e.
    """
    if isinstance(label_smoothing, Tensor):
        return -F.logsigmoid(z) + (label_smoothing * z).masked_fill(label_smoothing == 0, 0)
    return -F.logsigmoid(z) + label_smoothing * z if label_smoothing else -F.logsigmoid(z)


def sigmoid_slope(z: Tensor, label_smoothing: float | Tensor) -> Tensor:
    """Return the derivative of ``sigmoid_value`` by ``z``."""
    return label_smoothing - (-z).sigmoid()


@jit
def sigmoid_device(z, label_smoothing):
    """Return the value and the slope of the sigmoid loss."""
    tail = tl.exp(-tl.abs(z))
    # A smoothing of 0 must not turn an infinite margin into 0 * inf.
    tilt = tl.where(label_smoothing == 0.0, 0.0, label_smoothing * z)
    value = tl.maximum(-z, 0.0) + log1p(tail) + tilt
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
