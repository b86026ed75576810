"""Weights of a pair's tokens (LD-DPO) and of a pair (WPO), from what a batch already holds.

Sequences lie end to end and pair b is the sequences 2b and 2b + 1, as in ``pair_loss_head``. With
n_s the tokens of sequence s that the mask keeps and t = 1, 2, ... counting them::

    LD-DPO   weights[t of s] = 1 if t <= min(n_2b, n_2b+1) else ld_alpha
    WPO      weights[b] = exp(mean_t(a_t) of 2b + mean_t(a_t) of 2b + 1),
             a_t = logp_t - log sum_v p_tv^2

Shapes: tokens ``[N]``, ``cu_seqlens`` ``[2B + 1]``. Both are elementwise work and sums over N
numbers, next to a head's 2·N·D·V operations: plain torch, and for WPO's sums ``sequence_logps``.
Nothing is read back from a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import INTEGERS, check_number, check_tensor, compute_dtype
from ._loss_arguments import check_pair_bounds
from .plan import check_int
from .sequence_logps import _check_spans, sequence_logps


def _check_pairs(cu_seqlens: Tensor, tokens: int, like: tuple[str, Tensor] | None) -> None:
    """Check ``cu_seqlens`` of pairs: its values on a CPU alone, since elsewhere that is a sync."""
    if not check_pair_bounds(cu_seqlens, like) and tokens:
        raise ValueError(f"cu_seqlens: expected sequences that hold {tokens} tokens, got none")
    if not torch.compiler.is_compiling():
        _check_spans(cu_seqlens, tokens)


def _check_mask(mask: Tensor, tokens: int, like: tuple[str, Tensor]) -> Tensor:
    check_tensor("mask", mask, dtypes=(torch.bool, *INTEGERS), shape=(tokens,), like=like)
    return mask if mask.dtype == torch.bool else mask != 0


def length_desensitized_weights(
    cu_seqlens: Tensor,
    ld_alpha: float,
    *,
    mask: Tensor | None = None,
    tokens: int | None = None,
) -> Tensor:
    """Return LD-DPO's weight of each token: ``ld_alpha`` past the length of the pair's shorter one.

    Equivalent PyTorch, for one pair without a mask::

        shared = min(len(chosen), len(rejected))
        weights = [torch.where(torch.arange(len(s)) < shared, 1.0, ld_alpha) for s in pair]

    Multiply token log-probs with them before they are summed, the policy's and the reference's::

        sums = sequence_logps(weights * token_logps, cu_seqlens=cu_seqlens, mask=mask).sums

    Args:
        cu_seqlens: ``[2B + 1]``, int32 or int64: pair b is the sequences 2b and 2b + 1, sequence s
            the tokens ``cu_seqlens[s]:cu_seqlens[s + 1]``. Its values are checked on a CPU only.
        ld_alpha: weight of a token past the shorter sequence's length, in [0, 1]; 1 is plain DPO.
        mask: ``[N]``, bool or integer, 0 where a token does not count. Lengths and positions are
            counted among the others. Default None: every token counts.
        tokens: N, which is on the host only if it is said. Needed without a mask.

    Returns:
        ``[N]``, float32: 1, ``ld_alpha``, or 0 where the mask is 0. A constant.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: neither ``mask`` nor ``tokens``, or two that differ; a shape, a device or
            ``cu_seqlens`` that does not fit; ``ld_alpha`` out of range.

    Source:
        LD-DPO: Liu et al., arXiv 2409.06411: the likelihood of the tokens past the public length,
        min of the two, enters with the power alpha.
    """
    ld_alpha = check_number("ld_alpha", ld_alpha, low=0, high=1)
    if tokens is not None:
        tokens = check_int("tokens", tokens, 0)
    elif mask is None:
        raise ValueError("tokens: expected the number of tokens where there is no mask, got None")
    elif isinstance(mask, Tensor):
        tokens = mask.numel()
    _check_pairs(cu_seqlens, tokens or 0, None)
    device = cu_seqlens.device
    if mask is not None:
        mask = _check_mask(mask, tokens, ("cu_seqlens", cu_seqlens))
    if not tokens:
        return torch.zeros(0, device=device)
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].contiguous().long()
    index = torch.arange(tokens, device=device)
    # Of sequences that begin at one token all but the last are empty: it is the last one's.
    sequence = torch.searchsorted(ends, index, right=True).clamp_(max=ends.shape[0] - 1)
    before = torch.arange(tokens + 1, device=device)  # kept tokens left of each boundary
    if mask is not None:
        before[1:] = mask.cumsum(0)
    lengths = before[ends] - before[starts]
    shared = lengths.view(-1, 2).amin(1)[sequence // 2]
    inside = before[1:] - before[starts[sequence]] <= shared
    weights = torch.where(inside, 1.0, ld_alpha)
    return weights if mask is None else weights.masked_fill_(~mask, 0)


def wpo_weights(
    token_logps: Tensor,
    log_sum_sq_probs: Tensor,
    *,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return WPO's weight of each pair: how likely the policy is to have written its two responses.

    Equivalent PyTorch::

        aligned = token_logps - log_sum_sq_probs
        means = torch.stack([s.mean() for s in aligned.split(cu_seqlens.diff().tolist())])
        weights = means.exp().view(-1, 2).prod(-1).detach()

    ``linear_token_logps(..., outputs=("log_sum_sq_probs",))`` gives both arguments in one pass;
    ``preference_loss(..., weights=)`` and the ops in front of it take the result.

    Args:
        token_logps: ``[N]``, any float dtype and stride: the policy's log-prob of each token.
        log_sum_sq_probs: ``[N]``, float: log of the sum of the squared probabilities of the whole
            vocabulary at that token, the expected probability of a token that the policy samples.
        cu_seqlens: ``[2B + 1]``, int32 or int64: pair b is the sequences 2b and 2b + 1. Its values
            are checked on a CPU only.
        mask: ``[N]``, bool or integer, 0 where a token does not count; such a token may hold NaN.
            Default None: every token counts.
        impl: of the sums, as in ``sequence_logps``. Default ``"auto"``.

    Returns:
        ``[B]``, float32 (float64 if an input is): above 0, and a constant. Above 1 where the policy
        prefers the tokens to what it would sample. A sequence without tokens counts as 1.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, a device or ``cu_seqlens`` that does not fit.

    Numerics:
        The two means are added before the exponential: their product could be 0 times infinity.

    Source:
        WPO: Zhou et al., arXiv 2406.11827, equation 2, length-normalised, with the weight
        alignment by sampling.
    """
    check_tensor("token_logps", token_logps, ndim=1)
    like = ("token_logps", token_logps)
    check_tensor("log_sum_sq_probs", log_sum_sq_probs, shape=token_logps.shape, like=like)
    _check_pairs(cu_seqlens, token_logps.shape[0], like)
    if mask is not None:
        mask = _check_mask(mask, token_logps.shape[0], like)
    dtype = compute_dtype(token_logps, log_sum_sq_probs)
    aligned = token_logps.detach().to(dtype) - log_sum_sq_probs.detach().to(dtype)
    sums, counts = sequence_logps(aligned, cu_seqlens=cu_seqlens, mask=mask, impl=impl)
    return (sums / counts.clamp(min=1)).view(-1, 2).sum(-1).exp()
