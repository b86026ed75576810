"""Batches without padding: sequences laid end to end, and how examples are gathered into them.

A batch has two levels. *Segments* are what attention sees: a run of tokens that attends causally to
itself and, where it has a parent, to the whole of its parent segment. *Responses* are what is
scored: a run of rows that have a target each. Without sharing, a response is one segment, prompt
and response together. A shared prompt is a segment of its own, laid once, and the parent of its
responses' segments, which follow it.

    repeated   [prompt response₁] [prompt response₂] ...
    shared     [prompt] ← [response₁] [response₂] ...        K - 1 prompts fewer for K responses
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from heapq import heappop, heappush
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor

# Passes are even enough when the heaviest is this factor of the mean; and when to give up.
_EVEN = 1.002
_STEPS_A_PASS = 8


@dataclass(frozen=True)
class Group:
    """The responses to one prompt: two in a preference pair, chosen first; K when judging.

    Args:
        prompt_ids: The prompt's token ids; at least one.
        response_ids: Each response's token ids; at least one each.
        example_id: The row of the dataset that the group comes from.
        extras: Numbers that travel with the group, one for each response or one for the group.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[Sequence[int]]
    example_id: int = 0
    extras: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens that the group takes in a batch where every response has its own prompt."""
        return self.tokens_laid(share_prompts=False)

    def tokens_laid(self, *, share_prompts: bool) -> int:
        """Return the tokens that the group takes in a batch, its prompt shared or repeated."""
        prompts = 1 if share_prompts and self.response_ids else len(self.response_ids)
        return prompts * len(self.prompt_ids) + sum(map(len, self.response_ids))


@dataclass(frozen=True)
class Segments:
    """What ``cu_seqlens`` and ``parents`` say, on the host: who needs it need not read the device.

    Args:
        lengths: Tokens in each segment.
        parents: The segment whose keys each also sees, or -1.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end: T tokens, S segments, N targets, R responses, G groups.

    Attributes:
        input_ids: Token ids, int64 ``[T]``.
        position_ids: Each token's position, int64 ``[T]``; restarts with every segment, and goes on
            from the parent's end where there is one.
        cu_seqlens: Segment s is tokens ``cu_seqlens[s]:cu_seqlens[s + 1]``, int32 ``[S + 1]``.
        parents: The segment whose keys s also sees, or -1, int32 ``[S]``.
        max_seqlen: Tokens in the longest segment.
        target_rows: The token whose hidden state predicts each target, int64 ``[N]``; a shared
            prompt's last token is there once for each response.
        targets: The predicted token ids, int64 ``[N]``.
        cu_targets: Response r is ``cu_targets[r]:cu_targets[r + 1]`` of the targets, int32
            ``[R + 1]``.
        cu_groups: Group g is ``cu_groups[g]:cu_groups[g + 1]`` of the responses, int32 ``[G + 1]``.
        example_ids: Each group's row in the dataset, int64 ``[G]``.
        extras: Further numbers, float32, one for each response or group, by name.
        key_rows: Where prompts are shared, the tokens whose keys each segment sees, segment after
            segment, its parent's first, int64 ``[T_k]``; None where a segment sees its own alone.
        cu_keys: Segment s sees ``key_rows[cu_keys[s]:cu_keys[s + 1]]``, int32 ``[S + 1]``, or None.
        max_keys: Keys that the segment with most of them sees, or None.
        segments: The segments' lengths and parents on the host, or None.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    parents: Tensor
    max_seqlen: int
    target_rows: Tensor
    targets: Tensor
    cu_targets: Tensor
    cu_groups: Tensor
    example_ids: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    key_rows: Tensor | None = None
    cu_keys: Tensor | None = None
    max_keys: int | None = None
    segments: Segments | None = None

    @property
    def shares_prompts(self) -> bool:
        """Whether a segment has a parent."""
        return self.key_rows is not None

    @property
    def num_groups(self) -> int:
        """How many prompts (pairs, in preference training) the batch holds."""
        return self.example_ids.numel()

    @property
    def num_tokens(self) -> int:
        """How many tokens the backbone sees."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return the batch with its tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return the batch in page-locked memory, as torch's data loader asks for it."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, fn) -> PackedBatch:
        moved = {
            f.name: fn(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved, extras={name: fn(x) for name, x in self.extras.items()})


def pack(groups: Sequence[Group], *, share_prompts: bool = False) -> PackedBatch:
    """Lay groups end to end.

    Args:
        groups: G groups.
        share_prompts: Lay a prompt once, before its responses, as the parent of their segments. A
            group of one response stays one segment. Otherwise each response is one segment, its
            prompt before it.

    Raises:
        ValueError: There are no groups, or one has an empty prompt or response.
    """
    if not groups:
        raise ValueError("groups: expected at least one group, got none")
    input_ids: list[int] = []
    position_ids: list[int] = []
    parents: list[int] = []
    bounds = [0]
    target_rows: list[int] = []
    targets: list[int] = []

    def lay(ids: Sequence[int], position: int, parent: int = -1) -> None:
        input_ids.extend(ids)
        position_ids.extend(range(position, position + len(ids)))
        parents.append(parent)
        bounds.append(len(input_ids))

    for group in groups:
        if not group.prompt_ids or not all(group.response_ids):
            raise ValueError(
                "groups: expected a prompt and responses of one token or more, "
                f"got an empty one in example {group.example_id}"
            )
        length = len(group.prompt_ids)
        shared = share_prompts and len(group.response_ids) > 1
        parent = len(parents)
        if shared:
            lay(group.prompt_ids, 0)
        last_of_prompt = len(input_ids) - 1
        for response_ids in group.response_ids:
            if shared:
                lay(response_ids, length, parent)
            else:
                lay([*group.prompt_ids, *response_ids], 0)
                last_of_prompt = len(input_ids) - len(response_ids) - 1
            # The last prompt token predicts the first response token.
            start = len(input_ids) - len(response_ids)
            target_rows += [last_of_prompt, *range(start, len(input_ids) - 1)]
            targets += response_ids

    response_lengths = [len(ids) for group in groups for ids in group.response_ids]
    batch = PackedBatch(
        input_ids=torch.tensor(input_ids, dtype=torch.int64),
        position_ids=torch.tensor(position_ids, dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        parents=torch.tensor(parents, dtype=torch.int32),
        max_seqlen=max(end - start for start, end in pairwise(bounds)),
        target_rows=torch.tensor(target_rows, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        cu_targets=_offsets(response_lengths),
        cu_groups=_offsets([len(group.response_ids) for group in groups]),
        example_ids=torch.tensor([group.example_id for group in groups], dtype=torch.int64),
        segments=Segments(tuple(end - start for start, end in pairwise(bounds)), tuple(parents)),
        extras={
            name: torch.tensor(
                [x for group in groups for x in group.extras[name]], dtype=torch.float32
            )
            for name in groups[0].extras
        },
    )
    return batch if max(parents) < 0 else replace(batch, **_keys(bounds, parents))


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _keys(bounds: Sequence[int], parents: Sequence[int]) -> dict[str, Any]:
    """Return ``key_rows``, ``cu_keys`` and ``max_keys`` of segments with parents."""
    own = [range(start, end) for start, end in pairwise(bounds)]
    seen = [
        [*(own[parent] if parent >= 0 else ()), *rows]
        for rows, parent in zip(own, parents, strict=True)
    ]
    lengths = [len(rows) for rows in seen]
    return {
        "key_rows": torch.tensor(list(chain(*seen)), dtype=torch.int64),
        "cu_keys": _offsets(lengths),
        "max_keys": max(lengths),
    }


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
