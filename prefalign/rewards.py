"""Reward functions: imported by name, called over rows, and checked in what they return."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import RunError

Reward = Callable[[Sequence[str], Sequence[str]], list[float]]


def load_reward(name: str) -> Reward:
    """Import a reward function, named ``file.py:function`` or ``module:function``."""
    place, _, function = name.rpartition(":")
    try:
        if not place or not function:
            raise RunError(f"expected file.py:function or module:function, got {name!r}")
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, function)
    except (RunError, ImportError, OSError, AttributeError, SyntaxError) as error:
        raise RunError(f"evaluation.reward: {name}: {error}") from None


def call_reward(reward: Reward, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Call a reward function and check what it returned.

    Raises:
        RunError: It raised, returned too few or too many values, or one that is no finite number.
    """
    try:
        values = reward(prompts, completions)
    except Exception as error:
        raise RunError(f"evaluation.reward: it raised {type(error).__name__}: {error}") from error
    if len(values) != len(completions):
        raise RunError(
            f"evaluation.reward: expected {len(completions)} values, one for each completion, "
            f"got {len(values)}"
        )
    bad = [
        i
        for i, value in enumerate(values)
        if isinstance(value, str | bytes) or value is None or not math.isfinite(value)
    ]
    if bad:
        rows = ", ".join(map(str, bad[:5]))
        raise RunError(
            f"evaluation.reward: expected finite numbers, got {json.dumps(str(values[bad[0]]))} "
            f"(rows {rows}{' and more' if len(bad) > 5 else ''})"
        )
    return [float(value) for value in values]
