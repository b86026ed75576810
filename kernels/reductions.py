"""Means of a batch's losses other than the plain one.

Dr.DPO's, of B losses at a temperature b'::

    mean = -b' * log(sum_i exp(-losses_i / b') / B)
    d mean / d losses_i = exp(-losses_i / b') / sum_j exp(-losses_j / b')

From b' = infinity, the plain mean, to b' = 0, the smallest loss: the smaller, the less a pair with
a large loss counts, whose label may be wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_number, check_tensor, compute_dtype


def dr_dpo_mean(losses: Tensor, temperature: float = 1.0) -> Tensor:
    """Return Dr.DPO's mean of the losses of a batch.

    Equivalent PyTorch::

        -temperature * (torch.logsumexp(-losses / temperature, 0) - math.log(len(losses)))

    Args:
        losses: ``[B]`` or any other shape, any float dtype and stride; at least one. All of a
            step's: means of parts do not add up to the mean of the whole, neither over passes nor
            over processes.
        temperature: Dr.DPO's beta', in the unit of the losses. Above 0, default 1.

    Returns:
        0-dim, float32 (float64 from float64), between the smallest loss and the plain mean.
        Differentiable.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: no losses, or a temperature out of range.

    Numerics:
        Relative to the smallest loss, by ``log1p`` and ``expm1`` where the mean is near it: at a
        high temperature the two terms of the formula above are large and cancel, which would leave
        ``temperature`` times the rounding error of log B.

    Source:
        Dr.DPO: Wu et al., arXiv 2407.07880.
    """
    check_tensor("losses", losses)
    if not losses.numel():
        raise ValueError("losses: expected at least one, got none")
    temperature = check_number("temperature", temperature, above=0)
    losses = losses.to(compute_dtype(losses))
    # The mean does not depend on what it is taken relative to, nor does its derivative.
    smallest = losses.detach().amin()
    x = (smallest - losses) / temperature
    shrunk = torch.expm1(x).mean()
    # 1 + shrunk loses digits near 0, where most losses are far above the smallest.
    near = torch.log1p(shrunk.clamp(min=-0.5))
    return smallest - temperature * torch.where(shrunk > -0.5, near, x.exp().mean().log())
