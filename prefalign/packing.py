"""Batches without padding: sequences laid end to end.

A batch has two levels. *Segments* are what attention sees: a run of tokens that attends causally to
itself and, where it has a parent, to the whole of its parent segment. *Responses* are what is
scored: a run of rows that have a target each. Without sharing, a response is one segment, prompt
and response together. A shared prompt is a segment of its own, laid once, and the parent of its
responses' segments, which follow it.

    repeated   [prompt response₁] [prompt response₂] ...
    shared     [prompt] ← [response₁] [response₂] ...        K - 1 prompts fewer for K responses

A batch that is too long for one pass may have *parts*: batches of their own, each with some of its
responses, which a model runs one after the other. The loss sees the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, chain, pairwise
from typing import Any

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
        parts: Batches which, laid end to end, are this one: each has the next of its responses, and
            no extras. Empty where the batch is one pass.
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
    parts: tuple[PackedBatch, ...] = ()

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
        """How many tokens the backbone sees, in all parts."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return the batch with its tensors on ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return the batch in page-locked memory, as torch's data loader asks for it."""
        return self.map(lambda tensor: tensor.pin_memory())

    def map(self, fn: Callable[[Tensor], Tensor]) -> PackedBatch:
        """Return the batch with ``fn`` of each of its tensors, parts and extras included."""
        moved: dict[str, Any] = {
            f.name: fn(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(
            self,
            **moved,
            extras={name: fn(x) for name, x in self.extras.items()},
            parts=tuple(part.map(fn) for part in self.parts),
        )


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
        segments=Segments(tuple(end - start for start, end in pairwise(bounds)), tuple(parents)),
        **group_fields(groups),
    )
    return batch if max(parents) < 0 else replace(batch, **_keys(bounds, parents))


def group_fields(groups: Sequence[Group]) -> dict[str, Any]:
    """Return the fields of a batch that say what its groups are."""
    return {
        "cu_groups": _offsets([len(group.response_ids) for group in groups]),
        "example_ids": torch.tensor([group.example_id for group in groups], dtype=torch.int64),
        "extras": {
            name: torch.tensor(
                [x for group in groups for x in group.extras[name]], dtype=torch.float32
            )
            for name in groups[0].extras
        },
    }


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
