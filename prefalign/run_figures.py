"""The figures of a run, read from its folder as it stands.

Nothing here fails on what a run has not written yet, or on a line that a kill cut short: what is
not there is listed in :attr:`RunFigures.missing`. Responses and pairs are read row by row and only
their figures are kept.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .errors import RunError

Row = dict[str, Any]
Series = dict[str, list[tuple[float, float]]]

# A control character would vanish or break the page: its picture stands for it, and a lone half of
# a surrogate pair, which UTF-8 cannot hold, or an override of the writing direction, U+FFFD.
_VISIBLE: dict[int, str] = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\t\n"}
_VISIBLE |= dict.fromkeys([0x202D, 0x202E, *range(0x7F, 0xA0), *range(0xD800, 0xE000)], "\ufffd")


@dataclass
class IterationFigures:
    """What the files of one iteration say.

    Args:
        number: Which iteration, from 1.
        gauge: Its line of ``gauge.jsonl``.
        arm: The baseline that it is an iteration of; empty for the algorithm's own.
        tokens: Length of every response.
        kinds: Mean length of the guided and of the plain responses, where they are told apart.
        cut: Share of the responses cut at the length limit.
        margins: The judge's margin of every pair, chosen minus rejected.
        pairs: Number of pairs.
        noisy: Share of the pairs judged noisy, of those that were judged at all.
    """

    number: int
    gauge: Row = field(default_factory=dict)
    arm: str = ""
    tokens: array[float] = field(default_factory=lambda: array("d"))
    kinds: dict[str, float] = field(default_factory=dict)
    cut: float | None = None
    margins: array[float] = field(default_factory=lambda: array("d"))
    pairs: int = 0
    noisy: float | None = None

    @property
    def name(self) -> str:
        """The iteration's stage, which is its folder."""
        return f"{self.arm}/iteration-{self.number}" if self.arm else f"iteration-{self.number}"

    def gauged(self, name: str) -> float | None:
        """Return one number of the gauge."""
        return number_of(self.gauge.get(name))


@dataclass
class RunFigures:
    """What a run folder holds, and what it does not.

    Args:
        folder: The folder.
        settings: The settings, nested.
        settings_text: The settings as the file has them.
        state: The contents of ``state.json``.
        metrics: The rows of ``metrics.jsonl``.
        iterations: The iterations that have begun.
        baselines: Those of the algorithm's baselines, with what the gauge says of them.
        evaluation: The rows of ``evaluation.json``, one a model.
        missing: A sentence on each thing that is not there.
    """

    folder: Path
    settings: Row = field(default_factory=dict)
    settings_text: str = ""
    state: Row = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    iterations: list[IterationFigures] = field(default_factory=list)
    baselines: list[IterationFigures] = field(default_factory=list)
    evaluation: list[Row] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def setting(self, dotted: str) -> Any:
        """Return one setting by its dotted name, None where the file has none."""
        value: Any = self.settings
        for name in dotted.split("."):
            value = mapping_of(value).get(name)
        return value

    @property
    def models(self) -> dict[str, Row]:
        """The rows of the evaluation by their keys."""
        return {row["key"]: row for row in self.evaluation}

    @property
    def last(self) -> str | None:
        """Key of the last iteration that was evaluated."""
        numbers = [n for key in self.models if (n := iteration_number(key)) is not None]
        return f"iteration-{max(numbers)}" if numbers else None

    @property
    def warnings(self) -> list[str]:
        """The gauge's warnings, and losses that are not numbers."""
        found = []
        for iteration in [*self.iterations, *self.baselines]:
            found += [f"{iteration.name}: {w}" for w in list_of(iteration.gauge.get("warnings"))]
        for stage in dict.fromkeys(row["stage"] for row in self.metrics):
            losses = [r["loss"] for r in self.metrics if r["stage"] == stage and "loss" in r]
            if broken := sum(number_of(loss) is None for loss in losses):
                steps = f"{broken} of {len(losses)} logged steps"
                found.append(f"{stage}: the loss is not a number at {steps}")
        return found

    def series(self, name: str, minus: str | None = None) -> Series:
        """Return step and value of one metric by stage, of all stages but the baselines' own.

        Values that are not numbers are left out.

        Args:
            name: The metric.
            minus: A metric to take off.
        """
        points: Series = {}
        for row in self.metrics:
            step, value = number_of(row.get("step")), number_of(row.get(name))
            less = 0.0 if minus is None else number_of(row.get(minus))
            if step is not None and value is not None and less is not None:
                if "/" not in row["stage"]:
                    points.setdefault(row["stage"], []).append((step, value - less))
        return points

    def completions(self, key: str) -> Iterator[Row]:
        """Yield a model's rows of ``evaluation/<key>.jsonl``."""
        return rows_of(self.folder / "evaluation" / f"{key}.jsonl")

    def head_to_head(self, one: str, other: str) -> tuple[float | None, float | None]:
        """Return how often one model's reward is the higher, and the standard error.

        A tie counts half. None where there are no common prompts.
        """
        wins = array("d")
        for a, b in zip(self.completions(one), self.completions(other), strict=False):
            x, y = number_of(a.get("reward")), number_of(b.get("reward"))
            if x is not None and y is not None and a.get("prompt") == b.get("prompt"):
                wins.append(0.5 if x == y else float(x > y))
        if not wins:
            return None, None
        return float(np.mean(wins)), float(np.std(wins)) / len(wins) ** 0.5


def read_run(folder: Path) -> RunFigures:
    """Read a run folder.

    Raises:
        RunError: There is no such folder.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such run folder")
    run = RunFigures(folder)
    run.settings_text = _text(run, "config.yaml")
    try:
        run.settings = mapping_of(yaml.safe_load(run.settings_text))
    except yaml.YAMLError:
        run.missing.append("config.yaml is broken.")
    run.state = mapping_of(_json(run, "state.json"))
    rows = rows_of(folder / "metrics.jsonl")
    run.metrics = [row for row in rows if isinstance(row.get("stage"), str)]
    if not run.metrics:
        run.missing.append("metrics.jsonl holds no steps: nothing has been trained yet.")
    _read_iterations(run)
    if run.setting("evaluation.reward") or (folder / "evaluation.json").exists():
        rows = (row for row in list_of(_json(run, "evaluation.json")) if isinstance(row, dict))
        # A key is the name of a file, so nothing else is let through.
        keyed = ({**row, "key": str(row.get("key", ""))} for row in rows)
        run.evaluation = [row for row in keyed if re.fullmatch(r"[\w-]{1,99}", row["key"])]
        for key in run.models:
            if not (folder / "evaluation" / f"{key}.jsonl").is_file():
                run.missing.append(f"evaluation/{key}.jsonl is missing.")
    else:
        run.missing.append("There is no evaluation: evaluation.reward is not set.")
    return run


def _read_iterations(run: RunFigures) -> None:
    gauges: dict[tuple[str, int], Row] = {}
    for row in rows_of(run.folder / "gauge.jsonl"):
        if (place := _place(row.get("stage"))) is not None:
            gauges[place] = row
    begun = [_place(path.name) for path in run.folder.glob("iteration-*")]
    begun += [
        _place(f"{path.parent.name}/{path.name}")
        for path in run.folder.glob("*/iteration-*")
        if path.is_dir() and path.parent.name != "evaluation"
    ]
    # A baseline's iterations stand in the order in which the gauge first named it.
    arms = list(dict.fromkeys(arm for arm, _ in gauges))
    arms += sorted({place[0] for place in begun if place is not None} - {*arms})
    places = gauges.keys() | {place for place in begun if place is not None}
    for arm, number in sorted(places, key=lambda place: (arms.index(place[0]), place[1])):
        iteration = IterationFigures(number, gauges.get((arm, number), {}), arm)
        (run.baselines if arm else run.iterations).append(iteration)
        if (arm, number) not in gauges:
            run.missing.append(f"gauge.jsonl has no line on {iteration.name}.")
        for name, read in _READ.items():
            # A baseline needs no pairs, nor does the released code, and its rows are not read.
            if name == "pairs" and (arm or run.setting("variant") == "released"):
                continue
            path = run.folder / iteration.name / f"{name}.jsonl"
            if not path.is_file():
                run.missing.append(f"{iteration.name}/{name}.jsonl is missing.")
            elif not arm:
                read(path, iteration)
        if iteration.cut is None:
            iteration.cut = iteration.gauged("cut_share")
    _read_planned(run)


def _read_planned(run: RunFigures) -> None:
    planned = run.setting("iterations")
    if not isinstance(planned, int):
        return
    last = max((iteration.number for iteration in run.iterations), default=0)
    if last < planned:
        run.missing.append(f"The run has begun {last} of {planned} iterations.")
        return
    done = {iteration.arm for iteration in run.baselines if iteration.number >= planned}
    names = map(str, list_of(run.setting("evaluation.baselines")))
    if short := [clean(name) for name in names if planned and name not in done]:
        run.missing.append(f"These baselines have not begun all iterations: {', '.join(short)}.")


def _read_responses(path: Path, iteration: IterationFigures) -> None:
    cut = known = 0
    kinds: dict[str, array[float]] = {"guided": array("d"), "plain": array("d")}
    for row in rows_of(path):
        tokens = [number_of(value) for value in list_of(row.get("tokens"))]
        iteration.tokens.extend(value for value in tokens if value is not None)
        for value, guided in zip(tokens, list_of(row.get("guided")), strict=False):
            if value is not None and isinstance(guided, bool):
                kinds["guided" if guided else "plain"].append(value)
        flags = [value for value in list_of(row.get("cut")) if isinstance(value, bool)]
        known += len(flags)
        cut += sum(flags)
    iteration.kinds = {name: float(np.mean(found)) for name, found in kinds.items() if found}
    iteration.cut = cut / known if known else None


def _read_pairs(path: Path, iteration: IterationFigures) -> None:
    noisy = known = 0
    for row in rows_of(path):
        iteration.pairs += 1
        chosen, rejected = (
            number_of(row.get("chosen_reward")),
            number_of(row.get("rejected_reward")),
        )
        if chosen is not None and rejected is not None:
            iteration.margins.append(chosen - rejected)
        if isinstance(row.get("noisy"), bool):  # null: trained on before there was a threshold
            known += 1
            noisy += row["noisy"]
    iteration.noisy = noisy / known if known else None


_READ = {"responses": _read_responses, "pairs": _read_pairs}


def rows_of(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSON-lines file; none if it is not there, none for a broken line."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as handle:
        for line in handle:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def _text(run: RunFigures, name: str) -> str:
    path = run.folder / name
    if not path.is_file():
        run.missing.append(f"{name} is missing.")
        return ""
    return path.read_text("utf-8", errors="replace")


def _json(run: RunFigures, name: str) -> Any:
    if text := _text(run, name):
        try:
            return json.loads(text)
        except ValueError:
            run.missing.append(f"{name} is broken.")
    return None


def mapping_of(value: Any) -> Row:
    """Return a mapping as it is, and anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def list_of(value: Any) -> list[Any]:
    """Return a list as it is, and anything else as an empty one."""
    return value if isinstance(value, list) else []


def number_of(value: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON's integers have no bound
        return None


def iteration_number(stage: Any) -> int | None:
    """Return 2 for ``iteration-2``, None for any other stage."""
    found = re.fullmatch(r"iteration-(\d{1,9})", stage) if isinstance(stage, str) else None
    return int(found.group(1)) if found else None


def _place(stage: Any) -> tuple[str, int] | None:
    """Return ("", 2) for ``iteration-2``, ("raft", 2) for ``raft/iteration-2``, None for others."""
    arm, _, name = stage.rpartition("/") if isinstance(stage, str) else ("", "", None)
    number = iteration_number(name)
    return None if number is None or not re.fullmatch(r"[\w-]{0,99}", arm) else (arm, number)


def text_of(content: Any) -> str:
    """Return the text of a prompt or response: a string, or messages, of which the last user's.

    The number of messages left out is said. Control characters become visible signs.
    """
    note = ""
    if isinstance(content, list):
        messages = [message for message in content if isinstance(message, dict)]
        users = [message for message in messages if message.get("role") == "user"] or messages
        content = users[-1].get("content") if users else content
        if isinstance(content, list):  # parts, each of a type
            content = "\n".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
        if len(messages) > 1:
            note = f"\n[the last user message of {len(messages)} messages]"
    return clean("" if content is None else content) + note


def clean(value: Any) -> str:
    """Return a value's text with control characters made visible."""
    return str(value).translate(_VISIBLE)
