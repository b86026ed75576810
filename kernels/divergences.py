"""Scores of a sequence under a choice of f-divergence: functions of its log-ratio to the reference.

A preference loss with a regulariser other than the reverse KL compares f'(pi / pi_ref) of the two
sequences in the place of log(pi / pi_ref). Each is a value and a derivative by the log-ratio r in
nats, in torch and in Triton; ``p`` is the one number that two of them take.

Source: f-DPO, Wang et al., "Beyond Reverse KL", arXiv 2309.16240. Its alpha is 1 minus ours, which
is TRL's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import expm1, jit, log1p, tl
from .loss_rows import confidence_device

LARGEST = 80.0
"""The largest exponent: exp(80) is finite in float32, and beyond it the score is constant."""
_LARGEST_DEVICE = tl.constexpr(LARGEST)


class Divergence(NamedTuple):
    """A score ``value(r, p)``, its derivative ``slope(r, p)``, and both as ``device(r, p)``."""

    value: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, float], Tensor]
    device: Callable


def log_ratio(r: Tensor, p: float) -> Tensor:
    """Return ``r``: the reverse KL."""
    return r


def log_ratio_slope(r: Tensor, p: float) -> Tensor:
    """Return 1."""
    return torch.ones_like(r)


@jit
def log_ratio_device(r, p):
    """Return the score and the slope of the reverse KL."""
    return r, 1.0


def power(r: Tensor, p: float) -> Tensor:
    """Return ``(exp(p * r) - 1) / p``: an alpha-divergence with alpha = 1 + p; -1 is forward KL."""
    return (p * r).clamp(max=LARGEST).expm1() / p


def power_slope(r: Tensor, p: float) -> Tensor:
    """Return ``exp(p * r)``, and 0 where the score is constant."""
    t = p * r
    return torch.where(t <= LARGEST, t.clamp(max=LARGEST).exp(), 0)


@jit
def power_device(r, p):
    """Return the score and the slope of an alpha-divergence."""
    t = p * r
    top = tl.minimum(t, _LARGEST_DEVICE)
    return expm1(top) / p, tl.where(t <= _LARGEST_DEVICE, tl.exp(top), 0.0)


def jensen_shannon(r: Tensor, p: float) -> Tensor:
    """Return ``log(2 * sigmoid(r))``, without the cancellation at r = 0."""
    positive = r > 0
    below = torch.where(positive, -r, r)
    return r.masked_fill(positive, 0) - (0.5 * below.expm1()).log1p()


def jensen_shannon_slope(r: Tensor, p: float) -> Tensor:
    """Return ``sigmoid(-r)``."""
    return (-r).sigmoid()


@jit
def jensen_shannon_device(r, p):
    """Return the score and the slope of the Jensen-Shannon divergence."""
    value = tl.minimum(r, 0.0) - log1p(0.5 * expm1(-tl.abs(r)))
    return value, confidence_device(-r)


_POWER = Divergence(power, power_slope, power_device)

DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": Divergence(log_ratio, log_ratio_slope, log_ratio_device),
    "forward_kl": _POWER,
    "js_divergence": Divergence(jensen_shannon, jensen_shannon_slope, jensen_shannon_device),
    "alpha_divergence": _POWER,
}


def resolve_divergence(name: str, alpha: float) -> tuple[str, float]:
    """Return the name to look up and its number: alpha = 1 is the reverse KL."""
    if name == "alpha_divergence":
        # The limit, taken where exp(p * r) - 1 has no digits left.
        return ("reverse_kl", 0.0) if abs(alpha - 1) < 1e-6 else (name, alpha - 1)
    return name, -1.0 if name == "forward_kl" else 0.0
