"""Per-token KL between two models' next-token distributions, straight from hidden states.

    z     = f(hidden @ weight.T + bias),              p     = softmax(z)        the policy
    z_ref = f(ref_hidden @ ref_weight.T + ref_bias),  p_ref = softmax(z_ref)    the reference

    forward   KL(p_ref || p) = sum_v p_ref·(log p_ref - log p),   d/dz = p - p_ref
    reverse   KL(p || p_ref) = sum_v p·(log p - log p_ref),       d/dz = p·(log p - log p_ref - KL)

hidden, ref_hidden [N, D], weight, ref_weight [V, D] -> [N]. f is the scale, softcap and temperature
of ``linear_token_logps``. Neither model's [N, V] logits are held: tiles of both, with an online
log-sum-exp each, and the same again in backward. In F = 2·N·D·V:

    forward                          2F           keeps four numbers a row
    backward, frozen head            2F + 1F      both logits again, the gradient of hidden
    backward, trained head           2F + 2F      and that of the weight

16-bit inputs whose gradient of hidden, summed in float32, does not fit the workspace take 2F more
with a trained head. There is no Triton kernel yet: on a GPU the same tiles run in plain torch.
"""

from __future__ import annotations

import torch

from . import _linear_kl_chunked
from ._autograd import differentiable
from ._common import INTEGERS, check_choice, check_tensor, resolve_impl
from ._head_math import Head
from .linear_token_logps import autocast, check_head, head_logits, which_grads
from .plan import check_int

DIRECTIONS = ("forward", "reverse")


def reference_linear_token_kl(
    hidden, ref_hidden, weight, ref_weight, bias, ref_bias, mask, head, direction
):
    """Return the KLs, eagerly; differentiable, in the dtype of ``hidden``."""
    z = head_logits(hidden, weight, bias, head)
    wide = torch.promote_types(z.dtype, torch.float32)
    # Detached rather than under no_grad, which forward mode passes through.
    constants = (ref_hidden, weight if ref_weight is None else ref_weight, ref_bias)
    ref_z = head_logits(*(x if x is None else x.detach() for x in constants), head)
    ref_logp = ref_z.to(wide).log_softmax(-1)
    logp = z.to(wide).log_softmax(-1)
    over, under = (ref_logp, logp) if direction == "forward" else (logp, ref_logp)
    apart = (over - under).masked_fill(over == -torch.inf, 0)
    kl = (over.exp() * apart).sum(-1)
    return kl if mask is None else kl.masked_fill(~mask, 0)


@torch.library.custom_op("prefalign::linear_token_kl", mutates_args=())
def _op(
    hidden: torch.Tensor,
    ref_hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    direction: str,
    budget: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _linear_kl_chunked.forward(
        hidden, ref_hidden, weight, ref_weight, bias, ref_bias, mask,
        Head(logit_scale, softcap, temperature), direction == "forward", budget,
    )  # fmt: skip


@_op.register_fake
def _(hidden, ref_hidden, weight, ref_weight, bias, ref_bias, mask, logit_scale, softcap,
      temperature, direction, budget):  # fmt: skip
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    N = hidden.shape[0]
    return hidden.new_empty(N, dtype=dtype), hidden.new_empty((4, N), dtype=dtype)


@torch.library.custom_op("prefalign::linear_token_kl_backward", mutates_args=())
def _backward_op(
    grad: torch.Tensor,
    kl: torch.Tensor,
    norm: torch.Tensor,
    hidden: torch.Tensor,
    ref_hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    direction: str,
    budget: int,
    needs: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the policy's inputs from recomputed logits; ``needs`` is a subset of "hwb"."""
    grads = _linear_kl_chunked.backward(
        grad, kl, norm, hidden, ref_hidden, weight, ref_weight, bias, ref_bias, mask,
        Head(logit_scale, softcap, temperature), direction == "forward",
        tuple(letter in needs for letter in "hwb"), budget,
    )  # fmt: skip
    return tuple(hidden.new_empty(0) if x is None else x for x in grads)


@_backward_op.register_fake
def _(grad, kl, norm, hidden, ref_hidden, weight, ref_weight, bias, ref_bias, mask, logit_scale,
      softcap, temperature, direction, budget, needs):  # fmt: skip
    return tuple(
        hidden.new_empty(0) if letter not in needs else value.new_empty(value.shape)
        for letter, value in zip("hwb", (hidden, weight, bias), strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.logit_scale, ctx.softcap, ctx.temperature, ctx.direction, ctx.budget = inputs
    kl, norm = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(norm)
    ctx.save_for_backward(kl, norm, *tensors)


def _backward(ctx, grad, _norm):
    none = [None] * 12
    if grad is None:
        return tuple(none)
    need_h, _, need_w, _, need_b, *_ = ctx.needs_input_grad
    needs = which_grads(need_h, need_w, need_b)
    grads = _backward_op(
        grad, *ctx.saved_tensors, ctx.logit_scale, ctx.softcap, ctx.temperature, ctx.direction,
        ctx.budget, needs,
    )  # fmt: skip
    for place, letter, value in zip((0, 2, 4), "hwb", grads, strict=True):
        none[place] = value if letter in needs else None
    return tuple(none)


_op = differentiable(_op, _backward, _setup_context)


def linear_token_kl(
    hidden: torch.Tensor,
    ref_hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    ref_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    direction: str = "forward",
    workspace_bytes: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Return the KL between reference and policy at each token, without forming the logits.

    Equivalent PyTorch, with ``f`` the scale, softcap and temperature of ``linear_token_logps``::

        logp = f(F.linear(hidden, weight, bias)).float().log_softmax(-1)
        with torch.no_grad():
            ref_logp = f(F.linear(ref_hidden, ref_weight, ref_bias)).float().log_softmax(-1)
        kl = (ref_logp.exp() * (ref_logp - logp)).sum(-1)  # forward
        kl = (logp.exp() * (logp - ref_logp)).sum(-1)  # reverse

    Summed over a response (``sequence_logps(kl, cu_seqlens=...).sums``) the forward direction is
    TDPO's sequential KL, which ``tdpo_loss`` takes.

    Args:
        hidden: [..., D], float16, bfloat16, float32 or float64; the policy's last hidden state.
        ref_hidden: the shape and dtype of ``hidden``; the reference's.
        weight: [V, D], the dtype of ``hidden``; the policy's head.
        ref_weight: [V, D], the reference's head; None (default): both share ``weight``, and one
            read of it serves both.
        bias: [V], any float dtype, or None.
        ref_bias: [V] or None. With a shared head (``ref_weight=None``) it defaults to ``bias``.
        logit_scale: factor on both models' logits; default 1.
        softcap: cap on both models' logits, above 0, or None.
        temperature: divides both models' logits, after the cap; above 0, default 1.
        mask: [...], bool or integer, 0 where a token does not count: exactly 0, no gradient, and
            on a CPU dropped before any GEMM; its hidden states may be NaN. Default None: all count.
        direction: ``"forward"``, KL(reference || policy), or ``"reverse"``, KL(policy ||
            reference). Default ``"forward"``.
        workspace_bytes: bytes of temporaries beyond inputs, outputs and gradients; default 64 MiB
            on a CPU, 512 MiB on a GPU.
        impl: ``"auto"`` and ``"chunked"`` (tiles in plain torch, on a GPU too) or ``"reference"``
            (eager, forms the logits). ``"triton"`` is refused: there is no kernel yet.

    Returns:
        [...] float32 (float64 for float64 inputs), in nats, at least 0. Differentiable, once, in
        ``hidden``, ``weight`` and ``bias``; the reference is a constant, also by a weight that
        both models share.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value;
            ``impl="triton"``.

    Numerics: as in ``linear_token_logps``. Where hidden states and heads are equal the KL and every
    gradient are exactly 0. A small KL is what terms of the size of the logits leave. A vocabulary
    entry of logit -inf under both models (padding, by the bias) counts nowhere.

    Cost: 2F forward, F = 2·N·D·V; 3F backward with a frozen head, 4F with a trained one.

    Source: TDPO: Zeng et al., arXiv 2404.11999, definition of the sequential KL divergence.
    """
    if impl == "triton":
        raise ValueError(
            "impl: linear_token_kl has no Triton kernel yet, got 'triton'; "
            "'auto' and 'chunked' run on a GPU too"
        )
    check_choice("direction", direction, DIRECTIONS)
    if ref_weight is None and ref_bias is None:
        ref_bias = bias
    hidden, ref_hidden, weight, ref_weight = autocast(hidden, ref_hidden, weight, ref_weight)
    check_tensor("hidden", hidden, min_ndim=1)
    like, shape = ("hidden", hidden), hidden.shape[:-1]
    unused = torch.zeros((), dtype=torch.int64, device=hidden.device).expand(shape)
    head = check_head(hidden, weight, unused, bias, logit_scale, softcap, temperature, -100)
    same = {"dtypes": (hidden.dtype,), "like": like}
    check_tensor("ref_hidden", ref_hidden, shape=hidden.shape, **same)
    if ref_weight is not None:
        check_tensor("ref_weight", ref_weight, shape=weight.shape, **same)
    if ref_bias is not None:
        check_tensor("ref_bias", ref_bias, shape=weight.shape[:1], like=like)
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool, *INTEGERS), shape=shape, like=like)
        mask = mask if mask.dtype == torch.bool else mask != 0
    budget = 0 if workspace_bytes is None else check_int("workspace_bytes", workspace_bytes, 1)
    resolve_impl(impl, hidden.device, hidden.dtype)
    ref_hidden, ref_weight, ref_bias = (
        None if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias)
    )
    if impl == "reference":
        return reference_linear_token_kl(
            hidden, ref_hidden, weight, ref_weight, bias, ref_bias, mask, head, direction
        )
    D = hidden.shape[-1]
    kl, _ = _op(
        hidden.reshape(-1, D), ref_hidden.reshape(-1, D), weight, ref_weight, bias, ref_bias,
        None if mask is None else mask.reshape(-1), *head, direction, budget,
    )  # fmt: skip
    return kl.view(shape)
