"""The ordinary side of ``prefalign verify``: a DPO step in plain torch; and what all sides share.

Each side loads the model anew and makes two steps on the same pairs; the weights of the first are
what the reference policy is. The optimiser is plain SGD without clipping, so that an error of the
gradient is an error, of the same relative size, of the step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import causal_lm, generation_attention
from .errors import ModelError
from .kernels.preference_loss import preference_loss
from .loading import first_line, load_model
from .packing import Group
from .references import is_peft
from .verify_config import VerifySettings

# What the optimiser's step takes off the mean loss, to first order.
FALL = 0.1
STEPS = 2


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
def measured(outcome: Outcome, device: torch.device) -> Iterator[None]:
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


def synchronize(device: torch.device) -> None:
    """Wait for what the device has left to do."""
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
    with measured(outcome, device), generation_attention(model):
        off: Any = contextlib.nullcontext()
        if is_peft(model):
            peft_model: Any = model
            off = peft_model.disable_adapter()
        with torch.no_grad(), off:
            reference = torch.stack([_pair_logps(model, group, outcome) for group in groups])
        for step in range(STEPS):
            synchronize(device)
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
            synchronize(device)
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
        loss = _eager_loss(found, expected, group, settings)
        slopes.append(torch.autograd.grad(loss, found, retain_graph=True)[0])
        (loss / len(groups)).backward()
        losses.append(loss.detach())
        logps.append(found.detach())
    outcome.losses.append(torch.stack(losses).cpu())
    outcome.logps.append(torch.cat(logps).cpu())
    outcome.slopes.append(torch.cat(slopes).cpu())


def _eager_loss(logps: Tensor, reference: Tensor, group: Group, settings: VerifySettings) -> Tensor:
    smoothing = settings.label_smoothing
    if settings.loss_type == "sigmoid":
        z = settings.beta * ((logps[0] - reference[0]) - (logps[1] - reference[1]))
        return -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)
    counts = torch.tensor([len(ids) for ids in group.response_ids], device=logps.device)
    return preference_loss(
        *logps[:, None],
        *reference[:, None],
        chosen_counts=counts[:1],
        rejected_counts=counts[1:],
        loss_type=settings.loss_type,
        beta=settings.beta,
        label_smoothing=smoothing,
        impl="reference",
    ).losses[0]
