"""Datasets: held out, divided into iterations, compared."""

import logging

import pytest
from datasets import Dataset
from texts import user

from prefalign import data
from prefalign.errors import DataError, UserError


def prompts(*texts):
    return Dataset.from_list([{"prompt": text, "i": i} for i, text in enumerate(texts)])


def test_hold_out():
    pairs = prompts(*(f"{i % 90}?" for i in range(100)))
    train, held = data.hold_out(pairs, seed=3)
    assert (len(train), len(held)) == (84, 16)
    assert not set(train["prompt"]) & set(held["prompt"])
    assert sorted([*train["i"], *held["i"]]) == list(range(100))
    assert list(train["i"]) == sorted(train["i"])
    again, held_again = data.hold_out(pairs, seed=3)
    assert list(train["i"]) == list(again["i"]) and list(held["i"]) == list(held_again["i"])
    assert list(data.hold_out(pairs, seed=4)[1]["i"]) != list(held["i"])
    assert len(data.hold_out(pairs, fraction=0.3, seed=3)[1]) == 30
    assert len(data.hold_out(pairs, fraction=0.0, minimum=0, seed=3)[1]) == 0


def test_hold_out_of_unequal_prompts():
    pairs = prompts(*["a"] * 30, *["b"] * 4)
    train, held = data.hold_out(pairs, minimum=3, fraction=0.0, seed=0)
    assert (set(train["prompt"]), set(held["prompt"])) == ({"a"}, {"b"})


def test_hold_out_of_conversations():
    pairs = Dataset.from_list([{"prompt": [user(f"{i % 5}")], "i": i} for i in range(20)])
    train, held = data.hold_out(pairs, minimum=4, seed=0)
    assert len(held) == 4
    assert not {p[0]["content"] for p in train["prompt"]} & {
        p[0]["content"] for p in held["prompt"]
    }


@pytest.mark.parametrize("texts", [["a"] * 100, [f"{i}" for i in range(16)]])
def test_hold_out_of_too_few(texts):
    with pytest.raises(DataError) as caught:
        data.hold_out(prompts(*texts), seed=0, source="a.jsonl")
    assert str(caught.value) == (
        f"a.jsonl: {len(texts)} rows with {len(set(texts))} different prompts are too few to hold "
        "out 16 and leave any to train on"
    )


def test_split_prompts(caplog):
    fresh = prompts(*(f"{i % 15}?" for i in range(20)))
    with caplog.at_level(logging.WARNING, logger="prefalign"):
        parts = data.split_prompts(fresh, [2, 3, 4], seed=1, source="a.jsonl")
    assert [record.getMessage() for record in caplog.records] == [
        "a.jsonl: 5 of 20 prompts repeat an earlier one and are left out"
    ]
    assert [len(part) for part in parts] == [2, 3, 4]
    used = [prompt for part in parts for prompt in part["prompt"]]
    assert len(set(used)) == 9
    again = data.split_prompts(fresh, [2, 3, 4], iterations=3, seed=1)
    assert [list(part["i"]) for part in again] == [list(part["i"]) for part in parts]
    equal = data.split_prompts(fresh, iterations=4, seed=1)
    assert [len(part) for part in equal] == [4, 4, 4, 3]
    assert len({prompt for part in equal for prompt in part["prompt"]}) == 15


def test_split_prompts_of_too_few():
    with pytest.raises(DataError) as caught:
        data.split_prompts(prompts("a", "b", "a"), [2, 2], seed=0, source="a.jsonl")
    assert str(caught.value) == (
        "a.jsonl: 4 prompts are asked for, for 2 iterations, and 2 different were found"
    )
    with pytest.raises(DataError, match="3 prompts are asked for, for 3 iterations, and 1 was fou"):
        data.split_prompts(prompts("a"), iterations=3, seed=0)
    with pytest.raises(UserError, match="expected 3 sizes, one for each iteration, got 2"):
        data.split_prompts(prompts("a"), [1, 1], iterations=3, seed=0)
    with pytest.raises(UserError, match="expected parts of 1 prompt or more"):
        data.split_prompts(prompts("a"), [0], seed=0)


def test_prompts_that_are_labelled_too(caplog):
    labelled = prompts("a", "b")
    fresh = Dataset.from_list([{"prompt": [user(text)]} for text in ("b", "c", "b")])
    with caplog.at_level(logging.WARNING, logger="prefalign"):
        assert data.warn_shared_prompts(labelled, fresh, source="p.jsonl") == 2
        assert data.warn_shared_prompts(labelled, prompts("c")) == 0
    assert [record.getMessage() for record in caplog.records] == [
        "p.jsonl: 2 of 3 prompts are also prompts of labelled pairs"
    ]
