"""The Triton kernels of ``token_logps``: one pass over a row's logits each way.

Where the rows are too few to fill the card, a row is reduced in several splits of the vocabulary,
which a second kernel folds in their order.

``stats`` are logps, row_max, log_sum, entropy, mean, is_top1 and sum_sq, each ``[N]``, or ``[0]``
where the output was not asked for.
"""

from __future__ import annotations

from ._common import jit, row_views, store_rounded, tanh, tl, triton
from .configs import row_for


@jit
def _fold(m, total, total_sq, moment, m_i, total_i, total_sq_i, moment_i, inv_temperature):
    """Fold the sums of a tile or split, taken at its maximum ``m_i``, into those so far."""
    m_new = tl.maximum(m, m_i)
    # All of -inf so far: any finite shift gives exp(-inf) = 0.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    step = tl.where(m == float("-inf"), 0.0, (m - shift) * inv_temperature)
    step_i = tl.where(m_i == float("-inf"), 0.0, (m_i - shift) * inv_temperature)
    a = tl.exp(step)
    b = tl.exp(step_i)
    moment = a * (moment + total * step) + b * (moment_i + total_i * step_i)
    total = total * a + total_i * b
    total_sq = total_sq * a * a + total_sq_i * b * b
    return m_new, total, total_sq, moment


@jit
def _finish(
    row,
    valid,
    target,
    logits_ptr,
    logps_ptr,
    max_ptr,
    log_sum_ptr,
    entropy_ptr,
    mean_ptr,
    top1_ptr,
    sum_sq_ptr,
    stride_v,
    V,
    temperature,
    softcap,
    m,
    total,
    total_sq,
    moment,
    total_y,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    TOP1: tl.constexpr,
    SUM_SQ: tl.constexpr,
):
    """Write one row's outputs from its sums."""
    # A label out of range has been caught by an asynchronous assertion, but must not be read.
    in_range = valid & (target >= 0) & (target < V)
    x_target = tl.load(logits_ptr + target * stride_v, mask=in_range, other=0.0).to(tl.float32)
    y_target = softcap * tanh(x_target / softcap) if SOFTCAP else x_target
    log_sum = tl.log(total)
    logp = tl.div_rn(y_target - m, temperature) - log_sum
    tl.store(logps_ptr + row, tl.where(valid, logp, 0.0))
    tl.store(max_ptr + row, tl.where(valid, m, 0.0))
    tl.store(log_sum_ptr + row, tl.where(valid, log_sum, 0.0))
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(valid, log_sum - moment / total, 0.0))
    if MEAN:
        tl.store(mean_ptr + row, tl.where(valid, total_y / V / temperature, 0.0))
    if TOP1:
        tl.store(top1_ptr + row, valid & (y_target >= m))
    if SUM_SQ:
        tl.store(sum_sq_ptr + row, tl.where(valid, tl.log(total_sq) - 2.0 * log_sum, 0.0))


@jit
def _forward_kernel(
    logits_ptr,
    targets_ptr,
    logps_ptr,
    max_ptr,
    log_sum_ptr,
    entropy_ptr,
    mean_ptr,
    top1_ptr,
    sum_sq_ptr,
    part_ptr,
    stride_outer,
    stride_inner,
    stride_v,
    n_inner,
    V,
    num_splits,
    split_size,
    stride_part,
    temperature,
    softcap,
    ignore_index,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    TOP1: tl.constexpr,
    SUM_SQ: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Reduce one split of one row in one pass over its tiles, with a running maximum."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    target = tl.load(targets_ptr + row)
    valid = target != ignore_index
    logits_ptr += (row // n_inner) * stride_outer + (row % n_inner) * stride_inner

    inv_temperature = 1.0 / temperature
    m = float("-inf")
    total = 0.0
    total_sq = 0.0
    moment = 0.0  # sum of exp(u) * u, where u = (y - m) / temperature
    total_y = 0.0
    end = tl.minimum(split * split_size + split_size, V)
    for start in range(split * split_size, tl.where(valid, end, 0), BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        x = tl.load(
            logits_ptr + offs_v.to(tl.int64) * stride_v, mask=mask_v, other=float("-inf")
        ).to(tl.float32)
        y = tl.where(mask_v, softcap * tanh(x / softcap), float("-inf")) if SOFTCAP else x
        m_new = tl.maximum(m, tl.max(y, axis=0))
        # A tile, or all so far, of -inf: any finite shift gives exp(-inf) = 0.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        step = tl.where(m == float("-inf"), 0.0, (m - shift) * inv_temperature)
        rescale = tl.exp(step)
        u = (y - shift) * inv_temperature
        e = tl.exp(u)
        if ENTROPY:
            tile_moment = tl.sum(tl.where(e == 0.0, 0.0, e * u), axis=0)
            moment = rescale * (moment + total * step) + tile_moment
        total = total * rescale + tl.sum(e, axis=0)
        if SUM_SQ:
            total_sq = total_sq * rescale * rescale + tl.sum(e * e, axis=0)
        if MEAN:
            total_y += tl.sum(tl.where(mask_v, y, 0.0), axis=0)
        m = m_new

    if SPLIT:
        part_ptr += row * num_splits + split
        tl.store(part_ptr, m)
        tl.store(part_ptr + stride_part, total)
        if SUM_SQ:
            tl.store(part_ptr + 2 * stride_part, total_sq)
        if ENTROPY:
            tl.store(part_ptr + 3 * stride_part, moment)
        if MEAN:
            tl.store(part_ptr + 4 * stride_part, total_y)
    else:
        _finish(
            row, valid, target, logits_ptr, logps_ptr, max_ptr, log_sum_ptr, entropy_ptr, mean_ptr,
            top1_ptr, sum_sq_ptr, stride_v, V, temperature, softcap, m, total, total_sq, moment,
            total_y, SOFTCAP, ENTROPY, MEAN, TOP1, SUM_SQ,
        )  # fmt: skip


@jit
def _combine_kernel(
    logits_ptr,
    targets_ptr,
    logps_ptr,
    max_ptr,
    log_sum_ptr,
    entropy_ptr,
    mean_ptr,
    top1_ptr,
    sum_sq_ptr,
    part_ptr,
    stride_outer,
    stride_inner,
    stride_v,
    n_inner,
    V,
    num_splits,
    stride_part,
    temperature,
    softcap,
    ignore_index,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    TOP1: tl.constexpr,
    SUM_SQ: tl.constexpr,
):
    """Fold the splits of one row, in their order, and write its outputs."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    valid = target != ignore_index
    logits_ptr += (row // n_inner) * stride_outer + (row % n_inner) * stride_inner
    inv_temperature = 1.0 / temperature
    m = float("-inf")
    total = 0.0
    total_sq = 0.0
    moment = 0.0
    total_y = 0.0
    part_ptr += row * num_splits
    for split in range(num_splits):
        at = part_ptr + split
        total_sq_i = tl.load(at + 2 * stride_part) if SUM_SQ else 0.0
        moment_i = tl.load(at + 3 * stride_part) if ENTROPY else 0.0
        if MEAN:
            total_y += tl.load(at + 4 * stride_part)
        m, total, total_sq, moment = _fold(
            m, total, total_sq, moment, tl.load(at), tl.load(at + stride_part), total_sq_i,
            moment_i, inv_temperature,
        )  # fmt: skip
    _finish(
        row, valid, target, logits_ptr, logps_ptr, max_ptr, log_sum_ptr, entropy_ptr, mean_ptr,
        top1_ptr, sum_sq_ptr, stride_v, V, temperature, softcap, m, total, total_sq, moment,
        total_y, SOFTCAP, ENTROPY, MEAN, TOP1, SUM_SQ,
    )  # fmt: skip


@jit
def _backward_kernel(
    grad_ptr,
    grad_logps_ptr,
    grad_entropy_ptr,
    logits_ptr,
    targets_ptr,
    max_ptr,
    log_sum_ptr,
    entropy_ptr,
    stride_grad_logps,
    stride_grad_entropy,
    stride_outer,
    stride_inner,
    stride_v,
    n_inner,
    V,
    temperature,
    softcap,
    ignore_index,
    SOFTCAP: tl.constexpr,
    LOGPS: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write one tile of one row of the gradient; every tile is on its own."""
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    target = tl.load(targets_ptr + row)
    valid = target != ignore_index
    logits_ptr += (row // n_inner) * stride_outer + (row % n_inner) * stride_inner
    mask_read = offs_v < tl.where(valid, V, 0)
    x = tl.load(logits_ptr + offs_v.to(tl.int64) * stride_v, mask=mask_read, other=0.0).to(
        tl.float32
    )
    y = x
    inv_temperature = 1.0 / temperature
    slope = inv_temperature
    if SOFTCAP:
        t = tanh(x / softcap)
        y = softcap * t
        slope = (1.0 - t) * (1.0 + t) * inv_temperature
    m = tl.load(max_ptr + row)
    logp = (y - m) * inv_temperature - tl.load(log_sum_ptr + row)
    p = tl.exp(logp)
    grad = tl.zeros([BLOCK_V], tl.float32)
    if LOGPS:
        upstream = tl.load(grad_logps_ptr + row * stride_grad_logps).to(tl.float32)
        grad += tl.where(offs_v == target, upstream, 0.0) - upstream * p
    if ENTROPY:
        upstream_h = tl.load(grad_entropy_ptr + row * stride_grad_entropy).to(tl.float32)
        entropy = tl.load(entropy_ptr + row)
        grad -= tl.where(p == 0.0, 0.0, upstream_h * p * (logp + entropy))
    grad = tl.where(valid, grad * slope, 0.0)
    store_rounded(grad_ptr + row * V + offs_v, grad, offs_v < V)


def _launch_options(logits) -> dict[str, int]:
    row = row_for(logits.device)
    block = min(row.token_block, max(16, triton.next_power_of_2(logits.shape[-1])))
    return {"BLOCK_V": block, "num_warps": row.token_warps if block >= 2048 else 4}


def split_rows(rows: int, vocab: int, block: int, programs: int) -> tuple[int, int]:
    """Return (splits, their size): as many as it takes for ``rows`` to make ``programs``."""
    blocks = triton.cdiv(vocab, block)
    size = triton.cdiv(blocks, min(blocks, triton.cdiv(programs, max(rows, 1)))) * block
    return triton.cdiv(vocab, size), size


def forward(logits, targets, temperature, softcap, ignore_index, stats):
    vocab = logits.shape[-1]
    options = _launch_options(logits)
    programs = row_for(logits.device).programs
    flags = {
        "SOFTCAP": softcap is not None,
        "ENTROPY": stats[3].numel() > 0,
        "MEAN": stats[4].numel() > 0,
        "TOP1": stats[5].numel() > 0,
        "SUM_SQ": stats[6].numel() > 0,
    }
    for view, first in row_views(logits):
        outer, inner, _ = view.shape
        n = outer * inner
        rows = [stat[first : first + n] for stat in stats]
        splits, size = split_rows(n, vocab, options["BLOCK_V"], programs)
        part = stats[0].new_empty((5, n, splits)) if splits > 1 else stats[0]
        pointers = (view, targets[first:], *rows, part)
        shape = (*view.stride(), inner, vocab, splits)
        scalars = (n * splits, temperature, softcap or 1.0, ignore_index)
        _forward_kernel[(n, splits)](
            *pointers, *shape, size, *scalars, **flags, SPLIT=splits > 1, **options
        )
        if splits > 1:
            _combine_kernel[(n,)](*pointers, *shape, *scalars, **flags, num_warps=1)


def backward(grad, grads, logits, targets, stats, temperature, softcap, ignore_index):
    vocab = logits.shape[-1]
    options = _launch_options(logits)
    grad_logps, grad_entropy = grads
    row_max, log_sum, entropy = stats
    for view, first in row_views(logits):
        outer, inner, _ = view.shape
        _backward_kernel[(outer * inner, triton.cdiv(vocab, options["BLOCK_V"]))](
            grad[first:],
            None if grad_logps is None else grad_logps[first:],
            None if grad_entropy is None else grad_entropy[first:],
            view,
            targets[first:],
            row_max[first:],
            log_sum[first:],
            entropy[first:],
            0 if grad_logps is None else grad_logps.stride(0),
            0 if grad_entropy is None else grad_entropy.stride(0),
            *view.stride(),
            inner,
            vocab,
            temperature,
            softcap or 1.0,
            ignore_index,
            SOFTCAP=softcap is not None,
            LOGPS=grad_logps is not None,
            ENTROPY=grad_entropy is not None,
            **options,
        )
