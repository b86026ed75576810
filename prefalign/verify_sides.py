"""The trainers that ``prefalign verify`` compares with eager PyTorch: the library's, and TRL's."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .attention import generation_attention
from .config import TrainingSettings
from .loading import first_line, load_tokenizer
from .models import score
from .packed_trainer import Groups, training_arguments
from .packing import Group, PackedBatch
from .references import is_peft, reference_of
from .trainer import PreferenceTrainer
from .verify_config import VerifySettings
from .verify_eager import STEPS, Keep, Outcome, load, measured, synchronize


class SkippedError(Exception):
    """Why a side cannot be compared."""


class _Watch(TrainerCallback):
    """Keep a trainer's first gradients, and the time of its last step."""

    def __init__(self, outcome: Outcome, keep: Keep, device: torch.device):
        self.outcome, self.keep, self.device = outcome, keep, device

    def on_step_begin(self, args, state, control, **kwargs):
        """Called before an optimiser step's first pass."""
        synchronize(self.device)
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Called when the gradients are whole."""
        if state.global_step == 0:
            self.outcome.gradients = self.keep(model)

    def on_step_end(self, args, state, control, **kwargs):
        """Called after an optimiser step."""
        synchronize(self.device)
        self.outcome.seconds = time.perf_counter() - self.started


def _train(trainer_class: Any, model: nn.Module, rate: float, watch: _Watch, **kwargs: Any) -> None:
    """Train on the pairs in their order, each step on all of them."""

    class Ordered(trainer_class):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
    constant = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.0)
    trainer = Ordered(model, optimizers=(sgd, constant), callbacks=[watch], **kwargs)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train()


def run_prefalign(
    settings: VerifySettings,
    groups: Sequence[Group],
    device: torch.device,
    keep: Keep,
    rate: float,
) -> Outcome:
    """Run the steps by ``PreferenceTrainer``, on packed passes, as ``prefalign dpo`` does."""
    outcome = Outcome()
    model = load(settings, device)
    count = len(groups)

    class Recorded(PreferenceTrainer):
        def group_losses(self, model, batch: PackedBatch):
            losses, metrics = super().group_losses(model, batch)
            names = ("logps/chosen", "logps/rejected")
            values = torch.stack([losses.detach(), *(metrics[name] for name in names)], -1)
            found.update(zip(batch.example_ids.tolist(), values.cpu(), strict=True))
            outcome.passes += [part.num_tokens for part in batch.parts or (batch,)]
            if len(found) == count:
                values = torch.stack([found[i] for i in range(count)])
                outcome.losses.append(values[:, 0])
                outcome.logps.append(values[:, 1:].flatten())
                found.clear()
            return losses, metrics

    found: dict[int, Tensor] = {}
    training = TrainingSettings(
        learning_rate=rate,
        batch_size=count,
        max_grad_norm=0.0,
        gradient_checkpointing=settings.gradient_checkpointing,
        arguments={"save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
        | ({"use_cpu": True} if device.type == "cpu" else {}),
    )
    with measured(outcome, device), tempfile.TemporaryDirectory() as folder:
        if is_peft(model):
            reference = reference_of(model)
        else:
            reference = None
            scored = score(
                model,
                groups,
                max_tokens=settings.max_tokens,
                share_prompts=settings.share_prompts,
            )
            groups = [
                replace(group, extras={"reference_logps": logps})
                for group, logps in zip(groups, scored, strict=True)
            ]
        _train(
            Recorded,
            model,
            rate,
            _Watch(outcome, keep, device),
            args=training_arguments(
                training, folder, num_groups=count, epochs=STEPS, max_steps=STEPS
            ),
            train_dataset=Groups(groups),
            max_tokens=settings.max_tokens,
            share_prompts=settings.share_prompts,
            split_pairs=settings.split_pairs,
            reference=reference,
            loss_type=settings.loss_type,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
        )
    outcome.passes = outcome.passes[: len(outcome.passes) // STEPS]
    return outcome


def run_trl(
    settings: VerifySettings,
    groups: Sequence[Group],
    device: torch.device,
    keep: Keep,
    rate: float,
) -> Outcome:
    """Run the steps by TRL's ``DPOTrainer``, a pair in each pass, on the same tokens.

    Raises:
        SkippedError: TRL is missing, has no such loss, or refuses the model.
    """
    if not settings.trl:
        raise SkippedError("--trl is false")
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "trl"
        why = "TRL is not installed: pip install 'prefalign[trl]'"
        raise SkippedError(why if missing else f"cannot import TRL: {first_line(error)}") from error
    if settings.loss_type != "sigmoid" or settings.label_smoothing:
        raise SkippedError("only the plain sigmoid loss is known to be the same in TRL")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars and its own deprecations
            return _run_trl(DPOConfig, DPOTrainer, settings, groups, device, keep, rate)
    except Exception as error:
        # What TRL or its version refuses says nothing about the two others.
        raise SkippedError(f"TRL refuses: {first_line(error)}") from error


def _run_trl(
    config: Any,
    trainer_class: Any,
    settings: VerifySettings,
    groups: Sequence[Group],
    device: torch.device,
    keep: Keep,
    rate: float,
) -> Outcome:
    from datasets import Dataset

    outcome = Outcome()
    losses: list[Tensor] = []

    class Recorded(trainer_class):
        def __init__(self, model, **kwargs):
            super().__init__(model, **kwargs)
            if is_peft(model) and "ref" in model.peft_config:
                # TRL's reference would be a copy of the adapter; without it, the adapter is off.
                model.delete_adapter("ref")

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # already tokens

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
            return loss

    model = load(settings, device)
    rows = [
        {
            "prompt_ids": list(group.prompt_ids),
            "chosen_ids": list(group.response_ids[0]),
            "rejected_ids": list(group.response_ids[1]),
        }
        for group in groups
    ]
    with (
        measured(outcome, device),
        generation_attention(model),
        tempfile.TemporaryDirectory() as folder,
    ):
        arguments = config(
            output_dir=folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(groups),
            max_steps=STEPS,
            learning_rate=rate,
            max_grad_norm=0.0,
            beta=settings.beta,
            max_length=None,
            bf16=False,
            fp16=False,
            gradient_checkpointing=settings.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            precompute_ref_log_probs=not is_peft(model),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        )
        _train(
            Recorded,
            model,
            rate,
            _Watch(outcome, keep, device),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(settings.tokenizer or settings.model),
        )
    outcome.losses = list(torch.stack(losses).float().cpu().chunk(STEPS))
    return outcome
