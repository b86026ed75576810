"""Preference training on packed batches: DPO and its relatives.

The pairs' first responses are the chosen ones. ``packed_trainer`` has everything that is not the
loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from .kernels.objectives import couples_batch, needs_reference, resolve
from .kernels.preference_loss import preference_loss
from .models import Reference, target_hidden
from .packed_trainer import Groups, PackedTrainer
from .packing import PackedBatch

CHOSEN, REJECTED = slice(0, None, 2), slice(1, None, 2)
"""The chosen and rejected responses of a packed batch of pairs, chosen first in each."""


class PreferenceTrainer(PackedTrainer):
    """Train a causal language model on preference pairs, without logits and without padding.

    The loss is the mean of ``preference_loss`` over the pairs of an optimiser step, however they
    are spread over passes, accumulation steps and processes.

    Args:
        model: A Hugging Face causal language model, or a PEFT model around one, prepared by
            ``prefalign.models.load_model`` (packed attention).
        args: transformers' arguments; a "batch" of theirs is pairs. See ``training_arguments``.
        train_dataset: Pairs, as ``Groups``. ``extras["weights"]`` of a pair multiplies its loss.
        reference: The reference policy. None takes the log-probs that travel with the pairs as
            ``extras["reference_logps"]``, one for each response; a loss without a reference needs
            neither.
        loss_type: A loss of ``preference_loss``, or several. One that depends on a whole batch
            depends on the pairs of one process's batch.
        loss_weights: The weights of several.
        beta: Inverse temperature.
        label_smoothing: cDPO's share of flipped labels.
        f_divergence_type: As in ``preference_loss``. So are the next two.
        f_alpha_divergence_coef: The alpha-divergence's alpha.
        loss_options: Numbers that single losses take.
        weighted_mean: Divide a step's losses by the sum of their ``extras["weights"]``, and not by
            their number.
        **kwargs: Anything else that ``PackedTrainer`` (``max_tokens``) or ``transformers.Trainer``
            takes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        train_dataset: Groups,
        *,
        reference: Reference | None = None,
        loss_type: str | Sequence[str] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = 1.0,
        loss_options: Mapping[str, float] | None = None,
        weighted_mean: bool = False,
        **kwargs: Any,
    ):
        self.loss_arguments: dict[str, Any] = {
            "loss_type": loss_type,
            "loss_weights": loss_weights,
            "beta": beta,
            "label_smoothing": label_smoothing,
            "f_divergence_type": f_divergence_type,
            "f_alpha_divergence_coef": f_alpha_divergence_coef,
            "loss_options": loss_options,
        }
        terms = resolve(**self.loss_arguments)
        self.couples_batch = self.couples_batch or couples_batch(terms)
        self.needs_reference = needs_reference(terms)
        super().__init__(model, args, train_dataset, **kwargs)
        self.weighted_mean = weighted_mean
        self.reference = reference
        self.beta = beta

    def group_losses(
        self, model: torch.nn.Module, batch: PackedBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return each pair's loss, ``[B]`` with a graph, and its metrics, ``[B]`` each."""
        reference = self.reference_logps(batch)  # before the policy's activations are there
        policy = self.policy_logps(model, batch)
        counts = batch.cu_targets.diff()
        out = preference_loss(
            policy[CHOSEN],
            policy[REJECTED],
            *((None, None) if reference is None else (reference[CHOSEN], reference[REJECTED])),
            chosen_counts=counts[CHOSEN],
            rejected_counts=counts[REJECTED],
            weights=batch.extras.get("weights"),
            **self.loss_arguments,
        )
        return out.losses, pair_metrics(out.chosen_rewards, out.rejected_rewards, policy)

    def weight(self, batch: PackedBatch) -> float:
        """Return the number of pairs in a batch, or the sum of their weights."""
        if self.weighted_mean:
            return float(batch.extras["weights"].sum())
        return super().weight(batch)

    def reference_logps(self, batch: PackedBatch) -> Tensor | None:
        """Return the reference's log-prob of each response, ``[R]``; None if there is no need."""
        if self.reference is None and self.needs_reference:
            return batch.extras["reference_logps"]
        if self.reference is None:
            return batch.extras.get("reference_logps")
        with torch.no_grad(), self.reference.use() as reference:
            return self.response_logps(target_hidden(reference, batch), reference, batch)


def pair_metrics(
    chosen_rewards: Tensor, rejected_rewards: Tensor, policy_logps: Tensor
) -> dict[str, Tensor]:
    """Return the metrics of a batch of pairs under the names that TRL gives them, ``[B]`` each."""
    margins = chosen_rewards - rejected_rewards
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
        "logps/chosen": policy_logps[CHOSEN].detach(),
        "logps/rejected": policy_logps[REJECTED].detach(),
    }
