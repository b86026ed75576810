"""What is said and done about a plan: ``prefalign plan``, and the check before a run's first step.

The predictions are ``planner``'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .config import DataSettings, ModelSettings, RunSettings
from .data import load_preferences
from .errors import RunError
from .fake_models import fake_from_config
from .loading import first_line, load_tokenizer
from .memory_model import Training
from .memory_trace import COMPONENTS
from .packing import Group
from .plan_config import PlanSettings
from .plan_search import Fit, other_result, parse_size, same_result, scoring_budget, usable
from .planner import Plan, Request, Work, make_plan
from .tokenization import groups_from_pairs, tokenize_preferences

logger = logging.getLogger(__name__)

_GIB = 2**30
NO_FIT = 1


# prefalign plan


def main(settings: PlanSettings) -> int:
    """Print a plan, and what would fit; return 0 where the run fits as it is set, else 1."""
    settings.validate()
    _limit(settings.gpu_memory, settings.device, "gpu_memory")  # before the data are read
    return show(_request(settings), settings.gpu_memory, "gpu_memory", prefix="model.")


def show(request: Request, limit_text: str | None, option: str, *, prefix: str = "") -> int:
    """Print a plan, and what would fit; return 0 where the run fits as it is set, else 1.

    Args:
        request: The run.
        limit_text: Memory of the device; a GPU's own if not given.
        option: What the user calls that.
        prefix: What the command leaves out of settings' full names.

    Raises:
        RunError: There is no limit, or nothing that can be planned.
    """
    limit = _limit(limit_text, request.device, option)
    if request.sharded:
        raise RunError("training.arguments: a model that FSDP or DeepSpeed shards is not planned")
    if not request.works:
        raise RunError("nothing is trained, so there is nothing to plan")
    fake = fake_from_config(request.model)
    plan = make_plan(request, fake)
    room = usable(limit, request.device)
    print(describe(request, plan, limit, room), flush=True)
    if plan.peak <= room:
        return 0
    same, other = same_result(request, room), other_result(request, room)
    print(f"\n{advise(same, other, prefix)}", flush=True)
    return NO_FIT


def _limit(limit_text: str | None, device: str, option: str) -> int:
    limit = device_memory(limit_text, device, option)
    if limit is None:
        raise RunError(
            f"{option}: expected a size such as 24GiB, since no {device} device tells it"
        )
    return limit


def _request(settings: PlanSettings) -> Request:
    model = ModelSettings(
        path=settings.model,
        tokenizer=settings.tokenizer,
        dtype=settings.dtype,
        load_in_4bit=settings.load_in_4bit,
        lora=settings.lora,
    )
    lengths = {
        "max_length": settings.max_length,
        "max_prompt_length": settings.max_prompt_length,
    }
    run = RunSettings(model=model, data=DataSettings(**lengths), training=settings.training)
    if settings.preferences:
        tokenizer = load_tokenizer(settings.tokenizer or settings.model)
        source = settings.preferences
        rows = tokenize_preferences(load_preferences(source), tokenizer, source=source, **lengths)
        groups: Sequence[Group] = groups_from_pairs(rows)
    else:
        response = settings.max_length - settings.max_prompt_length
        pair = Group([0] * settings.max_prompt_length, [[0] * response] * 2)
        groups = [pair] * settings.training.batch_size
    training = Training(settings.training, settings.reference)
    work = Work("dpo", groups, training, scored=settings.reference == "logps")
    return Request(model, [work], run, settings.device)


def device_memory(limit: str | None, device: str, option: str) -> int | None:
    """Return the memory that is given, else the GPU's own, else None."""
    if limit is not None:
        return parse_size(limit, option)
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return None


# Before a run


def check(
    make_request: Callable[[], Request], limit: int, on_excess: str
) -> tuple[dict[str, Any], int | None]:
    """Refuse a run that would not fit, or return the settings to adapt it by.

    A run does not end because its prediction did: unknown optimisers, odd architectures.

    Args:
        make_request: Returns the run.
        limit: Bytes of the device.
        on_excess: ``refuse``, ``adapt`` or ``warn``.

    Returns:
        Changes by the settings' full names, none where the run fits; and the tokens of a pass that
        scores responses, or None where nothing could be predicted.

    Raises:
        RunError: It does not fit, and may not or cannot be made to.
    """
    changes: dict[str, Any] = {}
    found: list[Fit] = []
    try:
        request = make_request()
        if request.sharded:
            logger.warning("memory: a model that FSDP or DeepSpeed shards is not planned")
            return {}, None
        room = usable(limit, request.device)
        fake = fake_from_config(request.model)
        plan = make_plan(request, fake)
        fits = plan.peak <= room
        if not fits and on_excess != "warn":
            found = same_result(request, room)
            changes = found[0].changes if found else {}
        scoring_tokens = scoring_budget(request.with_settings(changes), fake, room)
    except Exception as error:
        message = f"{type(error).__name__}: {first_line(error)}"
        logger.warning("memory: cannot be planned, the run goes on: %s", message)
        return {}, None
    said = f"{_gib(plan.peak)} predicted for {plan.worst.name!r}, {_gib(room)} there for tensors"
    if fits:
        logger.info("memory: %s", said)
    elif on_excess == "warn":
        logger.warning("memory: %s", said)
    elif on_excess == "refuse" or not found:
        hint = _options(changes) or "no budget of tokens; --plan looks for other settings"
        raise RunError(f"memory: {said}; what fits: {hint} (or --memory.on_excess warn)")
    else:
        logger.warning("memory: %s; adapted: %s", said, _options(changes))
    return changes, scoring_tokens


# What is said


def describe(request: Request, plan: Plan, limit: int, room: int) -> str:
    """Return a plan as a table, and the verdict."""
    total, trained = (f"{n / 1e6:,.0f} M" for n in plan.parameters)
    examples = sum(len(work.groups) for work in request.works)
    longest = max(
        (group for work in request.works for group in work.groups),
        key=lambda group: max(map(len, group.response_ids)) + len(group.prompt_ids),
    )
    parts = " + ".join(str(len(x)) for x in (longest.prompt_ids, *longest.response_ids))
    verdict = (
        f"Fits: {_gib(plan.peak)} at the highest, in {plan.worst.name!r}"
        if plan.peak <= room
        else f"Does not fit: {_gib(plan.peak)} in {plan.worst.name!r}"
    )
    return "\n".join(
        [
            f"{request.model.path}: {total} parameters, {trained} of them trained",
            f"{examples:,} examples; the longest has {parts} tokens (prompt + responses); "
            f"{request.settings.training.max_tokens:,} tokens a pass",
            "",
            _table(plan),
            "",
            f"{verdict}; {_gib(room)} of {_gib(limit)} are for tensors",
        ]
    )


def _table(plan: Plan) -> str:
    used = [name for name in COMPONENTS if any(phase.components[name] for phase in plan.phases)]
    header = ["GiB", "peak", *used]
    rows = [
        [phase.name, f"{phase.peak / _GIB:.2f}"]
        + [f"{phase.components[name] / _GIB:.2f}" for name in used]
        for phase in plan.phases
    ]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    )


def advise(same: Sequence[Fit], other: Sequence[Fit], prefix: str = "") -> str:
    """Return the settings that fit, the fastest first; ``prefix`` is left out of their names."""
    lines = []
    for title, fits in (
        ("What fits and learns the same, fastest first:", same),
        ("What fits and learns otherwise, fastest first:", other),
    ):
        lines += ["", title] if fits else []
        lines += [
            f"  {_gib(fit.plan.peak):>9}  {fit.plan.flops:.2f} forward passes a token  "
            f"{_options(fit.changes, prefix)}"
            for fit in fits
        ]
    return "\n".join(lines[1:]) or "Nothing that can be set makes it fit."


def _options(changes: dict[str, Any], prefix: str = "") -> str:
    return " ".join(
        f"--{name.removeprefix(prefix)} {str(value).lower() if isinstance(value, bool) else value}"
        for name, value in changes.items()
    )


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"
