"""What PLE and its baselines learn from responses, on rows made by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from prefalign.kernels.enhancement_loss import released_weights

from prefalign.loop import Arm
from prefalign.packing import pack
from prefalign.ple_baselines import METHODS, ranked
from prefalign.ple_config import PLESettings

ARM = Arm("sft", "other")


def row(*scores, ids=None):
    ids = ids or [[7, 8 + i] for i in range(len(scores))]
    return {"prompt": "Q?", "prompt_ids": [5, 6], "ids": ids, "scores": list(scores)}


@pytest.fixture
def run():
    """Stand in for the run: its settings, and a reference that says which stage was asked."""
    asked = []

    def with_reference(name, stage, groups):
        asked.append((name, stage))
        return list(groups)

    return SimpleNamespace(settings=PLESettings(), with_reference=with_reference, asked=asked)


def learned(name, run, rows, i=1):
    return METHODS[name].examples(run, ARM, i, rows)


def test_raft_keeps_the_best_and_of_equals_the_first(run):
    groups = learned("raft", run, [row(0.1, 0.9, 0.9, 0.2), row(0.0, 0.0)])
    assert [group.response_ids for group in groups] == [([7, 9],), ([7, 8],)]
    assert METHODS["raft"].samples(run.settings) == 4 and not METHODS["raft"].guided


def test_distillation_learns_the_guided_response_whatever_its_reward(run):
    (group,) = learned("distillation", run, [row(-9.0)])
    assert group.response_ids == [[7, 8]]
    assert METHODS["distillation"].samples(run.settings) == 0 and METHODS["distillation"].guided


def test_dpo_leaves_out_what_is_equal_and_compares_with_the_iterations_start(run):
    rows = [row(0.0, 1.0), row(1.0, 0.0, ids=[[7], [7]]), row(0.0, 0.0)]
    groups = learned("dpo", run, rows, i=2)
    assert [group.example_id for group in groups] == [0, 2]
    assert groups[0].response_ids == [[7, 8], [7, 9]]  # guided is chosen, whatever the rewards
    assert run.asked == [("other/iteration-2/reference", "other/iteration-1")]


@pytest.mark.parametrize("i", [1, 3])
def test_the_released_code_pairs_best_and_worst_with_a_weight(run, i):
    rows = [row(0.5, 2.0 + k, -1.0, 0.0) for k in range(10)] + [row(1.0, 1.0, 1.0)]
    groups = learned("released", run, rows, i=i)
    assert [group.example_id for group in groups] == list(range(10))  # a tie says nothing
    assert all(group.response_ids == ([7, 9], [7, 10]) for group in groups)
    weights = [group.extras["weights"][0] for group in groups]
    gaps = torch.arange(10, dtype=torch.float64) + 3
    assert weights == released_weights(gaps, iteration=i).tolist()
    assert sum(weight == 1 for weight in weights) == i  # a tenth, three tenths of the pairs
    assert weights[0] == pytest.approx(1 / (1 + math.exp(-0.3)))
    assert run.asked == [(f"other/iteration-{i}/reference", "sft")]


def test_gaps_at_the_threshold_are_not_ranked_whatever_the_rounding():
    """In tenths: float64 ranks 0.4 over 0.1 at 0.3, differences in float32 0.3 over 0.1 at 0.2."""
    pairs = [(a, b) for a in range(11) for b in range(11)]
    gaps = [a / 10 - b / 10 for a, b in pairs]
    for tenths in range(11):
        assert ranked(gaps, tenths / 10) == [a - b > tenths for a, b in pairs]


def test_the_loss_sees_the_gaps_that_the_run_tells_of(run):
    run.parts = SimpleNamespace(
        process=SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None)
    )
    rows = [row(0.3, 0.1), row(0.9, 0.7), row(0.35, 0.1), row(-0.5, 0.1)]
    groups = METHODS["fixed-threshold"].examples(run, ARM, 1, rows)
    rewards = pack(groups).extras["rewards"]
    assert (rewards[::2] - rewards[1::2] > 0.2).tolist() == [False, False, True, False]
    assert torch.allclose(rewards[::2] - rewards[1::2], torch.tensor([0.2, 0.2, 0.25, -0.6]))
    facts = METHODS["fixed-threshold"].facts(run, ARM, 1, groups)
    assert facts == {"threshold": 0.2, "ranked_share": 0.25, "guided_ahead": 0.75}
