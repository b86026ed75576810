"""A beta for each batch, from how far the batch's pairs are apart (beta-DPO).

With the reward discrepancy of a pair, its mean over the batch, and running averages of the
discrepancies' mean M0 and standard deviation sigma::

    M_i = beta0 * margin_i
    M0 <- momentum * M0 + (1 - momentum) * mean(M),   sigma <- likewise with std(M)
    beta = max(floor, beta0 * (1 + scale * (mean(M) - M0)))

A batch whose pairs are further apart than usual gets a larger beta: a more careful step. The
averages take a batch in before it is compared with them, and start at 0, as the policy does where
it equals its reference. Filtering keeps a fraction of the pairs, drawn without replacement with
probabilities proportional to ``exp(-(M_i - M0)^2 / (2 * sigma^2))``, and takes the mean above over
those alone.

A few operations on ``[B]`` numbers: plain torch, with no host sync.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._common import check_number, check_tensor, compute_dtype

_STATE = ("mean", "std")


class DynamicBeta:
    """Beta-DPO's beta, batch by batch, and the running averages that it depends on.

    Example::

        dynamic = DynamicBeta(beta=0.1)
        beta = dynamic.update(chosen_logratios - rejected_logratios)
        losses = preference_loss(*logps, beta=beta).losses

    Args:
        beta: beta0, per nat. Above 0, default 0.1.
        scale: the paper's alpha, how much beta follows the discrepancy; at least 0 (a constant
            beta), default 0.6. The released code measures M in nats, without beta0: its numbers are
            those of ``scale / beta`` here.
        momentum: of the running averages, in [0, 1). Default 0.9.
        floor: the least beta. Above 0 and at most ``beta``, default 0.001. Without it a batch far
            below the average would get a beta of 0, and no gradient, or a negative one, which
            rewards the rejected responses.

    Raises:
        TypeError: an argument that is no number.
        ValueError: a number out of range.

    Source:
        beta-DPO: Wu et al., arXiv 2407.08639; the order of the updates, the start at 0 and the
        floor are those of the released code (junkangwu/beta-DPO).
    """

    def __init__(
        self,
        beta: float = 0.1,
        *,
        scale: float = 0.6,
        momentum: float = 0.9,
        floor: float = 1e-3,
    ):
        """Begin with averages of 0."""
        self.beta = check_number("beta", beta, above=0)
        self.scale = check_number("scale", scale, low=0)
        self.momentum = check_number("momentum", momentum, low=0)
        if self.momentum >= 1:
            raise ValueError(f"momentum: expected a number below 1, got {momentum}")
        self.floor = check_number("floor", floor, above=0, high=self.beta)
        self.mean = torch.zeros(())
        self.std = torch.zeros(())

    def update(self, margins: Tensor) -> Tensor:
        """Take a batch in and return its beta.

        Args:
            margins: ``[B]``, any float dtype and stride, at least one: ``(log pi - log ref)`` of
                the chosen minus that of the rejected response, in nats, without beta. Detached
                here. In data-parallel training, the gathered margins of all processes: each would
                get a beta of its own else.

        Returns:
            0-dim, float32 (float64 from float64), a constant on the margins' device.

        Raises:
            TypeError, ValueError: margins that are no ``[B]`` floats, or none at all.
        """
        return self._beta(self._take(margins).mean())

    def update_filtered(
        self, margins: Tensor, keep: float = 0.8, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take a batch in, draw the pairs to learn from, and return beta and who they are.

        Args:
            margins: as in ``update``.
            keep: the fraction of pairs to keep, the paper's rho, in (0, 1]. Default 0.8. Rounded
                down to a number of pairs, but at least one.
            generator: what draws them, on the margins' device. Default None: torch's own. The
                processes of a data-parallel run need the same draw.

        Returns:
            ``(beta, kept)``: the beta of the kept pairs' mean, and ``[B]`` bool. For the mean loss
            of those pairs: ``(losses * kept).sum() / kept.sum()``.

        Raises:
            TypeError, ValueError: as in ``update``; ``keep`` out of range.
        """
        keep = check_number("keep", keep, above=0, high=1)
        rewards = self._take(margins)
        pairs = rewards.shape[0]
        count = max(1, int(pairs * keep))
        # The largest of log-weights plus Gumbel noise are a draw without replacement. The weights
        # themselves underflow far out, and torch.multinomial reads them on the host.
        noise = torch.empty_like(rewards).exponential_(generator=generator).log_()
        spread = self.std.clamp(min=torch.finfo(rewards.dtype).tiny ** 0.25)
        scores = ((rewards - self.mean) / spread).square().mul(-0.5) - noise
        chosen = scores.topk(count).indices
        kept = torch.zeros_like(rewards, dtype=torch.bool).index_fill_(0, chosen, True)
        return self._beta(rewards[chosen].mean()), kept

    def _take(self, margins: Tensor) -> Tensor:
        """Return the discrepancies of a batch after they have entered the averages."""
        check_tensor("margins", margins, ndim=1)
        if not margins.numel():
            raise ValueError("margins: expected at least one, got none")
        rewards = margins.detach().to(compute_dtype(margins)) * self.beta
        spread = rewards.std(correction=min(1, rewards.shape[0] - 1))
        for name, value in zip(_STATE, (rewards.mean(), spread), strict=True):
            before = getattr(self, name).to(value.device, value.dtype)
            setattr(self, name, before * self.momentum + value * (1 - self.momentum))
        return rewards

    def _beta(self, mean: Tensor) -> Tensor:
        return (self.beta * (1 + self.scale * (mean - self.mean))).clamp(min=self.floor)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running averages, ``"mean"`` and ``"std"``, in rewards: copies."""
        return {name: getattr(self, name).clone() for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state_dict`` returned; a ValueError where it holds anything else."""
        if set(state) != set(_STATE):
            raise ValueError(f"state: expected {', '.join(_STATE)}, got {', '.join(sorted(state))}")
        for name in _STATE:
            check_tensor(f"state[{name!r}]", state[name], ndim=0)
        for name in _STATE:
            setattr(self, name, state[name].detach().clone())
