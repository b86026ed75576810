"""Launch configurations by architecture: a table, so that results never depend on timing.

Each row was compiled for its card with every variant of the kernels that it configures
(``tests/kernels/test_compile_linear.py``; the resources are in ``bench/results/compiled/``).

One tile shape serves the single head and the triple: a row's sums are then reduced in the same
order in both, and their log-probs are the same bits. What may differ between them, the second
accumulator of a lone head (``pair``) and how operands are read (``tma``), leaves that order alone.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ._common import INTERPRETED


class Blocks(NamedTuple):
    """Blocks of one GEMM-like launch.

    ``pair``: a lone head multiplies two neighbouring weight tiles per tile of hidden rows.
    ``pieces``: the epilogue goes over a tile in so many pieces. ``tma``: read 16-byte aligned
    operands through tensor descriptors.
    """

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    pieces: int = 1
    pair: bool = False
    tma: bool = False

    def by_pointers(self) -> Blocks:
        """Return what to launch where descriptors cannot be used but were counted on.

        Addresses and masks take the registers of a second accumulator (up to 1200 bytes of spills);
        ``block_v`` of the logits kernel is within 128 anyway, so its bits stay the same.
        """
        if not self.tma:
            return self
        return self._replace(pair=False, tma=False, block_v=min(self.block_v, 128))

    def for_columns(self, columns: int) -> Blocks:
        """Return what a GEMM launches for a result of so few columns: an adapter's factor.

        The copy engine's boxes are 64 columns wide, so that a narrower operand goes by pointers.
        """
        if columns > 64 or columns >= self.block_v:
            return self
        width = max(16, 1 << (columns - 1).bit_length())
        return self._replace(block_v=width, pieces=1, pair=False, tma=False)

    def with_adapter(self) -> Blocks:
        """Return what to launch with a low-rank adapter, whose factors take registers too.

        A second accumulator of 128 columns would spill up to 40 bytes on sm_90; no bit depends on
        it.
        """
        return self._replace(pair=self.pair and self.block_v < 128)


class Row(NamedTuple):
    """What one architecture launches; ``half`` is for 16-bit operands, ``single`` for float32.

    ``programs``: how many fill the card for a few waves; fewer make shorter splits of V. ``group``:
    row blocks that share a weight tile in L2. ``token_block``, ``token_warps``: of ``token_logps``.
    """

    half: Blocks
    half_gemm: Blocks
    single: Blocks
    single_gemm: Blocks
    programs: int
    group: int
    longest_split: int
    token_block: int
    token_warps: int


# float32 is multiplied on the plain cores ("ieee"), where 64 x 32 sums per block are enough.
_SINGLE = Blocks(64, 32, 16, 8, 2)
_SINGLE_GEMM = Blocks(64, 64, 32, 8, 2)

# mma.sync: the tile 128 x 64 is the largest whose triple with two heads, softcap and bias keeps
# two accumulators and nine statistics per row in registers (128 x 128 spills 340 to 1400 bytes).
# A lone head takes two such tiles at once: 128 x 128, 180 registers.
_MMA = Blocks(128, 64, 32, 8, 3, pair=True)
_MMA_GEMM = Blocks(128, 128, 32, 8, 3, pieces=4)
# wgmma and tcgen05 want 64-wide K blocks and 128 columns an instruction. An epilogue over the whole
# tile spills up to 1200 bytes, in four pieces of 32 columns at most 24.
_HOPPER = Blocks(128, 128, 64, 8, 3, pieces=4, pair=True, tma=True)
_HOPPER_GEMM = Blocks(128, 256, 64, 8, 3, pieces=4, tma=True)

TABLE = {
    # A100: 108 processors, 40 MB of L2; 163 KiB of shared memory leave room for a fourth stage.
    "sm_80": Row(
        _MMA._replace(num_stages=4), _MMA_GEMM._replace(num_stages=4), _SINGLE, _SINGLE_GEMM,
        programs=4 * 108, group=8, longest_split=32, token_block=4096, token_warps=8,
    ),
    # RTX 3090, A10: 6 MB of L2 hold fewer hidden rows; the blocks of the 4090 otherwise.
    "sm_86": Row(
        _MMA, _MMA_GEMM, _SINGLE, _SINGLE_GEMM,
        programs=4 * 84, group=4, longest_split=32, token_block=4096, token_warps=8,
    ),
    # RTX 4090, L40: 72 MB of L2.
    "sm_89": Row(
        _MMA, _MMA_GEMM, _SINGLE, _SINGLE_GEMM,
        programs=4 * 128, group=8, longest_split=32, token_block=4096, token_warps=8,
    ),
    # H100, H200: a block of 8192 bf16 logits keeps 16 KiB in flight per program.
    "sm_90": Row(
        _HOPPER, _HOPPER_GEMM, _SINGLE, _SINGLE_GEMM,
        programs=4 * 132, group=8, longest_split=16, token_block=8192, token_warps=8,
    ),
    # B200: the accumulators live in tensor memory, the epilogue has the registers to itself.
    "sm_100": Row(
        _HOPPER, _HOPPER_GEMM, _SINGLE, _SINGLE_GEMM,
        programs=4 * 148, group=8, longest_split=16, token_block=8192, token_warps=8,
    ),
    # RTX 5090: mma.sync like the 4090, fed by the copy engine, which frees 40 registers.
    "sm_120": Row(
        _MMA._replace(tma=True), _MMA_GEMM._replace(tma=True), _SINGLE, _SINGLE_GEMM,
        programs=4 * 170, group=8, longest_split=32, token_block=4096, token_warps=8,
    ),
    # MI300X: 4 waves of 64 lanes. A second stage of the GEMM comes near the 64 KiB of local memory.
    "gfx942": Row(
        Blocks(128, 64, 32, 4, 2, pair=True), Blocks(128, 128, 32, 8, 1),
        _SINGLE._replace(num_stages=1), _SINGLE_GEMM._replace(num_stages=1),
        programs=4 * 304, group=4, longest_split=32, token_block=4096, token_warps=8,
    ),
    # The interpreter pays per operation; small blocks let small tests straddle their edges.
    "interpreter": Row(
        Blocks(16, 32, 16, 4, 1, pieces=2, pair=True, tma=True),
        Blocks(16, 32, 16, 4, 1, pieces=2, tma=True),
        Blocks(16, 32, 16, 4, 1, pieces=2, pair=True), Blocks(16, 32, 16, 4, 1, pieces=2),
        programs=8, group=2, longest_split=4, token_block=4096, token_warps=8,
    ),
}  # fmt: skip
"""Architecture -> row. A card that is not listed takes the nearest that its hardware can run."""


def nearest(major: int, minor: int) -> str:
    """Return the row of a CUDA compute capability: the newest not above it in its generation."""
    if major >= 12:
        return "sm_120"
    if major >= 10:
        return "sm_100"
    if major == 9:
        return "sm_90"
    return "sm_89" if (major, minor) == (8, 9) else "sm_80" if (major, minor) == (8, 0) else "sm_86"


@functools.cache
def _architecture(index: int | None) -> str:
    if torch.version.hip:
        return "gfx942"
    return nearest(*torch.cuda.get_device_capability(index))


def architecture(device: torch.device) -> str:
    """Return the key of ``device`` in ``TABLE``."""
    if INTERPRETED or device.type != "cuda":
        return "interpreter"
    return _architecture(device.index)


def row_for(device: torch.device) -> Row:
    """Return the configurations of ``device``."""
    return TABLE[architecture(device)]


def blocks_for(tensor: torch.Tensor, gemm: bool = False) -> Blocks:
    """Return the blocks of the logits kernel, or of the GEMM, for operands like ``tensor``."""
    row = row_for(tensor.device)
    if tensor.dtype.itemsize == 2:
        return row.half_gemm if gemm else row.half
    return row.single_gemm if gemm else row.single


def split_sizes(N: int, V: int, tile: int, blocks: Blocks, row: Row) -> tuple[int, int]:
    """Return (slice, split) of V: a slice is whole splits, and a split is whole blocks.

    ``tile`` is what the plan allows a slice to be. Splits are as long as they may be while the row
    blocks of N and the splits of one slice still make ``row.programs``. Of shapes and the table
    only: the splits, and so the bits, are the same with and without a Jacobian.
    """
    tiles = max(1, min(tile, V) // blocks.block_v)
    row_blocks = -(-N // blocks.block_n)
    split = row.longest_split
    while split > 1 and (split > tiles or row_blocks * (tiles // split) < row.programs):
        split //= 2
    return tiles // split * split * blocks.block_v, split * blocks.block_v
