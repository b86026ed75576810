"""Preference logits of every pair of the responses to a prompt, for ragged groups.

With ``d = policy - reference`` and group g the responses ``cu_groups[g]:cu_groups[g + 1]``::

    out[g, i, j] = r_i - r_j = beta * (d_i - d_j)
    d L / d policy_i = beta * (sum_j G[g, i, j] - sum_j G[g, j, i])

The difference is taken before the scaling, so that the result is antisymmetric bit for bit and its
diagonal exactly 0, which ``beta * d_i - beta * d_j`` is not once a compiler fuses a multiply-add.
Shapes: R responses in G groups of K_g; the output ``[G, Kmax, Kmax]`` or the ``sum_g K_g * K_g``
elements of its blocks. One pass writes the output (4 bytes and 2 operations an element) from 2·R
numbers; the backward pass reads it twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
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
    store_rounded,
    tl,
    triton,
)

LAYOUTS = ("padded", "flat")

MAX_BLOCK_K = 1024


def pairwise_preference_logits_reference(
    policy_logps: Tensor,
    reference_logps: Tensor,
    group_sizes: Sequence[int],
    beta: float = 0.1,
    layout: str = "padded",
) -> Tensor:
    """Return the pairs of every group by eager PyTorch, in the dtype given."""
    groups = (policy_logps - reference_logps).split(list(group_sizes))
    blocks = [beta * (d[:, None] - d[None, :]) for d in groups]
    if layout == "flat":
        return torch.cat([policy_logps[:0], *(block.flatten() for block in blocks)])
    widest = max(group_sizes, default=0)
    pads = [widest - block.shape[0] for block in blocks]
    padded = [F.pad(block, (0, pad, 0, pad)) for block, pad in zip(blocks, pads, strict=True)]
    return torch.stack(padded) if padded else policy_logps.view(0, 0, 0)


# Triton: program (g, i) has response i of group g; the grid is as wide as the widest group.


@jit
def _group(cu_ptr, blocks_ptr, g, K_MAX, PADDED: tl.constexpr):
    """Return a group's first response, its size, and its block's first element and row stride."""
    first = tl.load(cu_ptr + g).to(tl.int64)
    size = tl.load(cu_ptr + g + 1).to(tl.int64) - first
    if PADDED:
        width = size * 0 + K_MAX
        block = g * K_MAX * K_MAX
    else:
        width = size
        block = tl.load(blocks_ptr + g)
    return first, size, block, width


@jit
def _forward_kernel(
    policy_ptr,
    reference_ptr,
    cu_ptr,
    blocks_ptr,
    out_ptr,
    stride_p,
    stride_r,
    K_MAX,
    beta,
    PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write one row of one group's block, and in the padded layout the zeros around it."""
    g = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64)
    first, size, block, width = _group(cu_ptr, blocks_ptr, g, K_MAX, PADDED)
    inside = i < size
    policy_ptr += first * stride_p
    reference_ptr += first * stride_r
    d_i = tl.load(policy_ptr + i * stride_p, mask=inside, other=0.0).to(tl.float32)
    d_i -= tl.load(reference_ptr + i * stride_r, mask=inside, other=0.0).to(tl.float32)
    columns = tl.where(inside, size, 0)
    written = width if PADDED else columns
    for begin in range(0, written, BLOCK_K):
        j = begin + tl.arange(0, BLOCK_K).to(tl.int64)
        mask = j < columns
        d_j = tl.load(policy_ptr + j * stride_p, mask=mask, other=0.0).to(tl.float32)
        d_j -= tl.load(reference_ptr + j * stride_r, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, beta * (d_i - d_j), 0.0)
        tl.store(out_ptr + block + i * width + j, value, mask=j < written)


@jit
def _backward_kernel(
    grad_ptr,
    grad_out_ptr,
    cu_ptr,
    blocks_ptr,
    K_MAX,
    beta,
    PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Reduce one response's row and column of the upstream gradient."""
    g = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64)
    first, size, block, width = _group(cu_ptr, blocks_ptr, g, K_MAX, PADDED)
    inside = i < size
    acc = tl.zeros([BLOCK_K], tl.float32)
    columns = tl.where(inside, size, 0)
    for begin in range(0, columns, BLOCK_K):
        j = begin + tl.arange(0, BLOCK_K).to(tl.int64)
        mask = j < columns
        row = tl.load(grad_out_ptr + block + i * width + j, mask=mask, other=0.0)
        column = tl.load(grad_out_ptr + block + j * width + i, mask=mask, other=0.0)
        acc += row.to(tl.float32) - column.to(tl.float32)
    store_rounded(grad_ptr + first + i, beta * tl.sum(acc, axis=0), inside)


def _block_k(widest: int) -> int:
    return min(MAX_BLOCK_K, max(16, triton.next_power_of_2(widest)))


def _block_starts(cu_groups: Tensor, padded: bool) -> Tensor | None:
    if padded:
        return None
    sizes = cu_groups.diff()
    return (sizes * sizes).cumsum(0) - sizes * sizes


def _forward_triton(policy_logps, reference_logps, cu_groups, widest, beta, padded, out):
    _forward_kernel[(cu_groups.shape[0] - 1, widest)](
        policy_logps,
        reference_logps,
        cu_groups,
        _block_starts(cu_groups, padded),
        out,
        policy_logps.stride(0),
        reference_logps.stride(0),
        widest,
        beta,
        PADDED=padded,
        BLOCK_K=_block_k(widest),
        num_warps=4,
    )


def _backward_triton(grad, grad_out, cu_groups, widest, beta, padded):
    _backward_kernel[(cu_groups.shape[0] - 1, widest)](
        grad,
        grad_out,
        cu_groups,
        _block_starts(cu_groups, padded),
        widest,
        beta,
        PADDED=padded,
        BLOCK_K=_block_k(widest),
        num_warps=4,
    )


# Chunked torch: a group at a time, written in place.


def _blocks(out: Tensor, cu_groups: Tensor, padded: bool):
    """Yield each group's slice of responses and its ``[K, K]`` view of ``out``."""
    used = 0
    for g, (start, end) in enumerate(pairwise(cu_groups.tolist())):
        size = end - start
        if padded:
            yield slice(start, end), out[g, :size, :size]
        else:
            yield slice(start, end), out[used : used + size * size].view(size, size)
            used += size * size


def _forward_chunked(policy_logps, reference_logps, cu_groups, widest, beta, padded, out):
    d = policy_logps.to(out.dtype) - reference_logps.to(out.dtype)
    if padded:
        out.zero_()
    for rows, block in _blocks(out, cu_groups, padded):
        block.copy_(d[rows, None] - d[None, rows]).mul_(beta)


def _backward_chunked(grad, grad_out, cu_groups, widest, beta, padded):
    for rows, block in _blocks(grad_out, cu_groups, padded):
        grad[rows] = beta * (block - block.T).sum(-1)


# The op


@torch.library.custom_op("prefalign::pairwise_preference_logits", mutates_args=())
def _pairwise_preference_logits(
    policy_logps: Tensor,
    reference_logps: Tensor,
    cu_groups: Tensor,
    widest: int,
    elements: int,
    beta: float,
    padded: bool,
    impl: str,
) -> Tensor:
    out = _allocate(policy_logps, reference_logps, cu_groups, widest, elements, padded)
    if out.numel():
        forward = _forward_triton if impl == "triton" else _forward_chunked
        with on_device(out):
            forward(policy_logps, reference_logps, cu_groups, widest, beta, padded, out)
    return out


def _allocate(policy_logps, reference_logps, cu_groups, widest, elements, padded):
    shape = (cu_groups.shape[0] - 1, widest, widest) if padded else (elements,)
    return policy_logps.new_empty(shape, dtype=compute_dtype(policy_logps, reference_logps))


@_pairwise_preference_logits.register_fake
def _(policy_logps, reference_logps, cu_groups, widest, elements, beta, padded, impl):
    return _allocate(policy_logps, reference_logps, cu_groups, widest, elements, padded)


@torch.library.custom_op("prefalign::pairwise_preference_logits_backward", mutates_args=())
def _pairwise_preference_logits_backward(
    grad_out: Tensor,
    policy_logps: Tensor,
    cu_groups: Tensor,
    widest: int,
    beta: float,
    padded: bool,
    impl: str,
) -> Tensor:
    grad = policy_logps.new_empty(policy_logps.shape)
    if grad.numel():
        backward = _backward_triton if impl == "triton" else _backward_chunked
        with on_device(grad):
            backward(grad, grad_out.contiguous(), cu_groups, widest, beta, padded)
    return grad


@_pairwise_preference_logits_backward.register_fake
def _(grad_out, policy_logps, cu_groups, widest, beta, padded, impl):
    return policy_logps.new_empty(policy_logps.shape)


def _setup_context(ctx, inputs, output):
    policy_logps, _, cu_groups, widest, _, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(policy_logps, cu_groups)
    ctx.options = (widest, *options)


def _backward(ctx, grad_out):
    grad = None
    if ctx.needs_input_grad[0] and grad_out is not None:
        grad = _pairwise_preference_logits_backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return grad, *[None] * 7


_pairwise_preference_logits = differentiable(_pairwise_preference_logits, _backward, _setup_context)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_divides(size: int, responses: int) -> int:
    if size < 1 or responses % size:
        raise ValueError(
            f"group_sizes: expected an int that divides the {responses} responses, got {size}"
        )
    return size


def _sizes(
    group_sizes: int | Sequence[int] | Tensor | None, cu_groups: Tensor | None, responses: int
) -> list[int]:
    """Return the sizes of the groups on the host, after checking that they add up."""
    if (group_sizes is None) == (cu_groups is None):
        got = "neither" if group_sizes is None else "both"
        raise ValueError(f"group_sizes, cu_groups: expected exactly one of them, got {got}")
    if cu_groups is not None:
        name = "cu_groups"
        check_tensor(name, cu_groups, dtypes=INTEGERS, ndim=1)
        ends = cu_groups.tolist()
        if not ends or ends[0] != 0:
            raise ValueError(f"cu_groups: expected [G + 1] that begins with 0, got {ends[:8]}")
        sizes = [end - start for start, end in pairwise(ends)]
    elif isinstance(group_sizes, Tensor):
        name = "group_sizes"
        check_tensor(name, group_sizes, dtypes=INTEGERS, ndim=1)
        sizes = group_sizes.tolist()
    else:
        name = "group_sizes"
        if _is_int(group_sizes):
            group_sizes = [group_sizes] * (responses // _check_divides(group_sizes, responses))
        if not isinstance(group_sizes, Iterable):
            raise TypeError(f"group_sizes: expected integers, got {type(group_sizes).__name__}")
        sizes = list(group_sizes)
        for size in sizes:
            if not _is_int(size):
                raise TypeError(f"group_sizes: expected integers, got {type(size).__name__}")
    if min(sizes, default=0) < 0:
        raise ValueError(f"{name}: expected groups of at least 0 responses, got {min(sizes)}")
    if sum(sizes) != responses:
        raise ValueError(
            f"{name}: expected groups of {responses} responses in all, got {sum(sizes)}"
        )
    return sizes


def pairwise_preference_logits(
    policy_logps: Tensor,
    reference_logps: Tensor,
    *,
    group_sizes: int | Sequence[int] | Tensor | None = None,
    cu_groups: Tensor | None = None,
    beta: float = 0.1,
    layout: str = "padded",
    impl: str = "auto",
) -> Tensor:
    """Return the preference logit of every pair of responses to the same prompt.

    Equivalent PyTorch, for one group::

        r = beta * (policy_logps - reference_logps)
        out = r[:, None] - r[None, :]

    Args:
        policy_logps: ``[R]``, any float dtype and stride: log-prob of each response under the
            policy, in nats, the responses to one prompt side by side.
        reference_logps: ``[R]``, under the reference model. A constant: one that requires grad is
            refused.
        group_sizes: K of each group, a sequence of ints or an integer tensor ``[G]``; 0 is allowed.
            Or one int, at least 1, for all of them.
        cu_groups: ``[G + 1]``, integer tensor: where each group begins, from 0 to R. Exactly one of
            the two must be given. The sizes are needed on the host: a tensor on a GPU costs a
            sync, one on the CPU or a sequence none. Under ``torch.compile`` pass one int, or a
            sequence, which is compiled anew for every number of groups.
        beta: scale of the log-ratios, per nat. Above 0, default 0.1.
        layout: ``"padded"`` or ``"flat"``. Default ``"padded"``.
        impl: ``"auto"``, ``"triton"``, ``"chunked"`` or ``"reference"``. Default ``"auto"``.

    Returns:
        Padded: ``[G, Kmax, Kmax]``, where ``sigmoid(out[g, i, j])`` is the probability that
        response i of prompt g is preferred to its response j, and 0 outside a group. Flat: the
        groups' ``K * K`` blocks laid end to end. float32 (float64 if an input is; the inputs'
        dtype from the reference). Differentiable in ``policy_logps``, once.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: both or neither of ``group_sizes`` and ``cu_groups``, sizes that do not add up
            to R, a shape or device that does not fit, ``beta`` out of range, an unknown layout, or
            a reference that requires grad.

    Numerics:
        float32 inside; antisymmetric bit for bit; the diagonal is exactly 0 for finite log-probs.

    Source:
        SPA: Kim et al., arXiv 2406.04412, equation 7.
    """
    check_tensor("policy_logps", policy_logps, ndim=1)
    check_tensor(
        "reference_logps",
        reference_logps,
        shape=policy_logps.shape,
        like=("policy_logps", policy_logps),
        constant=True,
    )
    check_choice("layout", layout, LAYOUTS)
    beta = check_number("beta", beta, above=0)
    dtype = compute_dtype(policy_logps, reference_logps)
    impl = resolve_impl(impl, policy_logps.device, dtype)
    R = policy_logps.shape[0]
    to = {"dtype": torch.int64, "device": policy_logps.device if impl == "triton" else "cpu"}
    if impl != "reference" and cu_groups is None and _is_int(group_sizes):
        widest = _check_divides(group_sizes, R)  # no list, which would tie a compiled graph to G
        starts, elements = torch.arange(0, R + 1, widest, **to), R * widest
    else:
        sizes = _sizes(group_sizes, cu_groups, R)
        if impl == "reference":
            return pairwise_preference_logits_reference(
                policy_logps, reference_logps, sizes, beta, layout
            )
        widest, elements = max(sizes, default=0), sum(size * size for size in sizes)
        starts = torch.tensor([0, *accumulate(sizes)], **to)
    return _pairwise_preference_logits(
        policy_logps, reference_logps, starts, widest if R else 0, elements, beta,
        layout == "padded", impl,
    )  # fmt: skip
