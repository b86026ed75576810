"""Correctness first: every provider's error against float64, and who may be timed.

The house contract, for each output and gradient, in the mean and in the maximum::

    |actual - exact|  <=  max(2 * |eager - exact|,  eps * |exact|)

with ``eager`` the same-dtype eager computation and eps that of its output's dtype, at least four of
float32's. prefalign must keep it, or the benchmark fails. A peer that does not is ``coarse``: it is
timed, marked, and not ranked. Errors beyond a tenth of the answer's largest value are ``wrong`` and
not timed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cases import Outputs

OK, COARSE, WRONG = "ok", "coarse", "wrong"
WRONG_FROM = 0.1


def error(actual: Tensor, eager: Tensor, exact: Tensor) -> dict[str, float]:
    """Return how far ``actual`` and ``eager`` are from ``exact``, and what was allowed.

    ``contract`` is the larger of error / allowed over mean and maximum: at most 1 keeps the
    contract. ``relative`` is the maximum error over the answer's largest size.
    """
    if actual.shape != exact.shape or not actual.isfinite().all():
        lost = float("inf")
        return {"mean": lost, "max": lost, "relative": lost, "contract": lost, "eager_max": 0.0}
    eps = max(torch.finfo(eager.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    got, bound, size = (actual - exact).abs(), (eager - exact).abs(), exact.abs()
    shares = [
        reduce(got).item() / max(2 * reduce(bound).item(), eps * reduce(size).item(), 1e-300)
        for reduce in (torch.mean, torch.amax)
    ]
    return {
        "mean": got.mean().item(),
        "max": got.amax().item(),
        "relative": got.amax().item() / max(size.amax().item(), 1e-300),
        "contract": max(shares),
        "eager_max": bound.amax().item(),
    }


def errors(actual: Outputs, eager: Outputs, exact: Outputs) -> dict[str, dict[str, float]]:
    """Return the error of every output that the exact answer has, by name."""
    return {name: error(actual[name], eager[name], exact[name]) for name in exact}


def verdict(found: dict[str, dict[str, float]]) -> str:
    """Return ``ok``, ``coarse`` or ``wrong``."""
    if any(not value["relative"] <= WRONG_FROM for value in found.values()):
        return WRONG
    return OK if all(value["contract"] <= 1 for value in found.values()) else COARSE
