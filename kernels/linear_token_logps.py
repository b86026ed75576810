"""Per-token log-probs of a linear head, straight from hidden states: no [N, V] logits.

    z    = softcap·tanh(u / softcap) / temperature,   u = logit_scale·(hidden @ weight.T + bias)
    logp = z_y - log sum_v exp(z_v)

hidden [N, D], weight [V, D], targets [N] -> logps [N]. One pass of the head is F = 2·N·D·V FLOP.

    forward, nothing needs a gradient       1F          reads hidden and weight once per row chunk
    frozen head, forward + backward         2F          saves J [N, D], backward only scales rows
    trained head, forward + backward        4F          saves lse [N], recomputes vocabulary slices
    trained LoRA on it (``head_adapter``)   3F          the same, but for the weight's gradient

The row Jacobian of a frozen head, summed up beside the log-sum-exp, with d = dz/du:

    J_t = dlogp_t / dhidden_t = logit_scale·(d_y·weight[y] - sum_v p_v·d_v·weight[v])

Beyond inputs, outputs and what is saved: O(N + D·chunk) and one budgeted workspace (``plan``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from . import _linear_chunked, _linear_triton
from ._autograd import differentiable, wants_grad
from ._common import (
    FLOATS,
    INTEGERS,
    check_ignore_index,
    check_labels,
    check_number,
    check_outputs,
    check_tensor,
    resolve_impl,
)
from ._head_math import Head
from ._low_rank import Adapter
from .head_adapter import HeadAdapter, check_adapter, project
from .plan import HeadPlan, default_workspace, head_strategy, head_tiles, tile_bytes
from .token_logps import OUTPUTS, TokenLogps

IMPLEMENTATIONS = {"chunked": _linear_chunked, "triton": _linear_triton}


def head_logits(hidden, weight, bias, head: Head, adapter=None) -> torch.Tensor:
    """Return the logits of ``hidden``, eagerly, in its dtype."""
    z = F.linear(hidden, weight, bias if bias is None else bias.to(hidden.dtype))
    if adapter is not None:  # PEFT's order, in the wider of the two dtypes
        wide = torch.promote_types(hidden.dtype, adapter.a.dtype)
        low = F.linear(hidden.to(wide), adapter.a.to(wide))
        z = (z + F.linear(low, adapter.b.to(wide)) * adapter.scaling).to(hidden.dtype)
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / head.temperature


def reference_linear_token_logps(hidden, weight, targets, bias, head, ignore_index, adapter=None):
    """Return every output of the op, eagerly; differentiable, in the dtype of ``hidden``."""
    z = head_logits(hidden, weight, bias, head, adapter)
    z = z if z.dtype == torch.float64 else z.float()
    live = targets != ignore_index
    y = torch.where(live, targets, 0).unsqueeze(-1)
    logp = z.log_softmax(-1)
    out = TokenLogps(
        logps=logp.gather(-1, y).squeeze(-1),
        lse=torch.logsumexp(z, -1).detach(),
        entropy=-(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1),
        mean_logits=z.mean(-1).detach(),
        is_top1=(z.gather(-1, y).squeeze(-1) >= z.amax(-1)).detach(),
        log_sum_sq_probs=torch.logsumexp(2 * logp, -1).detach(),
    )
    return TokenLogps(*(value.masked_fill(~live, 0) for value in out))


def plan_tiles(hidden, V, rows, tile, budget, rank=0):
    """Return (rows, vocabulary entries, budget), with 0 replaced by what the plan would say."""
    N, D = hidden.shape
    budget = budget or default_workspace(hidden.device)
    if not rows:
        rows, tile = head_tiles(N, V, D, hidden.dtype, hidden.device, budget, rank)
    return rows, tile, budget


@torch.library.custom_op("prefalign::linear_token_logps", mutates_args=())
def _op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    extras: str,
    strategy: str,
    impl: str,
    row_chunk: int,
    vocab_tile: int,
    budget: int,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    check_labels("targets", targets, weight.shape[0], ignore_index)
    rank = 0 if low is None else low.shape[1]
    rows, tile, _ = plan_tiles(hidden, weight.shape[0], row_chunk, vocab_tile, budget, rank)
    head = Head(logit_scale, softcap, temperature)
    names = tuple(name for name in extras.split(",") if name not in ("", "lse"))
    stats, norm, J, J_low = IMPLEMENTATIONS[impl].forward(
        hidden, weight, targets, bias, head, ignore_index, names, strategy == "row_jacobian",
        rows, tile, adapter=None if low is None else Adapter(low, up),
    )  # fmt: skip
    values = (stats.get(name) for name in TokenLogps._fields)
    return tuple(hidden.new_empty(0) if x is None else x for x in (*values, norm, J, J_low))


@_op.register_fake
def _(hidden, weight, targets, bias, logit_scale, softcap, temperature, ignore_index, extras,
      strategy, impl, row_chunk, vocab_tile, budget, low=None, up=None):  # fmt: skip
    names = ("logps", "lse", *extras.split(","))
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    stats = [
        targets.new_empty(targets.shape, dtype=torch.bool if name == "is_top1" else dtype)
        if name in names
        else hidden.new_empty(0)
        for name in TokenLogps._fields
    ]
    J, J_low = (
        x.new_empty(x.shape)
        if strategy == "row_jacobian" and x is not None
        else hidden.new_empty(0)
        for x in (hidden, low)
    )
    return (*stats, targets.new_empty((2, *targets.shape), dtype=dtype), J, J_low)


@torch.library.custom_op("prefalign::linear_token_logps_backward", mutates_args=())
def backward_op(
    grad_logps: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    norm: torch.Tensor,
    entropy: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    needs: str,
    impl: str,
    row_chunk: int,
    vocab_tile: int,
    budget: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the head's inputs from recomputed logits; ``needs`` is a subset of "hwb"."""
    return _gradients(
        grad_logps, grad_entropy, hidden, weight, targets, bias, norm, entropy, logit_scale,
        softcap, temperature, ignore_index, needs, impl, row_chunk, vocab_tile, budget,
    )[:3]  # fmt: skip


def _gradients(
    grad_logps, grad_entropy, hidden, weight, targets, bias, norm, entropy, logit_scale, softcap,
    temperature, ignore_index, needs, impl, row_chunk, vocab_tile, budget, adapter=None,
):  # fmt: skip
    V, D = weight.shape
    rank = 0 if adapter is None else adapter.up.shape[1]
    rows, tile, budget = plan_tiles(hidden, V, row_chunk, vocab_tile, budget, rank)
    grads = IMPLEMENTATIONS[impl].backward(
        grad_logps, grad_entropy, hidden, weight, targets, bias, norm,
        None if grad_entropy is None else entropy,
        Head(logit_scale, softcap, temperature), ignore_index,
        tuple(letter in needs for letter in "hwblu"), rows, tile,
        budget - tile_bytes(rows, tile, D, hidden.dtype, hidden.device, rank), adapter=adapter,
    )  # fmt: skip
    return tuple(hidden.new_empty(0) if x is None else x for x in grads)


@backward_op.register_fake
def _(grad_logps, grad_entropy, hidden, weight, targets, bias, norm, entropy, logit_scale, softcap,
      temperature, ignore_index, needs, impl, row_chunk, vocab_tile, budget):  # fmt: skip
    return tuple(
        hidden.new_empty(0) if letter not in needs else value.new_empty(value.shape)
        for letter, value in zip("hwb", (hidden, weight, bias), strict=True)
    )


@torch.library.custom_op("prefalign::linear_token_logps_adapter_backward", mutates_args=())
def adapter_backward_op(
    grad_logps: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    norm: torch.Tensor,
    entropy: torch.Tensor,
    low: torch.Tensor,
    up: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    needs: str,
    impl: str,
    row_chunk: int,
    vocab_tile: int,
    budget: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what ``backward_op`` does, and the gradients of ``low`` and ``up`` ("lu")."""
    return _gradients(
        grad_logps, grad_entropy, hidden, weight, targets, bias, norm, entropy, logit_scale,
        softcap, temperature, ignore_index, needs, impl, row_chunk, vocab_tile, budget,
        Adapter(low, up),
    )  # fmt: skip


@adapter_backward_op.register_fake
def _(grad_logps, grad_entropy, hidden, weight, targets, bias, norm, entropy, low, up, logit_scale,
      softcap, temperature, ignore_index, needs, impl, row_chunk, vocab_tile,
      budget):  # fmt: skip
    return tuple(
        hidden.new_empty(0) if letter not in needs else value.new_empty(value.shape)
        for letter, value in zip("hwblu", (hidden, weight, bias, low, up), strict=True)
    )


@torch.library.custom_op("prefalign::scale_rows", mutates_args=())
def scale_rows_op(
    grad: torch.Tensor, jacobian: torch.Tensor, targets: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """Return grad[:, None]·J, rounded once to J's dtype; 0 at ignored rows, whatever ``grad`` is.

    This is the whole backward of a frozen head: N·D multiplications.
    """
    grad = grad.masked_fill(targets == ignore_index, 0)[:, None]
    out = torch.empty_like(jacobian)
    # torch promotes 16-bit J to a float32 temporary on a CPU: a megabyte at a time, not [N, D].
    step = jacobian.shape[0] if jacobian.is_cuda else max(1, 2**18 // jacobian.shape[1])
    for start in range(0, jacobian.shape[0], max(1, step)):
        rows = slice(start, start + step)
        torch.mul(jacobian[rows], grad[rows], out=out[rows])
    return out


@scale_rows_op.register_fake
def _(grad, jacobian, targets, ignore_index):
    return torch.empty_like(jacobian)


def which_grads(hidden, weight, bias, low=False, up=False) -> str:
    """Return what a backward op is to compute, as letters of "hwblu"."""
    return "h" * hidden + "w" * weight + "b" * bias + "l" * low + "u" * up


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, bias, *ctx.scalars, low, up = inputs
    logps, lse, entropy, mean_logits, is_top1, log_sum_sq_probs, norm, J, J_low = output
    ctx.strategy = inputs[9]
    ctx.set_materialize_grads(False)
    has_entropy = "entropy" in inputs[8].split(",")
    fixed = (lse, mean_logits, is_top1, log_sum_sq_probs, norm, J, J_low)
    ctx.mark_non_differentiable(*fixed, *(() if has_entropy else (entropy,)))
    if ctx.strategy == "recompute" or has_entropy:
        ctx.save_for_backward(hidden, weight, targets, bias, norm, entropy, J, J_low, low, up)
    else:
        ctx.save_for_backward(None, None, targets, None, None, None, J, J_low, None, None)


def _backward(ctx, grad_logps, _lse, grad_entropy, *_others):
    hidden, weight, targets, bias, norm, entropy, J, J_low, low, up = ctx.saved_tensors
    logit_scale, softcap, temperature, ignore_index, _, strategy, impl, *tiles = ctx.scalars
    need_h, need_w, _, need_b, *_ = ctx.needs_input_grad
    need_low, need_up = ctx.needs_input_grad[-2:]
    none = (None,) * len(ctx.scalars)
    if grad_logps is None and grad_entropy is None:
        return None, None, None, None, *none, None, None
    if strategy == "row_jacobian" and grad_entropy is None:
        dh, dlow = (
            scale_rows_op(grad_logps, x, targets, ignore_index) if need else None
            for x, need in ((J, need_h), (J_low, need_low))
        )
        return dh, None, None, None, *none, dlow, None
    if strategy == "forward":
        raise RuntimeError("linear_token_logps: the plan's strategy 'forward' has no backward")
    given = (grad_logps, grad_entropy, hidden, weight, targets, bias, norm, entropy)
    needs = which_grads(need_h, need_w, need_b, need_low, need_up)
    rest = (logit_scale, softcap, temperature, ignore_index, needs, impl, *tiles)
    if low is None:
        grads = backward_op(*given, *rest)
    else:
        grads = adapter_backward_op(*given, low, up, *rest)
    found = dict(zip("hwblu", grads, strict=False))
    dh, dw, db, dlow, dup = (found[x] if x in needs else None for x in "hwblu")
    return dh, dw, None, db, *none, dlow, dup


_op = differentiable(_op, _backward, _setup_context)


def check_head(
    hidden, weight, targets, bias, logit_scale, softcap, temperature, ignore_index, prefix=""
) -> Head:
    """Check one head's arguments and return its scalars. ``prefix`` names the second model's."""
    check_tensor(f"{prefix}hidden", hidden, dtypes=FLOATS, min_ndim=1)
    check_tensor(
        f"{prefix}weight", weight, dtypes=(hidden.dtype,), ndim=2, like=(f"{prefix}hidden", hidden)
    )
    V, D = weight.shape
    if V < 1 or D < 1 or hidden.shape[-1] != D:
        raise ValueError(
            f"{prefix}weight: expected shape [V, {hidden.shape[-1]}] with V and D above 0, as "
            f"{prefix}hidden {tuple(hidden.shape)} has it, got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_tensor(
            f"{prefix}bias", bias, dtypes=FLOATS, shape=(V,), like=(f"{prefix}hidden", hidden)
        )
    check_tensor(
        "targets", targets, dtypes=INTEGERS, shape=hidden.shape[:-1],
        like=(f"{prefix}hidden", hidden),
    )  # fmt: skip
    check_ignore_index(ignore_index)
    return Head(
        check_number("logit_scale", logit_scale),
        None if softcap is None else check_number("softcap", softcap, above=0),
        check_number("temperature", temperature, above=0),
    )


def autocast(hidden: torch.Tensor, *others: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Cast to autocast's dtype where it is on, as ``F.linear`` would: same numbers on a switch."""
    if not all(x is None or isinstance(x, torch.Tensor) for x in (hidden, *others)):
        return [hidden, *others]  # the checks that follow name which
    kind = hidden.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return [hidden, *others]
    dtype = torch.get_autocast_dtype(kind)
    return [x if x is None else x.to(dtype) for x in (hidden, *others)]


def choose_strategy(
    plan: HeadPlan | None, hidden, weight, bias, adapter: HeadAdapter | None = None
) -> tuple[str, list[int]]:
    """Return (strategy, [row_chunk, vocab_tile, budget]) from what needs grad, or ``plan``."""
    grad = torch.is_grad_enabled()
    rows, entries = [hidden], [weight, bias]
    if adapter is not None:
        rows.append(adapter.a)
        entries.append(adapter.b)
    hidden_grad = grad and any(map(wants_grad, rows))
    weight_grad = grad and any(map(wants_grad, entries))
    strategy = head_strategy(hidden_grad, weight_grad)
    if plan is None:
        return strategy, [0, 0, 0]
    if not isinstance(plan, HeadPlan):
        raise TypeError(f"plan: expected a HeadPlan or None, got {type(plan).__name__}")
    if (plan.V, plan.D) != tuple(weight.shape):
        raise ValueError(
            f"plan: expected one for weight {tuple(weight.shape)}, got V={plan.V}, D={plan.D}"
        )
    tiles = {name: getattr(plan, name) for name in ("row_chunk", "vocab_tile", "budget_bytes")}
    for name, value in tiles.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"plan: expected {name} to be an int above 0, got {value!r}")
    if strategy != "forward" and plan.strategy not in (strategy, "recompute"):
        raise ValueError(
            f"plan: expected strategy {strategy!r} or 'recompute' for what requires a gradient, "
            f"got {plan.strategy!r}"
        )
    strategy = strategy if strategy == "forward" else plan.strategy
    return strategy, list(tiles.values())


def linear_token_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    adapter: HeadAdapter | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: Sequence[str] = (),
    impl: str = "auto",
    plan: HeadPlan | None = None,
) -> torch.Tensor | TokenLogps:
    """Return the log-prob of each target token under a linear head, without forming the logits.

    Equivalent PyTorch::

        u = F.linear(hidden, weight, bias)
        if adapter is not None:
            u = u + F.linear(F.linear(hidden, adapter.a), adapter.b) * adapter.scaling
        u = logit_scale * u
        z = (u if softcap is None else softcap * torch.tanh(u / softcap)) / temperature
        logps = z.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        logps = logps.masked_fill(targets == ignore_index, 0)

    Args:
        hidden: [..., D], float16, bfloat16, float32 or float64; the last hidden state. Leading
            dimensions that cannot be flattened as a view are copied.
        weight: [V, D], the dtype of ``hidden``; the head's weight.
        targets: [...], int64 (or int32); the token to score, or ``ignore_index``.
        bias: [V], any float dtype, or None.
        adapter: a ``HeadAdapter(a, b, scaling)``, LoRA on ``weight``, or None; what PEFT adds to
            the head's output, in float32.
        logit_scale: factor on the logits (Cohere; Granite's ``1 / logits_scaling``); default 1.
        softcap: Gemma-2's cap on the logits, above 0, or None.
        temperature: divides the logits, after the cap; above 0, default 1.
        ignore_index: target of rows that do not count: they give exactly 0 and no gradient, and
            on a CPU are dropped before any GEMM. (On a GPU, knowing their number would be a host
            sync, so they are computed and masked.) Default -100.
        outputs: names of extras from the same pass, each [...]: ``"lse"`` (log-sum-exp),
            ``"entropy"`` (differentiable), ``"mean_logits"`` (over the vocabulary), ``"is_top1"``
            (bool: no logit is above the target's), ``"log_sum_sq_probs"`` (log sum_v p_v²).
        impl: ``"auto"`` (Triton on a GPU, else chunked), ``"triton"``, ``"chunked"`` or
            ``"reference"`` (eager, forms the logits).
        plan: a ``HeadPlan`` (tiles, strategy, budget); default: made from shapes and from what
            requires a gradient.

    Returns:
        logps, [...] float32 (float64 for float64 inputs); with ``outputs``, a
        ``TokenLogps`` whose first field it is and whose fields not asked for are None.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value; a
            label outside [0, V). On a GPU the label check is an asynchronous device assertion.

    Numerics: logits, sums and gradients accumulate in float32, 16-bit inputs are never rounded
    further before the log-sum-exp; gradients are rounded once, at the end (a frozen head's twice:
    its Jacobian is kept in ``hidden``'s dtype). Bit for bit deterministic, and the same log-probs
    with and without a gradient. Under autocast ``hidden`` and ``weight`` are cast as ``F.linear``
    casts them.

    Cost: 1F = 2·N·D·V FLOP without a gradient, 2F with a frozen head, 3F with a trained adapter on
    a frozen one, 4F with a trained head, all with backward, and r/D of F for each product with an
    adapter's ``b``; ``plan_head`` prints it, with the bytes. A gradient through the entropy of a
    frozen head costs 2F more (plan it with ``entropy_grad=True`` to make that 1F).

    Source: the row Jacobian is attention with the head's weight as keys and values, by the online
    softmax of Milakov & Gimelshein (2018).
    """
    names = check_outputs(outputs, OUTPUTS)
    a, b = adapter[:2] if isinstance(adapter, HeadAdapter) else (None, None)
    hidden, weight, a, b = autocast(hidden, weight, a, b)
    head = check_head(
        hidden, weight, targets, bias, logit_scale, softcap, temperature, ignore_index
    )
    if adapter is not None:
        adapter = check_adapter(adapter, a, b, hidden, weight)
    targets = targets.long()
    impl = resolve_impl(impl, hidden.device, hidden.dtype)
    strategy, tiles = choose_strategy(plan, hidden, weight, bias, adapter)
    if impl == "reference":
        if not torch.compiler.is_compiling():
            check_labels("targets", targets, weight.shape[0], ignore_index)
        out = reference_linear_token_logps(
            hidden, weight, targets, bias, head, ignore_index, adapter
        )
    else:
        rows, y = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).contiguous()
        low, up = (None, None) if adapter is None else project(rows, adapter, y, ignore_index)
        *stats, _, _, _ = _op(
            rows, weight, y, bias, *head, ignore_index, ",".join(names), strategy, impl, *tiles,
            low, up,
        )  # fmt: skip
        out = TokenLogps(
            *(x.view(targets.shape) if name in ("logps", *names) else None
              for name, x in zip(TokenLogps._fields, stats, strict=True))
        )  # fmt: skip
    if not names:
        return out.logps
    return TokenLogps(
        *(x if name in ("logps", *names) else None
          for name, x in zip(TokenLogps._fields, out, strict=True))
    )  # fmt: skip
