"""Supervised fine-tuning on packed demonstrations: the negative log-prob of their tokens."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .packed_trainer import PackedTrainer
from .packing import PackedBatch


class SFTTrainer(PackedTrainer):
    """Train a causal language model on responses, without logits and without padding.

    Args:
        *args: As for ``PackedTrainer``. Every response of a group is learned.
        mean_over: What the loss of an optimiser step is the mean over: ``tokens``, as is usual, or
            ``responses``, of each response's mean over its tokens.
        **kwargs: As for ``PackedTrainer``.
    """

    def __init__(
        self, *args: Any, mean_over: Literal["tokens", "responses"] = "tokens", **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        if mean_over not in ("tokens", "responses"):
            raise ValueError(f"mean_over: expected 'tokens' or 'responses', got {mean_over!r}")
        self.mean_over = mean_over

    def group_losses(
        self, model: torch.nn.Module, batch: PackedBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return each response's loss, ``[R]`` with a graph, and its metrics, ``[R]`` each."""
        logps = self.policy_logps(model, batch)
        means = logps / batch.cu_targets.diff()
        losses = -logps if self.mean_over == "tokens" else -means
        return losses, {"logps": logps, "logps_per_token": means}

    def weight(self, batch: PackedBatch) -> float:
        """Return the tokens or responses of a batch."""
        if self.mean_over == "tokens":
            return batch.targets.numel()
        return batch.cu_targets.numel() - 1
