"""Training on a plain and a guided response: PLE's ranking loss or its weighted SFT loss.

PLE, arXiv 2408.02599. Both responses are conditioned on the plain query. Where the guided one's
reward is ahead by more than the threshold, it is ranked above the plain one; elsewhere both are
imitated, with weights from their rewards.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .kernels.enhancement_loss import enhancement_loss
from .packed_trainer import PackedTrainer
from .packing import PackedBatch
from .ple_config import EnhancementSettings

GUIDED, PLAIN = slice(0, None, 2), slice(1, None, 2)
"""The guided and plain responses of a packed batch, the guided one first in each group."""


class EnhancementTrainer(PackedTrainer):
    """``PackedTrainer`` with PLE's loss.

    Args:
        *args: As for ``PackedTrainer``. A group is a guided and a plain response, with
            ``extras["rewards"]``, a number for each.
        enhancement: Settings of the loss.
        threshold: τ at the first step; infinities make one loss of the two.
        step_decay: What τ is multiplied with after every optimiser step.
        **kwargs: As for ``PackedTrainer``.
    """

    def __init__(
        self,
        *args: Any,
        enhancement: EnhancementSettings,
        threshold: float,
        step_decay: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.enhancement = enhancement
        self.threshold = threshold
        self.step_decay = step_decay

    @property
    def current_threshold(self) -> float:
        """τ at the current step."""
        return self.threshold * self.step_decay**self.state.global_step

    def group_losses(
        self, model: torch.nn.Module, batch: PackedBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return each pair's loss, ``[B]`` with a graph, and its metrics, ``[B]`` each."""
        logps = self.policy_logps(model, batch)
        rewards, lengths = batch.extras["rewards"], batch.cu_targets.diff()
        threshold = self.current_threshold
        settings = self.enhancement
        out = enhancement_loss(
            logps[PLAIN],
            logps[GUIDED],
            rewards[PLAIN],
            rewards[GUIDED],
            plain_lengths=lengths[PLAIN],
            guided_lengths=lengths[GUIDED],
            threshold=threshold,
            ranking=settings.ranking,
            sft=settings.sft,
            temperature=settings.temperature,
        )
        means = (logps / lengths).detach()
        metrics = {
            "ple/ranked": out.is_ranked.float(),
            "ple/guided_weight": out.weights[:, 1],
            "rewards/margins": rewards[GUIDED] - rewards[PLAIN],
            "logps/guided": means[GUIDED],
            "logps/plain": means[PLAIN],
        }
        if math.isfinite(threshold):  # JSON knows no infinity
            metrics["ple/threshold"] = torch.full_like(out.losses, threshold).detach()
        return out.losses, metrics
