"""The whole head in one call: hidden states of packed pairs to preference losses.

    logps = linear_token_logps(hidden, weight, targets)          [N], rows without a target dropped
    losses, rewards = pair_loss_head(logps, cu_seqlens, ref)     [B]

hidden [N, D], weight [V, D], targets [N], cu_seqlens [2B + 1]: responses end to end, chosen and
rejected in turn. One pass of the head is F = 2·N·D·V FLOP; forward and backward together:

==============================================  ======  =========================================
what requires a gradient                        cost    how
==============================================  ======  =========================================
nothing                                         1F      log-probs alone
hidden (frozen head)                            2F      row Jacobian; backward scales its rows
weight or bias                                  4F      log-probs, then vocabulary slices again
weight or bias, ``reduction="mean"``, chunked   3F      chunks of whole pairs, below
==============================================  ======  =========================================

In a margin loss all tokens of a sequence have one upstream scalar, and with the mean over pairs it
is known as soon as both sequences of a pair are summed. So for a chunk of rows that holds whole
pairs, with k = logit_scale / temperature and f' the derivative of the softcap:

    E = f(h @ W.T + b);  (m, s) = online log-sum-exp;  E = exp(E - m)        F/3, tile by tile
    g_t = ±slope(pair of t) / B                                              the pairs' margins
    dZ = k·g·f'·(1[y] - E / s)                                               in E's buffer
    dHidden = dZ @ W;  dWeight += dZ.T @ h                                   2F/3

Gradients are made in the forward pass and scaled in backward by the scalar that comes from above.
It holds the logits of one chunk, ``4·rows·V`` bytes, within the workspace; dWeight is summed in
float32 in the output itself, chunk by chunk in order. Where that cannot be or does not pay (a pair
alone exceeds the workspace; fewer than 256 rows a chunk; 16-bit inputs; the noise-aware loss;
Triton, still to be written) the cost is 4F: ``plan_pairs`` says. With the reference's
hidden states add 1F.

3F is kept because it is faster with chunks of enough rows: ms forward + backward, float32, 8 equal
pairs, two CPU cores, medians of 5 interleaved runs (and of 3 on a busy machine):

========================  ============  =====================  =====================
N, D, V                   4F            3F, 64 MiB (default)   3F, 128 MiB
========================  ============  =====================  =====================
512, 2048, 32000          694 (1616)    594 (1852), 2 chunks   558 (1382), 1 chunk
1024, 896, 64000          1111 (2737)   1084 (3782), 8 chunks  919 (2448), 3 chunks
========================  ============  =====================  =====================

Each chunk reads and writes all of dWeight, so that a chunk of few rows gains nothing, and loses
where others use the memory too: hence at least 256 rows a chunk, and 4F for the second line unless
the workspace is larger. In bfloat16
it was no clear gain (426 against 515 ms at 256, 896, 32000, but 372 against 274 at 64, 896, 64000):
the other path has bfloat16 GEMMs for gradients, and rounds them once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import check_choice, check_labels, check_number, check_tensor, resolve_impl
from ._linear_chunked import Head
from .linear_token_logps import (
    autocast,
    backward_op,
    check_head,
    choose_strategy,
    linear_token_logps,
    which_grads,
)
from .linear_token_logps_triple import linear_token_logps_triple
from .loss_heads import NOISE_AWARE, check_loss, check_pair_bounds, margin_losses, pair_loss_head
from .noise_aware_loss import NoiseAwareLoss
from .plan import HeadPlan, default_workspace
from .preference_loss import PreferenceLoss
from .sequence_logps import _check_spans

REDUCTIONS = ("none", "mean")

LOWEST = -1e30  # below every logit, yet finite
TILE = 4096
# Rows a chunk, on average, from which 3F pays: against 4F, D 896 V 32000, one chunk, fastest of 9,
# 32 rows 1.12, 64 rows 1.32, 128 rows 1.03 (median 0.76), 256 rows 0.81. Fewer rows save less of
# the logits' GEMM than it costs to go over dWeight once more.
LEAST_ROWS = 256
SLICE = 2**22  # elements of a [tile, D] product that is added to dWeight

_MIB = 2**20


# The plan


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


def plan_pairs(
    lengths: Sequence[int],
    V: int,
    D: int,
    *,
    dtype: torch.dtype = torch.float32,
    workspace_bytes: int | None = None,
    device: torch.device | str = "cpu",
) -> PairPlan:
    """Plan a trained head under the mean of a margin loss: 3F in chunks of whole pairs, or 4F.

    Args:
        lengths: rows with a target of each pair, chosen and rejected together.
        V: vocabulary entries.
        D: hidden size.
        dtype: of ``hidden`` and ``weight``.
        workspace_bytes: the budget; default 64 MiB on a CPU.
        device: where it runs. On a GPU the answer is 4F: the fused kernels do not keep logits, and
            whether keeping them pays there has not been measured. 16-bit inputs are 4F too.

    Returns:
        A ``PairPlan``; print it to read. ``linear_preference_loss`` makes the same one.
    """
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


# Chunks of whole pairs: one [n, V] of logits, made once


_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _dot(x: Tensor, w: Tensor) -> Tensor:
    """``x @ w.T``: of float32 by oneDNN, twice MKL's speed on AMD; any strides."""
    if _onednn_linear is None or x.dtype != torch.float32:
        return torch.mm(x, w.T)
    return _onednn_linear(x, w, None, "none", [], "")


def _cap(u: Tensor, head: Head) -> Tensor:
    """Turn GEMM results into logits, in their buffer."""
    if head.softcap is None:
        return u.mul_(head.scale / head.temperature)
    u.mul_(head.scale / head.softcap).tanh_()
    return u.mul_(head.softcap / head.temperature)


def _slope(z: Tensor, head: Head) -> Tensor:
    """Return dz/du up to scale / temperature, from the logit."""
    t = head.temperature / head.softcap
    return (z * z).mul_(-t * t).add_(1.0)


def _put(tile: Tensor, local: Tensor, values: Tensor) -> None:
    """Write ``values`` [n] at the rows' targets, where ``local`` [n] lies inside the tile."""
    inside = (local >= 0) & (local < tile.shape[1])
    column = local.clamp(0, tile.shape[1] - 1)[:, None]
    kept = tile.gather(1, column)[:, 0]
    tile.scatter_(1, column, torch.where(inside, values, kept)[:, None])


class _Chunk:
    """Logits of one chunk of rows as exp(z - m)·f', tile by tile, and their statistics."""

    def __init__(self, h: Tensor, weight: Tensor, y: Tensor, bias, head: Head, tile: int, keep):
        V = weight.shape[0]
        self.h, self.weight, self.y, self.head = h, weight, y, head
        # The target's own error goes straight into the log-prob: summed pairwise, not by the GEMM.
        u = weight[y].mul_(h).sum(1)
        self.zy = _cap(u if bias is None else u.add_(bias[y]), head)
        self.m = torch.full_like(self.zy, LOWEST)
        self.s = torch.zeros_like(self.zy)
        self.tiles: list[tuple[int, int, Tensor, Tensor]] = []
        for lo in range(0, V if h.shape[0] else 0, tile):
            hi = min(lo + tile, V)
            z = _dot(h, weight[lo:hi])
            z = _cap(z if bias is None else z.add_(bias[lo:hi]), head)
            _put(z, y - lo, self.zy)
            m = torch.maximum(self.m, z.amax(1))
            slope = _slope(z, head) if keep and head.softcap is not None else None
            z.sub_(m[:, None]).exp_()
            self.s = self.s * (self.m - m).exp() + z.sum(1)
            self.m = m
            if keep:
                self.tiles.append((lo, hi, z if slope is None else z.mul_(slope), m))
            del z
        self.logps = (self.zy - self.m) - self.s.log()

    def gradients(self, g: Tensor, dh: Tensor | None, dw: Tensor | None, db: Tensor | None, first):
        """Write dHidden of these rows, and add to (or, in the ``first`` chunk, write) the others.

        ``g`` [n] is the upstream of each log-prob. The logits' buffers are used up.
        """
        g = g * (self.head.scale / self.head.temperature)
        # -expm1(logp) is 1 - p without its cancellation.
        at_target = -g * torch.expm1(self.logps)
        if self.head.softcap is not None:
            at_target *= _slope(self.zy, self.head)
        if dh is not None:
            dh.zero_()
        while self.tiles:
            lo, hi, dz, m = self.tiles.pop(0)
            dz.mul_((-g * (m - self.m).exp() / self.s)[:, None])
            _put(dz, self.y - lo, at_target)
            if dh is not None:
                dh.add_(_dot(dz, self.weight[lo:hi].T))
            if dw is not None and first:
                dw[lo:hi] = _dot(dz.T, self.h.T)
            elif dw is not None:
                dw[lo:hi] += _dot(dz.T, self.h.T)
            if db is not None:
                db[lo:hi] += dz.sum(0)


def _ends(cu_seqlens: Tensor, kept: Tensor | None) -> list[int]:
    """Return the sequences' bounds over the rows that have a target."""
    if kept is None:
        return cu_seqlens.tolist()
    return torch.searchsorted(kept, cu_seqlens.to(kept.dtype)).tolist()


def _sequence_sums(logps: Tensor, ends: Sequence[int]) -> Tensor:
    first = ends[0]
    return torch.stack([logps[a - first : b - first].sum() for a, b in pairwise(ends)])


def _per_token(slopes: Tensor, ends: Sequence[int]) -> Tensor:
    """Spread slopes [b] over the tokens of chosen (+) and rejected (-) sequences."""
    signed = torch.stack([slopes, -slopes], -1).flatten()
    lengths = torch.tensor(ends).diff()
    return signed.repeat_interleave(lengths, output_size=ends[-1] - ends[0])


def _whole_pairs(
    hidden, weight, targets, bias, ref, ref_logps, weights, ends, kept, head, plan, loss, beta,
    label_smoothing, needs,
):  # fmt: skip
    """Return losses and rewards [B] and the gradients of their mean, at 3F."""
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
        if ref is None:
            reference = ref_logps[2 * first : 2 * last].to(dtype)
        else:
            rh, rw, rb = ref
            rb = None if rb is None else rb.to(dtype)
            like = _Chunk(rh[index], rw, y, rb, head, plan.vocab_tile, False)
            reference = _sequence_sums(like.logps, spans)
        w = None if weights is None else weights[first:last].to(dtype)
        *found, _, slopes = margin_losses(
            _sequence_sums(chunk.logps, spans), reference, loss, beta, label_smoothing, w
        )
        for values, part in zip(out, found, strict=True):
            values[first:last] = part
        if spans[0] == spans[-1]:
            continue
        g = _per_token(slopes / pairs, spans)
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


def _recompute(
    hidden, weight, targets, bias, ref, ref_logps, weights, ends, head, loss, beta,
    label_smoothing, ignore_index, needs, tiles,
):  # fmt: skip
    """Return the same at 4F, from the ops of ``linear_token_logps``; ``ends`` over all rows."""

    def logps(h, w, b):
        return torch.ops.prefalign.linear_token_logps(
            h, w, targets, b, *head, ignore_index, "", "recompute", "chunked", *tiles
        )

    stats = logps(hidden, weight, bias)
    dtype = stats[0].dtype
    reference = ref_logps.to(dtype) if ref is None else _sequence_sums(logps(*ref)[0], ends)
    w = None if weights is None else weights.to(dtype)
    *found, _, slopes = margin_losses(
        _sequence_sums(stats[0], ends), reference, loss, beta, label_smoothing, w
    )
    g = _per_token(slopes / slopes.shape[0], ends)
    grads = backward_op(
        g, None, hidden, weight, targets, bias, stats[6], stats[2], *head, ignore_index, needs,
        "chunked", *tiles,
    )  # fmt: skip
    return found, [x if letter in needs else None for letter, x in zip("hwb", grads, strict=True)]


@torch.library.custom_op("prefalign::linear_preference_loss", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    weights: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    loss: str,
    beta: float,
    label_smoothing: float,
    needs: str,
    row_chunk: int,
    vocab_tile: int,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean loss, both rewards, and the mean's gradients by the inputs in ``needs`` (of "hwb")."""
    _check_spans(cu_seqlens, hidden.shape[0])
    check_labels("targets", targets, weight.shape[0], ignore_index)
    pairs = cu_seqlens.shape[0] // 2
    if pairs == 0:
        return _allocate(hidden, weight, bias, pairs, needs, torch.zeros)
    head = Head(logit_scale, softcap, temperature)
    ref = None if ref_hidden is None else (
        ref_hidden, weight if ref_weight is None else ref_weight, ref_bias
    )  # fmt: skip
    live = targets != ignore_index
    kept = None if live.all() else live.nonzero()[:, 0]
    ends = _ends(cu_seqlens, kept)
    lengths = [b - a for a, b in pairwise(ends[::2])]
    plan = plan_pairs(
        lengths, *weight.shape, dtype=hidden.dtype, workspace_bytes=budget or None,
        device=hidden.device,
    )  # fmt: skip
    if plan.strategy == "whole_pairs":
        out, grads = _whole_pairs(
            hidden, weight, targets, bias, ref, ref_logps, weights, ends, kept, head, plan, loss,
            beta, label_smoothing, needs,
        )  # fmt: skip
    else:
        out, grads = _recompute(
            hidden, weight, targets, bias, ref, ref_logps, weights, cu_seqlens.tolist(), head,
            loss, beta, label_smoothing, ignore_index, needs, (row_chunk, vocab_tile, budget),
        )  # fmt: skip
    losses, *rewards = out
    grads = (hidden.new_empty(0) if x is None else x for x in grads)
    return losses.sum() / pairs, *(x.clone() for x in rewards), *grads


def _allocate(hidden, weight, bias, pairs, needs, make=torch.empty):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    device = hidden.device
    return (
        make((), dtype=dtype, device=device),
        *(make(pairs, dtype=dtype, device=device) for _ in range(2)),
        *(
            make(value.shape, dtype=value.dtype, device=device)
            if letter in needs
            else make(0, dtype=hidden.dtype, device=device)
            for letter, value in zip("hwb", (hidden, weight, bias), strict=True)
        ),
    )


@_op.register_fake
def _(hidden, weight, targets, bias, cu_seqlens, ref_logps, ref_hidden, ref_weight, ref_bias,
      weights, logit_scale, softcap, temperature, ignore_index, loss, beta, label_smoothing, needs,
      row_chunk, vocab_tile, budget):  # fmt: skip
    return _allocate(hidden, weight, bias, cu_seqlens.shape[0] // 2, needs)


def _setup_context(ctx, inputs, output):
    _, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(*output[3:])


@once_differentiable
def _backward(ctx, grad, *_):
    none = (None,) * 17
    if grad is None:
        return None, None, None, None, *none
    need_h, need_w, _, need_b = ctx.needs_input_grad[:4]
    dh, dw, db = ctx.saved_tensors
    return (
        dh * grad if need_h else None,
        dw * grad if need_w else None,
        None,
        db * grad if need_b else None,
        *none,
    )


_op.register_autograd(_backward, setup_context=_setup_context)


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    extrapolation: float = 0.0,
    alpha: float | Tensor | None = None,
    threshold: float | Tensor | None = None,
    reduction: str = "none",
    impl: str = "auto",
    plan: HeadPlan | None = None,
) -> PreferenceLoss | NoiseAwareLoss:
    """Return the preference loss of packed pairs straight from their hidden states.

    Equivalent PyTorch::

        logps = linear_token_logps(hidden, weight, targets, bias=bias)
        sums = sequence_logps(logps, cu_seqlens=cu_seqlens).sums
        out = preference_loss(sums[0::2], sums[1::2], ref_logps[0::2], ref_logps[1::2], beta=beta)
        losses = out.losses if reduction == "none" else out.losses.mean()

    Args:
        hidden: [N, D], float16, bfloat16, float32 or float64; the last hidden states of all
            responses end to end: chosen, rejected, chosen, rejected, and so on.
        weight: [V, D], the dtype of ``hidden``; the head's weight.
        targets: [N], int64 (or int32); the token to score, or ``ignore_index`` (prompt rows).
        cu_seqlens: [2B + 1], int32 or int64: sequence s is the rows
            ``cu_seqlens[s]:cu_seqlens[s + 1]``; from 0 to N.
        ref_logps: [2B], float: the reference's summed log-probs. A constant.
        ref_hidden: the shape and dtype of ``hidden``: the reference's hidden states, in place of
            ``ref_logps``; its log-probs are computed here, without a gradient, at 1F.
        ref_weight: [V, D], the reference's head; None (default): both share ``weight``.
        ref_bias: [V] or None. With a shared head it defaults to ``bias``.
        bias: [V], any float dtype, or None.
        logit_scale: factor on the logits; default 1. It and the next two hold for both models.
        softcap: Gemma-2's cap on the logits, above 0, or None.
        temperature: divides the logits, after the cap; above 0, default 1.
        ignore_index: target of rows that do not count: no share in any sum, no gradient, and on a
            CPU no GEMM. (On a GPU, knowing their number would be a host sync: they are computed
            and masked.) Default -100.
        loss: a name in ``losses.LOSSES``, or ``"noise_aware"``. Default ``"sigmoid"``, DPO.
        beta: scale of the margin, per nat. Above 0, default 0.1.
        label_smoothing: probability that a label is flipped, in [0, 0.5]. Default 0.
        weights: [B], float, multiplies the losses. A constant. Default None, all 1.
        extrapolation: SPA's lambda, for ``"noise_aware"``; default 0, where extrapolated and
            policy are one. Any other value needs ``ref_hidden``.
        alpha: as in ``noise_aware_loss``, default 0.1; ``"noise_aware"`` alone takes it.
        threshold: likewise; ``"noise_aware"`` needs it.
        reduction: ``"none"``, a loss for each pair, or ``"mean"``, their sum over B (0 where B is
            0; weighted losses are summed, not renormalised). Default ``"none"``.
        impl: ``"auto"`` (Triton on a GPU, else chunked), ``"triton"``, ``"chunked"`` or
            ``"reference"`` (eager, forms the logits).
        plan: a ``HeadPlan``, as in ``linear_token_logps``; its budget is also that of 3F's chunks.

    Returns:
        ``PreferenceLoss(losses, chosen_rewards, rejected_rewards)`` (for ``"noise_aware"`` a
        ``NoiseAwareLoss``, with ``is_noisy`` and ``confidences``), [B] each, the losses [] with
        ``"mean"``; float32 (float64 for float64 inputs). Only the losses are differentiable, once,
        in ``hidden``, ``weight`` and ``bias``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, an
            option that the loss does not take, a label outside [0, V).

    Numerics: as in ``linear_token_logps`` and ``pair_loss_head``. With ``ref_hidden`` equal to
    ``hidden`` and one head the loss is float32(log 2) exactly. Under ``ref_logps`` that were
    computed by ``linear_token_logps`` at the same shape it is so too but on the 3F path, whose
    tiles are others: there to float32 rounding. Deterministic bit for bit.

    Cost: the table above, plus 1F with ``ref_hidden``. Under ``torch.no_grad`` 1F.

    Source: DPO (arXiv 2305.18290, equation 7), whose margin is one scalar for all tokens of a
    sequence; SPA (arXiv 2406.04412).
    """
    hidden, weight, ref_hidden, ref_weight = autocast(hidden, weight, ref_hidden, ref_weight)
    check_tensor("hidden", hidden, ndim=2)
    head = check_head(
        hidden, weight, targets, bias, logit_scale, softcap, temperature, ignore_index
    )
    like = ("hidden", hidden)
    pairs = check_pair_bounds(cu_seqlens, like)
    _check_reference(hidden, weight, ref_logps, ref_hidden, ref_weight, ref_bias, pairs)
    if weights is not None:
        check_tensor("weights", weights, shape=(pairs,), like=like, constant=True)
    check_choice("reduction", reduction, REDUCTIONS)
    beta = check_number("beta", beta, above=0)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    label_smoothing, alpha, threshold = check_loss(
        loss, label_smoothing, alpha, threshold, like, dtype
    )
    extrapolation = check_number("extrapolation", extrapolation)
    if extrapolation and (loss != NOISE_AWARE or ref_hidden is None):
        raise ValueError(
            "extrapolation: expected 0, or loss='noise_aware' with ref_hidden; got "
            f"{extrapolation} with {loss!r} and "
            f"{'no ref_hidden' if ref_hidden is None else 'ref_hidden'}"
        )
    impl = resolve_impl(impl, hidden.device, hidden.dtype)
    if ref_weight is None and ref_bias is None and ref_hidden is not None:
        ref_bias = bias
    strategy, tiles = choose_strategy(plan, hidden, weight, bias)
    ref = tuple(x if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias))
    if (
        reduction == "mean"
        and strategy == "recompute"
        and impl == "chunked"
        and loss != NOISE_AWARE
        and hidden.dtype.itemsize > 2
        and (weight.requires_grad or (bias is not None and bias.requires_grad))
    ):
        needs = which_grads(
            hidden.requires_grad,
            weight.requires_grad,
            bias is not None and bias.requires_grad,
        )
        mean, chosen_rewards, rejected_rewards, *_ = _op(
            hidden, weight, targets.long().contiguous(), bias, cu_seqlens.contiguous(), ref_logps,
            *ref, weights, *head, ignore_index, loss, beta, label_smoothing, needs, *tiles,
        )  # fmt: skip
        return PreferenceLoss(mean, chosen_rewards, rejected_rewards)
    options = {
        "logit_scale": head.scale,
        "softcap": head.softcap,
        "temperature": head.temperature,
        "ignore_index": ignore_index,
        "impl": impl,
        "plan": plan,
    }
    ref_tokens = extrapolated = None
    if loss == NOISE_AWARE and ref_hidden is not None:
        policy, ref_tokens, extrapolated = linear_token_logps_triple(
            hidden, ref[0], weight, targets, ref_weight=ref[1], ref_bias=ref[2], bias=bias,
            extrapolation=extrapolation, **options,
        )  # fmt: skip
    else:
        policy = linear_token_logps(hidden, weight, targets, bias=bias, **options)
        if ref_hidden is not None:
            shared = weight if ref[1] is None else ref[1]
            with torch.no_grad():
                ref_tokens = linear_token_logps(ref[0], shared, targets, bias=ref[2], **options)
        extrapolated = policy.detach() if loss == NOISE_AWARE else None
    out = pair_loss_head(
        policy, cu_seqlens=cu_seqlens, ref_logps=ref_logps, ref_token_logps=ref_tokens,
        extrapolated_token_logps=extrapolated, loss=loss, beta=beta, alpha=alpha,
        label_smoothing=label_smoothing, threshold=threshold, weights=weights, impl=impl,
    )  # fmt: skip
    losses = out.losses if reduction == "none" else out.losses.sum() / max(1, pairs)
    if loss == NOISE_AWARE:
        return NoiseAwareLoss(losses, *out[1:3], out.is_noisy, out.confidences)
    return PreferenceLoss(losses, *out[1:3])


def _check_reference(hidden, weight, ref_logps, ref_hidden, ref_weight, ref_bias, pairs):
    like = ("hidden", hidden)
    if (ref_logps is None) == (ref_hidden is None):
        got = "neither" if ref_logps is None else "both"
        raise ValueError(f"ref_logps, ref_hidden: expected exactly one of them, got {got}")
    if ref_logps is not None:
        check_tensor("ref_logps", ref_logps, shape=(2 * pairs,), like=like, constant=True)
        for name, value in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if value is not None:
                raise ValueError(f"{name}: expected None with ref_logps, got a tensor")
        return
    same = (hidden.dtype,)
    check_tensor("ref_hidden", ref_hidden, dtypes=same, shape=hidden.shape, like=like)
    if ref_weight is not None:
        check_tensor("ref_weight", ref_weight, dtypes=same, shape=weight.shape, like=like)
    if ref_bias is not None:
        check_tensor("ref_bias", ref_bias, shape=weight.shape[:1], like=like)
