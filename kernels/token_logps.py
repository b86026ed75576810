"""Log-probabilities of target tokens, from logits.

With ``y = softcap * tanh(x / softcap)`` (``y = x`` without softcap) and ``z = y / temperature``::

    logps[n] = z[n, targets[n]] - log(sum_v exp(z[n, v]))
    d logps[n] / d x[n, v] = ([v == targets[n]] - p[n, v]) * (1 - tanh(x / softcap)^2) / temperature

Shapes: logits ``[..., V]``, flattened to N rows; everything else ``[...]``. The forward pass reads
each logit once (N·V elements, about 4·N·V operations) and keeps two float32 per row, the maximum
``m`` of ``y`` and ``log_sum = log(sum_v exp((y_v - m) / temperature))``. They are kept apart
because their sum loses the small one where logits are shifted far from zero. The backward pass
reads and writes each logit once and takes ``p = exp((y - m) / temperature - log_sum)`` from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _token_logps_chunked, _token_logps_triton
from ._autograd import differentiable
from ._common import (
    INTEGERS,
    check_ignore_index,
    check_labels,
    check_number,
    check_outputs,
    check_tensor,
    compute_dtype,
    on_device,
    resolve_impl,
)

OUTPUTS = ("lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")

IMPLEMENTATIONS = {"chunked": _token_logps_chunked, "triton": _token_logps_triton}


class TokenLogps(NamedTuple):
    """What ``token_logps`` returns when ``outputs`` names extras; None where not asked for."""

    logps: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


def token_logps_reference(
    logits: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenLogps:
    """Return every output by eager PyTorch, in the dtype of ``logits``."""
    valid = targets != ignore_index
    logits = logits.masked_fill(~valid[..., None], 0)
    z = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    log_probs = z.log_softmax(-1)
    finite = log_probs.masked_fill(log_probs == -math.inf, 0)
    index = torch.where(valid, targets, 0)
    every = (
        log_probs.gather(-1, index[..., None])[..., 0],
        z.detach().logsumexp(-1),
        -(log_probs.exp() * finite).sum(-1),
        z.detach().mean(-1),
        z.gather(-1, index[..., None])[..., 0] >= z.amax(-1),
        (2 * log_probs.detach()).logsumexp(-1),
    )
    return TokenLogps(*(torch.where(valid, each, 0).to(each.dtype) for each in every))


@torch.library.custom_op("prefalign::token_logps", mutates_args=())
def _token_logps(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    outputs: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_labels("targets", targets, logits.shape[-1], ignore_index)
    stats = _allocate(logits, outputs)
    if targets.numel():
        flat = [stat.view(-1) for stat in stats]
        with on_device(logits):
            IMPLEMENTATIONS[impl].forward(
                logits, targets.reshape(-1).contiguous(), temperature, softcap, ignore_index, flat
            )
    return stats


def _allocate(logits: Tensor, outputs: str) -> tuple[Tensor, ...]:
    """Return logps, row_max, log_sum, entropy, mean, is_top1, sum_sq: empty where not asked for."""
    wanted = outputs.split(",")
    shape = logits.shape[:-1]
    dtype = compute_dtype(logits)
    named = (("entropy", dtype), ("mean_logits", dtype), ("is_top1", torch.bool))
    return (
        *(logits.new_empty(shape, dtype=dtype) for _ in range(3)),
        *(
            logits.new_empty(shape if name in wanted else (0,), dtype=kind)
            for name, kind in (*named, ("log_sum_sq_probs", dtype))
        ),
    )


@_token_logps.register_fake
def _(logits, targets, temperature, softcap, ignore_index, outputs, impl):
    return _allocate(logits, outputs)


@torch.library.custom_op("prefalign::token_logps_backward", mutates_args=())
def _token_logps_backward(
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    impl: str,
) -> Tensor:
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if grad.numel():
        grads = [None if g is None else g.reshape(-1) for g in (grad_logps, grad_entropy)]
        stats = [stat.reshape(-1) for stat in (row_max, log_sum, entropy)]
        rows = grad.view(-1, logits.shape[-1])
        targets = targets.reshape(-1).contiguous()
        with on_device(logits):
            IMPLEMENTATIONS[impl].backward(
                rows, grads, logits, targets, stats, temperature, softcap, ignore_index
            )
    return grad


@_token_logps_backward.register_fake
def _(grad_logps, grad_entropy, logits, *args):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx, inputs, output):
    logits, targets, *options = inputs
    logps, row_max, log_sum, entropy, mean, is_top1, sum_sq = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(row_max, log_sum, mean, is_top1, sum_sq)
    ctx.save_for_backward(logits, targets, row_max, log_sum, entropy)
    ctx.options = options


def _backward(ctx, grad_logps, _max, _log_sum, grad_entropy, *_):
    temperature, softcap, ignore_index, outputs, impl = ctx.options
    if "entropy" not in outputs.split(","):
        grad_entropy = None
    grad = None
    if ctx.needs_input_grad[0] and not (grad_logps is None and grad_entropy is None):
        options = (temperature, softcap, ignore_index, impl)
        grad = _token_logps_backward(grad_logps, grad_entropy, *ctx.saved_tensors, *options)
    return grad, *[None] * 6


_token_logps = differentiable(_token_logps, _backward, _setup_context)


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: Sequence[str] = (),
    impl: str = "auto",
) -> Tensor | TokenLogps:
    """Return the log-probability of each target under softmax of its logits.

    Equivalent PyTorch, but for the rows of ``ignore_index``, which give exactly 0::

        z = softcap * torch.tanh(logits / softcap) / temperature  # without softcap: logits / ...
        z.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    Args:
        logits: ``[..., V]``, float16, bfloat16, float32 or float64, with any strides (slices and
            expanded tensors are not copied). Entries may be -inf.
        targets: ``[...]``, int32 or int64: labels in ``[0, V)``, or ``ignore_index``.
        temperature: divides the logits, after the cap. Above 0, default 1.
        softcap: caps the logits smoothly at plus or minus this value. Above 0; default
            None, no cap.
        ignore_index: the label of rows to leave out. Default -100. Such a row may hold NaN.
        outputs: names of extras from the same pass, each ``[...]``, of ``z`` as above:
            ``"lse"`` log-sum-exp; ``"entropy"`` in nats; ``"mean_logits"`` mean over V;
            ``"is_top1"`` (bool) whether no entry of ``z`` is larger than the target's;
            ``"log_sum_sq_probs"`` log of the sum of squared probabilities. Default ().
        impl: ``"auto"``, ``"triton"``, ``"chunked"`` or ``"reference"``. Default ``"auto"``: Triton
            on a GPU, chunked torch elsewhere and for float64.

    Returns:
        The log-probs ``[...]``, float32 (float64 from float64 logits; the dtype of ``logits`` from
        the reference), in nats. With ``outputs``, a ``TokenLogps``, whose first field is
        ``logps`` and whose fields that were not asked for are None. Only ``logps`` and ``entropy``
        are differentiable, once, and with respect to ``logits`` only.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or device that does not fit, a number out of range, an unknown name, or
            a label out of range. On a GPU the last is an asynchronous assertion.

    Numerics:
        float32 inside for half-precision logits: the only rounding is that of the logits given.
        The gradient is rounded once, to the dtype of ``logits``. Deterministic, bit for bit.

    Source:
        The online maximum and sum: Milakov and Gimelshein, arXiv 1805.02867, algorithm 3. The cap:
        Gemma 2, arXiv 2408.00118, section 2. The sum of squared probabilities: WPO, arXiv
        2406.11827.
    """
    check_tensor("logits", logits, min_ndim=1)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits: expected a vocabulary of at least 1, got {tuple(logits.shape)}")
    check_tensor(
        "targets",
        targets,
        dtypes=INTEGERS,
        shape=logits.shape[:-1],
        like=("logits", logits),
    )
    temperature = check_number("temperature", temperature, above=0)
    if softcap is not None:
        softcap = check_number("softcap", softcap, above=0)
    check_ignore_index(ignore_index)
    names = check_outputs(outputs, OUTPUTS)
    impl = resolve_impl(impl, logits.device, logits.dtype)
    targets = targets.long()
    if impl == "reference":
        if not torch.compiler.is_compiling():
            check_labels("targets", targets, logits.shape[-1], ignore_index)
        every = token_logps_reference(logits, targets, temperature, softcap, ignore_index)
    else:
        logps, row_max, log_sum, entropy, mean, is_top1, sum_sq = _token_logps(
            logits, targets, temperature, softcap, ignore_index, ",".join(names), impl
        )
        lse = row_max / temperature + log_sum if "lse" in names else None
        every = TokenLogps(logps, lse, entropy, mean, is_top1, sum_sq)
    if not names:
        return every.logps
    return TokenLogps(every.logps, **{name: getattr(every, name) for name in names})
