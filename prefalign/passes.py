"""How examples are gathered into passes: token budgets, and what is too long for one.

A pass is one forward and backward of a packed batch. Groups are spread evenly over as few passes as
fit the budget. One that is longer by itself is divided between its responses, into the parts of one
batch: the loss sees them together, the model one after the other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from heapq import heappop, heappush
from itertools import pairwise

import torch

from .packing import Group, PackedBatch, group_fields, pack

# Passes are even enough when the heaviest is this factor of the mean; and when to give up.
_EVEN = 1.002
_STEPS_A_PASS = 8


class Groups(torch.utils.data.Dataset):
    """A map-style dataset of groups, as the data loader wants it.

    Args:
        groups: One for each example; a pair has two responses, chosen first.
    """

    def __init__(self, groups: Sequence[Group]):
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Group:
        return self.groups[index]


class PackingCollator:
    """Collate groups into passes of at most ``max_tokens`` tokens.

    Args:
        max_tokens: The budget of one pass, in tokens.
        share_prompts: Lay a prompt once for all its responses.
        split: Lay what is longer than the budget in parts that are not, as ``pack_parts`` does.
            Otherwise a group that is longer makes a pass of its own.
        couple: Lay all groups as one batch: with ``split`` in parts, otherwise in one pass.
    """

    def __init__(
        self,
        max_tokens: int,
        *,
        share_prompts: bool = False,
        split: bool = False,
        couple: bool = False,
    ):
        self.max_tokens = max_tokens
        self.share_prompts = share_prompts
        self.split = split
        self.couple = couple

    def __call__(self, groups: Sequence[Group]) -> dict[str, list[PackedBatch]]:
        """Return ``{"passes": [PackedBatch, ...]}``, those in parts first."""
        shared = self.share_prompts
        together = [list(groups)]
        if not self.couple:
            lengths = [group.tokens_laid(share_prompts=shared) for group in groups]
            passes = split_by_tokens(lengths, self.max_tokens)
            together = [[groups[i] for i in indices] for indices in passes]
        if not self.split:
            return {"passes": [pack(each, share_prompts=shared) for each in together]}
        batches = [pack_parts(each, self.max_tokens, share_prompts=shared) for each in together]
        # Autograd holds a parameter's gradient of one part until the others' are there. In the
        # first pass of a step that is no copy more: there is no ``.grad`` yet.
        return {"passes": sorted(batches, key=lambda batch: not batch.parts)}


def pack_parts(
    groups: Sequence[Group], max_tokens: int, *, share_prompts: bool = False
) -> PackedBatch:
    """Lay groups as one batch, in parts of at most ``max_tokens`` tokens where it is longer.

    The parts are the passes that ``split_by_tokens`` makes, and the groups lie in their order. A
    group that is longer than the budget is divided into as few parts as fit it, as even as can be,
    of consecutive responses; each has the prompt, once where it is shared. A single response that
    is longer makes a part of its own.

    Args:
        groups: G groups.
        max_tokens: The budget of one part, in tokens.
        share_prompts: As for ``pack``.

    Returns:
        What ``pack`` gives, where one part is all.

    Raises:
        ValueError: As for ``pack``, or the budget is less than 1.
    """
    lengths = [group.tokens_laid(share_prompts=share_prompts) for group in groups]
    laid: list[Group] = []
    parts: list[list[Group]] = []
    for indices in split_by_tokens(lengths, max_tokens):
        together = [groups[i] for i in indices]
        laid += together
        if lengths[indices[0]] > max_tokens:
            parts += [[run] for run in _divide(together[0], max_tokens, share_prompts)]
        else:
            parts.append([replace(group, extras={}) for group in together])
    if len(parts) <= 1:
        return pack(laid, share_prompts=share_prompts)
    return replace(
        pack([group for part in parts for group in part], share_prompts=share_prompts),
        parts=tuple(pack(part, share_prompts=share_prompts) for part in parts),
        **group_fields(laid),
    )


def _divide(group: Group, max_tokens: int, share_prompts: bool) -> list[Group]:
    """Return groups of consecutive responses within the budget: the fewest, then the evenest."""
    prompt = len(group.prompt_ids)
    again = 0 if share_prompts else prompt

    def starts(budget: int) -> list[int]:
        found: list[int] = []
        load = 0
        for i, response_ids in enumerate(group.response_ids):
            load += again + len(response_ids)
            if not found or load > budget:
                found.append(i)
                load = prompt + len(response_ids)
        return found

    fewest = len(starts(max_tokens))
    budgets = range(max_tokens + 1)
    evenest = bisect_left(budgets, True, key=lambda budget: len(starts(budget)) <= fewest)
    bounds = [*starts(evenest), len(group.response_ids)]
    return [
        replace(group, response_ids=group.response_ids[start:end], extras={})
        for start, end in pairwise(bounds)
    ]


def split_by_tokens(num_tokens: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split examples into passes of at most ``max_tokens`` tokens, as few and as even as found.

    Even passes keep the peak of memory down and, over several processes, none waits for another.
    The number of passes is the fewest there can be, ``ceil(sum / max_tokens)``, wherever a balanced
    division of that many is found, and at most that of first-fit decreasing, which is within 22 %
    of the fewest. Deterministic. An example that is longer than the budget by itself makes a pass
    of its own.

    Args:
        num_tokens: Each example's length in tokens, as it will be laid.
        max_tokens: The budget of one pass, in tokens.

    Returns:
        The examples' indices, pass by pass, the largest pass first (one that does not fit in memory
        shows at once), ascending within each.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected 1 or more, got {max_tokens}")

    def load(indices: Sequence[int]) -> int:
        return sum(num_tokens[i] for i in indices)

    def heaviest(passes: Sequence[Sequence[int]]) -> int:
        return max(map(load, passes), default=0)

    order = sorted(range(len(num_tokens)), key=lambda i: (-num_tokens[i], i))
    alone = [[i] for i in order if num_tokens[i] > max_tokens]
    order = order[len(alone) :]
    passes = _first_fit(order, num_tokens, max_tokens)
    fewest = -(-load(order) // max_tokens)
    for count in range(fewest, len(passes) + 1):
        # At first-fit's own count its passes are evened out too: they fit for certain.
        starts = [_longest_first(order, num_tokens, count)]
        starts += [passes] if count == len(passes) else []
        even = min((_balance(start, num_tokens) for start in starts), key=heaviest)
        if heaviest(even) <= max_tokens:
            passes = even
            break
    passes = [sorted(p) for p in alone + passes]
    return sorted(passes, key=lambda p: (-load(p), p))


def _first_fit(order: Sequence[int], sizes: Sequence[int], room: int) -> list[list[int]]:
    """Put each example into the first pass that has room for it."""
    passes: list[list[int]] = []
    left: list[int] = []
    for i in order:
        fit = next((p for p, free in enumerate(left) if free >= sizes[i]), len(passes))
        if fit == len(passes):
            passes.append([])
            left.append(room)
        passes[fit].append(i)
        left[fit] -= sizes[i]
    return passes


def _longest_first(order: Sequence[int], sizes: Sequence[int], count: int) -> list[list[int]]:
    """Put each example into the lightest of ``count`` passes."""
    passes: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, p) for p in range(count)]
    for i in order:
        load, p = heappop(heap)
        passes[p].append(i)
        heappush(heap, (load + sizes[i], p))
    return passes


def _balance(passes: list[list[int]], sizes: Sequence[int]) -> list[list[int]]:
    """Move an example out of the heaviest pass, or swap it for a shorter one, while that evens."""
    passes = [list(p) for p in passes]
    loads = [sum(sizes[i] for i in p) for p in passes]
    for _ in range(_STEPS_A_PASS * len(passes)):
        heavy = max(range(len(passes)), key=loads.__getitem__)
        if loads[heavy] * len(passes) <= _EVEN * sum(loads):
            break
        # The change after which the heavier of the two passes is lightest.
        best = (loads[heavy], -1, -1, -1)
        for light, load in enumerate(loads):
            for i in passes[heavy]:
                for j in (-1, *passes[light]):  # -1 takes nothing in exchange
                    moved = sizes[i] - (sizes[j] if j >= 0 else 0)
                    heavier = max(loads[heavy] - moved, load + moved)
                    best = min(best, (heavier, light, i, j))
        heavier, light, i, j = best
        if heavier >= loads[heavy]:
            break
        moved = sizes[i] - (sizes[j] if j >= 0 else 0)
        passes[heavy].remove(i)
        passes[light].append(i)
        if j >= 0:
            passes[light].remove(j)
            passes[heavy].append(j)
        loads[heavy] -= moved
        loads[light] += moved
    return passes
