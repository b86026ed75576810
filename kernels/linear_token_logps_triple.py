"""Policy, reference and extrapolated log-probs of the same targets, in one pass over the head.

    z_pol = f(hidden @ weight.T + bias),   z_ref = f(ref_hidden @ ref_weight.T + ref_bias)
    z_ext = (1 + extrapolation)·z_pol - extrapolation·z_ref
    each: logp = z_y - log sum_v exp(z_v)

hidden, ref_hidden [N, D], weight, ref_weight [V, D], targets [N] -> three [N]. f is the scale,
softcap and temperature of ``linear_token_logps``. The extrapolated logits are taken tile by tile
after f and cost no GEMM: 2F forward (F = 2·N·D·V), 3F in all with a frozen head, 5F with a trained
one. A shared head's weight is read once for both models. Only the policy gets a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._autograd import differentiable
from ._common import check_labels, check_number, check_tensor, resolve_impl
from ._head_math import Head, Reference
from .linear_token_logps import (
    IMPLEMENTATIONS,
    autocast,
    backward_op,
    check_head,
    choose_strategy,
    head_logits,
    plan_tiles,
    scale_rows_op,
    which_grads,
)
from .plan import HeadPlan


class TripleLogps(NamedTuple):
    """Log-probs of the targets; only ``policy`` carries a gradient."""

    policy: torch.Tensor
    reference: torch.Tensor
    extrapolated: torch.Tensor


def reference_linear_token_logps_triple(hidden, weight, targets, bias, head, ignore_index, ref):
    """Return the three log-probs, eagerly, in the dtype of ``hidden``."""
    live = targets != ignore_index
    y = torch.where(live, targets, 0).unsqueeze(-1)
    z = head_logits(hidden, weight, bias, head)
    # Detached rather than under no_grad, which forward mode passes through.
    fixed = z.detach()
    ref_weight = (weight if ref.weight is None else ref.weight).detach()
    z_ref = head_logits(ref.hidden, ref_weight, ref.bias, head)
    z_ext = (1 + ref.extrapolation) * fixed - ref.extrapolation * z_ref
    z_ext = z_ext.masked_fill(fixed == -torch.inf, -torch.inf)
    wide = torch.promote_types(z.dtype, torch.float32)
    return TripleLogps(
        *(x.to(wide).log_softmax(-1).gather(-1, y).squeeze(-1).masked_fill(~live, 0)
          for x in (z, z_ref, z_ext))
    )  # fmt: skip


@torch.library.custom_op("prefalign::linear_token_logps_triple", mutates_args=())
def _op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    extrapolation: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    strategy: str,
    impl: str,
    row_chunk: int,
    vocab_tile: int,
    budget: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_labels("targets", targets, weight.shape[0], ignore_index)
    rows, tile, _ = plan_tiles(hidden, weight.shape[0], row_chunk, vocab_tile, budget)
    stats, norm, J, _ = IMPLEMENTATIONS[impl].forward(
        hidden, weight, targets, bias, Head(logit_scale, softcap, temperature), ignore_index, (),
        strategy == "row_jacobian", rows, tile,
        Reference(ref_hidden, ref_weight, ref_bias, extrapolation),
    )  # fmt: skip
    J = hidden.new_empty(0) if J is None else J
    return stats["logps"], stats["reference"], stats["extrapolated"], norm, J


@_op.register_fake
def _(hidden, weight, targets, bias, ref_hidden, ref_weight, ref_bias, extrapolation, logit_scale,
      softcap, temperature, ignore_index, strategy, impl, row_chunk, vocab_tile,
      budget):  # fmt: skip
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    J = hidden.new_empty(hidden.shape) if strategy == "row_jacobian" else hidden.new_empty(0)
    logps = (targets.new_empty(targets.shape, dtype=dtype) for _ in range(3))
    return (*logps, targets.new_empty((2, *targets.shape), dtype=dtype), J)


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, bias = inputs[:4]
    ctx.scalars = inputs[8:]
    _, reference, extrapolated, norm, J = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(reference, extrapolated, norm, J)
    if inputs[12] == "row_jacobian":
        ctx.save_for_backward(None, None, targets, None, None, J)
    else:
        ctx.save_for_backward(hidden, weight, targets, bias, norm, J)


def _backward(ctx, grad, *_others):
    hidden, weight, targets, bias, norm, J = ctx.saved_tensors
    logit_scale, softcap, temperature, ignore_index, strategy, impl, *tiles = ctx.scalars
    need_h, need_w, _, need_b = ctx.needs_input_grad[:4]
    none = (None,) * (len(ctx.needs_input_grad) - 4)
    if grad is None:
        return None, None, None, None, *none
    if strategy == "row_jacobian":
        return scale_rows_op(grad, J, targets, ignore_index), None, None, None, *none
    needs = which_grads(need_h, need_w, need_b)
    dh, dw, db = backward_op(
        grad, None, hidden, weight, targets, bias, norm, J, logit_scale, softcap, temperature,
        ignore_index, needs, impl, *tiles,
    )  # fmt: skip
    return dh if need_h else None, dw if need_w else None, None, db if need_b else None, *none


_op = differentiable(_op, _backward, _setup_context)


def linear_token_logps_triple(
    hidden: torch.Tensor,
    ref_hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ref_weight: torch.Tensor | None = None,
    extrapolation: float = 0.0,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
    plan: HeadPlan | None = None,
) -> TripleLogps:
    """Return policy, reference and extrapolated log-probs of each target token in one pass.

    Equivalent PyTorch, with ``f`` the scale, softcap and temperature of ``linear_token_logps``::

        z_pol = f(F.linear(hidden, weight, bias))
        with torch.no_grad():
            z_ref = f(F.linear(ref_hidden, ref_weight, ref_bias))
            z_ext = (1 + extrapolation) * z_pol - extrapolation * z_ref
        [z.float().log_softmax(-1).gather(-1, targets[..., None]) for z in (z_pol, z_ref, z_ext)]

    Args:
        hidden: [..., D], float16, bfloat16, float32 or float64; the policy's last hidden state.
        ref_hidden: the shape and dtype of ``hidden``; the reference's.
        weight: [V, D], the dtype of ``hidden``; the policy's head.
        targets: [...], int64 (or int32); the token to score, or ``ignore_index``.
        ref_weight: [V, D], the reference's head; None (default): both share ``weight``, and one
            read of it serves both.
        extrapolation: SPA's lambda; 0 (default) makes extrapolated = policy.
        bias: [V] or None.
        ref_bias: [V] or None. With a shared head (``ref_weight=None``) it defaults to ``bias``.
        logit_scale: factor on both models' logits; default 1.
        softcap: cap on both models' logits, above 0, or None; the extrapolation is taken after it.
        temperature: divides both models' logits, after the cap; default 1.
        ignore_index: target of rows that do not count: exactly 0, no gradient. Default -100.
        impl: ``"auto"``, ``"triton"``, ``"chunked"`` or ``"reference"``.
        plan: a ``HeadPlan``, as in ``linear_token_logps``.

    Returns:
        ``TripleLogps(policy, reference, extrapolated)``, each [...] float32 (float64 for float64
        inputs). The gradient flows from ``policy`` to ``hidden``, ``weight`` and ``bias``; the
        other two are constants, also by a weight that both models share.

    Raises:
        TypeError, ValueError: as in ``linear_token_logps``.

    Numerics: as in ``linear_token_logps``, whose log-probs ``policy`` equals bit for bit; with
    ``ref_hidden`` equal to ``hidden`` and a shared head, so does ``reference``. Where the policy's
    logit is -inf (a padded vocabulary) the extrapolated one is too.

    Cost: 2F forward; 3F with backward and a frozen head, 5F with a trained one.

    Source: SPA (Kim et al., 2024), section 4.2: de-coupled noise detection by extrapolated logits.
    """
    if ref_weight is None and ref_bias is None:
        ref_bias = bias
    hidden, ref_hidden, weight, ref_weight = autocast(hidden, ref_hidden, weight, ref_weight)
    head = check_head(
        hidden, weight, targets, bias, logit_scale, softcap, temperature, ignore_index
    )
    check_tensor(
        "ref_hidden", ref_hidden, dtypes=(hidden.dtype,), shape=hidden.shape,
        like=("hidden", hidden),
    )  # fmt: skip
    if ref_weight is not None:
        check_tensor(
            "ref_weight", ref_weight, dtypes=(hidden.dtype,), shape=weight.shape,
            like=("hidden", hidden),
        )  # fmt: skip
    if ref_bias is not None:
        check_tensor("ref_bias", ref_bias, shape=weight.shape[:1], like=("hidden", hidden))
    ref = Reference(
        ref_hidden.detach(),
        None if ref_weight is None else ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach(),
        check_number("extrapolation", extrapolation),
    )
    targets = targets.long()
    impl = resolve_impl(impl, hidden.device, hidden.dtype)
    strategy, tiles = choose_strategy(plan, hidden, weight, bias)
    if impl == "reference":
        if not torch.compiler.is_compiling():
            check_labels("targets", targets, weight.shape[0], ignore_index)
        return reference_linear_token_logps_triple(
            hidden, weight, targets, bias, head, ignore_index, ref
        )
    D = hidden.shape[-1]
    *logps, _, _ = _op(
        hidden.reshape(-1, D), weight, targets.reshape(-1).contiguous(), bias,
        ref.hidden.reshape(-1, D), *ref[1:], *head, ignore_index, strategy, impl, *tiles,
    )  # fmt: skip
    return TripleLogps(*(x.view(targets.shape) for x in logps))
