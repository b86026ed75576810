"""The peak of memory of each phase of a run, by component, from shapes alone.

The phases are run with fake tensors through the library's own code: packed attention, the fused
head, checkpointing, adapters. So nothing here knows an architecture; only the optimiser's states
and the sampling of tokens are formulas.

    score       the reference's log-probs: weights, and one pass without gradients
    train       one pass forward and backward, the first of a step and one after it, with the
                gradients and the optimiser's states that are there by then
    update      the optimiser's step
    generate    a batch of responses at full length, and its KV cache
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from transformers import DynamicCache

from .attention import causal_lm, generation_attention
from .config import GenerationSettings, TrainingSettings
from .errors import RunError
from .fake_models import FakeModel
from .kernels.linear_token_logps import linear_token_logps
from .kernels.linear_token_logps_triple import linear_token_logps_triple
from .memory_trace import ACTIVATIONS, CACHE, GRADIENTS, OPTIMIZER, REFERENCE, WEIGHTS, MemoryTrace
from .models import head_arguments, read_head, target_hidden
from .packing import PackedBatch
from .references import Reference, is_peft, modules_in_eval, reference_of

ReferenceKind = Literal["logps", "base", "copy"]
"""What is compared with: log-probs that come with the pairs; a PEFT policy's base model; a copy of
the policy, as a second model or, of a PEFT policy, a second adapter."""

# Bytes of states for each trained element; None stands for two states in its own dtype.
_STATES: dict[str, float | None] = {
    "adamw_torch": None,
    "adamw_torch_fused": None,
    "sgd": 0.0,
    # bitsandbytes: two states of 8 bits, a float32 constant for each 256 of them.
    "adamw_bnb_8bit": 2 * (1 + 4 / 256),
    "adamw_8bit": 2 * (1 + 4 / 256),
    "paged_adamw_8bit": 2 * (1 + 4 / 256),
}


@dataclass(frozen=True)
class Phase:
    """One phase's peak.

    Attributes:
        name: The phase.
        components: Bytes of each component at the peak.
    """

    name: str
    components: Counter[str] = field(default_factory=Counter)

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return self.components.total()


@dataclass(frozen=True)
class Training:
    """What a training step holds besides its passes.

    Args:
        settings: Optimiser, precision, checkpointing.
        reference: What the policy is compared with.
        extrapolated: Whether the loss needs the logits of both (SPA's noise-aware loss).
        processes: Processes that share a batch; more than one train with DDP.
    """

    settings: TrainingSettings
    reference: ReferenceKind = "logps"
    extrapolated: bool = False
    processes: int = 1


def score_phase(fake: FakeModel, batch: PackedBatch, settings: TrainingSettings, device: str):
    """Return the peak of a pass that scores responses without gradients."""
    with fake.active(device), MemoryTrace(device) as trace, modules_in_eval(fake.model):
        trace.add(_tensors(fake.model), WEIGHTS)
        with torch.no_grad(), _autocast(settings):
            _logps(fake.model, fake.batch(batch), through_wrapper=False)
        return Phase("score", trace.at_peak)


def train_phases(
    fake: FakeModel,
    first: PackedBatch | None,
    later: PackedBatch | None,
    training: Training,
    device: str,
) -> list[Phase]:
    """Return the peaks of a step's passes and of its update.

    Args:
        fake: The policy, its trained parameters requiring gradients.
        first: The first pass of a step, before which there are no gradients; None leaves it out.
        later: The heaviest of the other passes, or None where steps have one.
        training: What else there is.
        device: ``cpu`` or ``cuda``.
    """
    settings = training.settings
    phases = []
    with fake.active(device), MemoryTrace(device) as trace, _trained(fake.model, settings) as model:
        trace.add(_tensors(model), WEIGHTS)
        reference = _reference(fake, training, trace)
        states = torch.empty(optimizer_bytes(model, settings.optimizer), dtype=torch.uint8)
        trace.add([states], OPTIMIZER)
        trained = [p for p in model.parameters() if p.requires_grad]
        if training.processes > 1:
            # DDP's buckets are as large as the gradients.
            trace.held += [torch.empty_like(p) for p in trained]
            trace.add(trace.held, GRADIENTS)
        with trace.watch_gradients(model):
            if first is not None:
                trace.restart()
                _run_pass(model, fake.batch(first), reference, training)
                phases.append(Phase("first pass", trace.at_peak))
            for p in trained:
                p.grad = torch.empty_like(p)
                trace.add([p.grad], GRADIENTS)
            trace.restart()
            if later is not None:
                _run_pass(model, fake.batch(later), reference, training)
                phases.append(Phase("later pass", trace.at_peak))
        trace.restart()
        trace.hold(_update_bytes(model, settings.optimizer, device), OPTIMIZER)
        phases.append(Phase("update", trace.at_peak))
        for p in trained:
            p.grad = None
    return phases


def generation_phase(
    fake: FakeModel, settings: GenerationSettings, prompt_tokens: int, device: str
) -> Phase:
    """Return the peak of sampling a batch of responses at full length."""
    model, rows = fake.model, settings.batch_size
    with (
        fake.active(device),
        MemoryTrace(device) as trace,
        modules_in_eval(model),
        generation_attention(model),
        torch.no_grad(),
    ):
        trace.add(_tensors(model), WEIGHTS)
        cache = DynamicCache()
        lm = causal_lm(model)

        def forward(tokens: int, seen: int) -> Tensor:
            out = lm(
                input_ids=torch.zeros(rows, tokens, dtype=torch.int64),
                attention_mask=torch.ones(rows, seen + tokens, dtype=torch.int64),
                past_key_values=cache,
                logits_to_keep=1,
            )
            return out.logits[:, -1]

        forward(prompt_tokens, 0)
        _relabel(trace, cache)
        prefill = Phase("generate", trace.at_peak)
        grown = settings.max_new_tokens - 1
        if grown > 0:
            for index, layer in enumerate(_layers(cache)):
                keys, values = (x.new_empty((*x.shape[:2], grown, x.shape[3])) for x in layer)
                cache.update(keys, values, index)
            del keys, values
            _relabel(trace, cache)
        trace.restart()
        logits = forward(1, prompt_tokens + grown)
        _relabel(trace, cache)
        _sample(logits, settings.top_p)
        return max(prefill, Phase("generate", trace.at_peak), key=lambda phase: phase.peak)


def _sample(logits: Tensor, top_p: float) -> None:
    """Make what transformers' sampling makes of the last logits, and holds until it is done."""
    scores = logits.to(torch.float32, copy=True)
    scored = scores / 1.0  # the temperature
    if top_p < 1:
        ordered, order = scored.sort()
        sums = ordered.softmax(-1).cumsum(-1)
        del ordered, order, sums
        scored = scored.clone()
    shares = scored.softmax(-1)
    torch.empty_like(shares)  # the random numbers


def optimizer_bytes(model: nn.Module, optimizer: str) -> int:
    """Return the bytes of an optimiser's states.

    Raises:
        RunError: It is not known how much this optimiser keeps.
    """
    if optimizer not in _STATES:
        known = ", ".join(_STATES)
        raise RunError(f"training.optimizer: can plan for {known}; got {optimizer!r}")
    each = _STATES[optimizer]
    total = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            total += parameter.numel() * (2 * parameter.element_size() if each is None else each)
    return int(total)


def _update_bytes(model: nn.Module, optimizer: str, device: str) -> int:
    """Return what an update holds for a moment beyond its states."""
    sizes = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
    if optimizer != "adamw_torch" or not sizes:
        return 0
    # On a GPU all parameters' denominators at once (torch's foreach loop), else one's at a time.
    return sum(sizes) if device == "cuda" else 2 * max(sizes)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _reference(fake: FakeModel, training: Training, trace: MemoryTrace) -> Reference | None:
    model = fake.model
    if training.reference == "logps":
        return None
    if training.reference == "base":
        return reference_of(model)
    # A copy runs as the policy does, and takes its weights again; of an adapter, the adapter's.
    copied = [p for p in model.parameters() if p.requires_grad or not is_peft(model)]
    trace.held += [torch.empty_like(p) for p in copied]
    trace.add(trace.held, REFERENCE)
    return Reference(model)


@contextlib.contextmanager
def _trained(model: nn.Module, settings: TrainingSettings):
    """Set a model up as transformers' Trainer does."""
    forward = model.forward
    before = model.training
    model.train()
    if settings.gradient_checkpointing:
        _switch(model, "enable")({"use_reentrant": False})
    if settings.mixed_precision != "no":
        model.forward = convert_outputs_to_fp32(_autocast(settings)(forward))
    try:
        yield model
    finally:
        model.forward = forward
        if settings.gradient_checkpointing:
            _switch(model, "disable")()
        model.train(before)


def _switch(model: Any, what: str) -> Any:
    """Return the method that transformers 5.20 renamed."""
    old = f"gradient_checkpointing_{what}"
    return getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, old)


def _autocast(settings: TrainingSettings) -> Any:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.mixed_precision)
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


def _logps(model: nn.Module, batch: PackedBatch, *, through_wrapper: bool) -> Tensor:
    hidden = target_hidden(model, batch, through_wrapper=through_wrapper)
    return linear_token_logps(
        hidden, targets=batch.targets, **head_arguments(read_head(model), hidden)
    )


def _run_pass(
    model: nn.Module, batch: PackedBatch, reference: Reference | None, training: Training
) -> None:
    """Run a pass as the trainers do; the loss of sequences costs nothing worth counting."""
    with _autocast(training.settings):
        if training.extrapolated and reference is not None:
            with torch.no_grad(), reference.use() as other:
                ref_hidden = target_hidden(other, batch)
                ref_head = read_head(other)
            hidden = target_hidden(model, batch, through_wrapper=True)
            head = read_head(model)
            arguments = head_arguments(head, hidden)
            if ref_head.weight is not head.weight:
                more = head_arguments(ref_head, ref_hidden)
                arguments |= {"ref_weight": more["weight"], "ref_bias": more["bias"]}
            logps = linear_token_logps_triple(
                hidden, ref_hidden, targets=batch.targets, extrapolation=1.0, **arguments
            )[0]
            del hidden, ref_hidden
        else:
            if reference is not None:
                with torch.no_grad(), reference.use() as other:
                    _logps(other, batch, through_wrapper=False)
            logps = _logps(model, batch, through_wrapper=True)
        loss = logps.sum()
    loss.backward()


def _relabel(trace: MemoryTrace, cache: DynamicCache) -> None:
    trace.add((x for layer in _layers(cache) for x in layer), CACHE)


def _layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


__all__ = [
    "ACTIVATIONS",
    "GRADIENTS",
    "Phase",
    "Training",
    "generation_phase",
    "optimizer_bytes",
    "score_phase",
    "train_phases",
]
