"""Sums of token log-probabilities over sequences, packed end to end or one to a row.

With ``m[t]`` 1 where the mask is true, or everywhere without one::

    sums[s] = sum_{t in s} m[t] * token_logps[t]        counts[s] = sum_{t in s} m[t]
    d sums[s] / d token_logps[t] = m[t] if t in s else 0

Shapes: ``token_logps`` is ``[N]`` with ``cu_seqlens`` ``[S + 1]``, or ``[S, T]``. Each pass moves
4 bytes a token (and 1 of the mask); the forward pass adds once per token. Each sequence is summed
on its own, in an order that depends on its length alone, never as a difference of prefix sums: a
change to one sequence leaves the sums of all others bit-identical.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ._autograd import differentiable
from ._common import (
    INTEGERS,
    check_tensor,
    compute_dtype,
    jit,
    on_device,
    resolve_impl,
    store_rounded,
    tl,
)

BLOCK_T = 1024


class SequenceLogps(NamedTuple):
    """Summed log-probs and numbers of tokens of S sequences."""

    sums: Tensor
    counts: Tensor


def sequence_logps_reference(
    token_logps: Tensor, cu_seqlens: Tensor | None = None, mask: Tensor | None = None
) -> SequenceLogps:
    """Return sums and counts by eager PyTorch, in the dtype of ``token_logps``."""
    kept = torch.ones_like(token_logps, dtype=torch.bool) if mask is None else mask
    values = token_logps.masked_fill(~kept, 0)
    if cu_seqlens is None:
        return SequenceLogps(values.sum(-1), kept.sum(-1))
    spans = list(pairwise(cu_seqlens.tolist()))
    if not spans:
        return SequenceLogps(values.sum()[None][:0], kept.sum()[None][:0])
    return SequenceLogps(
        torch.stack([values[start:end].sum() for start, end in spans]),
        torch.stack([kept[start:end].sum() for start, end in spans]),
    )


# Triton


@jit
def _span(cu_ptr, seq, N, T, PACKED: tl.constexpr):
    """Return where a sequence begins and how long it is, within the N tokens whatever cu says."""
    start = tl.zeros([], tl.int64)
    end = start + T
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(cu_ptr + seq).to(tl.int64), 0), N)
        end = tl.minimum(tl.maximum(tl.load(cu_ptr + seq + 1).to(tl.int64), start), N)
    return start, end - start


@jit
def _forward_kernel(
    logps_ptr,
    cu_ptr,
    mask_ptr,
    sums_ptr,
    counts_ptr,
    N,
    T,
    stride_ls,
    stride_lt,
    stride_ms,
    stride_mt,
    PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sum one sequence: one partial sum per lane, then a tree over the lanes."""
    seq = tl.program_id(0).to(tl.int64)
    start, length = _span(cu_ptr, seq, N, T, PACKED)
    logps_ptr += seq * stride_ls + start * stride_lt
    acc = tl.zeros([BLOCK_T], tl.float32)
    count = tl.zeros([BLOCK_T], tl.int32)
    for begin in range(0, length, BLOCK_T):
        offs_t = begin + tl.arange(0, BLOCK_T).to(tl.int64)
        kept = offs_t < length
        if HAS_MASK:
            offs_m = seq * stride_ms + (start + offs_t) * stride_mt
            kept = kept & (tl.load(mask_ptr + offs_m, mask=kept, other=0) != 0)
        acc += tl.load(logps_ptr + offs_t * stride_lt, mask=kept, other=0.0).to(tl.float32)
        count += kept.to(tl.int32)
    tl.store(sums_ptr + seq, tl.sum(acc, axis=0))
    tl.store(counts_ptr + seq, tl.sum(count, axis=0).to(tl.int64))


@jit
def _backward_kernel(
    grad_ptr,
    grad_sums_ptr,
    cu_ptr,
    mask_ptr,
    N,
    T,
    stride_gs,
    stride_ms,
    stride_mt,
    PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Copy one sequence's upstream scalar to its tokens."""
    seq = tl.program_id(0).to(tl.int64)
    start, length = _span(cu_ptr, seq, N, T, PACKED)
    upstream = tl.load(grad_sums_ptr + seq * stride_gs).to(tl.float32)
    first = start if PACKED else seq * T
    for begin in range(0, length, BLOCK_T):
        offs_t = begin + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = offs_t < length
        grad = tl.where(inside, upstream, 0.0)
        if HAS_MASK:
            offs_m = seq * stride_ms + (start + offs_t) * stride_mt
            grad = tl.where(tl.load(mask_ptr + offs_m, mask=inside, other=0) != 0, grad, 0.0)
        store_rounded(grad_ptr + first + offs_t, grad, inside)


def _layout(tensor: Tensor | None, packed: bool) -> tuple[int, int]:
    """Return the strides from sequence to sequence and from token to token."""
    if tensor is None:
        return 0, 0
    return (0, tensor.stride(0)) if packed else tensor.stride()


def _sizes(token_logps: Tensor, packed: bool) -> tuple[int, int]:
    return (token_logps.shape[0], 0) if packed else (token_logps.numel(), token_logps.shape[1])


def _forward_triton(token_logps, cu_seqlens, mask, sums, counts):
    packed = cu_seqlens is not None
    _forward_kernel[(sums.numel(),)](
        token_logps,
        cu_seqlens,
        mask,
        sums,
        counts,
        *_sizes(token_logps, packed),
        *_layout(token_logps, packed),
        *_layout(mask, packed),
        PACKED=packed,
        HAS_MASK=mask is not None,
        BLOCK_T=BLOCK_T,
        num_warps=4,
    )


def _backward_triton(grad, grad_sums, cu_seqlens, mask):
    packed = cu_seqlens is not None
    _backward_kernel[(grad_sums.numel(),)](
        grad,
        grad_sums,
        cu_seqlens,
        mask,
        *_sizes(grad, packed),
        grad_sums.stride(0),
        *_layout(mask, packed),
        PACKED=packed,
        HAS_MASK=mask is not None,
        BLOCK_T=BLOCK_T,
        num_warps=4,
    )


# Chunked torch


def _forward_chunked(token_logps, cu_seqlens, mask, sums, counts):
    values = token_logps.to(sums.dtype)
    if mask is not None:
        values = torch.where(mask, values, 0)
    values = values.contiguous()  # torch.sum's order follows the strides
    if cu_seqlens is None:
        torch.sum(values, -1, out=sums)
        counts.copy_(values.shape[1] if mask is None else mask.sum(-1))
        return
    for seq, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        sums[seq] = values[start:end].sum()
        counts[seq] = end - start if mask is None else mask[start:end].sum()


def _backward_chunked(grad, grad_sums, cu_seqlens, mask):
    if cu_seqlens is None:
        upstream = grad_sums[:, None].expand(grad.shape)
    else:
        lengths = cu_seqlens.diff()
        upstream = grad_sums.repeat_interleave(lengths, output_size=grad.shape[0])
    grad.copy_(upstream if mask is None else torch.where(mask, upstream, 0))


# The op


def _check_spans(cu_seqlens: Tensor | None, tokens: int) -> None:
    """Check the values of ``cu_seqlens`` on a CPU; on a GPU that would be a host sync."""
    if cu_seqlens is None or cu_seqlens.is_cuda:
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in pairwise(ends)):
        raise ValueError(
            f"cu_seqlens: expected to rise from 0 to the {tokens} tokens, got {ends[:8]}"
            f"{'...' if len(ends) > 8 else ''} ending at {ends[-1]}"
        )


@torch.library.custom_op("prefalign::sequence_logps", mutates_args=())
def _sequence_logps(
    token_logps: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    _check_spans(cu_seqlens, token_logps.shape[0])
    sums, counts = _allocate(token_logps, cu_seqlens)
    if sums.numel():
        forward = _forward_triton if impl == "triton" else _forward_chunked
        with on_device(token_logps):
            forward(token_logps, cu_seqlens, mask, sums, counts)
    return sums, counts


def _allocate(token_logps: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    sequences = token_logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        token_logps.new_empty(sequences, dtype=compute_dtype(token_logps)),
        token_logps.new_empty(sequences, dtype=torch.int64),
    )


@_sequence_logps.register_fake
def _(token_logps, cu_seqlens, mask, impl):
    return _allocate(token_logps, cu_seqlens)


@torch.library.custom_op("prefalign::sequence_logps_backward", mutates_args=())
def _sequence_logps_backward(
    grad_sums: Tensor,
    token_logps: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    impl: str,
) -> Tensor:
    # Zeros: on a GPU nobody has checked that the sequences cover every token.
    grad = torch.zeros(token_logps.shape, dtype=token_logps.dtype, device=token_logps.device)
    if grad_sums.numel() and grad.numel():
        backward = _backward_triton if impl == "triton" else _backward_chunked
        with on_device(grad):
            backward(grad, grad_sums, cu_seqlens, mask)
    return grad


@_sequence_logps_backward.register_fake
def _(grad_sums, token_logps, cu_seqlens, mask, impl):
    return torch.empty(token_logps.shape, dtype=token_logps.dtype, device=token_logps.device)


def _setup_context(ctx, inputs, output):
    token_logps, cu_seqlens, mask, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(token_logps, cu_seqlens, mask)


def _backward(ctx, grad_sums, _counts):
    grad = None
    if ctx.needs_input_grad[0] and grad_sums is not None:
        grad = _sequence_logps_backward(grad_sums, *ctx.saved_tensors, ctx.impl)
    return grad, None, None, None


_sequence_logps = differentiable(_sequence_logps, _backward, _setup_context)


def sequence_logps(
    token_logps: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> SequenceLogps:
    """Return the summed log-prob and the number of tokens of each sequence.

    Equivalent PyTorch::

        kept = torch.where(mask, token_logps, 0)
        sums = torch.stack([s.sum() for s in kept.split(cu_seqlens.diff().tolist())])  # [N]
        sums = kept.sum(-1)  # [S, T]

    Args:
        token_logps: ``[N]`` with ``cu_seqlens``, else ``[S, T]``; any float dtype, any strides.
        cu_seqlens: ``[S + 1]``, int32 or int64, on the same device: sequence s is the tokens
            ``cu_seqlens[s]:cu_seqlens[s + 1]``. It begins with 0, never falls, and ends with N,
            which is checked on a CPU only. Default None: one sequence to a row.
        mask: of ``token_logps``' shape, bool or integer, 0 where a token does not count. Such a
            token may hold NaN. Default None: every token counts.
        impl: ``"auto"``, ``"triton"``, ``"chunked"`` or ``"reference"``. Default ``"auto"``. The
            last two read ``cu_seqlens`` on the host: on a GPU, a sync.

    Returns:
        ``SequenceLogps(sums, counts)``, each ``[S]``: sums in nats, float32 (float64 from float64;
        the input's dtype from the reference), counts int64. An empty or fully masked sequence
        gives 0 and 0. Sums are differentiable in ``token_logps``, once.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, a device or ``cu_seqlens`` that does not fit.

    Numerics:
        float32 sums, by lanes and then a tree. Bit-identical for a sequence of the same values,
        whatever the other sequences hold.

    Source:
        DPO, arXiv 2305.18290, section 4: log pi(y | x) is the sum over tokens.
    """
    packed = cu_seqlens is not None
    check_tensor("token_logps", token_logps, ndim=1 if packed else 2)
    like = ("token_logps", token_logps)
    if packed:
        check_tensor("cu_seqlens", cu_seqlens, dtypes=INTEGERS, ndim=1, like=like)
        if cu_seqlens.shape[0] == 0:
            raise ValueError("cu_seqlens: expected [S + 1] with at least one element, got none")
        cu_seqlens = cu_seqlens.contiguous()
    if mask is not None:
        check_tensor(
            "mask", mask, dtypes=(torch.bool, *INTEGERS), shape=token_logps.shape, like=like
        )
        if mask.dtype != torch.bool:
            mask = mask != 0
    impl = resolve_impl(impl, token_logps.device, token_logps.dtype)
    if impl == "reference":
        if not torch.compiler.is_compiling():
            _check_spans(cu_seqlens, token_logps.shape[0])
        return sequence_logps_reference(token_logps, cu_seqlens, mask)
    return SequenceLogps(*_sequence_logps(token_logps, cu_seqlens, mask, impl))
