"""released_weights: which pairs get weight 1, ties, few pairs, and the weighted DPO they make."""

import math

import pytest
import torch
from prefalign.kernels.enhancement_loss import released_weights
from prefalign.kernels.preference_loss import preference_loss

INF, NAN = math.inf, math.nan


def test_released_weights_of_each_iteration():
    gaps = torch.tensor([3.0, 9.0, 1.0, 7.0, 5.0, 2.0, 8.0, 4.0, 6.0, 10.0])
    others = torch.sigmoid(gaps / 10)
    for iteration, count in ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 5), (99, 5)):
        expected = torch.where(gaps > 10 - count, 1.0, others)
        assert torch.equal(released_weights(gaps, iteration=iteration), expected)
    once = released_weights(gaps, iteration=2, fractions=[0.7])
    assert torch.equal(once, torch.where(gaps > 3, 1.0, others))


def test_released_weights_where_gaps_tie():
    gaps = torch.tensor([2.0, 5.0, 5.0, 5.0, 2.0] * 20)
    weights = released_weights(gaps, iteration=1)
    top = (weights == 1).nonzero()[:, 0]
    assert torch.equal(top, (gaps == 5).nonzero()[:10, 0])  # the first ten of the sixty
    assert torch.equal(weights, released_weights(gaps, iteration=1))


@pytest.mark.parametrize(("pairs", "fraction", "count"), [
    (0, 0.5, 0), (1, 0.5, 0), (9, 0.1, 0), (10, 0.1, 1), (19, 0.1, 1), (100, 0.29, 29),
    (7, 0.0, 0), (7, 1.0, 7),
])  # fmt: skip
def test_released_weights_count_down(pairs, fraction, count):
    gaps = torch.arange(pairs) / 8
    weights = released_weights(gaps, iteration=1, fractions=(fraction,))
    assert weights.shape == (pairs,) and (weights == 1).sum() == count
    assert torch.equal(weights[: pairs - count], torch.sigmoid(gaps[: pairs - count] / 10))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_released_weights_keep_nan_visible_and_last(dtype):
    gaps = torch.tensor([NAN, 1.0, INF, -INF], dtype=dtype)
    weights = released_weights(gaps, iteration=1, fractions=(0.5,))
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert weights[0].isnan() and weights[1:].tolist() == [1, 1, 0]
    assert released_weights(gaps, iteration=1, fractions=(1.0,))[0].isnan()


def test_released_weights_in_a_weighted_dpo():
    generator = torch.Generator().manual_seed(0)
    logps = -60 + 20 * torch.randn(4, 30, generator=generator, dtype=torch.float64)
    gaps = torch.rand(30, generator=generator, dtype=torch.float64)
    policy = logps[:2].clone().requires_grad_()
    weights = released_weights(gaps, iteration=3)
    loss = preference_loss(*policy, *logps[2:], weights=weights).losses.sum() / weights.sum()
    z = 0.1 * ((policy[0] - logps[2]) - (policy[1] - logps[3]))
    plain = -torch.nn.functional.logsigmoid(z)
    top = gaps >= gaps.sort(descending=True).values[8]
    expected = (plain * torch.where(top, 1, torch.sigmoid(gaps / 10))).sum()
    expected = expected / (9 + torch.sigmoid(gaps / 10)[~top].sum())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    grads = (torch.autograd.grad(x, policy)[0] for x in (loss, expected))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-15)


GAPS = torch.zeros(3)


@pytest.mark.parametrize(("message", "given"), [
    ("reward_gaps: expected a tensor, got list", {"reward_gaps": [0.0]}),
    (r"reward_gaps: expected 1 dimension\(s\)", {"reward_gaps": torch.zeros(3, 2)}),
    ("reward_gaps: expected a constant", {"reward_gaps": torch.zeros(3, requires_grad=True)}),
    ("iteration: expected an int of at least 1, got 0", {"iteration": 0}),
    ("iteration: expected an int, got float", {"iteration": 1.0}),
    (r"fractions\[1\]: expected a number of at most 1, got 10", {"fractions": (0.1, 10)}),
    ("fractions: expected at least one number, got none", {"fractions": ()}),
])  # fmt: skip
def test_bad_arguments_of_released_weights(message, given):
    with pytest.raises((TypeError, ValueError), match=message):
        released_weights(**{"reward_gaps": GAPS, "iteration": 1, **given})
