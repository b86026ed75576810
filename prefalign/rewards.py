"""Rewards: functions, or models, that score completions; weighted, checked and normalised.

A reward function is called in TRL's convention, ``f(prompts=..., completions=..., **columns)``, and
returns a number for each completion, or None for one that it says nothing about. Where the prompts
are plain text, the completions are; where they are conversations, prompts are lists of messages and
each completion is a list of one message, the assistant's. A function gets the columns that it has
parameters for; all of them, where it takes ``**kwargs``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import numbers
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from .data import as_text
from .encoding import Text
from .errors import ModelError, RunError
from .layouts import as_messages
from .reward_models import RewardModel, load_reward_model
from .sources import shortened

Reward = Callable[..., Sequence[float | None]]
SHOWN_ROWS = 5


class Rewards:
    """One or several rewards as one: their weighted sum, with everything they return checked.

    Args:
        rewards: A function or a :class:`~prefalign.reward_models.RewardModel`, or a list of them.
        weights: A number for each, 1 by default.
        setting: What messages call the rewards.

    Raises:
        RunError: No rewards, something that cannot be called, or weights that do not fit.
    """

    def __init__(
        self,
        rewards: Reward | Sequence[Reward],
        weights: Sequence[float] | None = None,
        *,
        setting: str = "rewards",
    ):
        functions: list[Any] = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
        if not functions:
            raise RunError(f"{setting}: expected one reward or more, got none")
        for function in functions:
            if not callable(function):
                raise RunError(f"{setting}: expected functions, got {shortened(function)}")
        if weights is None:
            weights = [1.0] * len(functions)
        if len(weights) != len(functions):
            raise RunError(
                f"{setting}: expected {len(functions)} weights, one for each reward, "
                f"got {len(weights)}"
            )
        if bad := [weight for weight in weights if not math.isfinite(weight)]:
            raise RunError(f"{setting}: expected finite weights, got {bad[0]}")
        self.functions: list[Reward] = functions
        self.weights = [float(weight) for weight in weights]
        self.names = [reward_name(function) for function in functions]
        self.setting = setting

    @contextmanager
    def on_device(self, device: torch.device | str) -> Iterator[None]:
        """Have the reward models on ``device`` inside the block, and on the CPU after it."""
        with ExitStack() as stack:
            for function in self.functions:
                if isinstance(function, RewardModel):
                    stack.enter_context(function.on_device(device))
            yield

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        first_row: int = 0,
    ) -> list[float]:
        """Return each completion's reward: the weighted sum over the functions that gave one.

        Args:
            prompts: R prompts, text or messages.
            completions: R completions, as text; a conversation's are made the assistant's messages.
            columns: Further columns of R values each, by the name that functions know them by.
            first_row: The number of the first row, for messages; rows count from 0.

        Raises:
            RunError: A function raised, returned too few or too many values, or one that is no
                finite number; it asks for a column that is not there; or every function left a row
                out. The message names the function and the rows.
        """
        columns = columns or {}
        for name, values in {"completions": completions, **columns}.items():
            if len(values) != len(prompts):
                raise ValueError(
                    f"{name}: expected {len(prompts)} values, one for each prompt, "
                    f"got {len(values)}"
                )
        if not len(prompts):
            return []
        place = _Place(self.setting, prompts, first_row)
        totals: list[float | None] = [None] * len(prompts)
        messages = [
            as_messages(completion, "assistant") if isinstance(prompt, list) else completion
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        named = {"prompts": list(prompts), "completions": messages, **columns}
        for function, name, weight in zip(self.functions, self.names, self.weights, strict=True):
            for i, value in enumerate(_call(function, name, named, place)):
                if value is not None:
                    totals[i] = (totals[i] or 0.0) + weight * value
        if missing := [i for i, total in enumerate(totals) if total is None]:
            raise place.error(", ".join(self.names), "returned None, and nothing else did", missing)
        return [total for total in totals if total is not None]


def call_reward(
    reward: Reward,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    *,
    setting: str = "evaluation.reward",
) -> list[float]:
    """Call one reward function and check what it returned; see :meth:`Rewards.score`."""
    return Rewards(reward, setting=setting).score(prompts, completions)


def normalised(scores: Sequence[float], how: Literal["none", "standard"]) -> list[float]:
    """Return an iteration's scores, normalised.

    Args:
        scores: All the scores of the iteration.
        how: ``"standard"`` is ``(r - mean) / std`` with the population's standard deviation, and
            zeros where all are equal; ``"none"`` leaves them as they are.
    """
    if how not in ("none", "standard"):
        raise ValueError(f"how: expected 'none' or 'standard', got {how!r}")
    if how == "none" or not len(scores):
        return list(scores)
    if min(scores) == max(scores):  # a mean that rounds would leave a spread to divide by
        return [0.0] * len(scores)
    values = torch.tensor(scores, dtype=torch.float64)
    values = values / values.abs().max()  # neither squares that overflow nor ones that vanish
    return ((values - values.mean()) / values.std(correction=0)).tolist()


# By name


def load_rewards(
    names: str | Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    setting: str = "rewards",
    **options: Any,
) -> Rewards:
    """Import or load rewards by name, as :func:`load_reward` does, with their weights."""
    names = [names] if isinstance(names, str) else list(names)
    rewards = [load_reward(name, setting=setting, **options) for name in names]
    return Rewards(rewards, weights, setting=setting)


def load_reward(name: str, *, setting: str = "evaluation.reward", **options: Any) -> Reward:
    """Return the reward that a setting names.

    Args:
        name: ``file.py:function`` or ``module:function``; without a colon, the folder or hub name
            of a sequence-classification model.
        setting: The setting's name, for messages.
        **options: Of :func:`~prefalign.reward_models.load_reward_model`, for a model.

    Raises:
        RunError: There is nothing of that name, or it is no function.
    """
    place, colon, function = name.rpartition(":")
    if colon and not (place and function):
        raise RunError(
            f"{setting}: expected file.py:function, module:function or a model, got {name!r}"
        )
    if not colon:
        try:
            return load_reward_model(name, **options)
        except ModelError as error:
            hint = "" if Path(name).is_dir() else " (a function is file.py:function)"
            raise RunError(f"{setting}: {error}{hint}") from error
    try:
        reward = getattr(_module(place), function)
    except Exception as error:  # the module is the user's: it may raise anything
        reason = error if isinstance(error, ImportError | OSError | AttributeError) else None
        raise RunError(
            f"{setting}: {name}: {reason or f'{type(error).__name__}: {error}'}"
        ) from error
    if not callable(reward):
        raise RunError(f"{setting}: {name}: expected a function, got {shortened(reward)}")
    return reward


def reward_name(reward: Reward) -> str:
    """Return what messages and records call a reward."""
    if isinstance(reward, RewardModel):
        return reward.name
    function = getattr(reward, "func", reward)  # functools.partial's
    return getattr(function, "__name__", type(function).__name__)


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    # Under a name of its own: two files may be called alike, and dataclasses look their module up.
    name = f"{Path(place).stem}_{zlib.crc32(str(Path(place).resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# Calls and what comes back


class _Place:
    """The rows of a call, for messages."""

    def __init__(self, setting: str, prompts: Sequence[Text], first_row: int):
        self.setting = setting
        self.prompts = prompts
        self.first_row = first_row

    def error(self, name: str, message: str, rows: Sequence[int]) -> RunError:
        """Return an error that names the function, the rows and the first one's prompt."""
        numbers = [row + self.first_row for row in rows]
        if len(rows) > 1 and numbers[-1] - numbers[0] == len(rows) - 1:
            listed = f"rows {numbers[0]} to {numbers[-1]}"
        else:
            listed = f"row{'s' * (len(rows) > 1)} {', '.join(map(str, numbers[:SHOWN_ROWS]))}"
            listed += f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        prompt = shortened(as_text(self.prompts[rows[0]]))
        of = "" if len(rows) == 1 else f" of row {numbers[0]}"
        return RunError(f"{self.setting}: {name} {message} ({listed}; prompt{of}: {prompt})")


def _call(
    function: Reward, name: str, named: Mapping[str, Sequence[Any]], place: _Place
) -> list[float | None]:
    count = len(place.prompts)
    every = range(count)
    arguments, keywords = _arguments(function, name, named, place)
    try:
        values: Any = function(*arguments, **keywords)
    except Exception as error:
        said = f"raised {type(error).__name__}: {' '.join(str(error).split())}"
        raise place.error(name, said, every) from error
    shape = getattr(values, "shape", None)
    if shape is not None:
        if len(shape) != 1:
            raise place.error(
                name, f"returned a tensor of shape {list(shape)}, expected [{count}]", every
            )
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        kind = type(values).__name__
        raise place.error(name, f"returned {kind}, expected a list of {count} numbers", every)
    if len(values) != count:
        raise place.error(
            name, f"returned {len(values)} values, expected {count}, one for each completion", every
        )
    rewards = [None if value is None else _number(value) for value in values]
    if bad := [i for i, value in enumerate(rewards) if value is not None and math.isnan(value)]:
        came = shortened(values[bad[0]])
        raise place.error(name, f"returned {came}, expected finite numbers", bad)
    return rewards


def _arguments(
    function: Reward, name: str, named: Mapping[str, Sequence[Any]], place: _Place
) -> tuple[list[Any], dict[str, Any]]:
    """Return what to call a function with: what it has parameters for, by name."""
    both = [named["prompts"], named["completions"]]
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        return both, {}
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return [], dict(named)
    if not any(p.name == "completions" and p.kind != p.POSITIONAL_ONLY for p in parameters):
        return both, {}  # parameters by other names
    needed = {p.name for p in parameters if p.default is p.empty and p.kind != p.VAR_POSITIONAL}
    if missing := sorted(needed - set(named)):
        raise RunError(
            f"{place.setting}: {name} asks for {', '.join(missing)}; "
            f"the columns are {', '.join(named)}"
        )
    known = {parameter.name for parameter in parameters}
    return [], {key: values for key, values in named.items() if key in known}


def _number(value: Any) -> float:
    """Return a finite number as a float, and NaN for anything else."""
    if isinstance(value, torch.Tensor) or type(value).__module__ == "numpy":
        value = value.item() if getattr(value, "shape", None) == () else None
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan
