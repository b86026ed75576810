"""How much memory a run takes, before its first step.

A run is planned from its settings, its data's lengths and its model's configuration
(``memory_model`` predicts a phase). Every batch of an epoch is drawn up, in lengths alone, and the
heaviest of them are predicted. ``plan_search`` finds the settings that make it less.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from .attention import sharing_obstacle, uses_padded_rows
from .config import ModelSettings, RunSettings
from .fake_models import FakeModel
from .memory_model import Phase, Training, generation_phase, score_phase, train_phases
from .packing import Group, PackedBatch
from .passes import PackingCollator
from .references import is_peft

TYPICAL = "typical pass"
_BATCHES = 256  # looked at, at most: those with the longest examples


@dataclass(frozen=True)
class Work:
    """One training of a run, or one kind of them.

    Args:
        name: What it is called.
        groups: What is trained on, or groups of such lengths.
        training: What a step holds besides its passes.
        scored: Whether the groups' log-probs are computed before.
    """

    name: str
    groups: Sequence[Group]
    training: Training
    scored: bool = False


@dataclass(frozen=True)
class Request:
    """All that a plan is made from.

    Args:
        model: The model.
        works: The trainings.
        settings: The run's settings.
        device: ``cpu`` or ``cuda``.
        prompt_tokens: The longest prompt that responses are generated to; 0 if none are.
    """

    model: ModelSettings
    works: Sequence[Work]
    settings: RunSettings
    device: str
    prompt_tokens: int = 0

    @property
    def sharded(self) -> bool:
        """Whether an engine spreads the model over devices, which is not planned."""
        arguments = self.settings.training.arguments
        return any(arguments.get(name) for name in ("fsdp", "deepspeed")) or any(
            os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes")
            for name in ("FSDP", "DEEPSPEED")
        )

    def with_settings(self, changes: dict[str, Any]) -> Request:
        """Return the request with other settings, by their full names."""
        settings = replaced(self.settings, changes)
        works = [
            dataclasses.replace(
                work, training=dataclasses.replace(work.training, settings=settings.training)
            )
            for work in self.works
        ]
        return dataclasses.replace(self, model=settings.model, settings=settings, works=works)


@dataclass(frozen=True)
class Plan:
    """A prediction.

    Attributes:
        phases: Each phase's peak, named after its training.
        parameters: Parameters of the model, and how many are trained.
        flops: What training computes for a token of the data, in forward passes of one token: 3
            where the whole model is trained; recomputed and repeated tokens count.
    """

    phases: tuple[Phase, ...]
    parameters: tuple[int, int]
    flops: float

    @property
    def worst(self) -> Phase:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def peak(self) -> int:
        """Bytes of tensors at the highest peak."""
        return self.worst.peak


def make_plan(request: Request, fake: FakeModel, *, brief: bool = False) -> Plan:
    """Predict every phase of a run.

    Args:
        request: The run.
        fake: Its model without numbers.
        brief: Leave out what cannot be the peak of training.
    """
    phases: list[Phase] = []
    flops = 0.0
    for work in request.works:
        passes = draw_passes(work, fake, request.settings.seed)
        training, device = work.training, request.device
        found: list[Phase] = []
        if work.scored and not brief:
            heaviest = max([*passes.first, *passes.later], key=passes.tokens)
            found.append(score_phase(fake, heaviest, training.settings, device))
        if passes.typical is not None and not brief:
            typical, *_ = train_phases(fake, passes.typical, None, training, device)
            found.append(dataclasses.replace(typical, name=TYPICAL))
        first = [] if brief and passes.later_is_heaviest else passes.first
        for one, other in zip_longest(first, passes.later):
            found += train_phases(fake, one, other, training, device)
        phases += [
            dataclasses.replace(phase, name=f"{work.name}: {phase.name}")
            for phase in _largest(found)
        ]
        flops = max(flops, training_flops(work, is_peft(fake.model)))
    if request.prompt_tokens and not brief:
        phases.append(
            generation_phase(
                fake, request.settings.generation, request.prompt_tokens, request.device
            )
        )
    sizes = [(p.numel(), p.requires_grad) for p in fake.model.parameters()]
    trained = sum(n for n, requires_grad in sizes if requires_grad)
    return Plan(tuple(phases), (sum(n for n, _ in sizes), trained), flops)


def _largest(phases: Sequence[Phase]) -> list[Phase]:
    """Return the largest phase of each name."""
    best: dict[str, Phase] = {}
    for phase in phases:
        if phase.name not in best or phase.peak > best[phase.name].peak:
            best[phase.name] = phase
    return list(best.values())


@dataclass(frozen=True)
class Passes:
    """The passes of an epoch that tell what it holds.

    Attributes:
        first: Of the first passes of steps, the one with the most tokens and the one whose
            attention is the largest; they may be the same.
        later: Of the further ones, likewise, or none.
        typical: Of the first ones, the median by tokens, or None where all are equal.
        tokens: Counts the tokens that the model sees at a time.
    """

    first: list[PackedBatch]
    later: list[PackedBatch]
    typical: PackedBatch | None
    tokens: Callable[[PackedBatch], int]

    @property
    def later_is_heaviest(self) -> bool:
        """Whether a further pass, which stands on gradients, is as long as any first one."""
        return (
            len(self.first) == 1
            and bool(self.later)
            and self.tokens(self.later[0]) >= self.tokens(self.first[0])
        )


def draw_passes(work: Work, fake: FakeModel, seed: int) -> Passes:
    """Lay an epoch's batches in the order of ``seed``, and return the passes that matter."""
    settings = work.training.settings
    several = any(len(group.response_ids) > 1 for group in work.groups)
    padded = uses_padded_rows(fake.model)
    # The trial with numbers, which follows in training, is not for a model that has none.
    shared = settings.share_prompts and several and sharing_obstacle(fake.model) is None
    collate = PackingCollator(
        settings.max_tokens, share_prompts=shared, split=settings.split_pairs and several
    )

    def tokens(batch: PackedBatch) -> int:
        return max(_rows(part, padded) for part in (batch.parts or (batch,)))

    def scores(batch: PackedBatch) -> int:
        return max(_scores(part, padded) for part in (batch.parts or (batch,)))

    size = settings.batch_size // work.training.processes
    first: list[PackedBatch] = []
    later: list[PackedBatch] = []
    for batch in _batches(work.groups, size, seed):
        passes = collate([lengths_only(group) for group in batch])["passes"]
        first.append(passes[0])
        later = _best([*later, *passes[1:]], tokens, scores)
    median = sorted(first, key=tokens)[(len(first) - 1) // 2]
    first = _best(first, tokens, scores)
    typical = median if tokens(median) < tokens(first[0]) else None
    return Passes(first, later, typical, tokens)


def _best(batches: Sequence[PackedBatch], *keys: Any) -> list[PackedBatch]:
    if not batches:
        return []
    return list({id(best): best for best in (max(batches, key=key) for key in keys)}.values())


def _rows(batch: PackedBatch, padded: bool) -> int:
    """Return the tokens of a batch, those that only pad included."""
    assert batch.segments is not None
    lengths = batch.segments.lengths
    return len(lengths) * max(lengths) if padded else sum(lengths)


def _scores(batch: PackedBatch, padded: bool) -> int:
    """Return how many attention scores an eager layer makes, for each head."""
    assert batch.segments is not None
    lengths = batch.segments.lengths
    return len(lengths) * max(lengths) ** 2 if padded else sum(n * n for n in lengths)


def _batches(groups: Sequence[Group], size: int, seed: int) -> Iterator[list[Group]]:
    """Yield an epoch's batches as they might be drawn; those of the longest examples come first."""
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    batches = [order[i : i + size] for i in range(0, len(order), size)]

    def longest(batch: Sequence[int]) -> int:
        return max(groups[i].num_tokens for i in batch)

    batches.sort(key=longest, reverse=True)
    for batch in batches[:_BATCHES]:
        yield [groups[i] for i in batch]


def lengths_only(group: Group) -> Group:
    """Return a group whose tokens are all the same one."""
    return Group(
        [0] * len(group.prompt_ids), [[0] * len(x) for x in group.response_ids], group.example_id
    )


def training_flops(work: Work, adapter: bool) -> float:
    """Return what training computes for a token of the data, in forward passes of one token.

    A trained weight takes a product forward and two backward; a frozen one that an adapter stands
    on takes one. Attention's scores and the head are left out, the same for all settings.
    """
    settings = work.training.settings
    each = 2.0 if adapter else 3.0
    each += settings.gradient_checkpointing
    each += work.training.reference != "logps"
    laid = total = 0.0
    for group in work.groups:
        shared = group.tokens_laid(share_prompts=settings.share_prompts)
        laid += shared
        if settings.split_pairs and shared > settings.max_tokens and len(group.response_ids) > 1:
            # One part for each response: all but the longest are computed once more.
            parts = [len(group.prompt_ids) + len(x) for x in group.response_ids]
            total += each * sum(parts) + sum(parts) - max(parts)
        else:
            total += each * shared
    return total / laid


def replaced(settings: Any, changes: dict[str, Any]) -> Any:
    """Return nested settings with others in their place, by dotted names."""
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        new = replaced(getattr(settings, head), {rest: value}) if rest else value
        settings = dataclasses.replace(settings, **{head: new})
    return settings
