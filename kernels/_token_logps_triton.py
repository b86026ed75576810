"""The Triton kernels of ``token_logps``: one pass over a row's logits each way.

``stats`` are logps, row_max, log_sum, entropy, mean, is_top1 and sum_sq, each ``[N]``, or ``[0]``
where the output was not asked for.
"""

from __future__ import annotations

from ._common import jit, row_views, store_rounded, tanh, tl, triton

BLOCK_V = 4096
"""Elements a program holds at once: 16 a thread with 8 warps, enough loads in flight."""


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
    stride_outer,
    stride_inner,
    stride_v,
    n_inner,
    V,
    temperature,
    softcap,
    ignore_index,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    TOP1: tl.constexpr,
    SUM_SQ: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Reduce one row in one pass over tiles of the vocabulary, with a running maximum."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    valid = target != ignore_index
    logits_ptr += (row // n_inner) * stride_outer + (row % n_inner) * stride_inner
    # A label out of range has been caught by an asynchronous assertion, but must not be read.
    in_range = valid & (target >= 0) & (target < V)
    x_target = tl.load(logits_ptr + target * stride_v, mask=in_range, other=0.0).to(tl.float32)
    y_target = softcap * tanh(x_target / softcap) if SOFTCAP else x_target

    inv_temperature = 1.0 / temperature
    m = float("-inf")
    total = 0.0
    total_sq = 0.0
    moment = 0.0  # sum of exp(u) * u, where u = (y - m) / temperature
    total_y = 0.0
    for start in range(0, tl.where(valid, V, 0), BLOCK_V):
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

    log_sum = tl.log(total)
    logp = tl.div_rn(y_target - m, temperature) - log_sum
    tl.store(logps_ptr + row, tl.where(valid, logp, 0.0))
    tl.store(max_ptr + row, tl.where(valid, m, 0.0))
    tl.store(log_sum_ptr + row, tl.where(valid, log_sum, 0.0))
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(valid, log_sum - moment / total, 0.0))
    if MEAN:
        tl.store(mean_ptr + row, tl.where(valid, total_y / V * inv_temperature, 0.0))
    if TOP1:
        tl.store(top1_ptr + row, valid & (y_target >= m))
    if SUM_SQ:
        tl.store(sum_sq_ptr + row, tl.where(valid, tl.log(total_sq) - 2.0 * log_sum, 0.0))


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


def _launch_options(vocab: int) -> dict[str, int]:
    block = min(BLOCK_V, max(16, triton.next_power_of_2(vocab)))
    return {"BLOCK_V": block, "num_warps": 8 if block >= 2048 else 4}


def forward(logits, targets, temperature, softcap, ignore_index, stats):
    vocab = logits.shape[-1]
    for view, first in row_views(logits):
        outer, inner, _ = view.shape
        rows = [stat[first : first + outer * inner] for stat in stats]
        _forward_kernel[(outer * inner,)](
            view,
            targets[first:],
            *rows,
            *view.stride(),
            inner,
            vocab,
            temperature,
            softcap or 1.0,
            ignore_index,
            SOFTCAP=softcap is not None,
            ENTROPY=stats[3].numel() > 0,
            MEAN=stats[4].numel() > 0,
            TOP1=stats[5].numel() > 0,
            SUM_SQ=stats[6].numel() > 0,
            **_launch_options(vocab),
        )


def backward(grad, grads, logits, targets, stats, temperature, softcap, ignore_index):
    vocab = logits.shape[-1]
    options = _launch_options(vocab)
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
