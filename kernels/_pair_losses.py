"""What ``preference_loss`` and ``noise_aware_loss`` share: one kernel, one chunked path, checks.

Both take ``[B]`` log-probs of policy and reference to losses, rewards and the derivatives by the
policy's two, from which the backward pass is one product each. They differ in where a pair's label
smoothing comes from: a number, or the confidence of a third model's log-probs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._common import check_number, check_tensor, compute_dtype, jit, on_device, tl, triton
from .loss_rows import confidence_device
from .losses import Objective, device_options, log_ratios, pair_values, score_device

BLOCK_B = 128


@jit
def _forward_kernel(
    policy_chosen_ptr,
    policy_rejected_ptr,
    reference_chosen_ptr,
    reference_rejected_ptr,
    extrapolated_chosen_ptr,
    extrapolated_rejected_ptr,
    chosen_counts_ptr,
    rejected_counts_ptr,
    weights_ptr,
    betas_ptr,
    alpha_ptr,
    threshold_ptr,
    losses_ptr,
    chosen_rewards_ptr,
    rejected_rewards_ptr,
    chosen_slopes_ptr,
    rejected_slopes_ptr,
    is_noisy_ptr,
    confidences_ptr,
    stride_pc,
    stride_pr,
    stride_rc,
    stride_rr,
    stride_ec,
    stride_er,
    stride_nc,
    stride_nr,
    stride_w,
    stride_b,
    B,
    beta,
    label_smoothing,
    extra,
    power,
    NOISE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BETAS: tl.constexpr,
    REFERENCE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    LOSS: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Take one block of pairs from log-probs to losses, rewards and derivatives, and flags."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = offs < B
    pc = tl.load(policy_chosen_ptr + offs * stride_pc, mask=mask, other=0.0).to(tl.float32)
    pr = tl.load(policy_rejected_ptr + offs * stride_pr, mask=mask, other=0.0).to(tl.float32)
    rc = tl.zeros([BLOCK_B], tl.float32)
    rr = tl.zeros([BLOCK_B], tl.float32)
    if HAS_REFERENCE:
        rc = tl.load(reference_chosen_ptr + offs * stride_rc, mask=mask, other=0.0).to(tl.float32)
        rr = tl.load(reference_rejected_ptr + offs * stride_rr, mask=mask, other=0.0).to(tl.float32)
    if HAS_BETAS:
        beta = tl.load(betas_ptr + offs * stride_b, mask=mask, other=1.0).to(tl.float32)
    nc = 1
    nr = 1
    if PER_TOKEN:
        nc = tl.load(chosen_counts_ptr + offs * stride_nc, mask=mask, other=1)
        nr = tl.load(rejected_counts_ptr + offs * stride_nr, mask=mask, other=1)
    smoothing = label_smoothing
    if NOISE:
        offs_ec, offs_er = offs * stride_ec, offs * stride_er
        ec = tl.load(extrapolated_chosen_ptr + offs_ec, mask=mask, other=0.0).to(tl.float32)
        er = tl.load(extrapolated_rejected_ptr + offs_er, mask=mask, other=0.0).to(tl.float32)
        confidence = confidence_device(beta * ((ec - rc) - (er - rr)))
        is_noisy = confidence < tl.load(threshold_ptr)
        smoothing = tl.where(is_noisy, tl.load(alpha_ptr), 0.0)
        tl.store(is_noisy_ptr + offs, is_noisy, mask=mask)
        tl.store(confidences_ptr + offs, confidence, mask=mask)
    a, turn_a = score_device(pc, rc, nc, power, REFERENCE, PER_TOKEN, DIVERGENCE)
    b, turn_b = score_device(pr, rr, nr, power, REFERENCE, PER_TOKEN, DIVERGENCE)
    value, slope_a, slope_b = LOSS(a, b, beta, smoothing, extra, INNER)
    slope_a *= turn_a
    slope_b *= turn_b
    if HAS_WEIGHTS:
        w = tl.load(weights_ptr + offs * stride_w, mask=mask, other=0.0).to(tl.float32)
        value *= w
        slope_a *= w
        slope_b *= w
    tl.store(losses_ptr + offs, value, mask=mask)
    tl.store(chosen_rewards_ptr + offs, beta * (pc - rc), mask=mask)
    tl.store(rejected_rewards_ptr + offs, beta * (pr - rr), mask=mask)
    tl.store(chosen_slopes_ptr + offs, slope_a, mask=mask)
    tl.store(rejected_slopes_ptr + offs, slope_b, mask=mask)


class Pairs(NamedTuple):
    """The tensors of B pairs, ``[B]`` each but for ``betas``, which may be 0-dim; None: absent."""

    policy: tuple[Tensor, Tensor]
    reference: tuple[Tensor | None, Tensor | None] = (None, None)
    extrapolated: tuple[Tensor | None, Tensor | None] = (None, None)
    counts: tuple[Tensor | None, Tensor | None] = (None, None)
    weights: Tensor | None = None
    betas: Tensor | None = None

    def flat(self) -> tuple[Tensor | None, ...]:
        """Return all, in the order of the kernel's arguments."""
        pairs = (*self.policy, *self.reference, *self.extrapolated, *self.counts)
        return (*pairs, self.weights, self.betas)


def allocate(pairs: Pairs) -> list[Tensor]:
    """Return losses, chosen and rejected rewards and slopes, not yet written.

    With extrapolated log-probs, also flags and confidences.
    """
    like = pairs.policy[0]
    floats = [x for x in pairs.flat() if x is not None and x.is_floating_point()]
    dtype = compute_dtype(*floats)
    outputs = [like.new_empty(like.shape, dtype=dtype) for _ in range(5)]
    if pairs.extrapolated[0] is None:
        return outputs
    return [*outputs, torch.empty_like(outputs[0], dtype=torch.bool), torch.empty_like(outputs[0])]


def forward(
    pairs: Pairs, objective: Objective, scalars: tuple[Tensor | None, Tensor | None], impl: str
) -> tuple[Tensor, ...]:
    """Return losses, rewards and slopes; with extrapolated log-probs also flags and confidences.

    ``scalars`` are alpha and threshold, which make the smoothing where there are extrapolated ones.
    """
    noise = pairs.extrapolated[0] is not None
    outputs = allocate(pairs)
    count = pairs.policy[0].numel()
    if impl == "triton":
        _launch(pairs, objective, scalars, outputs, count)
        return tuple(outputs)
    dtype = outputs[0].dtype
    policy, reference, extrapolated = (
        tuple(None if x is None else x.to(dtype) for x in two) for two in pairs[:3]
    )
    weights, betas = (None if x is None else x.to(dtype) for x in pairs[4:])
    flags: tuple[Tensor, ...] = ()
    smoothing: float | Tensor = objective.label_smoothing
    if noise:
        alpha, threshold = scalars
        chosen, rejected = log_ratios(extrapolated, reference)
        confidences = (objective.beta * (chosen - rejected)).sigmoid()
        is_noisy = confidences < threshold
        smoothing, flags = torch.where(is_noisy, alpha, 0), (is_noisy, confidences)
    found = pair_values(objective, policy, reference, pairs.counts, smoothing, weights, betas)
    slopes = (found.chosen_slopes, found.rejected_slopes)
    return found.losses, found.chosen_rewards, found.rejected_rewards, *slopes, *flags


def _launch(pairs, objective, scalars, outputs, count) -> None:
    if not count:
        return
    noise = pairs.extrapolated[0] is not None
    tensors = pairs.flat()
    strides = [0 if x is None or x.ndim == 0 else x.stride(0) for x in tensors]
    with on_device(outputs[0]):
        _forward_kernel[(triton.cdiv(count, BLOCK_B),)](
            *tensors,
            *scalars,
            *(outputs if noise else (*outputs, None, None)),
            *strides,
            count,
            objective.beta,
            objective.label_smoothing,
            objective.extra,
            objective.power,
            NOISE=noise,
            HAS_REFERENCE=pairs.reference[0] is not None,
            HAS_WEIGHTS=pairs.weights is not None,
            HAS_BETAS=pairs.betas is not None,
            **device_options(objective),
            BLOCK_B=BLOCK_B,
            num_warps=4,
        )


def setup_context(ctx, inputs, output):
    """Keep the slopes; only the losses are differentiable."""
    _losses, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(*output[3:5])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.constants = len(inputs) - 2


def backward(ctx, grad_losses, *_):
    """Return the gradients of the two policy log-probs: one product each."""
    grads = [None, None]
    if grad_losses is not None:
        for i, (slope, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
            if ctx.needs_input_grad[i]:
                grads[i] = (grad_losses * slope).to(dtype)
    return *grads, *[None] * ctx.constants


def check_pairs(policy: dict[str, Tensor], constants: dict[str, Tensor | None]) -> None:
    """Check that all are ``[B]`` on one device, and that only the policy's require grad."""
    first = next(iter(policy))
    check_tensor(first, policy[first], ndim=1)
    like = (first, policy[first])
    for name, tensor in {**policy, **constants}.items():
        if tensor is not None:
            check_tensor(name, tensor, shape=like[1].shape, like=like, constant=name in constants)


def check_scalar(name: str, value: float | Tensor, like: tuple[str, Tensor], dtype) -> Tensor:
    """Return a number in [0, 1] as a 0-dim tensor on the pairs' device, without a host sync."""
    if isinstance(value, Tensor):
        check_tensor(name, value, ndim=0, like=like, constant=True)
        return value.to(dtype)
    number = check_number(name, value, low=0, high=1)
    return torch.full((), number, dtype=dtype, device=like[1].device)
