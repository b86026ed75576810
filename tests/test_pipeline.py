"""The parts' small checks: seeds."""

from prefalign.pipeline import stage_seed


def test_seeds_differ_between_stages_and_not_between_processes():
    assert stage_seed(0, "iteration-1", 3) == stage_seed(0, "iteration-1", 3)
    names = [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1)]
    assert len({stage_seed(*name) for name in names}) == 4
