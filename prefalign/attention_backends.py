"""The kernels behind packed attention; the first that is exact for a call runs.

=========================  ============================  ==========================================
backend                    where                         what it leaves to the next
=========================  ============================  ==========================================
flash-attn                 CUDA, half precision, Ampere  head sizes above 256, unequal or no
                           or newer, when importable     multiple of 8
torch's ``varlen_attn``    the same, with torch 2.11 or  the same; a soft cap; attention dropout;
                           newer instead                 windows without causality
merged partial attentions  CPU, causal                   windows shorter than a segment; a soft cap;
                                                         dropout; unequal head sizes
SDPA, one call a segment   anywhere else                 a soft cap
eager, segment by segment  anywhere                      nothing: holds one segment's scores
=========================  ============================  ==========================================

The first two gather the keys that a segment sees, its parent's first; the others take them from
where they are. The last three loop over the segments, whose lengths come with the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._merged_attention import has_kernels, merged_attention
from .packing import Segments

_FLASH_MAX_HEAD_SIZE = 256


@dataclass(frozen=True)
class PackedCall:
    """One layer's attention, as the backends take it: T tokens, all segments packed.

    ``key_rows`` and ``parents`` are given both or neither; with them a segment also sees the keys
    of its parent, T_k in all.
    """

    query: Tensor  # [T, H, E]
    key: Tensor  # [T, H_kv, E]
    value: Tensor  # [T, H_kv, E_v]
    cu_q: Tensor
    cu_k: Tensor  # bounds of the segments' keys after key_rows
    max_q: int
    max_k: int
    scale: float
    window: int | None  # keys that a query sees, itself included
    softcap: float | None
    causal: bool
    dropout: float
    key_rows: Tensor | None = None  # [T_k]
    parents: Tensor | None = None  # [S], -1 where there is none
    segments: Segments | None = None

    def on_host(self) -> Segments:
        """Return the segments' lengths and parents; reads the device where they did not come."""
        if self.segments is not None:
            return self.segments
        lengths = self.cu_q.diff().tolist()
        parents = [-1] * len(lengths) if self.parents is None else self.parents.tolist()
        return Segments(tuple(lengths), tuple(parents))

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values that the segments see, ``[T_k, H_kv, ...]``."""
        if self.key_rows is None:
            return self.key, self.value
        return take_rows(self.key, self.key_rows), take_rows(self.value, self.key_rows)

    @property
    def flash_window(self) -> tuple[int, int]:
        """Keys seen before and after a query, as flash-attn counts them: -1 is all."""
        left = -1 if self.window is None else self.window - 1
        if self.causal:
            return left, 0
        return left, left


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return ``x[rows]``, with a backward that adds up repeated rows in a fixed order.

    On a GPU the backward of ``index_select`` adds with atomics, that of indexing after a sort; on a
    CPU it is indexing that adds in any order, once it has several threads.
    """
    return x[rows] if x.is_cuda else x.index_select(0, rows)


PLANNED: ContextVar[Callable[[PackedCall], Tensor] | None] = ContextVar("PLANNED", default=None)
"""In the place of every backend, where memory is planned for a device that is not there."""


def backend_for(call: PackedCall) -> Callable[[PackedCall], Tensor]:
    """Return the backend to run: the first that is exact for ``call``, or the planned one."""
    return PLANNED.get() or exact_backend(call)


def exact_backend(call: PackedCall) -> Callable[[PackedCall], Tensor]:
    """Return the first backend that is exact for ``call``."""
    size = call.query.shape[-1]
    if (
        call.query.is_cuda
        and call.query.dtype in (torch.float16, torch.bfloat16)
        and size == call.value.shape[-1]
        and size <= _FLASH_MAX_HEAD_SIZE
        and size % 8 == 0
        and _has_flash(call.query.device)
    ):
        if _flash_attn() is not None:
            return _attend_flash
        plain = call.softcap is None and not call.dropout
        if plain and (call.causal or call.window is None) and _varlen_parameters():
            return _attend_varlen
    if (
        call.query.device.type == "cpu"
        and has_kernels()
        and call.causal
        and call.window is None
        and call.softcap is None
        and not call.dropout
        and size == call.value.shape[-1]
    ):
        return attend_merged
    return _attend_eager if call.softcap is not None else _attend_sdpa


@cache
def _has_flash(device: torch.device) -> bool:
    """Return whether flash attention runs there: ROCm, or NVIDIA's Ampere and newer."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _flash_attn() -> Callable[..., Tensor] | None:
    """Return flash-attn's packed attention, or None where it is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@cache
def _varlen_parameters() -> frozenset[str]:
    """Return what torch's packed attention takes; nothing where it is missing or too old."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    parameters = frozenset(inspect.signature(varlen_attn).parameters)
    return parameters if {"scale", "window_size"} <= parameters else frozenset()


def _attend_flash(call: PackedCall) -> Tensor:
    attend = _flash_attn()
    assert attend is not None
    return attend(
        call.query,
        *call.gathered(),
        call.cu_q,
        call.cu_k,
        call.max_q,
        call.max_k,
        dropout_p=call.dropout,
        softmax_scale=call.scale,
        causal=call.causal,
        window_size=call.flash_window,
        softcap=call.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _attend_varlen(call: PackedCall) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    key, value = call.gathered()
    options: dict[str, Any] = {}
    if (groups := call.query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in _varlen_parameters():
            options["enable_gqa"] = True
        else:
            # torch 2.11 leaves grouped heads undocumented.
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    attend: Any = varlen_attn  # its type allows for extras that are not asked for
    return attend(
        call.query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        call.cu_q,
        call.cu_k,
        call.max_q,
        call.max_k,
        scale=call.scale,
        window_size=call.flash_window,
        **options,
    )


def attend_merged(call: PackedCall) -> Tensor:
    """Attend on a CPU, a prompt's part and a response's own merged by their log-sum-exp."""
    segments = call.on_host()
    parts = (segments.lengths, segments.parents)
    return merged_attention(call.query, call.key, call.value, *parts, call.scale)


def _segments(call: PackedCall) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield each segment's queries, keys and values, ``[heads, length, size]``.

    A parent's keys come before a segment's own, as far back as the window reaches.
    """
    lengths, parents = call.on_host().lengths, call.on_host().parents
    # One split, not a slice each: a slice's backward fills a gradient of all T rows with zeros.
    queries, keys, values = (x.split(lengths) for x in (call.query, call.key, call.value))
    for query, key, value, parent in zip(queries, keys, values, parents, strict=True):
        if parent >= 0:
            length = lengths[parent]
            seen = length if call.window is None else min(length, call.window - 1)
            if seen:
                key = torch.cat([keys[parent][length - seen :], key])
                value = torch.cat([values[parent][length - seen :], value])
        yield query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)


def _visible(call: PackedCall, num_q: int, num_k: int) -> Tensor | None:
    """Return which keys each query sees, bool ``[num_q, num_k]``; None means all of them."""
    window = call.window if call.window is not None and call.window < num_k else None
    if not call.causal and window is None:
        return None
    device = call.query.device
    # The last query and the last key are the same token.
    ahead = (
        torch.arange(num_q, device=device)[:, None]
        + (num_k - num_q)
        - torch.arange(num_k, device=device)
    )
    visible = ahead >= 0 if call.causal else torch.ones_like(ahead, dtype=torch.bool)
    if window is not None:
        visible &= ahead < window
        if not call.causal:
            visible &= ahead > -window
    return visible


def _attend_sdpa(call: PackedCall) -> Tensor:
    groups = call.query.shape[1] // call.key.shape[1]
    outputs = []
    for query, key, value in _segments(call):
        num_q, num_k = query.shape[1], key.shape[1]
        plain = num_q == num_k and (call.window is None or call.window >= num_k)
        visible = None if plain else _visible(call, num_q, num_k)
        # With a mask, or in float32 on a GPU, grouped heads would leave SDPA its slow kernel alone.
        grouped = groups > 1 and visible is None and not query.is_cuda
        if groups > 1 and not grouped:
            key, value = (x.repeat_interleave(groups, dim=0) for x in (key, value))
        outputs.append(
            F.scaled_dot_product_attention(
                query[None],
                key[None],
                value[None],
                attn_mask=visible,
                dropout_p=call.dropout,
                is_causal=call.causal and visible is None,
                scale=call.scale,
                enable_gqa=grouped,
            )[0].transpose(0, 1)
        )
    return torch.cat(outputs)


def _attend_eager(call: PackedCall) -> Tensor:
    """Attend with all of one segment's scores in memory; softmax in float32 or better."""
    groups = call.query.shape[1] // call.key.shape[1]
    outputs = []
    for query, key, value in _segments(call):
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=0) for x in (key, value))
        scores = torch.matmul(query, key.transpose(1, 2)) * call.scale
        if call.softcap is not None:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        visible = _visible(call, query.shape[1], key.shape[1])
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        dtype = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores, dim=-1, dtype=dtype).to(value.dtype)
        weights = F.dropout(weights, p=call.dropout)
        outputs.append(torch.matmul(weights, value).transpose(0, 1))
    return torch.cat(outputs)
