"""What is measured: for each op the inputs, the providers, and the least work there is.

The inputs are drawn from a fixed seed, on the device: a GPU's would take minutes elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import memory_bound, providers
from .cases import Case
from .providers import Provider
from .shapes import BATCHES, HEADS, LOGITS, Shape

_PAIRS_OF_A_HEAD = 4  # the N tokens of a head, cut into chosen and rejected sequences
_BETA = 0.1

Maker = Callable[[Shape, torch.dtype, torch.device], Case]


@dataclass(frozen=True)
class Suite:
    """One table of results.

    ``passes`` is the least work in F = 2·N·D·V FLOP, for ops bound by the matmul; ``traffic`` gives
    the least bytes moved, for ops bound by memory. ``baseline`` is whom times are compared with.
    """

    name: str
    title: str
    make: Maker
    providers: tuple[Provider, ...]
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    passes: float = 0.0
    traffic: Callable[[Case], float] | None = None
    baseline: str = "bare GEMMs"

    def work(self, case: Case) -> float:
        """Return the least work of a case: FLOP, or bytes."""
        if self.traffic is not None:
            return self.traffic(case)
        return self.passes * 2.0 * case.shape.N * case.shape.D * case.shape.V


class _Draw:
    """Random tensors on a device, from one seed."""

    def __init__(self, device: torch.device):
        self.where: Any = {"generator": torch.Generator(device).manual_seed(0), "device": device}

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, **self.where)

    def integers(self, least: int, end: int, *sizes: int) -> Tensor:
        return torch.randint(least, end, sizes, **self.where)


def _leaves(case: Case, dtype: torch.dtype) -> Case:
    """Cast the inputs to the dtype; the gradient from above stays float32."""

    def change(name: str, x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and name != "upstream" else x

    return case.changed(change)


def _head_inputs(shape: Shape, draw: _Draw, *states: str) -> dict[str, Tensor]:
    N, V, D = shape.N, shape.V, shape.D
    return {
        **{name: 0.5 * draw.normal(N, D) for name in states},
        "weight": 0.05 * draw.normal(V, D),
        "targets": draw.integers(0, V, N),
    }


def _head(*wrt: str) -> Maker:
    def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
        draw = _Draw(device)
        inputs = _head_inputs(shape, draw, "hidden")
        upstream = {"logps": draw.normal(shape.N)} if wrt else {}
        case = Case(shape, inputs, wrt, upstream, per_row=("hidden", "targets"))
        return _leaves(case, dtype)

    return make


def _triple(*wrt: str) -> Maker:
    def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
        draw = _Draw(device)
        inputs = _head_inputs(shape, draw, "hidden", "ref_hidden")
        upstream = {"policy": draw.normal(shape.N)}
        rows = ("hidden", "ref_hidden", "targets")
        case = Case(shape, inputs, wrt, upstream, rows, {"extrapolation": 0.2})
        return _leaves(case, dtype)

    return make


def _dpo(*wrt: str) -> Maker:
    def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
        draw = _Draw(device)
        inputs = _head_inputs(shape, draw, "hidden", "ref_hidden")
        inputs["ref_hidden"] = inputs["hidden"] + 0.1 * inputs["ref_hidden"]  # a model nearby
        S = 2 * _PAIRS_OF_A_HEAD
        inputs["cu_seqlens"] = torch.arange(0, shape.N + 1, shape.N // S, device=device)
        scalars = {"sequences": S, "beta": _BETA}
        upstream = {"loss": torch.tensor(1.7, device=device)}
        case = Case(shape, inputs, wrt, upstream, scalars=scalars)
        return _leaves(case, dtype)

    return make


def _logits(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    draw = _Draw(device)
    inputs = {
        "logits": 3 * draw.normal(shape.N, shape.V),
        "targets": draw.integers(0, shape.V, shape.N),
    }
    upstream = {"logps": draw.normal(shape.N)}
    case = Case(shape, inputs, ("logits",), upstream, per_row=("logits", "targets"))
    return _leaves(case, dtype)


def _sequences(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    draw = _Draw(device)
    lengths = draw.integers(1, 2 * shape.T, 2 * shape.B)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    inputs = {
        "token_logps": -2 * draw.normal(int(cu_seqlens[-1])).abs(),
        "cu_seqlens": cu_seqlens,
        "sequence": torch.arange(2 * shape.B, device=device).repeat_interleave(lengths),
    }
    upstream = {"sums": draw.normal(2 * shape.B)}
    return _leaves(Case(shape, inputs, ("token_logps",), upstream), dtype)


def _pairs(*names: str, **scalars: float) -> Maker:
    def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
        draw = _Draw(device)
        inputs = {name: -100 + 20 * draw.normal(shape.B) for name in names}
        upstream = {"losses": draw.normal(shape.B)}
        wrt = ("policy_chosen", "policy_rejected")
        case = Case(shape, inputs, wrt, upstream, scalars={"beta": _BETA, **scalars})
        return _leaves(case, dtype)

    return make


def _groups(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    draw = _Draw(device)
    sizes = draw.integers(2, shape.K + 1, shape.B)
    sizes[0] = shape.K
    R = int(sizes.sum())
    within = torch.arange(shape.K, device=device)
    inside = within < sizes[:, None]
    place = (sizes.cumsum(0) - sizes)[:, None] + within
    inputs = {
        "policy": -100 + 20 * draw.normal(R),
        "reference": -100 + 20 * draw.normal(R),
        "inside": inside,
        "place": place.clamp(max=R - 1),
    }
    upstream = {"logits": draw.normal(shape.B, shape.K, shape.K)}
    scalars = {"sizes": sizes.tolist(), "beta": _BETA}
    return _leaves(Case(shape, inputs, ("policy",), upstream, scalars=scalars), dtype)


def _traffic(read: str | tuple[str, ...], times: float, outputs: int) -> Callable[[Case], float]:
    """Bytes of the inputs ``read``, ``times`` over, and of ``outputs`` [B] float32 results."""
    names = (read,) if isinstance(read, str) else read

    def traffic(case: Case) -> float:
        return times * sum(case.inputs[n].nbytes for n in names) + 4.0 * outputs * case.shape.B

    return traffic


_FLOAT32 = (torch.float32,)
_SIDES, _ALL = memory_bound.SIDES, memory_bound.SIDES + memory_bound.EXTRAPOLATED

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "head-forward", "linear_token_logps: forward, nothing needs a gradient",
            _head(), providers.HEAD, HEADS, passes=1,
        ),
        Suite(
            "head-frozen", "linear_token_logps: forward + backward, frozen head",
            _head("hidden"), providers.HEAD, HEADS, passes=2,
        ),
        Suite(
            "head-trained", "linear_token_logps: forward + backward, trained head",
            _head("hidden", "weight"), providers.HEAD, HEADS, passes=3,
        ),
        Suite(
            "triple", "linear_token_logps_triple: forward + backward, frozen shared head",
            _triple("hidden"), providers.TRIPLE, HEADS, passes=3,
        ),
        Suite(
            "triple-trained", "linear_token_logps_triple: forward + backward, trained shared head",
            _triple("hidden", "weight"), providers.TRIPLE, HEADS, passes=4,
        ),
        Suite(
            "dpo-frozen", "linear_preference_loss: policy and reference, frozen head",
            _dpo("hidden"), providers.DPO, HEADS, passes=3,
        ),
        Suite(
            "dpo-trained", "linear_preference_loss: policy and reference, trained head",
            _dpo("hidden", "weight"), providers.DPO, HEADS, passes=4,
        ),
        Suite(
            "token-logps", "token_logps: forward + backward",
            _logits, memory_bound.TOKEN, LOGITS,
            traffic=_traffic("logits", 3, 0), baseline="one copy of the logits",
        ),
        Suite(
            "sequence-logps", "sequence_logps: forward + backward, packed",
            _sequences, memory_bound.SUMS, BATCHES, _FLOAT32,
            traffic=_traffic("token_logps", 2, 4), baseline="eager",
        ),
        Suite(
            "preference-loss", "preference_loss: forward + backward",
            _pairs(*_SIDES), memory_bound.LOSS, BATCHES, _FLOAT32,
            traffic=_traffic(_SIDES, 1, 6), baseline="eager",
        ),
        Suite(
            "noise-aware-loss", "noise_aware_loss: forward + backward",
            _pairs(*_ALL, alpha=0.1, threshold=0.5), memory_bound.NOISE, BATCHES, _FLOAT32,
            traffic=_traffic(_ALL, 1, 7), baseline="eager",
        ),
        Suite(
            "pairwise", "pairwise_preference_logits: forward + backward, ragged groups",
            _groups, memory_bound.PAIRWISE, BATCHES, _FLOAT32,
            traffic=lambda case: 8.0 * case.shape.B * case.shape.K**2, baseline="eager",
        ),
    )
}  # fmt: skip
