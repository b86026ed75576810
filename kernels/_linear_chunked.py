"""The linear head's log-probs in plain torch, tile by tile: what runs on a CPU.

For a chunk of rows and a tile of vocabulary entries, with ``k = logit_scale / temperature``:

    z = f(hidden @ weight.T + bias), but z_y = -inf      one GEMM
    m' = m or, far above it, max_v z;  r = exp(m - m')   online log-sum-exp
    e = exp(z - m');  s' = r·s + sum_v e
    A' = r·A + (e·f') @ weight                           only for the row Jacobian
    at the end: logp = -log(1 + s·exp(m - z_y)), p_y = exp(logp),
                J = k·(f'_y·(1 - p_y)·weight[y] - p_y·exp(m - z_y)·A)

A low-rank adapter adds low @ up.T to the first line's sum and has a Jacobian of its own, with
``up`` in the place of ``weight``.

The triple does the same for two logits tiles over one weight tile and takes the extrapolated logits
from the two. Nothing has N·V elements.

Logits of 16-bit inputs are made by a float32 GEMM, so that none is rounded; bfloat16-valued float32
numbers may go through oneDNN's bfloat16 path, where the products are exact and the sums float32.
What only feeds a gradient (e, and the logits' gradients) is rounded to bfloat16 for a true
bfloat16 GEMM, twice as fast, whose tiles are summed in float32.

The target's own entry is kept out of all sums and GEMMs and joins them at the end: a confident
token has a log-prob and a Jacobian near 0, which p_y near 1 would drown, and its gradient in the
weight is so much larger than the others' that adding those to it one by one would lose them.
"""

from __future__ import annotations

import torch

from ._common import compute_dtype
from ._head_math import (
    Slices,
    Tiles,
    bias_part,
    cap_slope,
    gemm_precision,
    logits,
    put,
    rows_with_targets,
    target_logits,
)
from ._linear_chunked_backward import backward as backward
from ._low_rank import Factors, times
from ._online import JacobianSum, Online

_TILES_A_GEMM = 4  # of rounded operands; the tiles themselves are small, to stay in the caches


def forward(
    hidden, weight, targets, bias, head, ignore_index, extras, jacobian, rows, tile, reference=None,
    adapter=None,
):  # fmt: skip
    """Return ({name: [N] statistic}, norm [2, N], J [N, D], J [N, r]) of the head's rows.

    The Jacobians, by hidden and by the adapter's ``low``, are None where they are not asked for.

    ``norm`` is (m, s), from which backward makes p = exp(z - m) / s. With a ``reference`` the dict
    also has ``"reference"`` and ``"extrapolated"`` log-probs.
    """
    N, D = hidden.shape
    V = weight.shape[0]
    dtype = compute_dtype(hidden)
    names = ("logps", "lse", *extras) + (("reference", "extrapolated") if reference else ())
    result = {
        name: hidden.new_zeros(N, dtype=torch.bool if name == "is_top1" else dtype)
        for name in names
    }
    norm = hidden.new_ones(2, N, dtype=dtype)
    J = hidden.new_zeros(N, D) if jacobian else None
    J_low = torch.zeros_like(adapter.low) if jacobian and adapter else None
    kept = rows_with_targets(targets, ignore_index)
    total = N if kept is None else kept.numel()
    if total == 0:
        return result, norm, J, J_low
    rows = min(rows, total)
    sloped = jacobian and head.softcap is not None
    # The first: extrapolated, or scratch of the extras. The last: the slope.
    tiles = Tiles(hidden, dtype, rows, tile, (bool(extras) or reference is not None) + sloped)
    slices = Slices(weight, dtype, tile)
    ref_slices = None
    if reference and reference.weight is not None:
        ref_slices = Slices(reference.weight, dtype, tile)
    if jacobian:
        # In the room that is left where no other tiles are held.
        width = tile if extras or reference or sloped else min(V, _TILES_A_GEMM * tile)
        product = JacobianSum(weight, dtype, rows, width)
    factors = Factors(adapter, hidden) if adapter else None
    low = up = None
    with gemm_precision(hidden):
        for start in range(0, total, rows):
            end = min(start + rows, total)
            index = slice(start, end) if kept is None else kept[start:end]
            n = end - start
            h = hidden[index].to(dtype)
            y = targets[index]
            here = adapter.at(index) if adapter else None
            stats = Online(target_logits(h, weight, y, bias, head, here), extras)
            if jacobian:
                product.begin(n)
            if adapter:
                low = factors.rows(index)
                acc_low = torch.zeros_like(here.low) if jacobian else None
            if reference:
                ref_h = reference.hidden[index].to(dtype)
                ref_w = weight if reference.weight is None else reference.weight
                ref_stats = Online(target_logits(ref_h, ref_w, y, reference.bias, head))
                ext_stats = Online(
                    _extrapolate(stats.zy, ref_stats.zy, reference.extrapolation, bias is not None)
                )
            for lo in range(0, V, tile):
                hi = min(lo + tile, V)
                v = hi - lo
                w = slices(lo, hi)
                local = (y - lo).clamp_(0, v - 1)[:, None]
                inside = (y >= lo) & (y < hi)
                if adapter:
                    up = factors.entries(lo, hi)
                z = logits(h, w, bias_part(bias, lo, hi), head, low, up)
                if reference:
                    ref_w = w if ref_slices is None else ref_slices(lo, hi)
                    ref_z = logits(ref_h, ref_w, bias_part(reference.bias, lo, hi), head)
                    ext = tiles.view(0, n, v)
                    _extrapolate(z, ref_z, reference.extrapolation, bias is not None, out=ext)
                    for other, values in ((ext_stats, ext), (ref_stats, ref_z)):
                        put(values, local, inside, -torch.inf)
                        other.update(values)
                    del ref_z, values
                slope = cap_slope(z, head, tiles.view(-1, n, v)) if sloped else None
                if "is_top1" in extras:
                    # The GEMM's own: of equal logits none is above the other.
                    stats.sums["is_top1"] += torch.where(inside, z.gather(1, local)[:, 0], 0)
                if "mean_logits" in extras:
                    put(z, local, inside, 0)
                    stats.sums["mean_logits"] += z.sum(1)
                put(z, local, inside, -torch.inf)
                e, r = stats.update(z, tiles.view(0, n, v) if extras else None)
                if jacobian:
                    e = e if slope is None else e.mul_(slope)
                    if r is not None:
                        product.rescale(r)
                    product.add(e, w, lo)
                    if adapter:
                        if r is not None:
                            acc_low.mul_(r[:, None])
                        acc_low.add_(times(e, up))
                del z, e  # before the next tile is made
            out = stats.finish(V)
            if reference:
                out["reference"] = ref_stats.finish(V)["logps"]
                out["extrapolated"] = ext_stats.finish(V)["logps"]
            for name in names:
                result[name][index] = out[name]
            norm[0, index], norm[1, index] = stats.m, stats.s
            if jacobian:
                logps = out["logps"]
                J[index] = _finish_jacobian(product.finish(), stats, logps, weight, y, head).to(
                    J.dtype
                )
                if adapter:
                    J_low[index] = _finish_jacobian(acc_low, stats, logps, adapter.up, y, head)
    if targets.is_cuda:
        live = targets != ignore_index
        result = {name: value.masked_fill(~live, 0) for name, value in result.items()}
        norm.masked_fill_(~live, 1)
        for jac in (J, J_low):
            if jac is not None:
                jac.masked_fill_(~live[:, None], 0)
    return result, norm, J, J_low


def _extrapolate(z, ref_z, extrapolation: float, biased: bool, out=None):
    ext = torch.mul(ref_z, -extrapolation, out=out).add_(z, alpha=1.0 + extrapolation)
    # -inf in both (a padded vocabulary) is -inf, not NaN; only a bias makes it.
    return ext.masked_fill_(z == -torch.inf, -torch.inf) if biased else ext


def _finish_jacobian(acc, stats, logps, weight, y, head):
    """k·(f'_y·(1 - p_y)·weight[y] - acc / s), in the accumulator's buffer."""
    acc.mul_((-stats.shrink / stats.s)[:, None])
    factor = torch.expm1(logps).neg_()
    if head.softcap is not None:
        factor *= cap_slope(stats.zy, head, torch.empty_like(stats.zy))
    acc.addcmul_(factor[:, None], weight[y.clamp(0, weight.shape[0] - 1)].to(acc.dtype))
    return acc.mul_(head.scale / head.temperature)
