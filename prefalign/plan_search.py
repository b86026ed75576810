"""The settings under which a run fits in memory, and what of a device's memory it can have.

Every answer is a prediction (``planner.make_plan``) that was found to fit, not an estimate.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .attention import sharing_obstacle
from .config import LoraSettings
from .errors import RunError
from .fake_models import FakeModel, fake_from_config
from .loading import adapter_config
from .memory_model import generation_phase, score_phase
from .packing import pack
from .planner import Plan, Request, lengths_only, make_plan
from .references import is_peft

# What a device holds besides tensors: the driver's context or the process, and fragmentation.
_RESERVE = {"cuda": (0.75 * 2**30, 0.04), "cpu": (1.0 * 2**30, 0.0)}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SCORING = (8, 4, 2)  # times the budget of training, for passes without gradients
_STEP = 256  # a budget of tokens is a multiple of this
_LORA = LoraSettings(r=16, alpha=32)


@dataclass(frozen=True)
class Fit:
    """Settings under which a run fits.

    Attributes:
        changes: What to change, by the settings' full names.
        plan: What is predicted then of training.
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
    size = int(float(found[1]) * unit)
    if size == 0:
        raise RunError(f"{option}: expected more than nothing, got {text!r}")
    return size


def usable(limit: int, device: str) -> int:
    """Return the bytes of a device's memory that tensors can have."""
    fixed, share = _RESERVE[device]
    return max(0, int(limit * (1 - share) - fixed))


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

    They are an optimiser of 8 bits, which runs on a GPU alone; an adapter in the place of the whole
    model; and that on a base of 16 bits, and of 4.

    Args:
        request: The run as it is set.
        room: Bytes that tensors can have.
    """
    model = request.settings.model
    choices: list[dict[str, Any]] = []
    lora: dict[str, Any] = {}
    if model.lora.r == 0 and adapter_config(model.path) is None:
        lora = {"model.lora.r": _LORA.r, "model.lora.alpha": _LORA.alpha}
        choices.append(lora)
        if request.device == "cuda" and (
            request.settings.training.optimizer.startswith("adamw_torch")
        ):
            choices.append({"training.optimizer": "adamw_8bit"})
    if not model.load_in_4bit:
        half = {} if _is_half(request) else {"model.dtype": "bfloat16"}
        if half:
            choices.append({**lora, **half})
        if lora or model.lora.r > 0:
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
    # Found for the trainings that do not fit; all of them have to, in the end.
    over = {
        work.name
        for work in request.works
        for phase in given.plan.phases
        if phase.name.startswith(f"{work.name}: ") and phase.peak > room
    }
    whole = request
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
    request = whole
    found = at(lower)
    return found if found.plan.peak <= room else None


def scoring_budget(request: Request, fake: FakeModel, room: int) -> int:
    """Return how many tokens a pass without gradients may have: the budget of training, or more.

    Args:
        request: The run.
        fake: Its model.
        room: Bytes that tensors can have; a copy of the model as the reference is taken from them.
    """
    settings = request.settings.training
    groups = [group for work in request.works if work.scored for group in work.groups]
    if not groups:
        return settings.max_tokens
    copy = 0
    if not is_peft(fake.model):
        copy = sum(p.numel() * p.element_size() for p in fake.model.parameters())
    group = max(groups, key=lambda group: group.num_tokens)
    several = len(group.response_ids) > 1
    shared = settings.share_prompts and several and sharing_obstacle(fake.model) is None
    group, tokens = lengths_only(group), group.tokens_laid(share_prompts=shared)
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
