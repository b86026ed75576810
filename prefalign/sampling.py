"""The order of the examples: which of a batch go to which process.

Processes wait for the slowest at every step, and a packed batch takes as long as it has tokens. So
the examples of an optimiser step, which the seed alone decides, are dealt out by their lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler

_EVEN = 1.005  # loads this close are left as they are
_SWAPS = 16  # at most, for each process


class BalancedSampler(Sampler[int]):
    """Shuffle as one process would, and deal each step's examples evenly by tokens.

    Every ``processes * batch_size`` consecutive indices are the same as in the order of
    ``accelerate``'s ``SeedableRandomSampler``; within them, each process's ``batch_size`` have
    nearly as many tokens as the others'. Depends on the seed, the epoch and the lengths alone, so a
    resumed run goes on with the same batches.

    Args:
        lengths: Each example's tokens.
        batch_size: Examples of one process in a step.
        processes: Processes that share a step.
        seed: Seed of the shuffle; torch's by default, as for ``SeedableRandomSampler``.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, processes: int, seed: int | None = None
    ):
        self.lengths = lengths
        self.batch_size = batch_size
        self.processes = processes
        self.shuffled = SeedableRandomSampler(range(len(lengths)), data_seed=seed)

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is next; called by accelerate's data loader."""
        self.shuffled.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        order = list(self.shuffled)
        step = self.batch_size * self.processes
        for start in range(0, len(order), step):
            together = order[start : start + step]
            if len(together) < step:
                yield from together  # the last one of an epoch, which accelerate fills up
                continue
            lengths = [self.lengths[i] for i in together]
            for hand in deal(lengths, self.processes):
                yield from (together[i] for i in hand)


def deal(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Divide examples into hands of equally many, with sums of lengths as even as found.

    The longest first, each to the lightest hand that is not full; then swaps between the heaviest
    hand and another, while they even the two out. Deterministic.

    Args:
        lengths: Lengths of the examples; their number is a multiple of ``hands``.
        hands: How many hands.

    Returns:
        The examples' indices, hand by hand, ascending within each.
    """
    size = len(lengths) // hands
    dealt: list[list[int]] = [[] for _ in range(hands)]
    loads = [0] * hands
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        hand = min((h for h in range(hands) if len(dealt[h]) < size), key=loads.__getitem__)
        dealt[hand].append(i)
        loads[hand] += lengths[i]
    for _ in range(_SWAPS * hands):
        heavy = max(range(hands), key=loads.__getitem__)
        if loads[heavy] * hands <= _EVEN * sum(lengths):
            break
        # The swap after which the heavier of the two hands is lightest.
        heavier, light, i, j = min(
            (
                max(loads[heavy] - lengths[i] + lengths[j], loads[h] + lengths[i] - lengths[j]),
                h,
                i,
                j,
            )
            for h in range(hands)
            if h != heavy
            for i in dealt[heavy]
            for j in dealt[h]
        )
        if heavier >= loads[heavy]:
            break
        dealt[heavy][dealt[heavy].index(i)] = j
        dealt[light][dealt[light].index(j)] = i
        moved = lengths[i] - lengths[j]
        loads[heavy] -= moved
        loads[light] += moved
    return [sorted(hand) for hand in dealt]
