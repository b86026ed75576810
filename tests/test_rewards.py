"""Reward functions: imported, called in TRL's convention, weighted, checked, normalised."""

import functools
import math
import sys

import numpy as np
import pytest
import torch
from texts import assistant, user

from prefalign.errors import RunError
from prefalign.rewards import Rewards, call_reward, load_reward, load_rewards, normalised

PROMPTS = ["What is it?", "b", "c"]
LONG = "'a question of more than forty charac..."


def length(prompts, completions):
    return [len(completion) for completion in completions]


def raises(prompts, completions):
    raise KeyError("score")


def gives(values):
    def given(prompts, completions):
        return values

    return given


def refused(reward, prompts=PROMPTS, **kwargs):
    with pytest.raises(RunError) as error:
        Rewards(reward).score(prompts, ["x"] * len(prompts), **kwargs)
    assert "\n" not in str(error.value)
    return error.value


# Calls


@pytest.mark.parametrize(
    "reward",
    [
        length,
        lambda p, c: [len(x) for x in c],
        lambda completions: [len(x) for x in completions],
        lambda completions, **kwargs: [len(x) for x in kwargs["answer"]],
        lambda completions, answer: [len(x) for x in answer],
        lambda answer, completions, prompts, other=0: [len(x) + other for x in answer],
        functools.partial(lambda prompts, completions, more: [len(x) for x in completions], more=1),
        type("Scorer", (), {"__call__": lambda self, prompts, completions: [1, 2, 3]})(),
    ],
)
def test_a_function_gets_what_it_has_parameters_for(reward):
    completions = ["a", "bb", "ccc"]
    columns = {"answer": ["x", "yy", "zzz"]}
    assert Rewards(reward).score(PROMPTS, completions, columns) == [1.0, 2.0, 3.0]


def test_a_function_that_takes_everything_gets_every_column():
    seen = {}

    def reward(completions, **kwargs):
        seen.update(kwargs)
        return [0.0] * len(completions)

    Rewards(reward).score(PROMPTS, ["x"] * 3, {"answer": [1, 2, 3]})
    assert seen == {"prompts": PROMPTS, "answer": [1, 2, 3]}


def test_a_conversation_comes_as_messages():
    seen = []

    def reward(prompts, completions):
        seen.append((prompts, completions))
        return [0.0] * len(prompts)

    prompts = [[user("One?")], [user("Two?")]]
    Rewards(reward).score(prompts, ["a", [assistant("b")]])
    Rewards(reward).score(["One?"], ["a"])
    assert seen == [(prompts, [[assistant("a")], [assistant("b")]]), (["One?"], ["a"])]


def test_a_column_that_is_not_there():
    def reward(completions, answer, level):
        raise AssertionError

    message = str(refused(reward, columns={"answer": [1, 2, 3]}))
    assert message == (
        "rewards: reward asks for level; the columns are prompts, completions, answer"
    )
    with pytest.raises(ValueError, match="answer: expected 3 values, one for each prompt, got 2"):
        Rewards(length).score(PROMPTS, ["x"] * 3, {"answer": [1, 2]})
    with pytest.raises(ValueError, match="completions: expected 3 values"):
        Rewards(length).score(PROMPTS, ["x"] * 4)


def test_no_rows_call_nothing():
    assert Rewards(raises).score([], []) == []


# What comes back


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.5, -2],
        (1, 0.5, -2),
        np.array([1, 0.5, -2], dtype=np.float32),
        [np.float32(1), np.float64(0.5), np.int64(-2)],
        torch.tensor([1, 0.5, -2]),
        torch.tensor([1, 0.5, -2], dtype=torch.bfloat16, requires_grad=True),
        list(torch.tensor([1, 0.5, -2])),
    ],
)
def test_numbers_of_any_kind_become_floats(values):
    scores = Rewards(gives(values)).score(PROMPTS, ["x"] * 3)
    assert scores == [1.0, 0.5, -2.0]
    assert all(type(score) is float for score in scores)


EVERY = "(rows 0 to 2; prompt of row 0: 'What is it?')"
ONE = "(row 1; prompt: 'b')"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], f"returned 1 values, expected 3, one for each completion {EVERY}"),
        ([1.0] * 4, f"returned 4 values, expected 3, one for each completion {EVERY}"),
        (torch.zeros(2), f"returned 2 values, expected 3, one for each completion {EVERY}"),
        (torch.zeros(3, 1), f"returned a tensor of shape [3, 1], expected [3] {EVERY}"),
        (torch.zeros(()), f"returned a tensor of shape [], expected [3] {EVERY}"),
        (None, f"returned NoneType, expected a list of 3 numbers {EVERY}"),
        (1.0, f"returned float, expected a list of 3 numbers {EVERY}"),
        ("123", f"returned str, expected a list of 3 numbers {EVERY}"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, f"returned dict, expected a list of 3 numbers {EVERY}"),
        ([0.0, math.nan, 1.0], f"returned nan, expected finite numbers {ONE}"),
        ([0.0, -math.inf, 1.0], f"returned -inf, expected finite numbers {ONE}"),
        ([0.0, 10**400, 1.0], "returned 1000000000000000000000000000000000000..., expected fini"),
        ([0.0, "0.5", 1.0], f"returned '0.5', expected finite numbers {ONE}"),
        ([0.0, True, 1.0], f"returned True, expected finite numbers {ONE}"),
        ([0.0, np.True_, 1.0], f"returned np.True_, expected finite numbers {ONE}"),
        (torch.ones(3, dtype=torch.bool), "returned True, expected finite numbers (rows 0 to 2;"),
        ([0.0, 1j, 1.0], f"returned 1j, expected finite numbers {ONE}"),
        ([0.0, torch.zeros(1), 1.0], f"returned tensor([0.]), expected finite numbers {ONE}"),
        ([0.0, None, 1.0], f"returned None, and nothing else did {ONE}"),
        ([math.nan, 0.0, math.nan], "returned nan, expected finite numbers (rows 0, 2; prompt of"),
    ],
)
def test_a_mistake_names_the_function_and_the_rows(values, message):
    assert str(refused(gives(values))).startswith(f"rewards: given {message}")


def test_a_function_that_raises():
    error = refused(raises)
    assert str(error) == f"rewards: raises raised KeyError: 'score' {EVERY}"
    assert isinstance(error.__cause__, KeyError)


def test_rows_are_those_of_the_whole_and_long_lists_are_shortened():
    prompts = ["a question of more than forty characters?"] * 20
    values = [0.0, *[math.nan, 0.0] * 9, 0.0]
    message = str(refused(gives(values), prompts=prompts, first_row=256))
    assert message == (
        "rewards: given returned nan, expected finite numbers (rows 257, 259, 261, 263, 265 and "
        f"4 more; prompt of row 257: {LONG})"
    )
    message = str(refused(gives([None]), prompts=[[user("One?")]]))
    assert message.endswith("(row 0; prompt: 'user: One?')")


# Several


def test_weights():
    twice = [length, gives([1.0, 0.0, -1.0])]
    completions = ["a", "bb", "ccc"]
    assert Rewards(twice).score(PROMPTS, completions) == [2.0, 2.0, 2.0]
    assert Rewards(twice, [2, -0.5]).score(PROMPTS, completions) == [1.5, 4.0, 6.5]
    assert Rewards(twice).names == ["length", "given"]
    for weights, message in (([1.0], "expected 2 weights, one for each reward, got 1"),):
        with pytest.raises(RunError, match=message):
            Rewards(twice, weights)
    with pytest.raises(RunError, match="expected finite weights, got nan"):
        Rewards(twice, [1.0, math.nan])
    with pytest.raises(RunError, match="expected one reward or more, got none"):
        Rewards([])
    with pytest.raises(RunError, match="expected functions, got 'length'"):
        Rewards(["length"])


def test_none_leaves_a_row_to_the_other_functions():
    first, second = gives([1.0, None, 3.0]), gives([None, 20.0, 30.0])
    assert Rewards([first, second], [1.0, 0.5]).score(PROMPTS, "xyz") == [1.0, 10.0, 18.0]
    zero = Rewards([gives([0.0, None, 1.0]), gives([None, 0.0, 1.0])])
    assert zero.score(PROMPTS, "xyz") == [0.0, 0.0, 2.0]
    message = str(refused([gives([1.0, None, None]), gives([1.0, None, 2.0])]))
    assert message == f"rewards: given, given returned None, and nothing else did {ONE}"


def test_the_evaluations_reward():
    assert call_reward(length, PROMPTS, ["x", "yy", "z"]) == [1.0, 2.0, 1.0]
    with pytest.raises(RunError, match="^evaluation.reward: raises raised KeyError"):
        call_reward(raises, PROMPTS, ["x"] * 3)


# Normalisation


def test_normalised():
    scores = [3.0, 1.0, 4.0, 1.0, 5.0]
    values = np.array(scores)
    expected = (values - values.mean()) / values.std()
    assert normalised(scores, "standard") == pytest.approx(expected, rel=1e-12)
    assert normalised(scores, "none") == scores
    # The mean of three tenths is not a tenth, in floating point.
    assert normalised([0.1] * 3, "standard") == [0.0] * 3
    assert normalised([], "standard") == []
    for scale in (1e-200, 1e200):
        scaled = normalised([score * scale for score in scores], "standard")
        assert scaled == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="how: expected 'none' or 'standard', got 'minmax'"):
        normalised(scores, "minmax")


# By name


def test_a_reward_is_imported_from_a_file_or_a_module(tmp_path):
    (tmp_path / "mine.py").write_text("def long(prompts, completions):\n    return [1.0]\n")
    assert load_reward(f"{tmp_path}/mine.py:long")([], []) == [1.0]
    assert load_reward("math:fsum") is math.fsum


def test_two_files_of_one_name_with_dataclasses(tmp_path):
    text = (
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Box:\n    value: float = {value}\n"
        "def reward(completions):\n    return [Box().value for _ in completions]\n"
    )
    names = []
    for value in (1.0, 2.0):
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "mine.py").write_text(text.format(value=value))
        names.append(f"{folder}/mine.py:reward")
    rewards = load_rewards(names, [1.0, 10.0])
    assert rewards.score(["a"], ["b"]) == [21.0]
    assert load_rewards(names[0]).score(["a"], ["b"]) == [1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":f", "expected file.py:function, module:function or a model, got ':f'"),
        ("a:", "expected file.py:function, module:function or a model, got 'a:'"),
        ("nowhere.py:f", "nowhere.py:f: [Errno 2] No such file or directory: "),
        ("no_such_module:f", "no_such_module:f: No module named 'no_such_module'"),
        ("math:nothing", "math:nothing: module 'math' has no attribute 'nothing'"),
        ("math:pi", "math:pi: expected a function, got 3.14159"),
        ("FOLDER/broken.py:f", "FOLDER/broken.py:f: SyntaxError: invalid syntax"),
        ("FOLDER/raises.py:f", "FOLDER/raises.py:f: ZeroDivisionError: division by zero"),
        ("./nowhere", "./nowhere: there is no such folder (a function is file.py:function)"),
        (
            "FOLDER/raises.py",
            "FOLDER/raises.py: expected a model's folder, found a file (a function is "
            "file.py:function)",
        ),
    ],
)
def test_names_that_cannot_be_loaded(name, message, tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    name, message = (text.replace("FOLDER", str(tmp_path)) for text in (name, message))
    modules = set(sys.modules)
    with pytest.raises(RunError) as error:
        load_reward(name, setting="rewards.0")
    assert str(error.value).startswith(f"rewards.0: {message}")
    assert not {module for module in set(sys.modules) - modules if module.startswith("raises")}
