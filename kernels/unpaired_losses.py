"""The losses of single responses, by name, and the baselines that they compare a response with.

``UNPAIRED_LOSSES`` holds losses of a scalar z, how far a response is on the right side of its
baseline: a value and a derivative in torch, for the chunked path, and a Triton device function that
returns both. ``kl_baseline`` makes KTO's baseline and ``RunningShift`` BCO's, each from all
processes' responses where ``torch.distributed`` runs. A new loss is a new row; nothing else names
a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ._common import check_tensor, compute_dtype, jit, log1p, tl


class UnpairedRow(NamedTuple):
    """A loss of the signed scalar ``z``, its derivative by it, and what ``z`` is relative to.

    ``value`` and ``slope`` are torch's, for the chunked path; ``device(z)`` is Triton's and returns
    both. ``baseline`` says what is subtracted, and where: ``"log-ratio"`` a number of nats, from
    the log-ratio; ``"reward"`` a reward, from ``beta`` times the log-ratio; None nothing.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    device: Callable
    baseline: str | None
    source: str


def sigmoid_value(z: Tensor) -> Tensor:
    """Return ``1 - sigmoid(z)``, with nothing that cancels."""
    return (-z).sigmoid()


def sigmoid_slope(z: Tensor) -> Tensor:
    """Return the derivative of ``sigmoid_value`` by ``z``."""
    return -z.sigmoid() * (-z).sigmoid()


@jit
def sigmoid_device(z):
    """Return the value and the slope of ``1 - sigmoid(z)``."""
    tail = tl.exp(-tl.abs(z))
    share = 1.0 / (1.0 + tail)
    return tl.where(z >= 0.0, tail, 1.0) * share, -tail * share * share


def log_sigmoid_value(z: Tensor) -> Tensor:
    """Return ``-log sigmoid(z)``."""
    return -F.logsigmoid(z)


def log_sigmoid_slope(z: Tensor) -> Tensor:
    """Return the derivative of ``log_sigmoid_value`` by ``z``."""
    return -(-z).sigmoid()


@jit
def log_sigmoid_device(z):
    """Return the value and the slope of ``-log sigmoid(z)``."""
    tail = tl.exp(-tl.abs(z))
    return log1p(tail) + tl.maximum(-z, 0.0), -tl.where(z >= 0.0, tail, 1.0) / (1.0 + tail)


UNPAIRED_LOSSES: dict[str, UnpairedRow] = {
    "kto": UnpairedRow(
        sigmoid_value,
        sigmoid_slope,
        sigmoid_device,
        "log-ratio",
        "KTO, arXiv 2402.01306, equation 7 of version 1; the baseline is its z0",
    ),
    "apo_zero_unpaired": UnpairedRow(
        sigmoid_value,
        sigmoid_slope,
        sigmoid_device,
        None,
        "APO-zero, arXiv 2408.06266, equation 7, whose two terms are each of one response",
    ),
    "bco": UnpairedRow(
        log_sigmoid_value,
        log_sigmoid_slope,
        log_sigmoid_device,
        "reward",
        "BCO, arXiv 2404.04656; the baseline is its reward shift delta",
    ),
}


# The baselines


def _over_processes(sums: Tensor, group: dist.ProcessGroup | None, sync: bool) -> Tensor:
    """Return the sums over the processes of the group, where there are any."""
    if sync and dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums, group=group)
    return sums


@torch.no_grad()
def kl_baseline(
    policy_kl_logps: Tensor,
    reference_kl_logps: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    sync: bool = True,
) -> Tensor:
    """Return KTO's z0: how far the policy is from the reference, on responses to other prompts.

    Equivalent PyTorch::

        z0 = (policy_kl_logps - reference_kl_logps).detach().mean().clamp(min=0)

    Args:
        policy_kl_logps: ``[S]``, any float dtype and stride: log-prob under the policy, in nats,
            of each prompt's mismatched response, such as the next one's in the batch. No gradient
            flows to it; make it under ``torch.no_grad()``.
        reference_kl_logps: ``[S]``, under the reference model.
        group: the processes whose responses are averaged. Default None, all of them, where
            ``torch.distributed`` is initialised. One sum over the processes, to be called by all.
        sync: False averages this process's alone. Default True.

    Returns:
        A 0-dim tensor, float32 (float64 if any input is), at least 0 and the same in every process:
        the mean over all responses, whatever number each process has, clamped after the mean. 0
        where there are none. No host sync.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or device that does not fit.

    Source:
        KTO: Ethayarajh et al., arXiv 2402.01306, section 4.1.
    """
    check_tensor("policy_kl_logps", policy_kl_logps, ndim=1)
    like = ("policy_kl_logps", policy_kl_logps)
    check_tensor("reference_kl_logps", reference_kl_logps, shape=policy_kl_logps.shape, like=like)
    dtype = compute_dtype(policy_kl_logps, reference_kl_logps)
    ratios = policy_kl_logps.to(dtype) - reference_kl_logps.to(dtype)
    count = ratios.new_full((), ratios.numel())
    total, count = _over_processes(torch.stack([ratios.sum(), count]), group, sync)
    return (total / count.clamp(min=1)).clamp(min=0)


class RunningShift:
    """BCO's reward shift delta: the mean reward of all responses of all steps so far.

    ::

        shift = RunningShift()
        rewards = beta * (policy_logps - reference_logps)
        delta = shift.update(rewards)  # in training; in evaluation shift.value
        out = unpaired_loss(..., loss_type="bco", baseline=delta, beta=beta)

    The paper's delta is half the sum of the two kinds' mean rewards, which is this mean where there
    are as many of each; as in TRL it is estimated over the whole run. ``state_dict`` and
    ``load_state_dict`` are what Accelerate's ``register_for_checkpointing`` asks for.

    Args:
        group: the processes whose rewards are averaged. Default None, all of them, where
            ``torch.distributed`` is initialised. ``update`` is then to be called by all.
        sync: False averages this process's alone. Default True.
        device: where ``value`` is until there are rewards, whose device it then follows. Default
            None, torch's default.

    Source:
        BCO: Jung et al., arXiv 2404.04656.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None = None,
        sync: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        self._group, self._sync = group, sync
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # the total, how many

    @property
    def value(self) -> Tensor:
        """The mean so far, a 0-dim float64 tensor on the device of the rewards; 0 at first."""
        total, count = self._sums
        return total / count.clamp(min=1)

    @torch.no_grad()
    def update(self, rewards: Tensor) -> Tensor:
        """Take a step's rewards ``[S]`` into the mean and return it, with no gradient.

        Rewards that are not finite are left out: one of them would stay for ever. No host sync.
        """
        check_tensor("rewards", rewards, ndim=1)
        finite = rewards.isfinite()
        total = rewards.double().masked_fill(~finite, 0).sum()
        step = _over_processes(torch.stack([total, finite.sum()]), self._group, self._sync)
        self._sums = self._sums.to(step.device) + step
        return self.value

    def state_dict(self) -> dict[str, Tensor]:
        """Return what ``load_state_dict`` takes: the rewards' total and how many they are."""
        total, count = self._sums.clone()
        return {"total": total, "count": count}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a ``state_dict``, bit for bit."""
        if set(state) != {"total", "count"}:
            raise ValueError(f"state: expected the keys 'count' and 'total', got {sorted(state)}")
        self._sums = torch.stack([state["total"], state["count"]]).double()
