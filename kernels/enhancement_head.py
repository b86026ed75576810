"""PLE's loss straight from token log-probabilities: ``pair_loss_head(loss="ple")``.

Responses lie end to end, guided and plain in turn: pair b is the sequences 2b (guided) and 2b + 1
(plain) of ``cu_seqlens``. With ``sums[s]`` and ``counts[s]`` over the tokens of sequence s that
count, and ``l`` the loss of ``enhancement_terms``::

    losses[b] = l(sums[2b + 1], sums[2b], counts[2b + 1], counts[2b], rewards[2b + 1], rewards[2b])
    slopes[s] = d losses[b] / d sums[s]        d losses[b] / d token_logps[t] = slopes[s], t in s

Shapes: ``token_logps`` is ``[N]``, ``cu_seqlens`` ``[2B + 1]``, ``rewards`` ``[2B]``. A program has
one pair. The forward pass reads 4 bytes a token (1 more with a mask) and writes about 57 bytes a
pair; the backward pass is ``pair_loss_head``'s. No reference model takes part.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._autograd import differentiable
from ._common import check_number, check_tensor, compute_dtype, jit, on_device, resolve_impl, tl
from ._loss_heads_triton import _sequence
from .enhancement_loss import check_forms, check_threshold, enhancement_loss_reference
from .enhancement_terms import RANKINGS, enhancement_device, enhancement_terms
from .losses import sequence_sums
from .sequence_logps import BLOCK_T, _check_spans, sequence_logps_reference

PLE = "ple"


class EnhancementHead(NamedTuple):
    """``EnhancementLoss`` of B pairs, guided less plain in nats, sums and counts of sequences."""

    losses: Tensor
    is_ranked: Tensor
    weights: Tensor
    margins: Tensor
    sums: Tensor
    counts: Tensor


def enhancement_head_reference(
    token_logps: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    threshold: Tensor,
    ranking: str,
    sft: str,
    temperature: float,
) -> EnhancementHead:
    """Return everything by eager PyTorch, in the dtype given."""
    sums, counts = sequence_logps_reference(token_logps, cu_seqlens, mask)
    both = (x.view(-1, 2).unbind(-1) for x in (sums, counts, rewards))
    inputs = (x for guided, plain in both for x in (plain, guided))
    found = enhancement_loss_reference(*inputs, threshold, ranking, sft, temperature)
    sums = sums.detach()
    return EnhancementHead(*found, sums[0::2] - sums[1::2], sums, counts)


@jit
def _forward_kernel(
    logps_ptr,
    rewards_ptr,
    mask_ptr,
    cu_ptr,
    threshold_ptr,
    losses_ptr,
    is_ranked_ptr,
    weights_ptr,
    margins_ptr,
    sums_ptr,
    counts_ptr,
    slopes_ptr,
    N,
    stride_l,
    stride_r,
    stride_m,
    temperature,
    HAS_MASK: tl.constexpr,
    RANKING: tl.constexpr,
    RANKS_MEANS: tl.constexpr,
    TUNES_MEANS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Take one pair from its tokens to its loss, flag, weights and derivatives by its two sums."""
    b = tl.program_id(0).to(tl.int64)
    # A sequence's reward is read where a reference model's sum would be.
    guided, reward_g, _, count_g = _sequence(
        2 * b, logps_ptr, rewards_ptr, logps_ptr, mask_ptr, cu_ptr, N, stride_l, stride_r,
        stride_l, stride_m, True, False, False, HAS_MASK, BLOCK_T,
    )  # fmt: skip
    plain, reward_p, _, count_p = _sequence(
        2 * b + 1, logps_ptr, rewards_ptr, logps_ptr, mask_ptr, cu_ptr, N, stride_l, stride_r,
        stride_l, stride_m, True, False, False, HAS_MASK, BLOCK_T,
    )  # fmt: skip
    loss, is_ranked, weight_p, weight_g, slope_p, slope_g = enhancement_device(
        plain, guided, count_p.to(tl.float32), count_g.to(tl.float32), reward_p, reward_g,
        tl.load(threshold_ptr), temperature, RANKING, RANKS_MEANS, TUNES_MEANS,
    )  # fmt: skip
    tl.store(losses_ptr + b, loss)
    tl.store(is_ranked_ptr + b, is_ranked)
    tl.store(weights_ptr + 2 * b, weight_p)
    tl.store(weights_ptr + 2 * b + 1, weight_g)
    tl.store(margins_ptr + b, guided - plain)
    tl.store(sums_ptr + 2 * b, guided)
    tl.store(sums_ptr + 2 * b + 1, plain)
    tl.store(counts_ptr + 2 * b, count_g)
    tl.store(counts_ptr + 2 * b + 1, count_p)
    tl.store(slopes_ptr + 2 * b, slope_g)
    tl.store(slopes_ptr + 2 * b + 1, slope_p)


def _forward_triton(token_logps, rewards, mask, cu_seqlens, threshold, ranking, sft, temperature):
    outputs = _allocate(token_logps, cu_seqlens, threshold.dtype)
    row = RANKINGS[ranking]
    with on_device(token_logps):
        _forward_kernel[(outputs[0].numel(),)](
            token_logps,
            rewards,
            mask,
            cu_seqlens,
            threshold,
            *outputs,
            token_logps.shape[0],
            token_logps.stride(0),
            rewards.stride(0),
            0 if mask is None else mask.stride(0),
            temperature,
            HAS_MASK=mask is not None,
            RANKING=row.device,
            RANKS_MEANS=row.per_token,
            TUNES_MEANS=sft == "mean",
            BLOCK_T=BLOCK_T,
            num_warps=4,
        )
    return outputs


def _forward_chunked(token_logps, rewards, mask, cu_seqlens, threshold, ranking, sft, temperature):
    ends = cu_seqlens.tolist()
    values = token_logps.to(threshold.dtype)
    values = values if mask is None else torch.where(mask, values, 0)
    sums = sequence_sums(values.contiguous(), ends)  # torch.sum's order follows the strides
    lengths = (b - a if mask is None else mask[a:b].sum() for a, b in pairwise(ends))
    counts = torch.tensor([int(n) for n in lengths], dtype=torch.int64, device=sums.device)
    both = (x.view(-1, 2).unbind(-1) for x in (sums, counts, rewards.to(sums.dtype).contiguous()))
    inputs = (x for guided, plain in both for x in (plain, guided))
    losses, is_ranked, plain_weights, guided_weights, plain_slopes, guided_slopes = (
        enhancement_terms(*inputs, threshold, ranking, sft, temperature)
    )
    weights = torch.stack((plain_weights, guided_weights), -1)
    slopes = torch.stack((guided_slopes, plain_slopes), -1).flatten()
    return losses, is_ranked, weights, sums[0::2] - sums[1::2], sums, counts, slopes


@torch.library.custom_op("prefalign::enhancement_head", mutates_args=())
def _enhancement_head(
    token_logps: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    threshold: Tensor,
    ranking: str,
    sft: str,
    temperature: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_spans(cu_seqlens, token_logps.shape[0])
    if cu_seqlens.shape[0] < 3:
        return _allocate(token_logps, cu_seqlens, threshold.dtype)
    forward = _forward_triton if impl == "triton" else _forward_chunked
    return forward(
        token_logps, rewards, mask, cu_seqlens, threshold, ranking, sft, temperature
    )  # fmt: skip


def _allocate(token_logps, cu_seqlens, dtype):
    """Return the op's outputs, not yet written, in the order of its kernel."""
    sequences = cu_seqlens.shape[0] - 1
    pairs = sequences // 2
    return (
        token_logps.new_empty(pairs, dtype=dtype),
        token_logps.new_empty(pairs, dtype=torch.bool),
        token_logps.new_empty((pairs, 2), dtype=dtype),
        token_logps.new_empty(pairs, dtype=dtype),
        token_logps.new_empty(sequences, dtype=dtype),
        token_logps.new_empty(sequences, dtype=torch.int64),
        token_logps.new_empty(sequences, dtype=dtype),
    )


@_enhancement_head.register_fake
def _(token_logps, rewards, mask, cu_seqlens, threshold, ranking, sft, temperature, impl):
    return _allocate(token_logps, cu_seqlens, threshold.dtype)


def _setup_context(ctx, inputs, output):
    token_logps, _, mask, cu_seqlens, *_ = inputs
    _, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(output[-1], cu_seqlens, mask)
    ctx.constants = token_logps.shape[0], token_logps.dtype, inputs[-1]


def _backward(ctx, grad_losses, *_):
    grad = None
    if ctx.needs_input_grad[0] and grad_losses is not None:
        grad = torch.ops.prefalign.pair_loss_head_backward(
            grad_losses, *ctx.saved_tensors, *ctx.constants
        )
    return grad, *[None] * 8


_enhancement_head = differentiable(_enhancement_head, _backward, _setup_context)


def check_enhancement(
    like: tuple[str, Tensor],
    pairs: int,
    rewards: Any,
    threshold: Any,
    ranking: Any,
    sft: Any,
    reward_temperature: Any,
    **others: Any,
) -> tuple[Tensor, str, str, float]:
    """Check what ``loss="ple"`` takes, and that ``others`` are None; return all but the rewards.

    The threshold becomes a 0-dim tensor of the dtype that is computed in.
    """
    for name, value in others.items():
        if value is not None:
            got = type(value).__name__ if isinstance(value, Tensor) else value
            raise ValueError(f"{name}: expected none with loss='ple', got {got}")
    if rewards is None:
        raise ValueError("rewards: expected a tensor with loss='ple', got None")
    if threshold is None:
        raise ValueError("threshold: expected a number with loss='ple', got None")
    check_tensor("rewards", rewards, shape=(2 * pairs,), like=like, constant=True)
    ranking = "mean" if ranking is None else ranking
    sft = "mean" if sft is None else sft
    check_forms(ranking, sft)
    temperature = 1.0 if reward_temperature is None else reward_temperature
    temperature = check_number("reward_temperature", temperature, above=0)
    scalar = check_threshold(threshold, like, compute_dtype(like[1], rewards))
    return scalar, ranking, sft, temperature


def refuse_enhancement(**options: Any) -> None:
    """Refuse with any other loss the options that ``loss="ple"`` alone takes."""
    for name, value in options.items():
        if value is not None:
            got = type(value).__name__ if isinstance(value, Tensor) else value
            raise ValueError(f"{name}: expected None, only 'ple' takes it, got {got}")


def enhancement_head(
    token_logps: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    threshold: Tensor,
    ranking: str,
    sft: str,
    temperature: float,
    impl: str,
) -> EnhancementHead:
    """Return the head of checked arguments; ``pair_loss_head`` says what they are."""
    impl = resolve_impl(impl, token_logps.device, threshold.dtype)
    inputs = (
        token_logps, rewards, mask, cu_seqlens.contiguous(), threshold, ranking, sft, temperature,
    )  # fmt: skip
    if impl == "reference":
        if not torch.compiler.is_compiling():
            _check_spans(inputs[3], token_logps.shape[0])
        return enhancement_head_reference(*inputs)
    return EnhancementHead(*_enhancement_head(*inputs, impl)[:-1])
