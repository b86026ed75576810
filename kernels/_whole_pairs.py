"""A trained head under the mean of a loss of pairs at 3F: chunks of whole pairs, in plain torch.

In a loss of a pair's two sums all tokens of a sequence have one upstream scalar, and with the mean
over pairs it is known as soon as both sequences are summed. So for a chunk of rows that holds whole
pairs, with k = logit_scale / temperature and f' the derivative of the softcap:

    E = f(h @ W.T + b);  (m, s) = online log-sum-exp;  E = exp(E - m)        1F, tile by tile
    g_t = slope(sequence of t) / B                                          the pairs' losses
    dZ = k·g·f'·(1[y] - E / s)                                               in E's buffer
    dHidden = dZ @ W;  dWeight += dZ.T @ h                                   2F

It holds the logits of one chunk, ``4·rows·V`` bytes, within the
workspace; dWeight is summed in float32 in the output itself, chunk by chunk in order. Which pairs
make a chunk, and when it does not pay, ``pair_plan.py`` says.

Kept because it is faster with chunks of enough rows: ms forward + backward, float32, 8 equal
pairs, two CPU cores, medians of 5 interleaved runs (and of 3 on a busy machine):

========================  ============  =====================  =====================
N, D, V                   4F            3F, 64 MiB (default)   3F, 128 MiB
========================  ============  =====================  =====================
512, 2048, 32000          694 (1616)    594 (1852), 2 chunks   558 (1382), 1 chunk
1024, 896, 64000          1111 (2737)   1084 (3782), 8 chunks  919 (2448), 3 chunks
========================  ============  =====================  =====================

Each chunk reads and writes all of dWeight, so that a chunk of few rows gains nothing, and loses
where others use the memory too: hence at least 256 rows a chunk, and 4F for the second line unless
the workspace is larger. In bfloat16 it was no clear gain (426 against 515 ms at 256, 896, 32000,
but 372 against 274 at 64, 896, 64000): the other path has bfloat16 GEMMs for gradients, and rounds
them once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._head_math import Head, bias_part, cap_slope, dot, logits, put, target_logits
from ._online import Online
from .losses import pair_slopes, per_token, sequence_sums
from .pair_plan import PairPlan


class _Chunk:
    """Logits of one chunk of rows as exp(z - m)·f', tile by tile, and their statistics."""

    def __init__(self, h: Tensor, weight: Tensor, y: Tensor, bias, head: Head, tile: int, keep):
        V = weight.shape[0]
        self.h, self.weight, self.y, self.head = h, weight, y, head
        self.stats = Online(target_logits(h, weight, y, bias, head))
        self.tiles: list[tuple[int, int, Tensor, Tensor]] = []
        for lo in range(0, V if h.shape[0] else 0, tile):
            hi = min(lo + tile, V)
            z = logits(h, weight[lo:hi], bias_part(bias, lo, hi), head)
            slope = None
            if keep and head.softcap is not None:
                slope = cap_slope(z, head, torch.empty_like(z))
            put(z, *self._targets(lo, hi), -torch.inf)
            e, _ = self.stats.update(z)
            if keep:
                self.tiles.append((lo, hi, e if slope is None else e.mul_(slope), self.stats.m))
            del z, e  # before the next tile is made
        self.logps = self.stats.finish(V)["logps"]

    def _targets(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return the rows' targets within a tile [n, 1], clamped, and which lie inside [n]."""
        local = self.y - lo
        inside = (local >= 0) & (local < hi - lo)
        return local.clamp_(0, hi - lo - 1)[:, None], inside

    def gradients(self, g: Tensor, dh: Tensor | None, dw: Tensor | None, db: Tensor | None, first):
        """Write dHidden of these rows, and add to (or, in the ``first`` chunk, write) the others.

        ``g`` [n] is the upstream of each log-prob. The logits' buffers are used up.
        """
        g = g * (self.head.scale / self.head.temperature)
        # -expm1(logp) is 1 - p without its cancellation.
        at_target = -g * torch.expm1(self.logps)
        if self.head.softcap is not None:
            at_target *= cap_slope(self.stats.zy, self.head, torch.empty_like(self.stats.zy))
        if dh is not None:
            dh.zero_()
        while self.tiles:
            lo, hi, dz, m = self.tiles.pop(0)
            dz.mul_((-g * (m - self.stats.m).exp() / self.stats.s)[:, None])
            if dh is not None:
                dh.add_(dot(dz, self.weight[lo:hi].T))
            if dw is not None and first:
                dw[lo:hi] = dot(dz.T, self.h.T)
            elif dw is not None:
                dw[lo:hi] += dot(dz.T, self.h.T)
            if db is not None:
                db[lo:hi] += dz.sum(0)
        # The targets' entries, so much larger than the others, join at the end.
        if dh is not None:
            dh.addcmul_(at_target[:, None], self.weight[self.y])
        if dw is not None:
            dw.index_add_(0, self.y, self.h * at_target[:, None])
        if db is not None:
            db.index_add_(0, self.y, at_target)


def whole_pairs(
    hidden, weight, targets, bias, ref, ref_logps, weights, ends, kept, head, plan: PairPlan,
    objective, needs,
):  # fmt: skip
    """Return losses and rewards [B] and the gradients of their mean, at 3F.

    ``ends`` are the sequences' bounds over the rows that have a target, ``kept`` those rows or None
    for all; ``ref`` is the reference's (hidden, weight, bias) or None, with ``ref_logps`` then.
    """
    dtype, pairs = hidden.dtype, len(ends) // 2
    dh = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if "h" in needs else None
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if "w" in needs else None
    db = hidden.new_zeros(weight.shape[0], dtype=dtype) if "b" in needs else None
    out = [hidden.new_empty(pairs, dtype=dtype) for _ in range(3)]
    first_gradient = True
    for first, last in plan.chunks:
        spans = ends[2 * first : 2 * last + 1]
        rows = slice(spans[0], spans[-1])
        index = rows if kept is None else kept[rows]
        y = targets[index]
        b = None if bias is None else bias.to(dtype)
        chunk = _Chunk(hidden[index], weight, y, b, head, plan.vocab_tile, True)
        reference = None
        if ref_logps is not None:
            reference = ref_logps[2 * first : 2 * last].to(dtype)
        elif ref is not None:
            rh, rw, rb = ref
            rb = None if rb is None else rb.to(dtype)
            like = _Chunk(rh[index], rw, y, rb, head, plan.vocab_tile, False)
            reference = sequence_sums(like.logps, spans)
        w = None if weights is None else weights[first:last].to(dtype)
        bounds = torch.tensor(spans)
        found, slopes = pair_slopes(
            objective, sequence_sums(chunk.logps, spans), reference, bounds.diff(), w
        )
        for values, part in zip(out, found, strict=True):
            values[first:last] = part
        if spans[0] == spans[-1]:
            continue
        g = per_token(slopes / pairs, bounds, spans[-1] - spans[0])
        block = None
        if dh is not None:
            block = dh[rows] if kept is None else torch.empty_like(chunk.h)
        chunk.gradients(g, block, dw, db, first_gradient)
        if dh is not None and kept is not None:
            dh[index] = block
        first_gradient = False
    if first_gradient and dw is not None:
        dw.zero_()
    return out, (dh, dw, None if db is None else db.to(bias.dtype))
