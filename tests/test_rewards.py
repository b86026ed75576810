"""Reward functions: imported, called, checked."""

import math

import pytest

from prefalign.errors import RunError
from prefalign.rewards import call_reward, load_reward


def raises(prompts, completions):
    raise KeyError("score")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda p, c: [1.0], "expected 3 values, one for each completion, got 1"),
        (lambda p, c: [1.0] * 4, "expected 3 values, one for each completion, got 4"),
        (lambda p, c: [0.0, math.nan, 1.0], 'expected finite numbers, got "nan" (rows 1)'),
        (lambda p, c: [0.0, "0.5", None], 'expected finite numbers, got "0.5" (rows 1, 2)'),
        (raises, "it raised KeyError: 'score'"),
    ],
)
def test_a_rewards_mistake_names_the_rows(reward, message):
    with pytest.raises(RunError) as error:
        call_reward(reward, ["a"] * 3, ["b"] * 3)
    assert str(error.value) == f"evaluation.reward: {message}"


def test_rewards_become_floats():
    assert call_reward(lambda p, c: (1, True, 0.5), ["a"] * 3, ["b"] * 3) == [1.0, 1.0, 0.5]


def test_a_reward_is_imported_from_a_file_or_a_module(tmp_path):
    (tmp_path / "mine.py").write_text("def long(prompts, completions):\n    return [1.0]\n")
    assert load_reward(f"{tmp_path}/mine.py:long")([], []) == [1.0]
    assert load_reward("math:fsum") is math.fsum
    with pytest.raises(RunError, match="expected file.py:function or module:function"):
        load_reward("long")
