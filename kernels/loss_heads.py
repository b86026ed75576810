"""Pair losses straight from token log-probabilities: one launch forward, one launch backward.

Responses lie end to end, chosen and rejected in turn: pair b is the sequences 2b and 2b + 1 of
``cu_seqlens``. With ``sums[s]`` the sum over the tokens t of sequence s that count, ``ref`` the
same under the reference model, and l a row of ``losses.LOSSES``, whose score may be per token::

    score[s] = f(sums[s] - ref[s])           losses[b] = weights[b] * l(score[2b], score[2b + 1])
    slopes[s] = d losses[b] / d sums[s]      d losses[b] / d token_logps[t] = slopes[s], t in s

and 0 where masked. For a loss of the margin that is, with
``margins[b] = (sums[2b] - ref[2b]) - (sums[2b + 1] - ref[2b + 1])``::

    losses[b] = weights[b] * l(beta * margins[b])
    slopes[2b] = weights[b] * beta * l'(beta * margins[b]) = -slopes[2b + 1]

PLE's loss needs rewards in place of a reference, and is in ``enhancement_head.py``.

Shapes: ``token_logps`` is ``[N]``, ``cu_seqlens`` ``[2B + 1]``. A program has one pair. The forward
pass reads 4 bytes a token (8 with the reference's tokens, 12 with the extrapolated ones, 1 more
with a mask), adds as often, and writes about 52 bytes a pair; the backward pass writes 4 bytes a
token. What it replaces, ``sequence_logps`` and ``preference_loss`` over strided views, is two
launches forward and five backward, with ``[2B]`` tensors written and read between them.

Each sequence is summed on its own, in ``sequence_logps``' order: bit for bit its sums, whatever
the other sequences hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import _loss_heads_triton
from ._autograd import differentiable
from ._common import check_tensor, compute_dtype, on_device, resolve_impl
from ._loss_arguments import (
    NOISE_AWARE,
    check_loss,
    check_mask,
    check_pair_bounds,
    check_references,
    is_plain,
)
from ._pair_losses import Pairs
from .enhancement_head import PLE, check_enhancement, enhancement_head, refuse_enhancement
from .losses import Objective, log_ratios, pair_values, per_token, sequence_sums, sides
from .objectives import impl_of
from .preference_loss import of_terms, preference_loss_reference
from .sequence_logps import _check_spans, sequence_logps, sequence_logps_reference
from .token_weights import length_desensitized_weights


class PairLosses(NamedTuple):
    """Losses of B pairs, differentiable in the token log-probs, and detached statistics.

    ``margins`` are in nats, the rewards scaled by beta; ``sums`` and ``counts`` are of the 2B
    sequences. Of the last four, two are None unless the loss is ``"noise_aware"`` and two unless
    it is ``"ple"``, whose rewards are those given and whose margins have no reference.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    sums: Tensor
    counts: Tensor
    is_noisy: Tensor | None = None
    confidences: Tensor | None = None
    is_ranked: Tensor | None = None
    sft_weights: Tensor | None = None


def pair_loss_head_reference(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    extrapolated_token_logps: Tensor | None,
    mask: Tensor | None,
    weights: Tensor | None,
    alpha: Tensor | None,
    threshold: Tensor | None,
    objective: Objective,
) -> PairLosses:
    """Return everything by eager PyTorch, in the dtype given; ``ref_logps`` are the 2B sums."""
    sums, counts = sequence_logps_reference(token_logps, cu_seqlens, mask)
    pairs = Pairs(sides(sums), sides(ref_logps), counts=sides(counts), weights=weights)
    smoothing, is_noisy, confidences = None, None, None
    if extrapolated_token_logps is not None:
        beyond = sequence_logps_reference(extrapolated_token_logps, cu_seqlens, mask).sums
        chosen, rejected = log_ratios(sides(beyond.detach()), pairs.reference)
        confidences = (objective.beta * (chosen - rejected)).sigmoid()
        is_noisy = confidences < threshold
        smoothing = is_noisy.to(confidences.dtype) * alpha
    found = preference_loss_reference(pairs, objective, smoothing)
    chosen, rejected = log_ratios(sides(sums.detach()), pairs.reference)
    return PairLosses(*found, chosen - rejected, sums.detach(), counts, is_noisy, confidences)


# Chunked torch


def _forward_chunked(tensors, cu_seqlens, weights, scalars, ref_tokens, objective, noise, outputs):
    losses, *_, sums, counts, slopes, is_noisy, confidences = outputs
    dtype = losses.dtype
    *tensors, mask = tensors
    ends = cu_seqlens.tolist()

    def summed(token_logps):
        values = token_logps.to(dtype)
        values = values if mask is None else torch.where(mask, values, 0)
        return sequence_sums(values.contiguous(), ends)  # torch.sum's order follows the strides

    sums.copy_(summed(tensors[0]))
    for s, (start, end) in enumerate(pairwise(ends)):
        counts[s] = end - start if mask is None else mask[start:end].sum()
    ref = tensors[1]
    if ref is not None:
        ref = summed(ref) if ref_tokens else ref.to(dtype)
    smoothing: float | Tensor = objective.label_smoothing
    if noise:
        alpha, threshold = scalars
        chosen, rejected = log_ratios(sides(summed(tensors[2])), sides(ref))
        torch.sigmoid(objective.beta * (chosen - rejected), out=confidences)
        torch.lt(confidences, threshold, out=is_noisy)
        smoothing = torch.where(is_noisy, alpha, 0)
    weights = None if weights is None else weights.to(dtype)
    *found, slope_c, slope_r = pair_values(
        objective, sides(sums), sides(ref), sides(counts), smoothing, weights
    )
    for out, value in zip(outputs[:4], found, strict=True):
        out.copy_(value)
    torch.stack((slope_c, slope_r), -1, out=slopes.view(-1, 2))


def _backward_chunked(grad, grad_losses, slopes, cu_seqlens, mask):
    by_sum = (grad_losses[:, None] * slopes.view(-1, 2)).flatten()
    tokens = per_token(by_sum, cu_seqlens, grad.shape[0])
    grad.copy_(tokens if mask is None else torch.where(mask, tokens, 0))


# The op


def _allocate(token_logps, ref_logps, extrapolated, cu_seqlens, weights):
    """Return the op's outputs, not yet written, in the order of its kernel."""
    dtype = compute_dtype(token_logps, ref_logps, extrapolated, weights)
    sequences = cu_seqlens.shape[0] - 1
    pairs = sequences // 2
    noisy = 0 if extrapolated is None else pairs
    return (
        *(token_logps.new_empty(pairs, dtype=dtype) for _ in range(4)),
        token_logps.new_empty(sequences, dtype=dtype),
        token_logps.new_empty(sequences, dtype=torch.int64),
        token_logps.new_empty(sequences, dtype=dtype),
        token_logps.new_empty(noisy, dtype=torch.bool),
        token_logps.new_empty(noisy, dtype=dtype),
    )


@torch.library.custom_op("prefalign::pair_loss_head", mutates_args=())
def _pair_loss_head(
    token_logps: Tensor,
    ref_logps: Tensor | None,
    extrapolated: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    alpha: Tensor | None,
    threshold: Tensor | None,
    ref_tokens: bool,
    loss: str,
    beta: float,
    label_smoothing: float,
    extra: float,
    divergence: str,
    power: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_spans(cu_seqlens, token_logps.shape[0])
    outputs = _allocate(token_logps, ref_logps, extrapolated, cu_seqlens, weights)
    objective = Objective(loss, beta, label_smoothing, extra, divergence, power)
    if outputs[0].numel():
        forward = _loss_heads_triton.forward if impl == "triton" else _forward_chunked
        with on_device(token_logps):
            forward(
                (token_logps, ref_logps, extrapolated, mask), cu_seqlens, weights,
                (alpha, threshold), ref_tokens, objective, extrapolated is not None, outputs,
            )  # fmt: skip
    return outputs


@_pair_loss_head.register_fake
def _(token_logps, ref_logps, extrapolated, mask, cu_seqlens, weights, *_):
    return _allocate(token_logps, ref_logps, extrapolated, cu_seqlens, weights)


@torch.library.custom_op("prefalign::pair_loss_head_backward", mutates_args=())
def _pair_loss_head_backward(
    grad_losses: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    tokens: int,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    if not slopes.numel():
        return slopes.new_zeros(tokens, dtype=dtype)
    grad = slopes.new_empty(tokens, dtype=dtype)
    if tokens:
        backward = _loss_heads_triton.backward if impl == "triton" else _backward_chunked
        with on_device(grad):
            backward(grad, grad_losses, slopes, cu_seqlens, mask)
    return grad


@_pair_loss_head_backward.register_fake
def _(grad_losses, slopes, cu_seqlens, mask, tokens, dtype, impl):
    return slopes.new_empty(tokens, dtype=dtype)


def _setup_context(ctx, inputs, output):
    token_logps, _, _, mask, cu_seqlens, *_ = inputs
    _, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(output[6], cu_seqlens, mask)
    ctx.constants = token_logps.shape[0], token_logps.dtype, inputs[-1]


def _backward(ctx, grad_losses, *_):
    grad = None
    if ctx.needs_input_grad[0] and grad_losses is not None:
        grad = _pair_loss_head_backward(grad_losses, *ctx.saved_tensors, *ctx.constants)
    return grad, *[None] * 15


_pair_loss_head = differentiable(_pair_loss_head, _backward, _setup_context)


def pair_loss_head(
    token_logps: Tensor,
    *,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None = None,
    ref_token_logps: Tensor | None = None,
    extrapolated_token_logps: Tensor | None = None,
    mask: Tensor | None = None,
    loss: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 1.0,
    loss_options: Mapping[str, float] | None = None,
    ld_alpha: float | None = None,
    alpha: float | Tensor | None = None,
    threshold: float | Tensor | None = None,
    weights: Tensor | None = None,
    rewards: Tensor | None = None,
    ranking: str | None = None,
    sft: str | None = None,
    reward_temperature: float | None = None,
    impl: str = "auto",
) -> PairLosses:
    """Return the preference loss of each pair from the log-probs of its tokens.

    Equivalent PyTorch::

        sums = torch.stack([s.sum() for s in token_logps.split(cu_seqlens.diff().tolist())])
        chosen, rejected = (sums - ref_logps).view(-1, 2).unbind(-1)
        z = beta * (chosen - rejected)
        losses = -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)

    With ``loss="noise_aware"`` the smoothing of a pair is ``alpha`` where
    ``sigmoid(beta * margin) < threshold`` for the margin of ``extrapolated_token_logps``, else 0.
    With ``loss="ple"`` it is ``enhancement_loss`` of the sums and counts: the chosen sequence of a
    pair is the guided response, the rejected one the plain response.

    Args:
        token_logps: ``[N]``, any float dtype and stride: log-prob of each token of the responses,
            in nats, packed chosen, rejected, chosen, rejected, and so on.
        cu_seqlens: ``[2B + 1]``, int32 or int64, on the same device: pair b is the sequences 2b
            (chosen) and 2b + 1 (rejected), sequence s the tokens
            ``cu_seqlens[s]:cu_seqlens[s + 1]``. From 0 to N, checked on a CPU only.
        ref_logps: ``[2B]``, float: the sums under the reference model. A constant: one that
            requires grad is refused. So are all that follow.
        ref_token_logps: ``[N]``, float: its tokens, summed here. Exactly one of the two; neither
            with ``"ple"``; at most one with a loss that has no reference, for the rewards.
        extrapolated_token_logps: ``[N]``, float: for ``"noise_aware"`` alone, which needs it.
        mask: ``[N]``, bool or integer, 0 where a token does not count: it may hold NaN, and its
            gradient is exactly 0. Default None: every token counts.
        loss: what ``preference_loss`` takes as ``loss_type``, ``"noise_aware"`` or ``"ple"``.
            Default ``"sigmoid"``, DPO. A row of ``losses.LOSSES`` is one launch; sums of several
            and losses of the whole batch are ``sequence_logps`` and ``preference_loss``.
        loss_weights: as in ``preference_loss``, for several losses. Default None, all 1.
        beta: scale of the margin, per nat. Above 0, default 0.1. ``"ple"`` has none.
        label_smoothing: probability that a label is flipped, in [0, 0.5]. Default 0; must be 0
            with ``"noise_aware"``.
        f_divergence_type: as in ``preference_loss``, default ``"reverse_kl"``. So are the next two.
        f_alpha_divergence_coef: default 1.
        loss_options: default None.
        ld_alpha: LD-DPO's weight, in [0, 1], of tokens past the length of the pair's shorter
            sequence, in every sum; ``ref_logps`` are taken as they are. Default None, 1.
        alpha: label smoothing of noisy pairs, in [0, 1]: a number, or a 0-dim tensor on the device
            whose value is not checked. Default 0.1. ``"noise_aware"`` alone takes it.
        threshold: a pair is noisy when its confidence is strictly below; in [0, 1], likewise.
            With ``"ple"`` any number: a pair is ranked when its reward gap is strictly above.
        weights: ``[B]``, float, multiplies the losses. Default None, all 1; ``"ple"`` takes none.
        rewards: ``[2B]``, float, by sequence: for ``"ple"``, which needs them and alone takes them.
        ranking: as in ``enhancement_loss``, default ``"mean"``; ``"ple"`` alone takes it.
        sft: likewise.
        reward_temperature: its ``temperature``, default 1; likewise.
        impl: ``"auto"``, ``"triton"``, ``"chunked"`` or ``"reference"``. Default ``"auto"``. The
            last two read ``cu_seqlens`` on the host: on a GPU, a sync.

    Returns:
        ``PairLosses``: losses, chosen and rejected rewards (times beta) and margins (nats) ``[B]``,
        sums and counts ``[2B]``; ``is_noisy`` and ``confidences`` ``[B]``, or None; ``is_ranked``
        ``[B]`` and ``sft_weights`` ``[B, 2]`` (of the plain and the guided), or None. float32
        (float64 if an input is; the inputs' dtype from the reference), counts int64. Only the
        losses are differentiable, once, in ``token_logps``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, a device or ``cu_seqlens`` that does not fit, a number out of range,
            an option that the loss does not take, or a constant that requires grad.

    Numerics:
        float32 sums, by lanes and then a tree, as in ``sequence_logps``; a pair's numbers do not
        depend on the others bit for bit. Where the reference's tokens equal the policy's the loss
        is float32(log 2) exactly. No overflow at any margin. No atomics, no host sync on a GPU.

    Source:
        DPO: Rafailov et al., arXiv 2305.18290, equation 7. Noise-aware: SPA, Kim et al., arXiv
        2406.04412, equations 11 and 12. PLE: Liu et al., arXiv 2408.02599.
    """
    check_tensor("token_logps", token_logps, ndim=1)
    like = ("token_logps", token_logps)
    pairs = check_pair_bounds(cu_seqlens, like)
    forms = {"ranking": ranking, "sft": sft, "reward_temperature": reward_temperature}
    if loss == PLE:
        ple = check_enhancement(
            like, pairs, rewards, threshold, **forms, ref_logps=ref_logps,
            ref_token_logps=ref_token_logps, extrapolated_token_logps=extrapolated_token_logps,
            alpha=alpha, label_smoothing=label_smoothing or None, weights=weights,
            ld_alpha=ld_alpha,
        )  # fmt: skip
        mask = check_mask(mask, token_logps)
        found = enhancement_head(token_logps, rewards, mask, cu_seqlens, *ple, impl)
        losses, is_ranked, sft_weights, *others = found
        own = (rewards[0::2], rewards[1::2])
        return PairLosses(losses, *own, *others, None, None, is_ranked, sft_weights)
    refuse_enhancement(rewards=rewards, **forms)
    shape = token_logps.shape
    for name, value, size in (
        ("ref_logps", ref_logps, (2 * pairs,)),
        ("ref_token_logps", ref_token_logps, shape),
        ("extrapolated_token_logps", extrapolated_token_logps, shape),
        ("weights", weights, (pairs,)),
    ):
        if value is not None:
            check_tensor(name, value, shape=size, like=like, constant=True)
    mask = check_mask(mask, token_logps)
    ref = ref_token_logps if ref_logps is None else ref_logps
    dtype = compute_dtype(token_logps, ref, extrapolated_token_logps, weights)
    terms, alpha, threshold = check_loss(
        loss, beta, label_smoothing, alpha, threshold, like, dtype, loss_weights,
        f_divergence_type, f_alpha_divergence_coef, loss_options,
    )  # fmt: skip
    check_references(terms, ref_logps=ref_logps, ref_token_logps=ref_token_logps)
    if (extrapolated_token_logps is None) == (loss == NOISE_AWARE):
        raise ValueError(
            "extrapolated_token_logps: expected a tensor with loss='noise_aware' and None with "
            f"any other, got {type(extrapolated_token_logps).__name__} with {loss!r}"
        )
    impl = impl_of(terms, impl, resolve_impl(impl, token_logps.device, dtype))
    cu_seqlens = cu_seqlens.contiguous()
    if ld_alpha is not None:
        of_token = length_desensitized_weights(cu_seqlens, ld_alpha, mask=mask, tokens=shape[0])
        of_token = of_token.to(dtype if impl != "reference" else token_logps.dtype)
        token_logps, ref_token_logps, extrapolated_token_logps = (
            None if x is None else x * of_token
            for x in (token_logps, ref_token_logps, extrapolated_token_logps)
        )
        ref = ref_token_logps if ref_logps is None else ref_logps
    if not is_plain(terms):
        return _composed(
            token_logps, cu_seqlens, ref_logps, ref_token_logps, mask, weights, terms, impl
        )
    objective = terms[0].objective
    if impl == "reference":
        if not torch.compiler.is_compiling():
            _check_spans(cu_seqlens, shape[0])
        if ref_token_logps is not None:
            ref = sequence_logps_reference(ref_token_logps, cu_seqlens, mask).sums
        return pair_loss_head_reference(
            token_logps, cu_seqlens, ref, extrapolated_token_logps, mask, weights, alpha,
            threshold, objective,
        )  # fmt: skip
    *outputs, _, is_noisy, confidences = _pair_loss_head(
        token_logps, ref, extrapolated_token_logps, mask, cu_seqlens, weights, alpha, threshold,
        ref_token_logps is not None, *objective, impl,
    )  # fmt: skip
    return PairLosses(*outputs, *((is_noisy, confidences) if loss == NOISE_AWARE else ()))


def _composed(token_logps, cu_seqlens, ref_logps, ref_token_logps, mask, weights, terms, impl):
    """Return the losses by way of the sequences' sums: of several rows, or of the whole batch."""
    spans = {"cu_seqlens": cu_seqlens, "mask": mask, "impl": impl}
    sums, counts = sequence_logps(token_logps, **spans)
    if ref_token_logps is not None:
        ref_logps = sequence_logps(ref_token_logps, **spans).sums
    pairs = Pairs(sides(sums), sides(ref_logps), counts=sides(counts), weights=weights)
    found = of_terms(pairs, terms, impl)
    chosen, rejected = log_ratios(sides(sums.detach()), pairs.reference)
    return PairLosses(*found, chosen - rejected, sums.detach(), counts)
