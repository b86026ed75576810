"""The sides that ``prefalign verify`` compares: eager PyTorch, the library's trainer, TRL's.

Each side loads the model anew and makes two steps on the same pairs; the weights of the first are
what the reference policy is. The optimiser is plain SGD without clipping, so that an error of the
gradient is an error, of the same relative size, of the step.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .attention import causal_lm, generation_attention
from .config import TrainingSettings
from .errors import ModelError
from .kernels.preference_loss import preference_loss
from .loading import first_line, load_model, load_tokenizer
from .models import score
from .packed_trainer import Groups, training_arguments
from .packing import Group, PackedBatch
from .references import is_peft, reference_of
from .trainer import PreferenceTrainer
from .verify_config import VerifySettings

# What the optimiser's step takes off the mean loss, to first order.
FALL = 0.1
STEPS = 2


class SkippedError(Exception):
    """Why a side cannot be compared."""


@dataclass
class Outcome:
    """What a side found for B pairs: at first, and after one optimiser step.

    Attributes:
        losses: Each pair's loss in each step, ``[B]``.
        logps: Each response's log-prob in each step, ``[2B]``, chosen and rejected in turn; none
            where a side does not tell.
        gradients: What was kept of the first step's gradients.
        seconds: Time of the second step.
        peak: Bytes on the GPU at the most, or None on a CPU.
        passes: The tokens of each forward and backward pass of a step.
        slopes: The first losses' derivative by the log-probs in each step, ``[2B]``.
        largest_logit: The largest logit's size.
    """

    losses: list[Tensor] = field(default_factory=list)
    logps: list[Tensor] = field(default_factory=list)
    gradients: Any = None
    seconds: float = 0.0
    peak: int | None = None
    passes: list[int] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)
    largest_logit: float = 1.0


Keep = Callable[[nn.Module], Any]
"""What is kept of a model's gradients, while they are there."""


def load(
    settings: VerifySettings, device: torch.device, dtype: torch.dtype | None = None
) -> nn.Module:
    """Load the model, without dropout and in training mode, which checkpointing asks for."""
    torch.manual_seed(settings.seed)  # a fresh adapter is random
    model = load_model(settings.model, dtype=settings.dtype, lora=settings.lora)
    if dtype is not None:
        model = model.to(dtype)
    config: Any = causal_lm(model).config
    for owner in (*model.modules(), config, config.get_text_config()):
        for name, value in list(vars(owner).items()):
            if "drop" in name and isinstance(value, float):
                setattr(owner, name, 0.0)
        if isinstance(owner, nn.Dropout):
            owner.p = 0.0
    return model.to(device).train()


@contextlib.contextmanager
def _measured(outcome: Outcome, device: torch.device) -> Iterator[None]:
    """Note the GPU's peak, and say it in one line where the memory is not enough."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            "out of memory: take fewer pairs, a smaller max_tokens or max_length, or "
            f"gradient_checkpointing ({first_line(error)})"
        ) from error
    if device.type == "cuda":
        outcome.peak = torch.cuda.max_memory_allocated(device)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


# Eager PyTorch


def run_eager(
    settings: VerifySettings,
    groups: Sequence[Group],
    device: torch.device,
    keep: Keep,
    *,
    rate: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Outcome, float]:
    """Run the steps in plain torch: every sequence by itself, the model's logits, log-softmax.

    Args:
        settings: The settings.
        groups: The pairs.
        device: Where to run.
        keep: Called with the model after the first backward pass.
        rate: SGD's learning rate; what takes ``FALL`` off the loss to first order if not given.
        dtype: In the place of the model's dtype.

    Returns:
        What was found, and the learning rate.
    """
    outcome = Outcome()
    model = load(settings, device, dtype)
    if settings.gradient_checkpointing:
        lm: Any = causal_lm(model)
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [p for p in model.parameters() if p.requires_grad]
    with _measured(outcome, device), generation_attention(model):
        off: Any = contextlib.nullcontext()
        if is_peft(model):
            peft_model: Any = model
            off = peft_model.disable_adapter()
        with torch.no_grad(), off:
            reference = torch.stack([_pair_logps(model, group, outcome) for group in groups])
        for step in range(STEPS):
            _synchronize(device)
            started = time.perf_counter()
            _eager_step(model, groups, reference, settings, outcome)
            if step == 0:
                outcome.gradients = keep(model)
                if rate is None:
                    grads = [p.grad for p in parameters if p.grad is not None]
                    norms = [torch.linalg.vector_norm(g.double()).item() for g in grads]
                    square = sum(norm**2 for norm in norms)
                    rate = FALL / square if square else 0.0
                torch.optim.SGD(parameters, rate).step()
                for parameter in parameters:
                    parameter.grad = None
            _synchronize(device)
            outcome.seconds = time.perf_counter() - started
    assert rate is not None
    return outcome, rate


def _pair_logps(model: nn.Module, group: Group, outcome: Outcome) -> Tensor:
    """Return the log-probs of a pair's responses, ``[2]``."""
    sums = []
    for response in group.response_ids:
        ids = torch.tensor([[*group.prompt_ids, *response]], device=_device(model))
        logits = model(input_ids=ids, use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        outcome.largest_logit = max(outcome.largest_logit, logits.detach().abs().max().item())
        found = logits.log_softmax(-1).gather(1, ids[0, len(group.prompt_ids) :, None])
        sums.append(found.sum())
    return torch.stack(sums)


def _device(model: nn.Module) -> torch.device:
    return causal_lm(model).get_input_embeddings().weight.device


def _eager_step(
    model: nn.Module,
    groups: Sequence[Group],
    reference: Tensor,
    settings: VerifySettings,
    outcome: Outcome,
) -> None:
    losses, logps, slopes = [], [], []
    for group, expected in zip(groups, reference, strict=True):
        found = _pair_logps(model, group, outcome)
        loss = _eager_loss(found, expected, settings)
        slopes.append(torch.autograd.grad(loss, found, retain_graph=True)[0])
        (loss / len(groups)).backward()
        losses.append(loss.detach())
        logps.append(found.detach())
    outcome.losses.append(torch.stack(losses).cpu())
    outcome.logps.append(torch.cat(logps).cpu())
    outcome.slopes.append(torch.cat(slopes).cpu())


def _eager_loss(logps: Tensor, reference: Tensor, settings: VerifySettings) -> Tensor:
    smoothing = settings.label_smoothing
    if settings.loss_type == "sigmoid":
        z = settings.beta * ((logps[0] - reference[0]) - (logps[1] - reference[1]))
        return -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)
    return preference_loss(
        *logps[:, None],
        *reference[:, None],
        loss_type=settings.loss_type,
        beta=settings.beta,
        label_smoothing=smoothing,
        impl="reference",
    ).losses[0]


# Trainers


class _Watch(TrainerCallback):
    """Keep a trainer's first gradients, and the time of its last step."""

    def __init__(self, outcome: Outcome, keep: Keep, device: torch.device):
        self.outcome, self.keep, self.device = outcome, keep, device

    def on_step_begin(self, args, state, control, **kwargs):
        """Called before an optimiser step's first pass."""
        _synchronize(self.device)
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Called when the gradients are whole."""
        if state.global_step == 0:
            self.outcome.gradients = self.keep(model)

    def on_step_end(self, args, state, control, **kwargs):
        """Called after an optimiser step."""
        _synchronize(self.device)
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
    with _measured(outcome, device), tempfile.TemporaryDirectory() as folder:
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
        _measured(outcome, device),
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
