"""PLE's loss: guided above plain where the reward gap is large, weighted SFT on both elsewhere.

A pair is a response y of the plain query and a response y^p of the query with the principles
written in front; both are scored, by the policy and by the reward model, after the plain query.
With the mean log-probs m = logps / lengths, in the default forms::

    gap = guided_rewards - plain_rewards          is_ranked = gap > threshold
    w_guided = sigmoid(gap / temperature)         w_plain = sigmoid(-gap / temperature)
    losses = max(0, m_plain - m_guided)                         where is_ranked
             -(w_plain * m_plain + w_guided * m_guided)         elsewhere

Shapes: every tensor is ``[B]``; ``threshold`` is a scalar. One pass reads four to six numbers a
pair and writes six: the loss, the flag, two weights and the derivatives by the two log-probs, from
which the backward pass is one product. The forms are ``enhancement_terms.RANKINGS``.

``released_weights`` is of the other algorithm that goes by the same name, the released code's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._autograd import differentiable
from ._common import (
    INTEGERS,
    check_choice,
    check_number,
    check_tensor,
    compute_dtype,
    jit,
    on_device,
    resolve_impl,
    tl,
    triton,
)
from .enhancement_terms import (
    RANKINGS,
    SFT,
    enhancement_device,
    enhancement_terms,
    gap_weights,
    mean_logps,
    needs_lengths,
)
from .loss_rows import scaled

BLOCK_B = 128
RELEASED_FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5)
RELEASED_SCALE = 10.0


class EnhancementLoss(NamedTuple):
    """Per-pair losses, which pairs were ranked, and the SFT weights (plain, guided) ``[B, 2]``."""

    losses: Tensor
    is_ranked: Tensor
    weights: Tensor


def enhancement_loss_reference(
    plain_logps: Tensor,
    guided_logps: Tensor,
    plain_lengths: Tensor | None,
    guided_lengths: Tensor | None,
    plain_rewards: Tensor,
    guided_rewards: Tensor,
    threshold: float | Tensor,
    ranking: str = "mean",
    sft: str = "mean",
    temperature: float = 1.0,
) -> EnhancementLoss:
    """Return every output by eager PyTorch, in the dtype given."""
    row = RANKINGS[ranking]
    means = sums = plain_logps, guided_logps
    if needs_lengths(ranking, sft):
        means = mean_logps(plain_logps, plain_lengths), mean_logps(guided_logps, guided_lengths)
    gap = guided_rewards - plain_rewards
    is_ranked = gap > threshold
    weights = gap_weights(gap, temperature)
    ranked = row.value(*(means if row.per_token else sums))
    plain, guided = means if sft == "mean" else sums
    tuned = -(scaled(weights[0], plain) + scaled(weights[1], guided))
    losses = torch.where(is_ranked, ranked, tuned)
    return EnhancementLoss(losses, is_ranked, torch.stack(weights, -1))


@jit
def _forward_kernel(
    plain_ptr,
    guided_ptr,
    plain_lengths_ptr,
    guided_lengths_ptr,
    plain_rewards_ptr,
    guided_rewards_ptr,
    threshold_ptr,
    losses_ptr,
    is_ranked_ptr,
    weights_ptr,
    slopes_ptr,
    stride_p,
    stride_g,
    stride_pl,
    stride_gl,
    stride_pr,
    stride_gr,
    B,
    temperature,
    RANKING: tl.constexpr,
    RANKS_MEANS: tl.constexpr,
    TUNES_MEANS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Take one block of pairs from log-probs to losses, flags, weights and derivatives."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = offs < B
    plain = tl.load(plain_ptr + offs * stride_p, mask=mask, other=0.0).to(tl.float32)
    guided = tl.load(guided_ptr + offs * stride_g, mask=mask, other=0.0).to(tl.float32)
    reward_p = tl.load(plain_rewards_ptr + offs * stride_pr, mask=mask, other=0.0).to(tl.float32)
    reward_g = tl.load(guided_rewards_ptr + offs * stride_gr, mask=mask, other=0.0).to(tl.float32)
    length_p = tl.full([BLOCK_B], 1.0, tl.float32)
    length_g = length_p
    if RANKS_MEANS or TUNES_MEANS:
        length_p = tl.load(plain_lengths_ptr + offs * stride_pl, mask=mask, other=1).to(tl.float32)
        length_g = tl.load(guided_lengths_ptr + offs * stride_gl, mask=mask, other=1).to(tl.float32)
    threshold = tl.load(threshold_ptr)
    loss, is_ranked, weight_p, weight_g, slope_p, slope_g = enhancement_device(
        plain, guided, length_p, length_g, reward_p, reward_g, threshold, temperature,
        RANKING, RANKS_MEANS, TUNES_MEANS,
    )  # fmt: skip
    tl.store(losses_ptr + offs, loss, mask=mask)
    tl.store(is_ranked_ptr + offs, is_ranked, mask=mask)
    tl.store(weights_ptr + 2 * offs, weight_p, mask=mask)
    tl.store(weights_ptr + 2 * offs + 1, weight_g, mask=mask)
    tl.store(slopes_ptr + offs, slope_p, mask=mask)
    tl.store(slopes_ptr + B + offs, slope_g, mask=mask)


@torch.library.custom_op("prefalign::enhancement_loss", mutates_args=())
def _enhancement_loss(
    plain_logps: Tensor,
    guided_logps: Tensor,
    plain_lengths: Tensor | None,
    guided_lengths: Tensor | None,
    plain_rewards: Tensor,
    guided_rewards: Tensor,
    threshold: Tensor,
    ranking: str,
    sft: str,
    temperature: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (
        plain_logps,
        guided_logps,
        plain_lengths,
        guided_lengths,
        plain_rewards,
        guided_rewards,
    )
    row = RANKINGS[ranking]
    if impl == "triton":
        outputs = _allocate(plain_logps, threshold.dtype)
        pairs = plain_logps.numel()
        if pairs:
            with on_device(plain_logps):
                _forward_kernel[(triton.cdiv(pairs, BLOCK_B),)](
                    *inputs,
                    threshold,
                    *outputs,
                    *(0 if t is None else t.stride(0) for t in inputs),
                    pairs,
                    temperature,
                    RANKING=row.device,
                    RANKS_MEANS=row.per_token,
                    TUNES_MEANS=sft == "mean",
                    BLOCK_B=BLOCK_B,
                    num_warps=4,
                )
        return outputs
    floats = (t if t is None or t.dtype in INTEGERS else t.to(threshold.dtype) for t in inputs)
    terms = enhancement_terms(*floats, threshold, ranking, sft, temperature)
    losses, is_ranked, plain_weights, guided_weights, *slopes = terms
    weights = torch.stack((plain_weights, guided_weights), -1)
    return losses, is_ranked, weights, torch.stack(slopes)


def _allocate(plain_logps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return losses, flags, weights and slopes (plain's, then guided's), not yet written."""
    pairs = plain_logps.shape[0]
    return (
        plain_logps.new_empty(pairs, dtype=dtype),
        plain_logps.new_empty(pairs, dtype=torch.bool),
        plain_logps.new_empty((pairs, 2), dtype=dtype),
        plain_logps.new_empty((2, pairs), dtype=dtype),
    )


@_enhancement_loss.register_fake
def _(plain_logps, guided_logps, plain_lengths, guided_lengths, plain_rewards, guided_rewards,
      threshold, ranking, sft, temperature, impl):  # fmt: skip
    return _allocate(plain_logps, threshold.dtype)


def _setup_context(ctx, inputs, output):
    _losses, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(output[3])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _backward(ctx, grad_losses, *_):
    plain = guided = None
    if grad_losses is not None:
        plain, guided = grad_losses * ctx.saved_tensors[0]
        plain = plain.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        guided = guided.to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
    return plain, guided, *[None] * 9


_enhancement_loss = differentiable(_enhancement_loss, _backward, _setup_context)


def check_forms(ranking: str, sft: str) -> None:
    """Check the names of the two losses' forms."""
    check_choice("ranking", ranking, tuple(RANKINGS))
    check_choice("sft", sft, SFT)


def check_threshold(value: float | Tensor, like: tuple[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return a number, infinities among them, as a 0-dim tensor on the device of ``like``."""
    if isinstance(value, Tensor):
        check_tensor("threshold", value, ndim=0, like=like, constant=True)
        return value.to(dtype)
    infinite = isinstance(value, float) and value in (math.inf, -math.inf)  # Dynamo has no isinf
    number = value if infinite else check_number("threshold", value)
    if abs(number) > torch.finfo(dtype).max:
        number = math.copysign(math.inf, number)
    return torch.full((), number, dtype=dtype, device=like[1].device)


def enhancement_loss(
    plain_logps: Tensor,
    guided_logps: Tensor,
    plain_rewards: Tensor,
    guided_rewards: Tensor,
    *,
    plain_lengths: Tensor | None = None,
    guided_lengths: Tensor | None = None,
    threshold: float | Tensor,
    ranking: str = "mean",
    sft: str = "mean",
    temperature: float = 1.0,
    impl: str = "auto",
) -> EnhancementLoss:
    """Return PLE's loss of each pair: a ranking loss past the threshold, else weighted SFT.

    Equivalent PyTorch::

        plain, guided = plain_logps / plain_lengths, guided_logps / guided_lengths
        is_ranked = guided_rewards - plain_rewards > threshold
        weights = torch.softmax(torch.stack([plain_rewards, guided_rewards], -1) / temperature, -1)
        ranked = torch.relu(plain - guided)
        tuned = -(weights[:, 0] * plain + weights[:, 1] * guided)
        losses = torch.where(is_ranked, ranked, tuned)

    A threshold of ``-inf`` ranks every pair and one of ``inf`` none: each of the two losses alone.

    Args:
        plain_logps: ``[B]``, any float dtype and stride: log-prob of each plain response under the
            policy, in nats, summed over its tokens.
        guided_logps: ``[B]``, likewise for the response that was generated under the principles,
            scored after the plain query too.
        plain_rewards: ``[B]``, float: the reward of each plain response. A constant: one that
            requires grad is refused. So are all that follow.
        guided_rewards: ``[B]``, likewise, judged without the principles.
        plain_lengths: ``[B]``, int32 or int64: tokens of each plain response, which a mean is
            taken over; one below 1 is an empty response. Default None, for the forms without a
            mean, which do not read it.
        guided_lengths: ``[B]``, likewise.
        threshold: a pair is ranked when its gap is strictly above: a number (infinities too), or
            a 0-dim float tensor on the device, whose value is not checked.
        ranking: a name in ``enhancement_terms.RANKINGS``. ``"mean"`` (default) and ``"sum"`` are
            ``max(0, s(plain) - s(guided))`` of mean and of summed log-probs; ``"probability"`` of
            ``exp(sum)``, which for more than about a hundred nats is 0 in float32 and then has
            neither value nor gradient; ``"logistic"`` is ``log(1 + exp(s(plain) - s(guided)))``
            of mean log-probs, which has a gradient also where the guided response leads.
        sft: ``"mean"``, log-probs per token as SFT has them, or ``"sum"``. Default ``"mean"``.
        temperature: divides the rewards in the softmax. Above 0, default 1.
        impl: ``"auto"``, ``"triton"``, ``"chunked"`` or ``"reference"``. Default ``"auto"``.

    Returns:
        ``EnhancementLoss(losses, is_ranked, weights)``: ``[B]``, ``[B]`` bool, and ``[B, 2]``, the
        weights of (plain, guided) of every pair, ranked or not. Floats are float32 (float64 if any
        input is; the inputs' dtype from the reference). Only the losses are differentiable, once,
        in the two log-probs.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or device that does not fit, a number out of range, an unknown form,
            missing lengths, or a constant that requires grad.

    Numerics:
        float32 inside; gap and threshold are rounded to it before they are compared. At a tie the
        hinge's derivative is 0. A log-prob of -inf gives an infinite loss or none, never NaN, and
        an empty response 0. A NaN gap is not above any threshold: its weights are NaN, and so is
        its loss. No host sync.

    Source:
        PLE: Liu et al., arXiv 2408.02599. The paper's text leaves the score of the ranking loss,
        the weights' temperature and the SFT loss's normalisation open: ``"probability"`` is its
        literal form, ``"logistic"`` and the defaults are this library's.
    """
    policy = {"plain_logps": plain_logps, "guided_logps": guided_logps}
    rewards = {"plain_rewards": plain_rewards, "guided_rewards": guided_rewards}
    check_tensor("plain_logps", plain_logps, ndim=1)
    like, shape = ("plain_logps", plain_logps), plain_logps.shape
    for name, tensor in {**policy, **rewards}.items():
        check_tensor(name, tensor, shape=shape, like=like, constant=name in rewards)
    check_forms(ranking, sft)
    needed = needs_lengths(ranking, sft)
    lengths = {"plain_lengths": plain_lengths, "guided_lengths": guided_lengths}
    for name, tensor in lengths.items():
        if tensor is not None:
            check_tensor(name, tensor, dtypes=INTEGERS, shape=shape, like=like)
        elif needed:
            raise ValueError(
                f"{name}: expected the number of tokens of each response, for the mean in "
                f"ranking={ranking!r}, sft={sft!r}; got None"
            )
    temperature = check_number("temperature", temperature, above=0)
    dtype = compute_dtype(*policy.values(), *rewards.values())
    impl = resolve_impl(impl, plain_logps.device, dtype)
    threshold = check_threshold(threshold, like, dtype)
    read = tuple(lengths.values()) if needed else (None, None)
    inputs = (*policy.values(), *read, *rewards.values(), threshold, ranking, sft, temperature)
    if impl == "reference":
        return enhancement_loss_reference(*inputs)
    return EnhancementLoss(*_enhancement_loss(*inputs, impl)[:3])


def released_weights(
    reward_gaps: Tensor,
    *,
    iteration: int,
    fractions: Sequence[float] = RELEASED_FRACTIONS,
) -> Tensor:
    """Return the pairs' weights in PLE's released code, which is a weighted iterative DPO.

    The ``floor(q * B)`` pairs of the largest gaps get 1 and the others ``sigmoid(gap / 10)``,
    with q the iteration's fraction. Its loss is DPO's against the initial model::

        losses = preference_loss(*logps, weights=weights).losses
        loss = losses.sum() / weights.sum()

    Args:
        reward_gaps: ``[B]``, float: reward of the best response less that of the worst, for all
            pairs of the iteration, not of a batch. A constant.
        iteration: which iteration, from 1. After the last fraction, the last.
        fractions: the share of pairs with weight 1 by iteration, each in [0, 1]. Default
            ``(0.1, 0.2, 0.3, 0.4, 0.5)``.

    Returns:
        ``[B]``, float32 (float64 for float64). Of equal gaps the earlier pair comes first; with
        fewer than 1 / q pairs no pair gets 1. A NaN gap comes last, and its weight is NaN.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or a number out of range, no fractions, or gaps that require grad.

    Source:
        The released code, palm-biaoliu/PLE. It makes no pair of a prompt whose responses all have
        one reward: leave those out before.
    """
    check_tensor("reward_gaps", reward_gaps, ndim=1, constant=True)
    if isinstance(iteration, bool) or not isinstance(iteration, int):
        raise TypeError(f"iteration: expected an int, got {type(iteration).__name__}")
    if iteration < 1:
        raise ValueError(f"iteration: expected an int of at least 1, got {iteration}")
    shares = [check_number(f"fractions[{i}]", q, low=0, high=1) for i, q in enumerate(fractions)]
    if not shares:
        raise ValueError("fractions: expected at least one number, got none")
    share = shares[min(iteration, len(shares)) - 1]
    # The product of 100 and the float next to 0.29 is below 29: not one pair less for that.
    count = math.floor(share * reward_gaps.shape[0] * (1 + 1e-12))
    gaps = reward_gaps.detach().to(compute_dtype(reward_gaps))
    unknown = gaps.isnan()  # which sort puts first
    order = gaps.masked_fill(unknown, -math.inf).sort(descending=True, stable=True).indices
    weights = torch.sigmoid(gaps / RELEASED_SCALE).index_fill(0, order[:count], 1.0)
    return weights.masked_fill(unknown, math.nan)
