"""Training on packed batches: a ``transformers.Trainer`` whose batches have no padding.

Everything that is not the loss or the batch (optimiser, schedule, accumulation, mixed precision,
logging, checkpoints, distribution) is the Trainer's. A batch of its data loader is a list of
*passes*, packed batches of at most ``max_tokens`` tokens; each is one forward and backward. What is
learned is the subclasses': ``trainer.PreferenceTrainer``, ``sft_trainer.SFTTrainer``, and others.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from .config import TrainingSettings
from .errors import RunError
from .kernels.linear_token_logps import linear_token_logps
from .kernels.sequence_logps import sequence_logps
from .models import Head, head_arguments, prompts_are_shared, target_hidden, with_head
from .packing import PackedBatch
from .passes import Groups, PackingCollator
from .references import REFERENCE_ADAPTER
from .run_folder import remove
from .sampling import BalancedSampler

logger = logging.getLogger(__name__)

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


class PackedTrainer(Trainer):
    """Train a causal language model on groups of responses, without logits and without padding.

    The loss is the mean of ``group_losses`` over the groups of an optimiser step, however they are
    spread over passes, accumulation steps and processes.

    Args:
        model: A Hugging Face causal language model, or a PEFT model around one, prepared by
            ``prefalign.models.load_model`` (packed attention).
        args: transformers' arguments; a "batch" of theirs is groups. See ``training_arguments``.
        train_dataset: The groups, as ``Groups``.
        max_tokens: Tokens in one forward and backward pass.
        share_prompts: Compute a prompt once for all its responses. Where that would not be exact
            for the model, a warning says so and each response is computed with its own.
        split_pairs: Run the responses of a group that is longer than ``max_tokens`` through the
            backbone one after the other, which takes one more forward pass of all but the longest
            part and keeps the activations of one part at a time. The gradients are the same.
            Sharded engines (FSDP, DeepSpeed) do not split, and a warning says so.
        **kwargs: Anything else that ``transformers.Trainer`` takes.
    """

    couples_batch = False
    """Whether ``group_losses`` of one group depends on the others of its batch.

    Then all groups of a batch, a process's share of ``batch_size``, come to it at once, in parts
    that keep to ``max_tokens``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        train_dataset: Groups,
        *,
        max_tokens: int = 16384,
        share_prompts: bool = True,
        split_pairs: bool = True,
        **kwargs: Any,
    ):
        args.remove_unused_columns = False  # the examples are groups, not rows of a table
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=PackingCollator(max_tokens),
            **kwargs,
        )
        # Tried where the Trainer has put the model; a dataset of single responses needs no trial.
        several = len(train_dataset) > 0 and len(train_dataset[0].response_ids) > 1
        self.data_collator = PackingCollator(
            max_tokens,
            share_prompts=share_prompts and several and prompts_are_shared(model),
            split=split_pairs and (several or self.couples_batch) and self._can_split(),
            couple=self.couples_batch,
        )
        # The loss below is already divided by the number of groups in the optimiser step.
        self.model_accepts_loss_kwargs = True
        self._sums: dict[str, dict[str, Any]] = {"": {}, "eval_": {}}
        self._staging = False

    def _can_split(self) -> bool:
        kind = self.accelerator.distributed_type
        options: Any = self.args.gradient_checkpointing_kwargs or {}
        reentrant = self.args.gradient_checkpointing and options.get("use_reentrant", False)
        if kind in _SHARDED:
            _warn_once(f"training is sharded ({kind.value}): pairs are not split")
        elif self.accelerator.num_processes > 1 and reentrant:
            # Each part's backward would announce every parameter to DDP as ready.
            _warn_once("reentrant gradient checkpointing under DDP: pairs are not split")
        else:
            return True
        return False

    # What a subclass says

    def group_losses(
        self, model: torch.nn.Module, batch: PackedBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return each group's loss, ``[G]`` with a graph, and its metrics, ``[G]`` each."""
        raise NotImplementedError

    def weight(self, batch: PackedBatch) -> float:
        """Return what the sum of a batch's losses counts for in the mean: its groups.

        Asked while the batch is still on the CPU.
        """
        return batch.num_groups

    # Log-probs

    def policy_logps(self, model: torch.nn.Module, batch: PackedBatch) -> Tensor:
        """Return the policy's log-prob of each response, ``[R]``."""
        return self.response_logps(target_hidden(model, batch, through_wrapper=True), model, batch)

    def response_logps(self, hidden: Tensor, model: torch.nn.Module, batch: PackedBatch) -> Tensor:
        """Return the log-prob of each response, ``[R]``, from hidden states at the targets."""

        def logps(hidden: Tensor, head: Head) -> Tensor:
            return linear_token_logps(hidden, targets=batch.targets, **head_arguments(head, hidden))

        tokens = with_head(model, hidden, logps)
        return sequence_logps(tokens, cu_seqlens=batch.cu_targets).sums

    # What the Trainer calls

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Open autocast around the loss: the head and the reference run outside model.forward."""
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.accelerator.autocast())
        return stack

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """Return a pass's share of the optimiser step's mean loss."""
        batch = inputs["batch"]
        losses, metrics = self.group_losses(model, batch)
        if num_items_in_batch != math.inf:
            self._store("", losses, metrics, batch)
        items = num_items_in_batch if num_items_in_batch is not None else self.weight(batch)
        # Data parallelism averages gradients; the sum over processes is wanted.
        loss = losses.sum() / items * self.accelerator.num_processes
        return (loss, metrics) if return_outputs else loss

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run the passes of one batch; gradients are synchronised on the last one alone."""
        passes = self.passes_in_step(inputs["passes"])
        syncs = self.accelerator.sync_gradients
        total = torch.zeros((), device=self.args.device)
        for index, batch in enumerate(passes):
            last = index == len(passes) - 1
            filler = index >= len(inputs["passes"])
            self.accelerator.gradient_state._set_sync_gradients(syncs and last)
            context = (
                contextlib.nullcontext()
                if last or self.accelerator.distributed_type == DistributedType.DEEPSPEED
                else self.accelerator.no_sync(model)
            )
            with context:
                # A filler pass counts for nothing: divided by infinity.
                items: Any = math.inf if filler else num_items_in_batch
                total += super().training_step(model, {"batch": batch}, items)
        return total

    def passes_in_step(self, passes: list[PackedBatch]) -> list[PackedBatch]:
        """Return the passes and, under a sharded engine, fillers that count for nothing after them.

        Such an engine communicates in every pass, so all processes must make as many.
        """
        if self.accelerator.distributed_type not in _SHARDED:
            return passes
        count = torch.tensor([len(passes)], device=self.args.device)
        most = int(self.accelerator.gather(count).max())
        return passes + [passes[-1]] * (most - len(passes))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the Trainer's sampler; over several processes, one that deals by lengths."""
        groups: Any = self.train_dataset if train_dataset is None else train_dataset
        processes = self.accelerator.num_processes
        if processes == 1:
            return super()._get_train_sampler(train_dataset)
        collate: Any = self.data_collator
        shared = collate.share_prompts
        return BalancedSampler(
            [groups[i].tokens_laid(share_prompts=shared) for i in range(len(groups))],
            self._train_batch_size,
            processes,
            self.args.data_seed,
        )

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """Return the batches of an optimiser step and the weight of all their passes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = sum(self.weight(batch) for inputs in batches for batch in inputs["passes"])
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.gather(torch.tensor([items], device=device))
            return batches, counts.sum()
        return batches, items

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the mean loss of an evaluation batch; the metrics are gathered on the side."""
        losses, weight = [], 0
        passes = self._prepare_inputs(inputs)["passes"]
        with torch.no_grad(), self.compute_loss_context_manager():
            for index, batch in enumerate(self.passes_in_step(passes)):
                loss, metrics = self.group_losses(model, batch)
                if index >= len(passes):
                    continue
                self._store("eval_", loss, metrics, batch)
                losses.append(loss)
                weight += self.weight(batch)
        return torch.cat(losses).sum() / weight, None, None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count 6 floating-point operations for each parameter and token."""
        tokens = sum(batch.num_tokens for batch in inputs["passes"])
        assert self.model is not None
        return 6 * tokens * sum(p.numel() for p in self.model.parameters())

    # Metrics: summed on the device, read at a logging step

    def _store(
        self, prefix: str, losses: Tensor, metrics: dict[str, Tensor], batch: PackedBatch
    ) -> None:
        sums = self._sums[prefix]
        totals: dict[str, Any] = {name: x.detach().double().sum() for name, x in metrics.items()}
        totals |= {"num_tokens": batch.num_tokens, "groups": losses.numel()}
        for name, total in totals.items():
            sums[name] = sums.get(name, 0) + total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over the groups seen since the last log line."""
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        sums = self._sums[prefix]
        if sums:
            names = sorted(sums)
            values = torch.stack(
                [
                    torch.as_tensor(sums[n], dtype=torch.float64, device=self.args.device)
                    for n in names
                ]
            )
            if self.accelerator.num_processes > 1:
                values = self.accelerator.reduce(values, "sum")
            read = dict(zip(names, values.tolist(), strict=True))
            groups = read.pop("groups")
            logs[f"{prefix}num_tokens"] = read.pop("num_tokens")
            logs.update({f"{prefix}{name}": value / groups for name, value in read.items()})
            sums.clear()
        super().log(logs, start_time)

    # Checkpoints: complete or absent

    def _get_output_dir(self, trial) -> str:
        output_dir = super()._get_output_dir(trial)
        return os.path.join(output_dir, ".partial") if self._staging else output_dir

    def _save_checkpoint(self, model, trial) -> None:
        # The Trainer writes file by file into the final folder, so a kill would leave a checkpoint
        # that looks whole. It writes beside it here, and the folder is renamed.
        self._staging = True
        try:
            staging = Path(self._get_output_dir(trial))
            if self.args.should_save:
                remove(staging)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            # A run resumed from an earlier checkpoint comes to the later ones again.
            again = {checkpoint.name for checkpoint in staging.glob("checkpoint-*")}
            done = [c for c in sorted_checkpoints(staging.parent) if c.name not in again]
            for checkpoint in staging.glob("checkpoint-*"):
                # π_{i-1}'s adapter does not change; where it is there, transformers 5.17
                # reads it alone when it resumes, and not the policy's.
                remove(checkpoint / REFERENCE_ADAPTER)
                final = staging.parent / checkpoint.name
                remove(final)
                os.replace(checkpoint, final)
            remove(staging)
            keep = self.args.save_total_limit
            for old in done[: len(done) + 1 - keep] if keep else []:
                remove(old)
        self.accelerator.wait_for_everyone()


def sorted_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


class MetricsCallback(TrainerCallback):
    """Hand every log line of the training loop to a function.

    Args:
        write: Called as ``write(step, logs)`` on the main process.
    """

    def __init__(self, write: Callable[[int, dict[str, float]], None]):
        self.write = write

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called by the Trainer after a log line."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            self.write(state.global_step, logs)


class NoLastCheckpoint(TrainerCallback):
    """Leave out the checkpoint of the last step, after which the weights themselves are saved.

    transformers 5 trains one step too many when it resumes from such a checkpoint and ``max_steps``
    ends inside an epoch.
    """

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer after a step, after its own callback that asks for checkpoints."""
        if state.global_step >= state.max_steps:
            control.should_save = False


class QuietProgress(ProgressCallback):
    """The Trainer's progress bar with a name, and without a printed line for every log.

    Args:
        name: What is trained.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the loss and the margin beside the bar."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {n: logs[n] for n in ("loss", "rewards/margins") if n in logs}
            self.training_bar.set_postfix({n.split("/")[-1]: f"{v:.3g}" for n, v in shown.items()})


def training_arguments(
    settings: TrainingSettings,
    output_dir: str | os.PathLike[str],
    *,
    num_groups: int,
    epochs: int,
    max_steps: int | None = None,
    seed: int = 0,
    num_processes: int = 1,
) -> TrainingArguments:
    """Translate our settings into transformers' arguments.

    Args:
        settings: The settings.
        output_dir: Where checkpoints go.
        num_groups: Pairs in the training set.
        epochs: Epochs over them.
        max_steps: Optimiser steps, in the place of ``epochs``.
        seed: Seed of the data's order.
        num_processes: Processes that share ``settings.batch_size``.

    Raises:
        RunError: ``batch_size`` does not divide by the number of processes, or transformers refuses
            a value.
    """
    if settings.batch_size % num_processes:
        raise RunError(
            f"training.batch_size: expected a multiple of the {num_processes} processes, "
            f"got {settings.batch_size}"
        )
    steps = max_steps or epochs * -(-num_groups // settings.batch_size)
    values: dict[str, Any] = {
        "output_dir": os.fspath(output_dir),
        "per_device_train_batch_size": settings.batch_size // num_processes,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": epochs,
        "max_steps": max_steps or -1,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler,
        "warmup_steps": round(settings.warmup_ratio * steps),
        "optim": settings.optimizer,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.mixed_precision == "bf16",
        "fp16": settings.mixed_precision == "fp16",
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,  # the filter reads the loss from the device at every step
        "save_steps": settings.save_steps,
        "save_total_limit": 1,
        "report_to": settings.report_to or "none",
        "restore_callback_states_from_checkpoint": True,
        "ddp_find_unused_parameters": False,
        "seed": seed,
        "use_cpu": not torch.accelerator.is_available(),
    }
    if settings.gradient_checkpointing:
        values["gradient_checkpointing"] = True
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    try:
        arguments = TrainingArguments(**{**values, **settings.arguments})
    except (TypeError, ValueError, ImportError) as error:
        raise RunError(f"training: {error}") from None
    # Of several GPUs one process takes the first: transformers would split batches over all of
    # them (nn.DataParallel), which packed ones cannot be. A launcher gives each its process.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
