"""Whether a run fits in memory, before its first step, and the settings that make it fit.

A run is planned from its settings, its data's lengths and its model's configuration
(``memory_model`` predicts a phase). Every batch of an epoch is drawn up, in lengths alone, and the
heaviest of them are predicted.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .attention import sharing_obstacle, uses_padded_rows
from .config import LoraSettings, ModelSettings, RunSettings
from .errors import RunError
from .fake_models import FakeModel, fake_from_config
from .memory_model import Phase, Training, generation_phase, score_phase, train_phases
from .packing import Group, PackedBatch, pack
from .passes import PackingCollator
from .references import is_peft

# What a device holds besides tensors: the driver's context or the process, and fragmentation.
_RESERVE = {"cuda": (0.75 * 2**30, 0.04), "cpu": (1.0 * 2**30, 0.0)}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
TYPICAL = "typical pass"
_BATCHES = 256  # looked at, at most: those with the longest examples
_SCORING = (8, 4, 2)  # times the budget of training, for passes without gradients
_STEP = 256  # a budget of tokens is a multiple of this
_LORA = LoraSettings(r=16, alpha=32)


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
        return any(name in self.settings.training.arguments for name in ("fsdp", "deepspeed"))

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


@dataclass(frozen=True)
class Fit:
    """Settings under which a run fits.

    Attributes:
        changes: What to change, by the settings' full names.
        plan: What is predicted then.
    """

    changes: dict[str, Any]
    plan: Plan


def parse_size(text: str, option: str = "memory.limit") -> int:
    """Return a number of bytes: ``24GiB``, ``80 GB``, ``512MiB``.

    Raises:
        RunError: The text is not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if not found or (found[3] and not found[2]):
        raise RunError(f"{option}: expected a size such as 24GiB, got {text!r}")
    unit = _UNITS[found[2].lower()]
    if found[3]:
        unit = 1024 ** list(_UNITS).index(found[2].lower())
    return int(float(found[1]) * unit)


def usable(limit: int, device: str) -> int:
    """Return what of a device's memory tensors can have."""
    fixed, share = _RESERVE[device]
    return int(limit * (1 - share) - fixed)


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
            found.append(score_phase(fake, passes.first[0], training.settings, device))
        if passes.typical is not None and not brief:
            typical, *_ = train_phases(fake, passes.typical, None, training, device)
            found.append(dataclasses.replace(typical, name=TYPICAL))
        if brief and passes.later_is_heaviest:
            found += train_phases(fake, None, passes.later, training, device)
        else:
            for first in passes.first:
                found += train_phases(fake, first, passes.later, training, device)
        phases += [
            dataclasses.replace(phase, name=f"{work.name}: {phase.name}")
            for phase in _largest(found)
        ]
        flops = max(flops, training_flops(work, request.model.lora.r > 0))
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
            attention is the largest.
        later: Of the further ones, the one with the most tokens, or None.
        typical: Of the first ones, the median by tokens, or None where all are equal.
    """

    first: list[PackedBatch]
    later: PackedBatch | None
    typical: PackedBatch | None

    @property
    def later_is_heaviest(self) -> bool:
        """Whether a further pass, which stands on gradients, is as long as any first one."""
        return (
            len(self.first) == 1
            and self.later is not None
            and _tokens(self.later) >= _tokens(self.first[0])
        )


def _tokens(batch: PackedBatch) -> int:
    """Return the tokens that a model sees at a time."""
    return max((part.num_tokens for part in batch.parts), default=batch.num_tokens)


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

    def scores(batch: PackedBatch) -> int:
        return max(_scores(part, padded) for part in (batch.parts or (batch,)))

    size = settings.batch_size // work.training.processes
    first: list[PackedBatch] = []
    later: list[PackedBatch] = []
    for batch in _batches(work.groups, size, seed):
        passes = collate([_lengths_only(group) for group in batch])["passes"]
        first.append(passes[0])
        later = _best([*later, *passes[1:]], _tokens)
    median = sorted(first, key=_tokens)[(len(first) - 1) // 2]
    first = _best(first, _tokens, scores)
    typical = median if _tokens(median) < _tokens(first[0]) else None
    return Passes(first, next(iter(later), None), typical)


def _best(batches: Sequence[PackedBatch], *keys: Any) -> list[PackedBatch]:
    if not batches:
        return []
    return list({id(best): best for best in (max(batches, key=key) for key in keys)}.values())


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


def _lengths_only(group: Group) -> Group:
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


# Settings that fit


def same_result(request: Request, room: int) -> list[Fit]:
    """Return settings under which a run fits and learns the same, the fastest first.

    They are the budget of tokens and recomputed activations; and, where responses are generated,
    how many at a time.

    Args:
        request: The run as it is set.
        room: Bytes that tensors can have.
    """
    return _fits(request, [{}], room)


def other_result(request: Request, room: int) -> list[Fit]:
    """Return settings under which a run fits and learns otherwise, the fastest first.

    They are an optimiser of 8 bits; an adapter in the place of the whole model; and that on a base
    of 16 bits, and of 4.
    """
    model, choices = request.settings.model, []
    lora: dict[str, Any] = {}
    if model.lora.r == 0:
        lora = {"model.lora.r": _LORA.r, "model.lora.alpha": _LORA.alpha}
        choices.append(lora)
        if request.settings.training.optimizer.startswith("adamw_torch"):
            choices.append({"training.optimizer": "adamw_8bit"})
    if not model.load_in_4bit:
        half = {} if _is_half(request) else {"model.dtype": "bfloat16"}
        if half:
            choices.append({**lora, **half})
        choices.append({**lora, **half, "model.load_in_4bit": True})
    return _fits(request, choices, room)


def _is_half(request: Request) -> bool:
    fake = fake_from_config(dataclasses.replace(request.model, lora=LoraSettings()))
    return next(fake.model.parameters()).element_size() == 2


def _fits(request: Request, choices: Sequence[dict[str, Any]], room: int) -> list[Fit]:
    found = []
    for changes in choices:
        fit = _largest_budget(request.with_settings(changes), changes, room)
        found.append(fit)
        if request.settings.training.gradient_checkpointing:
            continue
        # Recomputing is for where the budget of tokens had to fall.
        if fit is None or "training.max_tokens" in fit.changes:
            changes = {**changes, "training.gradient_checkpointing": True}
            found.append(_largest_budget(request.with_settings(changes), changes, room))
    return sorted((fit for fit in found if fit is not None), key=lambda fit: fit.plan.flops)


def _largest_budget(request: Request, changes: dict[str, Any], room: int) -> Fit | None:
    """Return the largest budget of tokens that fits, found between two predictions."""
    fake = fake_from_config(request.model)
    generation = _smaller_generation(request, fake, room)
    if generation is None:
        return None
    changes = {**changes, **generation}
    most, least = request.settings.training.max_tokens, _least_budget(request)

    def at(max_tokens: int) -> Fit:
        more = {"training.max_tokens": max_tokens} if max_tokens != most else {}
        more |= changes
        return Fit(more, make_plan(request.with_settings(more), fake, brief=True))

    given = at(most)
    if given.plan.peak <= room:
        return given
    # A smaller budget takes what fits already no further.
    over = {
        work.name
        for work in request.works
        for phase in given.plan.phases
        if phase.name.startswith(f"{work.name}: ") and phase.peak > room
    }
    request = dataclasses.replace(request, works=[w for w in request.works if w.name in over])
    if least >= most or (low := at(least)).plan.peak > room:
        return None
    high, lower, upper = given, least, most
    # The peak is close to linear in tokens, so a few predictions are enough.
    for _ in range(4):
        slope = (high.plan.peak - low.plan.peak) / (upper - lower)
        guess = lower + int((room - low.plan.peak) / max(slope, 1e-9))
        guess = min(guess, upper - 1) // _STEP * _STEP
        if guess <= lower:
            break
        new = at(guess)
        if new.plan.peak <= room:
            lower, low = guess, new
        else:
            upper, high = guess, new
    return low


def scoring_budget(request: Request, fake: FakeModel, room: int) -> int:
    """Return how many tokens a pass without gradients may have: the budget of training, or more.

    Args:
        request: The run.
        fake: Its model.
        room: Bytes that tensors can have; a copy of the model as the reference is taken from them.
    """
    settings = request.settings.training
    if is_peft(fake.model):
        copy = 0
    else:
        copy = sum(p.numel() * p.element_size() for p in fake.model.parameters())
    group = max(
        (group for work in request.works for group in work.groups),
        key=lambda group: group.num_tokens,
    )
    several = len(group.response_ids) > 1
    shared = settings.share_prompts and several and sharing_obstacle(fake.model) is None
    group, tokens = _lengths_only(group), group.tokens_laid(share_prompts=shared)
    for factor in _SCORING:
        budget = factor * settings.max_tokens
        batch = pack([group] * max(1, budget // tokens), share_prompts=shared)
        if score_phase(fake, batch, settings, request.device).peak + copy <= room:
            return budget
    return settings.max_tokens


def _least_budget(request: Request) -> int:
    """Return the budget below which passes get no smaller."""
    longest = 1
    for work in request.works:
        training = work.training.settings
        for group in work.groups:
            if training.split_pairs:
                tokens = len(group.prompt_ids) + max(map(len, group.response_ids))
            else:
                tokens = group.tokens_laid(share_prompts=training.share_prompts)
            longest = max(longest, tokens)
    return -(-longest // _STEP) * _STEP


def _smaller_generation(request: Request, fake: FakeModel, room: int) -> dict[str, Any] | None:
    """Return the settings of a batch of responses that fits; None where not even one does."""
    settings = request.settings.generation
    size = settings.batch_size
    while request.prompt_tokens:
        smaller = dataclasses.replace(settings, batch_size=size)
        phase = generation_phase(fake, smaller, request.prompt_tokens, request.device)
        if phase.peak <= room:
            break
        if size == 1:
            return None
        size //= 2
    return {} if size == settings.batch_size else {"generation.batch_size": size}


def replaced(settings: Any, changes: dict[str, Any]) -> Any:
    """Return nested settings with others in their place, by dotted names."""
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        new = replaced(getattr(settings, head), {rest: value}) if rest else value
        settings = dataclasses.replace(settings, **{head: new})
    return settings
