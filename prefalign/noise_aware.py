"""Training on labels that the model gave itself: SPA's noise-aware loss with de-coupled detection.

Selfee (arXiv 2406.04412), section 4.3 and equations 11 and 12. A pair whose confidence is under a
threshold is taken for noise, and its label smoothed by alpha. Confidence is not the policy's own:
it comes from token logits extrapolated away from the reference's, combined before the softmax.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .kernels.linear_token_logps_triple import linear_token_logps_triple
from .kernels.noise_aware_loss import noise_aware_loss
from .kernels.sequence_logps import sequence_logps
from .models import (
    Head,
    head_arguments,
    read_head,
    refuse_head_adapter,
    target_hidden,
    with_head,
)
from .packing import PackedBatch
from .spa_config import NoiseSettings
from .trainer import CHOSEN, REJECTED, PreferenceTrainer, pair_metrics


class NoiseThreshold(TrainerCallback, ExportableState):
    """The confidences seen so far and the threshold that follows from them.

    A callback so that the Trainer saves it with every checkpoint and restores it.

    Args:
        quantile: The threshold is this quantile of confidences, linearly interpolated.
        window: Pairs that a rolling threshold looks back on.
    """

    def __init__(self, quantile: float = 0.1, window: int = 64):
        self.quantile = quantile
        self.window = window
        self.recent: list[float] | Tensor = []
        self.fixed: float | None = None
        # example id -> [step, confidence, noisy], the last time each pair was looked at
        self.judged: list[list[float]] | list[Tensor] = []

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        self.judged = self.rows()
        recent = self.recent.tolist() if isinstance(self.recent, Tensor) else self.recent
        return {
            "args": {"quantile": self.quantile, "window": self.window},
            "attributes": {"recent": recent, "fixed": self.fixed, "judged": self.judged},
        }

    def rows(self) -> list[list[float]]:
        """Return ``[example id, confidence, noisy]`` of each pair, as last seen."""
        last: dict[int, list[float]] = {}
        for block in self.judged:
            values = block.tolist() if isinstance(block, Tensor) else [block]
            for row in values:
                last[int(row[0])] = row
        return [last[i] for i in sorted(last)]

    def value(self, device: torch.device) -> Tensor:
        """Return the threshold, a scalar on ``device``: 0, which nothing is under, until known."""
        if self.fixed is not None:
            return torch.tensor(self.fixed, device=device)
        recent = torch.as_tensor(self.recent, dtype=torch.float32, device=device)
        if recent.numel() < self.window:
            return torch.zeros((), device=device)
        return torch.quantile(recent, self.quantile)

    def push(self, rows: Tensor) -> None:
        """Take in the pairs of a step: ``[P, 3]`` of example id, confidence and noisy."""
        recent = torch.as_tensor(self.recent, dtype=rows.dtype, device=rows.device)
        self.recent = torch.cat([recent, rows[:, 1]])[-self.window :]
        self.judged = [*self.judged, rows]


class NoiseAwareTrainer(PreferenceTrainer):
    """``PreferenceTrainer`` with the noise-aware loss on self-labelled pairs.

    The reference must be a model (π_{i-1}) wherever ``extrapolation`` is not 0, for its hidden
    states are needed. In the steps of alpha's warm-up that no threshold depends on, the log-probs
    that travel with the pairs are used and the reference is not run.

    Args:
        *args: As for ``PreferenceTrainer``.
        noise: Settings of the loss.
        extrapolation: λ of this iteration.
        **kwargs: As for ``PreferenceTrainer``.
    """

    def __init__(self, *args, noise: NoiseSettings, extrapolation: float, **kwargs):
        callbacks = [*kwargs.pop("callbacks", []), NoiseThreshold(noise.quantile, noise.window)]
        super().__init__(*args, callbacks=callbacks, **kwargs)
        if self.reference is not None:
            used: Any
            for used in (self.model, self.reference.model):
                refuse_head_adapter(used, "the noise-aware loss")
        self.noise = noise
        self.extrapolation = extrapolation
        self._step_rows: list[Tensor] = []
        self._threshold_now: Tensor | None = None

    @property
    def threshold(self) -> NoiseThreshold:
        """The threshold's state; a checkpoint that is loaded replaces the object."""
        callbacks = self.callback_handler.callbacks
        return next(cb for cb in callbacks if isinstance(cb, NoiseThreshold))

    @property
    def warmup_steps(self) -> int:
        """Steps at the start over which alpha is 0."""
        return math.ceil(self.noise.alpha_warmup * self.state.max_steps)

    @property
    def alpha(self) -> float:
        """Alpha at the current step."""
        return self.noise.alpha if self.state.global_step >= self.warmup_steps else 0.0

    @property
    def looks(self) -> bool:
        """Whether this step's confidences matter, to its loss or to a threshold to come."""
        if self.noise.threshold == "exact":
            return self.alpha > 0
        pairs = self.get_total_train_batch_size(self.args)
        ahead = math.ceil(self.noise.window / pairs)
        return self.state.global_step >= self.warmup_steps - ahead

    def group_losses(
        self, model: torch.nn.Module, batch: PackedBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return each pair's loss, ``[B]`` with a graph, and its metrics, ``[B]`` each."""
        if not self.looks and "reference_logps" in batch.extras:
            policy = self.policy_logps(model, batch)
            reference = batch.extras["reference_logps"]
            extrapolated = policy.detach()  # alpha is 0: no pair is looked at
        else:
            policy, reference, extrapolated = self.three_logps(model, batch)
        threshold = self._threshold_now
        if threshold is None:
            threshold = self.threshold.value(policy.device)
        out = noise_aware_loss(
            policy[CHOSEN],
            policy[REJECTED],
            reference[CHOSEN],
            reference[REJECTED],
            extrapolated[CHOSEN],
            extrapolated[REJECTED],
            beta=self.beta,
            alpha=self.alpha,
            threshold=threshold,
        )
        metrics = pair_metrics(out.chosen_rewards, out.rejected_rewards, policy)
        metrics["noise/share"] = (
            out.is_noisy.float() if self.alpha else torch.zeros_like(policy[CHOSEN])
        )
        metrics["noise/threshold"] = threshold.expand(out.losses.shape)
        metrics["noise/alpha"] = torch.full_like(out.confidences, self.alpha)
        if self.looks and model.training:
            flags = out.is_noisy if self.alpha else torch.full_like(out.confidences, torch.nan)
            columns = [batch.example_ids, out.confidences, flags]
            self._step_rows.append(torch.stack([c.double() for c in columns], dim=1))
        return out.losses, metrics

    def three_logps(
        self, model: torch.nn.Module, batch: PackedBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return policy, reference and extrapolated log-probs of each response, ``[R]`` each."""
        if self.extrapolation == 0 and self.reference is None:
            policy = self.policy_logps(model, batch)
            return policy, batch.extras["reference_logps"], policy.detach()
        assert self.reference is not None, "extrapolation needs the reference's hidden states"
        # The reference comes first, before the policy's activations are there.
        with torch.no_grad(), self.reference.use() as reference:
            ref_hidden = target_hidden(reference, batch)
            ref_head = read_head(reference)
        hidden = target_hidden(model, batch, through_wrapper=True)

        def three(hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
            arguments = head_arguments(head, hidden)
            if ref_head.weight is not head.weight:
                ref_arguments = head_arguments(ref_head, ref_hidden)
                arguments["ref_weight"] = ref_arguments["weight"]
                arguments["ref_bias"] = ref_arguments["bias"]
            logps = linear_token_logps_triple(
                hidden,
                ref_hidden,
                targets=batch.targets,
                extrapolation=self.extrapolation,
                **arguments,
            )
            return tuple(logps)

        logps = with_head(model, hidden, three)
        sums = [sequence_logps(x, cu_seqlens=batch.cu_targets).sums for x in logps]
        return sums[0], sums[1], sums[2]

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Run a batch's passes under one threshold, then take its confidences into the window."""
        if self.noise.threshold == "exact" and self.alpha > 0 and self.threshold.fixed is None:
            self.threshold.fixed = self._exact_threshold(model)
        self._threshold_now = self.threshold.value(self.args.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._step_rows:
            rows = torch.cat(self._step_rows[: len(inputs["passes"])])  # without fillers
            if self.accelerator.num_processes > 1:
                rows = self.accelerator.gather(rows)
            # In an order that does not depend on passes and processes.
            self.threshold.push(rows[rows[:, 0].argsort(stable=True)])
            self._step_rows = []
        self._threshold_now = None
        return loss

    def _exact_threshold(self, model: torch.nn.Module) -> float:
        """Return the quantile of the confidences of all pairs under the policy as it is."""
        pairs: Any = self.train_dataset
        mine = range(self.args.process_index, len(pairs), self.args.world_size)
        collate, confidences = self.data_collator, []
        model.eval()
        with torch.no_grad():
            passes = collate([pairs[i] for i in mine])["passes"]
            for batch in self.passes_in_step(passes):
                batch = batch.to(self.args.device)
                _, reference, extrapolated = self.three_logps(model, batch)
                margins = extrapolated - reference
                confidences.append(torch.sigmoid(self.beta * (margins[CHOSEN] - margins[REJECTED])))
        model.train()
        values = torch.cat(confidences[: len(passes)])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.pad_across_processes(values, pad_index=torch.nan)
            values = self.accelerator.gather(values)
        return torch.nanquantile(values, self.noise.quantile).item()
