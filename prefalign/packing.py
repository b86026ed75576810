"""Batches without padding: sequences laid end to end, and how examples are gathered into them.

A batch has two levels. *Segments* are what attention sees: a run of tokens that attends causally to
itself and, where it has a parent, to the whole of its parent segment. *Responses* are what is
scored: a run of rows that have a target each. Today a response is one segment, prompt and response
together, without a parent. A shared prompt will be a segment of its own and the parent of its
responses' segments; nothing else about the type changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate

import torch
from torch import Tensor


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
        """Tokens that the group takes in a batch."""
        return sum(len(self.prompt_ids) + len(ids) for ids in self.response_ids)


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
        target_rows: The token whose hidden state predicts each target, int64 ``[N]``.
        targets: The predicted token ids, int64 ``[N]``.
        cu_targets: Response r is ``cu_targets[r]:cu_targets[r + 1]`` of the targets, int32
            ``[R + 1]``.
        cu_groups: Group g is ``cu_groups[g]:cu_groups[g + 1]`` of the responses, int32 ``[G + 1]``.
        example_ids: Each group's row in the dataset, int64 ``[G]``.
        extras: Further numbers, float32, one for each response or group, by name.
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


def pack(groups: Sequence[Group]) -> PackedBatch:
    """Lay groups end to end; each response becomes one segment, its prompt before it."""
    if not groups:
        raise ValueError("groups: expected at least one group, got none")
    input_ids: list[int] = []
    position_ids: list[int] = []
    target_rows: list[int] = []
    targets: list[int] = []
    segment_lengths: list[int] = []
    response_lengths: list[int] = []
    for group in groups:
        for response_ids in group.response_ids:
            if not group.prompt_ids or not response_ids:
                raise ValueError(
                    "groups: expected a prompt and responses of one token or more, "
                    f"got an empty one in example {group.example_id}"
                )
            start = len(input_ids)
            length = len(group.prompt_ids) + len(response_ids)
            input_ids += group.prompt_ids
            input_ids += response_ids
            position_ids += range(length)
            # The last prompt token predicts the first response token.
            target_rows += range(start + len(group.prompt_ids) - 1, start + length - 1)
            targets += response_ids
            segment_lengths.append(length)
            response_lengths.append(len(response_ids))

    def offsets(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

    return PackedBatch(
        input_ids=torch.tensor(input_ids, dtype=torch.int64),
        position_ids=torch.tensor(position_ids, dtype=torch.int64),
        cu_seqlens=offsets(segment_lengths),
        parents=torch.full((len(segment_lengths),), -1, dtype=torch.int32),
        max_seqlen=max(segment_lengths),
        target_rows=torch.tensor(target_rows, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        cu_targets=offsets(response_lengths),
        cu_groups=offsets([len(group.response_ids) for group in groups]),
        example_ids=torch.tensor([group.example_id for group in groups], dtype=torch.int64),
        extras={
            name: torch.tensor(
                [x for group in groups for x in group.extras[name]], dtype=torch.float32
            )
            for name in groups[0].extras
        },
    )


def split_by_tokens(num_tokens: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split examples into passes of at most ``max_tokens`` tokens, the longest first.

    First-fit decreasing: deterministic, and within 22 % of the fewest passes there can be. An
    example that is longer than the budget by itself makes a pass of its own.

    Args:
        num_tokens: Each example's length in tokens.
        max_tokens: The budget of one pass, in tokens.

    Returns:
        The examples' indices, pass by pass, ascending within each.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected 1 or more, got {max_tokens}")
    passes: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(num_tokens)), key=lambda i: (-num_tokens[i], i)):
        need = num_tokens[index]
        fit = next((p for p, left in enumerate(room) if left >= need), None)
        if fit is None:
            passes.append([index])
            room.append(max_tokens - need)
        else:
            passes[fit].append(index)
            room[fit] -= need
    return [sorted(indices) for indices in passes]
