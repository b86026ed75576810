"""The chunked torch path of ``token_logps``: a few rows at a time, no float32 copy of the whole.

``stats`` are logps, row_max, log_sum, entropy, mean, is_top1 and sum_sq, each ``[N]``, or ``[0]``
where the output was not asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._common import compute_dtype, row_views

CHUNK_BYTES = 8 << 20
"""Size of the temporaries, all together: about what the caches of one core hold."""


def _chunks(logits: Tensor, copies: int) -> Iterator[tuple[Tensor, slice]]:
    """Yield ``([a, b, V] view, its rows)``, so small that ``copies`` of it fit the budget."""
    row_bytes = logits.shape[-1] * copies * compute_dtype(logits).itemsize
    rows = max(1, CHUNK_BYTES // row_bytes)
    for view, first in row_views(logits):
        outer, inner, _ = view.shape
        if inner > rows:
            for i, j in itertools.product(range(outer), range(0, inner, rows)):
                start = first + i * inner + j
                yield view[i : i + 1, j : j + rows], slice(start, start + min(rows, inner - j))
        else:
            step = max(1, rows // max(1, inner))
            for i in range(0, outer, step):
                start = first + i * inner
                yield view[i : i + step], slice(start, start + min(step, outer - i) * inner)


def forward(logits, targets, temperature, softcap, ignore_index, stats):
    logps, row_max, log_sum, entropy, mean, is_top1, sum_sq = stats
    vocab = logits.shape[-1]
    for view, rows in _chunks(logits, copies=4):
        x = view.to(logps.dtype)
        y = x if softcap is None else x.div(softcap).tanh_().mul_(softcap)
        valid = targets[rows] != ignore_index
        index = torch.where(valid, targets[rows], 0).view(*x.shape[:2], 1)
        m = y.amax(-1, keepdim=True)
        u = y - m
        if temperature != 1.0:
            u.div_(temperature)
        u_target = u.gather(-1, index)
        if entropy.numel():
            e = u.exp()
            total = e.sum(-1, keepdim=True)
            # -inf logits: 0 * -inf is 0 here.
            moment = e.mul_(u.masked_fill_(u == -math.inf, 0)).sum(-1, keepdim=True)
        else:
            total = u.exp_().sum(-1, keepdim=True)
        log_total = total.log()

        def keep(stat, value, rows=rows, valid=valid):
            stat[rows] = torch.where(valid, value.reshape(-1), 0)

        keep(logps, u_target - log_total)
        keep(row_max, m)
        keep(log_sum, log_total)
        if entropy.numel():
            keep(entropy, log_total - moment / total)
        if mean.numel():
            keep(mean, y.sum(-1) / vocab / temperature)
        if is_top1.numel():
            keep(is_top1, u_target >= 0)
        if sum_sq.numel():
            e = (y - m).mul_(2 / temperature).exp_()
            keep(sum_sq, e.sum(-1, keepdim=True).log() - 2 * log_total)


def backward(grad, grads, logits, targets, stats, temperature, softcap, ignore_index):
    row_max, log_sum, entropy = stats
    grad_logps, grad_entropy = grads
    for view, rows in _chunks(logits, copies=5):
        shape = (*view.shape[:2], 1)
        y = view.to(log_sum.dtype)
        if softcap is not None:
            t = y.div(softcap).tanh_()
            y = t * softcap
        valid = targets[rows] != ignore_index
        index = torch.where(valid, targets[rows], 0).view(shape)
        out = grad[rows].view(view.shape)
        direct = out.dtype == y.dtype
        log_p = torch.sub(y, row_max[rows].view(shape), out=out if direct else None)
        if temperature != 1.0:
            log_p.div_(temperature)
        log_p.sub_(log_sum[rows].view(shape))
        if grad_entropy is None:
            slope = log_p.exp_().mul_(grad_logps[rows].view(shape).neg())
        else:
            p = log_p.exp()
            log_p.masked_fill_(p == 0, 0).add_(entropy[rows].view(shape))
            slope = log_p.mul_(grad_entropy[rows].view(shape))
            if grad_logps is not None:
                slope.add_(grad_logps[rows].view(shape))
            slope.mul_(p).neg_()
        if grad_logps is not None:
            at_target = slope.gather(-1, index).add_(grad_logps[rows].view(shape))
            slope.scatter_(-1, index, at_target)
        if temperature != 1.0:
            slope.div_(temperature)
        if softcap is not None:
            slope.mul_(1 - t).mul_(t.add_(1))
        slope.masked_fill_(~valid.view(shape), 0)
        if not direct:
            out.copy_(slope)
