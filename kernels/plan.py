"""Which strategy a linear head runs with, what it costs, and how large its tiles are.

One pass of the head, ``hidden [N, D] @ weight.T [D, V]``, is F = 2·N·D·V floating-point operations;
every cost here is in F.

==============  ======================================  ======================  =================
strategy        when                                    forward + backward      saved for backward
==============  ======================================  ======================  =================
forward         nothing needs a gradient                1F + 0F                 nothing
row_jacobian    only ``hidden`` does (frozen head)      2F + 0F                 J [N, D]
recompute       ``weight`` or ``bias`` does, or the     1F + 3F (trained head)  inputs, lse [N]
                entropy is to be differentiated         1F + 2F (frozen head)
==============  ======================================  ======================  =================

``row_jacobian`` works because a token's log-prob is a scalar: its derivative by its own hidden row
is one vector, whatever the loss does later, so the forward pass can accumulate it beside the
log-sum-exp and backward only scales its rows. ``recompute`` makes the logits again, one vocabulary
slice with all rows at a time, so that each slice of the weight's gradient is summed in float32 and
written once.

The tiles depend on N, V, D, the dtype and the budget, never on the strategy: the same rows give
the same bits with a gradient and without, and DPO's first loss is ln 2 exactly.
"""

from __future__ import annotations

import dataclasses

import torch

STRATEGIES = ("forward", "row_jacobian", "recompute")

_MIB = 2**20
_WORKSPACE = {"cpu": 64 * _MIB, "cuda": 512 * _MIB}
# Upper bounds of (rows, vocabulary entries) of a tile. On two CPU cores, N 1024 D 896 V 64000 in
# float32, against the bare GEMMs: 1024 x 4096 0.97, 1024 x 2048 1.40, 1024 x 1024 1.63, 512 x 2048
# 1.72, 256 x 2048 2.4 (a busy machine: read the order). A GPU has multiprocessors to fill.
_LARGEST = {"cpu": (1024, 4096), "cuda": (8192, 8192)}
_NARROW = 512  # a slice below this wants fewer rows
_STEP = 256
_FEWEST = 16


def _kind(device: torch.device | str) -> str:
    return "cpu" if torch.device(device).type == "cpu" else "cuda"


def default_workspace(device: torch.device | str) -> int:
    """Return the default byte budget of a head's temporaries on ``device``."""
    return _WORKSPACE[_kind(device)]


def _needs(rows: int, D: int, dtype: torch.dtype, device: torch.device | str):
    """Return (elements, elements per vocabulary entry of the tile) held at each of the two peaks.

    On a CPU the forward pass of the triple holds three logits tiles (policy, reference, scratch)
    and four [rows, D] blocks (both models' hidden rows, the Jacobian's sum, a GEMM's result). The
    backward pass holds the logits' gradients, turned too, and a [tile, D] part of the weight's
    gradient. For 16-bit inputs both also hold float32 slices: of the weight, and of its gradient or
    of the other head. On a GPU operands are read as they are: two tiles (logits, weights), one
    block of sums, one slice's gradient.
    """
    half = dtype.itemsize == 2
    if _kind(device) != "cpu":
        return ((rows * D, 2 * rows + half * D),)
    if half:
        return (4.5 * rows * D, 3 * rows + 2 * D), (2 * rows * D, 2 * rows + 2.5 * D)
    # oneDNN packs what it reads: with 3 tiles and 4 blocks, 62 MiB, a process grew by 72.
    return (5 * rows * D, 4 * rows), (2 * rows * D, 2 * rows + D)


def tile_bytes(rows: int, tile: int, D: int, dtype: torch.dtype, device: torch.device | str) -> int:
    """Bytes of all temporaries that hold for one tile: the largest of the strategies and ops."""
    wide = 8 if dtype == torch.float64 else 4
    return int(wide * max(a + b * tile for a, b in _needs(rows, D, dtype, device)))


def head_tiles(
    N: int, V: int, D: int, dtype: torch.dtype, device: torch.device | str, budget: int
) -> tuple[int, int]:
    """Return (rows, vocabulary entries) of a tile whose temporaries fit ``budget`` bytes.

    As many rows as are useful, and the widest slice of the vocabulary that then fits; fewer rows
    where that slice would be too narrow for a GEMM. Row chunks are made equal, so that N = 1025
    runs as 513 + 512 rows and not as 1024 + 1.
    """
    if dtype.itemsize == 2 and 4 * N * D <= budget // 2:
        budget -= 4 * N * D  # room to sum the gradient of hidden in float32: saves a pass
    most_rows, widest = _LARGEST[_kind(device)]
    rows = max(1, min(most_rows, N))
    room = budget / (8 if dtype == torch.float64 else 4)
    while True:
        tile = int(min(max(0, room - a) // b for a, b in _needs(rows, D, dtype, device)))
        if tile >= min(_NARROW, V) or rows <= _FEWEST:
            break
        rows = (rows + 1) // 2
    step = _STEP if tile >= _STEP else _FEWEST
    tile = max(1, min(max(_FEWEST, tile // step * step), widest, V))
    chunks = max(1, -(-N // rows))
    return max(1, -(-N // chunks)), tile


def hidden_grad_fits(N: int, D: int, dtype: torch.dtype, spare: int) -> bool:
    """Whether a float32 sum of ``hidden``'s gradient for all N rows fits into ``spare`` bytes.

    float32 and float64 gradients are summed in the output itself. Where 16-bit ones do not fit,
    the gradient of ``hidden`` is made row chunk by row chunk in a pass of its own, at 1F more.
    """
    return dtype in (torch.float32, torch.float64) or 4 * N * D <= spare


def head_strategy(hidden_grad: bool, weight_grad: bool, entropy_grad: bool = False) -> str:
    """Return the strategy's name for what needs a gradient (``weight_grad``: weight or bias)."""
    if weight_grad or (hidden_grad and entropy_grad):
        return "recompute"
    return "row_jacobian" if hidden_grad else "forward"


@dataclasses.dataclass(frozen=True)
class HeadPlan:
    """How ``linear_token_logps`` runs at one shape; make it with ``plan_head``, print it to read.

    ``flops`` counts forward and backward in F = 2·N·D·V. ``workspace_bytes`` is what the op holds
    at its peak beyond inputs, outputs and ``saved_bytes``, which it keeps for backward.
    """

    strategy: str
    N: int
    V: int
    D: int
    dtype: torch.dtype
    device: str
    row_chunk: int
    vocab_tile: int
    forward_flops: float
    backward_flops: float
    workspace_bytes: int
    saved_bytes: int
    budget_bytes: int

    @property
    def flops(self) -> float:
        """Forward and backward together, in F."""
        return self.forward_flops + self.backward_flops

    def __str__(self) -> str:
        """Return the plan as a small table."""
        dtype = str(self.dtype).removeprefix("torch.")
        chunks = max(1, -(-self.N // self.row_chunk))
        rows = [
            ("shape", f"N {self.N:,}  V {self.V:,}  D {self.D:,}  {dtype} on {self.device}"),
            ("strategy", self.strategy),
            ("tile", f"{self.row_chunk:,} rows x {self.vocab_tile:,} vocabulary entries"),
            ("tiles", f"{chunks} x {-(-self.V // self.vocab_tile)}"),
            (
                "work",
                f"{self.flops:g}F (forward {self.forward_flops:g}F, backward "
                f"{self.backward_flops:g}F), F = {2.0 * self.N * self.D * self.V:.3g} FLOP",
            ),
            (
                "workspace",
                f"{self.workspace_bytes / _MIB:.1f} MiB of {self.budget_bytes / _MIB:.1f} MiB",
            ),
            ("saved", f"{self.saved_bytes / _MIB:.1f} MiB beyond the inputs"),
        ]
        return "\n".join(f"{name:<10} {value}" for name, value in rows)


def plan_head(
    N: int,
    V: int,
    D: int,
    *,
    dtype: torch.dtype = torch.float32,
    hidden_grad: bool = True,
    weight_grad: bool = False,
    entropy_grad: bool = False,
    workspace_bytes: int | None = None,
    device: torch.device | str = "cpu",
) -> HeadPlan:
    """Plan the head's log-probs at one shape: strategy, tiles, FLOPs and bytes.

    Args:
        N: rows of ``hidden``.
        V: vocabulary entries.
        D: hidden size.
        dtype: of ``hidden`` and ``weight``.
        hidden_grad: whether ``hidden`` needs a gradient.
        weight_grad: whether ``weight`` or ``bias`` needs one.
        entropy_grad: whether the entropy is going to be differentiated. Without it an op asked for
            the entropy still gives its gradient, at 2F more when the head is frozen.
        workspace_bytes: the budget; default 64 MiB on a CPU, 512 MiB on a GPU. Small inputs take
            less.
        device: where it runs.

    Returns:
        A ``HeadPlan``; pass it to the op as ``plan=``.

    Raises:
        ValueError: a size below 0, V or D of 0, or a budget that is not positive.
    """
    for name, value, least in (("N", N, 0), ("V", V, 1), ("D", D, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    budget = default_workspace(device) if workspace_bytes is None else int(workspace_bytes)
    if budget <= 0:
        raise ValueError(f"workspace_bytes: expected a positive number, got {workspace_bytes}")
    rows, tile = head_tiles(N, V, D, dtype, device, budget)
    strategy = head_strategy(hidden_grad, weight_grad, entropy_grad)
    workspace = tile_bytes(rows, tile, D, dtype, device)
    forward, backward, saved = 1.0, 0.0, 0
    if strategy == "row_jacobian":
        forward, saved = 2.0, N * D * dtype.itemsize
    elif strategy == "recompute":
        backward = 1.0 + hidden_grad + weight_grad
        saved = 4 * N * (1 + entropy_grad)
        if hidden_grad and dtype.itemsize == 2:
            if hidden_grad_fits(N, D, dtype, budget - workspace):
                workspace += 4 * N * D
            elif weight_grad:
                backward += 1.0
    return HeadPlan(
        strategy=strategy,
        N=N,
        V=V,
        D=D,
        dtype=dtype,
        device=str(torch.device(device)),
        row_chunk=rows,
        vocab_tile=tile,
        forward_flops=forward,
        backward_flops=backward,
        workspace_bytes=workspace,
        saved_bytes=saved,
        budget_bytes=budget,
    )
