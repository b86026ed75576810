"""Which examples of a step go to which process."""

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from prefalign.sampling import BalancedSampler, deal


def step_sets(order, size):
    return [sorted(order[i : i + size]) for i in range(0, len(order), size)]


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    hands=st.integers(1, 5),
)
def test_every_example_is_dealt_once_to_hands_of_equal_size(lengths, hands):
    lengths = lengths * hands
    dealt = deal(lengths, hands)
    assert sorted(i for hand in dealt for i in hand) == list(range(len(lengths)))
    assert {len(hand) for hand in dealt} == {len(lengths) // hands}


def test_swaps_mend_what_the_longest_first_leaves():
    # Longest first gives 8 + 5 + 4 + 3 = 20 against 7 + 6 + 4 + 2 = 19 or worse; even is 39 / 2.
    lengths = [9, 7, 6, 5, 4, 2, 2, 2]
    loads = [sum(lengths[i] for i in hand) for hand in deal(lengths, 2)]
    assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_wait_for_less_than_two_percent(processes):
    # A prompt and two responses, log-normal as UltraFeedback's.
    noise = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0))
    drawn = torch.tensor([4.7, 5.4, 5.4]) + noise * torch.tensor([1.0, 0.7, 0.7])
    lengths = drawn.exp().round().clamp(1, 1024).sum(1).int().tolist()
    waste = []
    sampler = BalancedSampler(lengths, 8, processes, seed=0)
    order = list(sampler)
    for start in range(0, len(order), 8 * processes):
        loads = [
            sum(lengths[i] for i in order[at : at + 8])
            for at in range(start, start + 8 * processes, 8)
        ]
        waste.append(1 - sum(loads) / len(loads) / max(loads))
    shuffled = list(SeedableRandomSampler(range(len(lengths)), data_seed=0))
    unbalanced = [
        sum(lengths[i] for i in shuffled[at : at + 8]) for at in range(0, len(shuffled), 8)
    ]
    pairs = torch.tensor(unbalanced, dtype=torch.float64).view(-1, processes)
    before = (1 - pairs.mean(1) / pairs.amax(1)).mean().item()
    assert before > 0.05  # what is mended is there
    assert sum(waste) / len(waste) < 0.02


def test_a_step_has_the_examples_that_one_process_would_give_it():
    lengths = torch.randint(1, 500, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = BalancedSampler(lengths, 4, 3, seed=7)
    alone = SeedableRandomSampler(range(50), data_seed=7)
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        alone.set_epoch(epoch)
        order, expected = list(sampler), list(alone)
        assert step_sets(order, 12) == step_sets(expected, 12)
        assert order != expected
        assert order[48:] == expected[48:]


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = list(range(1, 65))
    first = list(BalancedSampler(lengths, 4, 2, seed=1))
    torch.rand(3)
    sampler = BalancedSampler(lengths, 4, 2, seed=1)
    assert list(sampler) == first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(BalancedSampler(lengths, 4, 2, seed=2)) != first
