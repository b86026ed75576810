"""Which strategy a linear head runs with, what it costs, and how large its tiles are.

One pass of the head, ``hidden [N, D] @ weight.T [D, V]``, is F = 2·N·D·V floating-point operations;
every cost here is in F.

==============  ======================================  ======================  =================
strategy        when                                    forward + backward      saved for backward
==============  ======================================  ======================  =================
forward         nothing needs a gradient                1F + 0F                 nothing
row_jacobian    only ``hidden`` does (frozen head)      2F + 0F                 J [N, D]
recompute       ``weight`` or ``bias`` does, or the     1F + 3F (trained head)  inputs, lse [N]
                entropy is to be differentiated,        1F + 2F (frozen head)
                or an adapter's ``b`` does
==============  ======================================  ======================  =================

An adapter of rank r adds r/D of F for each product that it takes part in.

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
from typing import Any

import torch

from ._common import FLOATS

STRATEGIES = ("forward", "row_jacobian", "recompute")

_MIB = 2**20
_WORKSPACE = {"cpu": 64 * _MIB, "cuda": 512 * _MIB}
# Upper bounds of (rows, vocabulary entries) of a tile. On a CPU a tile that stays in the caches
# between its GEMMs is read from there: N 1024 D 896 V 64000, against the bare GEMMs, frozen head in
# bfloat16: 1024 x 2304 1.57, x 1024 1.47, x 768 1.45, x 512 1.46; N 512 D 2048 V 32000: 1.54, 1.46,
# 1.48, 1.49. In float32 and for a trained head 1024 was the fastest or within 1 %. A GPU has
# multiprocessors to fill.
_LARGEST = {"cpu": (1024, 1024), "cuda": (8192, 8192)}
_NARROW = 512  # a slice below this wants fewer rows
_STEP = 256
_FEWEST = 16


def _kind(device: torch.device | str) -> str:
    return "cpu" if torch.device(device).type == "cpu" else "cuda"


def default_workspace(device: torch.device | str) -> int:
    """Return the default byte budget of a head's temporaries on ``device``."""
    return _WORKSPACE[_kind(device)]


def _needs(rows: int, D: int, dtype: torch.dtype, device: torch.device | str, rank: int = 0):
    """Return (elements, elements per vocabulary entry of the tile) held at each of the two peaks.

    On a CPU the forward pass of the triple holds three logits tiles (policy, reference, scratch)
    and four [rows, D] blocks (both models' hidden rows, the Jacobian's sum, a GEMM's result). The
    backward pass holds the logits' gradients, turned too, and a [tile, D] part of the weight's
    gradient. For 16-bit inputs both also hold float32 slices: of the weight, and of its gradient or
    of the other head. On a GPU operands are read as they are: two tiles (logits, weights), one
    block of sums, one slice's gradient.

    Of an adapter's two factors, [rows, r] and [tile, r], a 16-bit head holds three parts, the six
    that meet in products and a product of three; a wide head a copy, a product and a sum.
    """
    half = dtype.itemsize == 2
    factors = (14 if half else 3) * rank
    if _kind(device) != "cpu":
        return ((rows * (D + factors), 2 * rows + half * D + factors),)
    if half:
        first, second = (4.5 * rows * D, 3 * rows + 2 * D), (2 * rows * D, 2 * rows + 2.5 * D)
    else:
        # oneDNN packs what it reads: with 3 tiles and 4 blocks, 62 MiB, a process grew by 72.
        first, second = (5 * rows * D, 4 * rows), (2 * rows * D, 2 * rows + D)
    return tuple((a + factors * rows, b + factors) for a, b in (first, second))


def tile_bytes(
    rows: int, tile: int, D: int, dtype: torch.dtype, device: torch.device | str, rank: int = 0
) -> int:
    """Bytes of all temporaries that hold for one tile: the largest of the strategies and ops."""
    wide = 8 if dtype == torch.float64 else 4
    return int(wide * max(a + b * tile for a, b in _needs(rows, D, dtype, device, rank)))


def head_tiles(
    N: int,
    V: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device | str,
    budget: int,
    rank: int = 0,
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
        tile = int(min(max(0, room - a) // b for a, b in _needs(rows, D, dtype, device, rank)))
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


def check_int(name: str, value: Any, least: int) -> int:
    """Return ``value`` after checking that it is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an int of at least {least}, got {value}")
    return value


def check_place(dtype: Any, device: Any, workspace_bytes: Any) -> tuple[torch.device, int]:
    """Check what every plan asks for and return the device and the budget in bytes."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    if dtype not in FLOATS:
        wanted, given = (
            ", ".join(str(x).removeprefix("torch.") for x in some) for some in (FLOATS, (dtype,))
        )
        raise ValueError(f"dtype: expected one of {wanted}, got {given}")
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device: expected a string or torch.device, got {type(device).__name__}")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected a device's name, got {device!r}") from None
    if workspace_bytes is None:
        return device, default_workspace(device)
    return device, check_int("workspace_bytes", workspace_bytes, 1)


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
    adapter_rank: int = 0,
    adapter_grad: bool = False,
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
        adapter_rank: r of a ``HeadAdapter`` on the head; 0 (default): none.
        adapter_grad: whether the adapter's ``b`` needs a gradient (``a``'s comes with that of
            ``hidden``).
        workspace_bytes: the budget; default 64 MiB on a CPU, 512 MiB on a GPU. Small inputs take
            less.
        device: where it runs.

    Returns:
        A ``HeadPlan``; pass it to the op as ``plan=``.

    Raises:
        TypeError: a size or a budget that is no int (a bool is none), a flag that is no bool, a
            dtype or a device that is none.
        ValueError: a size below 0, V or D of 0, a budget below 1, a dtype that is not float16,
            bfloat16, float32 or float64, a device that torch does not know, an adapter's gradient
            without a rank.
    """
    sizes = (("N", N, 0), ("V", V, 1), ("D", D, 1), ("adapter_rank", adapter_rank, 0))
    for name, value, least in sizes:
        check_int(name, value, least)
    flags = {
        "hidden_grad": hidden_grad, "weight_grad": weight_grad, "entropy_grad": entropy_grad,
        "adapter_grad": adapter_grad,
    }  # fmt: skip
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
    if adapter_grad and not adapter_rank:
        raise ValueError("adapter_grad: expected an adapter_rank above 0 with it, got 0")
    device, budget = check_place(dtype, device, workspace_bytes)
    rows, tile = head_tiles(N, V, D, dtype, device, budget, adapter_rank)
    strategy = head_strategy(hidden_grad, weight_grad or adapter_grad, entropy_grad)
    workspace = tile_bytes(rows, tile, D, dtype, device, adapter_rank)
    product = 1.0 + adapter_rank / D  # one with the weight, one with the adapter's b
    forward, backward, saved = product, 0.0, 0
    if strategy == "row_jacobian":
        wide = 8 if dtype == torch.float64 else 4
        forward, saved = 2 * product, N * (D * dtype.itemsize + adapter_rank * wide)
    elif strategy == "recompute":
        backward = product * (1 + hidden_grad) + weight_grad + adapter_grad * adapter_rank / D
        saved = 4 * N * (1 + entropy_grad + adapter_rank)
        if hidden_grad and dtype.itemsize == 2:
            if hidden_grad_fits(N, D, dtype, budget - workspace):
                workspace += 4 * N * D
            elif weight_grad or adapter_grad:
                backward += product
    return HeadPlan(
        strategy=strategy,
        N=N,
        V=V,
        D=D,
        dtype=dtype,
        device=str(device),
        row_chunk=rows,
        vocab_tile=tile,
        forward_flops=forward,
        backward_flops=backward,
        workspace_bytes=workspace,
        saved_bytes=saved,
        budget_bytes=budget,
    )
