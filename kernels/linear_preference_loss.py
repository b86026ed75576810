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
weight or bias, ``reduction="mean"``, chunked   3F      chunks of whole pairs
==============================================  ======  =========================================

In a loss of a pair's two sums all tokens of a sequence have one upstream scalar, known as soon as
both sequences are summed. So gradients can be made in the forward pass, chunk by chunk of whole
pairs, and scaled in backward by the scalar that comes from above: ``_whole_pairs.py``, with its
measurements. Where that cannot be or does not pay (a pair alone exceeds the workspace; fewer than
256 rows a chunk; 16-bit inputs; the noise-aware loss and PLE's; Triton, still to be written) the
cost is 4F: ``pair_plan.plan_pairs`` says. With the reference's hidden states add 1F.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ._autograd import differentiable, wants_grad
from ._common import check_choice, check_labels, check_number, check_tensor, resolve_impl
from ._head_math import Head
from ._loss_arguments import (
    NOISE_AWARE,
    check_loss,
    check_pair_bounds,
    check_references,
    is_plain,
)
from ._whole_pairs import whole_pairs
from .enhancement_head import PLE, check_enhancement, enhancement_head, refuse_enhancement
from .enhancement_loss import EnhancementLoss
from .linear_token_logps import (
    autocast,
    backward_op,
    check_head,
    choose_strategy,
    linear_token_logps,
    which_grads,
)
from .linear_token_logps_triple import linear_token_logps_triple
from .loss_heads import pair_loss_head
from .losses import Objective, pair_slopes, per_token, sequence_sums
from .noise_aware_loss import NoiseAwareLoss
from .pair_plan import PairPlan, plan_pairs
from .plan import HeadPlan
from .preference_loss import PreferenceLoss
from .sequence_logps import _check_spans

__all__ = ["PairPlan", "linear_preference_loss", "plan_pairs"]

REDUCTIONS = ("none", "mean")


def _ends(cu_seqlens: Tensor, kept: Tensor | None) -> list[int]:
    """Return the sequences' bounds over the rows that have a target."""
    if kept is None:
        return cu_seqlens.tolist()
    return torch.searchsorted(kept, cu_seqlens.to(kept.dtype)).tolist()


def _recompute(
    hidden, weight, targets, bias, ref, ref_logps, weights, cu_seqlens, counts, head, objective,
    ignore_index, needs, tiles,
):  # fmt: skip
    """Return what ``whole_pairs`` returns, at 4F, from the ops of ``linear_token_logps``."""

    def logps(h, w, b):
        return torch.ops.prefalign.linear_token_logps(
            h, w, targets, b, *head, ignore_index, "", "recompute", "chunked", *tiles
        )

    ends = cu_seqlens.tolist()
    stats = logps(hidden, weight, bias)
    dtype = stats[0].dtype
    reference = None if ref_logps is None else ref_logps.to(dtype)
    if ref is not None:
        reference = sequence_sums(logps(*ref)[0], ends)
    w = None if weights is None else weights.to(dtype)
    found, slopes = pair_slopes(objective, sequence_sums(stats[0], ends), reference, counts, w)
    g = per_token(slopes / (len(slopes) // 2), cu_seqlens, hidden.shape[0])
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
    extra: float,
    divergence: str,
    power: float,
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
    objective = Objective(loss, beta, label_smoothing, extra, divergence, power)
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
        out, grads = whole_pairs(
            hidden, weight, targets, bias, ref, ref_logps, weights, ends, kept, head, plan,
            objective, needs,
        )  # fmt: skip
    else:
        out, grads = _recompute(
            hidden, weight, targets, bias, ref, ref_logps, weights, cu_seqlens,
            torch.tensor(ends).diff(), head, objective, ignore_index, needs,
            (row_chunk, vocab_tile, budget),
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
      weights, logit_scale, softcap, temperature, ignore_index, loss, beta, label_smoothing, extra,
      divergence, power, needs, row_chunk, vocab_tile, budget):  # fmt: skip
    return _allocate(hidden, weight, bias, cu_seqlens.shape[0] // 2, needs)


def _setup_context(ctx, inputs, output):
    _, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(*output[3:])


def _backward(ctx, grad, *_):
    none = (None,) * 20
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


_op = differentiable(_op, _backward, _setup_context)


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
    loss: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 1.0,
    loss_options: Mapping[str, float] | None = None,
    ld_alpha: float | None = None,
    weights: Tensor | None = None,
    extrapolation: float = 0.0,
    alpha: float | Tensor | None = None,
    threshold: float | Tensor | None = None,
    rewards: Tensor | None = None,
    ranking: str | None = None,
    sft: str | None = None,
    reward_temperature: float | None = None,
    reduction: str = "none",
    impl: str = "auto",
    plan: HeadPlan | None = None,
) -> PreferenceLoss | NoiseAwareLoss | EnhancementLoss:
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
            ``ref_logps``; its log-probs are computed here, without a gradient, at 1F. With
            ``"ple"`` there is no reference; with a loss that has none it counts for the rewards.
        ref_weight: [V, D], the reference's head; None (default): both share ``weight``.
        ref_bias: [V] or None. With a shared head it defaults to ``bias``.
        bias: [V], any float dtype, or None.
        logit_scale: factor on the logits; default 1. It and the next two hold for both models.
        softcap: Gemma-2's cap on the logits, above 0, or None.
        temperature: divides the logits, after the cap; above 0, default 1.
        ignore_index: target of rows that do not count: no share in any sum, no gradient, and on a
            CPU no GEMM. (On a GPU, knowing their number would be a host sync: they are computed
            and masked.) Default -100.
        loss: what ``preference_loss`` takes as ``loss_type``, ``"noise_aware"`` or ``"ple"``.
            Default ``"sigmoid"``, DPO.
        loss_weights: as in ``preference_loss``, for several losses. Default None, all 1.
        beta: scale of the margin, per nat. Above 0, default 0.1.
        label_smoothing: probability that a label is flipped, in [0, 0.5]. Default 0.
        f_divergence_type: as in ``preference_loss``, default ``"reverse_kl"``. So are the next two.
        f_alpha_divergence_coef: default 1.
        loss_options: default None.
        ld_alpha: as in ``pair_loss_head``: LD-DPO. Default None.
        weights: [B], float, multiplies the losses. A constant. Default None, all 1.
        extrapolation: SPA's lambda, for ``"noise_aware"``; default 0, where extrapolated and
            policy are one. Any other value needs ``ref_hidden``.
        alpha: as in ``noise_aware_loss``, default 0.1; ``"noise_aware"`` alone takes it.
        threshold: likewise; ``"noise_aware"`` and ``"ple"`` need it, each in its own sense.
        rewards: [2B], float, of guided and plain responses in turn, for ``"ple"``. It and the
            next three are as in ``pair_loss_head``.
        ranking: default ``"mean"``.
        sft: default ``"mean"``.
        reward_temperature: divides the rewards, not the logits; default 1.
        reduction: ``"none"``, a loss for each pair, or ``"mean"``, their sum over B (0 where B is
            0; weighted losses are summed, not renormalised). Default ``"none"``.
        impl: ``"auto"`` (Triton on a GPU, else chunked), ``"triton"``, ``"chunked"`` or
            ``"reference"`` (eager, forms the logits).
        plan: a ``HeadPlan``, as in ``linear_token_logps``; its budget is also that of 3F's chunks.

    Returns:
        ``PreferenceLoss(losses, chosen_rewards, rejected_rewards)`` (for ``"noise_aware"`` a
        ``NoiseAwareLoss``, with ``is_noisy`` and ``confidences``; for ``"ple"`` an
        ``EnhancementLoss``), [B] each, the losses [] with ``"mean"``; float32 (float64 if
        ``hidden`` is). Only the losses are differentiable, once, in ``hidden``, ``weight`` and
        ``bias``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value, an
            option that the loss does not take, a label outside [0, V).

    Numerics: as in ``linear_token_logps`` and ``pair_loss_head``. With ``ref_hidden`` equal to
    ``hidden`` and one head the loss is float32(log 2) exactly. Under ``ref_logps`` that were
    computed by ``linear_token_logps`` at the same shape it is so too but on the 3F path, whose
    tiles are others: there to float32 rounding. Deterministic bit for bit.

    Cost: the table above, plus 1F with ``ref_hidden``. Under ``torch.no_grad`` 1F.

    Source: DPO (arXiv 2305.18290, equation 7), whose margin is one scalar for all tokens of a
    sequence; SPA (arXiv 2406.04412); PLE (arXiv 2408.02599).
    """
    hidden, weight, ref_hidden, ref_weight = autocast(hidden, weight, ref_hidden, ref_weight)
    check_tensor("hidden", hidden, ndim=2)
    head = check_head(
        hidden, weight, targets, bias, logit_scale, softcap, temperature, ignore_index
    )
    like = ("hidden", hidden)
    pairs = check_pair_bounds(cu_seqlens, like)
    check_choice("reduction", reduction, REDUCTIONS)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    forms = {"ranking": ranking, "sft": sft, "reward_temperature": reward_temperature}
    if loss == PLE:
        scalar, *form = check_enhancement(
            like, pairs, rewards, threshold, **forms, ref_logps=ref_logps, ref_hidden=ref_hidden,
            ref_weight=ref_weight, ref_bias=ref_bias, weights=weights, alpha=alpha,
            label_smoothing=label_smoothing or None, extrapolation=extrapolation or None,
            ld_alpha=ld_alpha,
        )  # fmt: skip
        logps = linear_token_logps(
            hidden, weight, targets, bias=bias, logit_scale=head.scale, softcap=head.softcap,
            temperature=head.temperature, ignore_index=ignore_index, impl=impl, plan=plan,
        )  # fmt: skip
        found = enhancement_head(
            logps, rewards.to(dtype), targets != ignore_index, cu_seqlens, scalar.to(dtype), *form,
            impl,
        )  # fmt: skip
        losses = found.losses if reduction == "none" else found.losses.sum() / max(1, pairs)
        return EnhancementLoss(losses, found.is_ranked, found.weights)
    refuse_enhancement(rewards=rewards, **forms)
    numbers = {
        "beta": beta,
        "label_smoothing": label_smoothing,
        "loss_weights": loss_weights,
        "f_divergence_type": f_divergence_type,
        "f_alpha_divergence_coef": f_alpha_divergence_coef,
        "loss_options": loss_options,
    }
    terms, alpha, threshold = check_loss(
        loss, alpha=alpha, threshold=threshold, like=like, dtype=dtype, **numbers
    )
    _check_reference(terms, hidden, weight, ref_logps, ref_hidden, ref_weight, ref_bias, pairs)
    if weights is not None:
        check_tensor("weights", weights, shape=(pairs,), like=like, constant=True)
    extrapolation = check_number("extrapolation", extrapolation)
    if extrapolation and (loss != NOISE_AWARE or ref_hidden is None):
        raise ValueError(
            "extrapolation: expected 0, or loss='noise_aware' with ref_hidden; got "
            f"{extrapolation} with {loss!r} and "
            f"{'no ref_hidden' if ref_hidden is None else 'ref_hidden'}"
        )
    impl = resolve_impl(impl, hidden.device, hidden.dtype)
    ref_logps, weights = (x if x is None else x.to(dtype) for x in (ref_logps, weights))
    if ref_weight is None and ref_bias is None and ref_hidden is not None:
        ref_bias = bias
    strategy, tiles = choose_strategy(plan, hidden, weight, bias)
    ref = tuple(x if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias))
    if (
        reduction == "mean"
        and strategy == "recompute"
        and impl == "chunked"
        and loss != NOISE_AWARE
        and is_plain(terms)
        and ld_alpha is None
        and hidden.dtype.itemsize > 2
        and (wants_grad(weight) or wants_grad(bias))
    ):
        needs = which_grads(wants_grad(hidden), wants_grad(weight), wants_grad(bias))
        mean, chosen_rewards, rejected_rewards, *_ = _op(
            hidden, weight, targets.long().contiguous(), bias, cu_seqlens.contiguous(), ref_logps,
            *ref, weights, *head, ignore_index, *terms[0].objective, needs, *tiles,
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
        extrapolated_token_logps=extrapolated, mask=targets != ignore_index, loss=loss, alpha=alpha,
        threshold=threshold, weights=weights, impl=impl, ld_alpha=ld_alpha, **numbers,
    )  # fmt: skip
    losses = out.losses if reduction == "none" else out.losses.sum() / max(1, pairs)
    if loss == NOISE_AWARE:
        return NoiseAwareLoss(losses, *out[1:3], out.is_noisy, out.confidences)
    return PreferenceLoss(losses, *out[1:3])


def _check_reference(terms, hidden, weight, ref_logps, ref_hidden, ref_weight, ref_bias, pairs):
    like = ("hidden", hidden)
    check_references(terms, ref_logps=ref_logps, ref_hidden=ref_hidden)
    if ref_hidden is None:
        if ref_logps is not None:
            check_tensor("ref_logps", ref_logps, shape=(2 * pairs,), like=like, constant=True)
        for name, value in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if value is not None:
                raise ValueError(f"{name}: expected None without ref_hidden, got a tensor")
        return
    same = (hidden.dtype,)
    check_tensor("ref_hidden", ref_hidden, dtypes=same, shape=hidden.shape, like=like)
    if ref_weight is not None:
        check_tensor("ref_weight", ref_weight, dtypes=same, shape=weight.shape, like=like)
    if ref_bias is not None:
        check_tensor("ref_bias", ref_bias, shape=weight.shape[:1], like=like)
