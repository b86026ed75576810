"""How a trained head runs under the mean of a loss of pairs: 3F in chunks of whole pairs, or 4F.

F = 2·N·D·V is one pass of the head. Once both sequences of a pair are summed, the upstream scalar
of every one of its tokens is known; a chunk of rows that holds whole pairs, and the logits of all
of its rows, needs no second look at them. That takes ``4·rows·V`` bytes, which must fit the
workspace, and pays from ``LEAST_ROWS`` rows a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ._common import FLOATS, check_number
from .plan import default_workspace

TILE = 4096
# Rows a chunk, on average, from which 3F pays: against 4F, D 896 V 32000, one chunk, fastest of 9,
# 32 rows 1.12, 64 rows 1.32, 128 rows 1.03 (median 0.76), 256 rows 0.81. Fewer rows save less of
# the logits' GEMM than it costs to go over dWeight once more.
LEAST_ROWS = 256
SLICE = 2**22  # elements of a [tile, D] product that is added to dWeight

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class PairPlan:
    """How a trained head runs with ``reduction="mean"``; make it with ``plan_pairs``.

    ``chunks`` are (first, last) pairs of each chunk when ``strategy`` is ``"whole_pairs"``, 3F in
    all; with ``"recompute"``, 4F, there are none and ``reason`` says why.
    """

    strategy: str
    reason: str
    chunks: tuple[tuple[int, int], ...]
    vocab_tile: int
    flops: float
    workspace_bytes: int
    budget_bytes: int

    def __str__(self) -> str:
        """Return the plan as a small table."""
        rows = [
            ("strategy", f"{self.strategy}: {self.reason}"),
            ("work", f"{self.flops:g}F"),
            ("chunks", f"{len(self.chunks)} of whole pairs"),
            (
                "workspace",
                f"{self.workspace_bytes / _MIB:.1f} MiB of {self.budget_bytes / _MIB:.1f} MiB",
            ),
        ]
        return "\n".join(f"{name:<10} {value}" for name, value in rows)


def _vocab_tile(V: int, D: int, budget: int) -> int:
    """Return the tile: a [tile, D] block, of which a few exist, is at most an eighth of bytes."""
    return min(V, TILE, max(16, min(SLICE, budget // 32) // D))


def _chunk_bytes(rows: int, V: int, D: int, tile: int, dtype: torch.dtype) -> int:
    """Bytes held for one chunk: its logits, a softcap's tile, three row blocks, a dWeight slice."""
    return dtype.itemsize * (rows * (V + tile + 3 * D) + tile * D)


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an int of at least {least}, got {value}")


def _check_plan(lengths, V, D, dtype, workspace_bytes, device) -> None:
    if isinstance(lengths, str | bytes) or not isinstance(lengths, Sequence):
        raise TypeError(f"lengths: expected a sequence of ints, got {type(lengths).__name__}")
    for pair, length in enumerate(lengths):
        _check_count(f"lengths[{pair}]", length, 0)
    _check_count("V", V, 1)
    _check_count("D", D, 1)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    if dtype not in FLOATS:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise ValueError(
            f"dtype: expected one of {wanted}, got {str(dtype).removeprefix('torch.')}"
        )
    if workspace_bytes is not None:
        check_number("workspace_bytes", workspace_bytes, low=1)
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device: expected a string or torch.device, got {type(device).__name__}")
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected a device's name, got {device!r}") from None


def plan_pairs(
    lengths: Sequence[int],
    V: int,
    D: int,
    *,
    dtype: torch.dtype = torch.float32,
    workspace_bytes: int | None = None,
    device: torch.device | str = "cpu",
) -> PairPlan:
    """Plan a trained head under the mean of a loss of pairs: 3F in chunks of whole pairs, or 4F.

    Args:
        lengths: rows with a target of each pair, chosen and rejected together; 0 or more each.
        V: vocabulary entries.
        D: hidden size.
        dtype: of ``hidden`` and ``weight``: float16, bfloat16, float32 (default) or float64.
        workspace_bytes: the budget, at least 1; default 64 MiB on a CPU.
        device: where it runs. On a GPU the answer is 4F: the fused kernels do not keep logits, and
            whether keeping them pays there has not been measured. 16-bit inputs are 4F too.

    Returns:
        A ``PairPlan``; print it to read. ``linear_preference_loss`` makes the same one.

    Raises:
        TypeError: an argument of the wrong type; ``lengths`` must be a sequence of ints.
        ValueError: a length below 0, V or D below 1, a dtype that is none of these, a budget below
            1, a device that torch does not know.
    """
    _check_plan(lengths, V, D, dtype, workspace_bytes, device)
    budget = default_workspace(device) if workspace_bytes is None else int(workspace_bytes)
    tile = _vocab_tile(V, D, budget)

    def recompute(reason: str) -> PairPlan:
        return PairPlan("recompute", reason, (), 0, 4.0, budget, budget)

    if torch.device(device).type != "cpu":
        return recompute("not yet written for Triton")
    if dtype.itemsize == 2:
        return recompute("16-bit gradients are to be rounded once, after the upstream scalar")
    chunks: list[tuple[int, int]] = []
    first = rows = most = 0
    for pair, length in enumerate(lengths):
        if _chunk_bytes(length, V, D, tile, dtype) > budget:
            return recompute(f"pair {pair} alone, {length} rows, exceeds the workspace")
        if pair > first and _chunk_bytes(rows + length, V, D, tile, dtype) > budget:
            chunks.append((first, pair))
            first, rows = pair, 0
        rows += length
        most = max(most, rows)
    if len(lengths):
        chunks.append((first, len(lengths)))
    if sum(lengths) < LEAST_ROWS * len(chunks):
        return recompute(f"fewer than {LEAST_ROWS} rows a chunk: no gain")
    size = _chunk_bytes(most, V, D, tile, dtype)
    return PairPlan("whole_pairs", "logits made once", tuple(chunks), tile, 3.0, size, budget)
