"""Hypothesis strategies for the ops from packed pairs to losses, beside ``strategies.py``'s."""

from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import strategies as st
from strategies import (
    HeadCase,
    dtypes,
    head_cases,
    impls,
    lay_out,
    layouts,
    seeds,
    sizes,
    upstream,
    upstreams,
)
from torch import Tensor

SIGMOID = ("sigmoid", "noise_aware")
"""Losses that are finite at every margin and log 2 where policy and reference are equal."""
LOSSES = (*SIGMOID, "lopsided", "bco_pair", "apo_down", "ipo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairCase:
    """What both ops take: packed pairs, and the options of their loss."""

    lengths: tuple[int, ...] = (2, 1)
    int32: bool = False
    loss: str = "sigmoid"
    beta: float = 0.1
    smoothing: float = 0.0
    threshold: float = 0.5
    scalars: bool = False
    weights: str | None = None
    weights_dtype: torch.dtype = torch.float32
    weights_layout: str = "contiguous"
    upstream: str = "normal"
    upstream_layout: str = "contiguous"
    pair_seed: int = 0

    @property
    def pairs(self) -> int:
        return len(self.lengths) // 2

    def options(self, device: str) -> dict:
        """The scalars of the call."""
        if self.loss != "noise_aware":
            return {"loss": self.loss, "beta": self.beta, "label_smoothing": self.smoothing}
        alpha, threshold = self.smoothing, self.threshold
        if self.scalars:
            alpha, threshold = (torch.tensor(x, device=device) for x in (alpha, threshold))
        return {"loss": self.loss, "beta": self.beta, "alpha": alpha, "threshold": threshold}

    def build_pairs(self) -> dict[str, Tensor | None]:
        """Return the bounds, weights, the losses' upstream and sums of a reference."""
        gen = torch.Generator().manual_seed(self.pair_seed)
        cu = torch.tensor([0, *self.lengths]).cumsum(0)
        weights = None
        if self.weights is not None:
            weights = torch.rand(self.pairs, generator=gen)
            weights *= (torch.rand(self.pairs, generator=gen) < 0.5) | (self.weights != "zeros")
            weights = lay_out(weights.to(self.weights_dtype), self.weights_layout)
        given = upstream(self.upstream, (self.pairs,), gen)
        if self.upstream != "expanded":
            given = lay_out(given, self.upstream_layout)
        sums = -3.0 * torch.tensor(self.lengths) + torch.randn(2 * self.pairs, generator=gen)
        return {
            "cu_seqlens": cu.int() if self.int32 else cu,
            "weights": weights,
            "upstream": given,
            "ref_logps": sums,
        }


@st.composite
def pair_lengths(draw, most: int, pairs: int) -> tuple[int, ...]:
    """Draw lengths of chosen and rejected in turn, often 0 or 1."""
    count = 2 * draw(st.integers(0, pairs))
    one = st.one_of(st.sampled_from((0, 1)), sizes(most))
    return tuple(draw(one) for _ in range(count))


@st.composite
def pair_options(draw, double: bool) -> dict:
    """Draw the fields of ``PairCase`` but the lengths."""
    loss = draw(st.sampled_from(LOSSES))
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    tops = {"sigmoid": (0.0, 0.1, 0.5), "noise_aware": (0.0, 0.1, 0.5, 1.0)}
    return {
        "int32": draw(st.booleans()),
        "loss": loss,
        "beta": draw(st.sampled_from((0.1, 0.37, 5.0))),
        "smoothing": draw(st.sampled_from(tops.get(loss, (0.0,)))),
        "threshold": draw(st.sampled_from((0.0, 0.5, 0.7, 1.0))),
        "scalars": draw(st.booleans()),
        "weights": draw(st.sampled_from((None, "normal", "zeros"))),
        "weights_dtype": draw(st.sampled_from((*narrow, torch.float64) if double else narrow)),
        "weights_layout": draw(layouts),
        "upstream": draw(upstreams),
        "upstream_layout": draw(layouts),
        "pair_seed": draw(seeds),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensCase(PairCase):
    """A call of ``pair_loss_head``."""

    impl: str = "chunked"
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float32,) * 3
    layouts: tuple[str, str, str] = ("contiguous",) * 3
    tokens: bool = True
    scale: float = 1.0
    same: bool = False
    hole: int | None = None
    mask: str | None = None
    mask_layout: str = "contiguous"
    poison: bool = True
    needs: bool = True
    block: int = 1024
    seed: int = 0

    def build(self) -> dict[str, Tensor | None]:
        """Return every tensor of a call by name; the reference as sums or as tokens."""
        gen = torch.Generator().manual_seed(self.seed)
        N = sum(self.lengths)
        first = -torch.randn(N, generator=gen, dtype=torch.float64).exp() * self.scale
        logps = [first, first.clone(), first.clone()]
        if not self.same:
            for x in logps[1:]:
                x -= torch.randn(N, generator=gen, dtype=torch.float64).abs() * self.scale
        if self.hole is not None and N:
            logps[0][self.hole % N] = -math.inf
        logps = [
            lay_out(x.to(dtype), layout)
            for x, dtype, layout in zip(logps, self.dtypes, self.layouts, strict=True)
        ]
        mask = None
        if self.mask is not None:
            mask = torch.rand(N, generator=gen) < 0.6
            mask = lay_out(mask & (self.mask != "none"), self.mask_layout)
            mask = mask.to(torch.int64) * 3 if self.mask == "integers" else mask
        found = self.build_pairs()
        sums = lay_out(found.pop("ref_logps").to(self.dtypes[1]), self.layouts[1])
        return found | {
            "token_logps": logps[0],
            "ref_logps": None if self.tokens else sums,
            "ref_token_logps": logps[1] if self.tokens else None,
            "extrapolated_token_logps": logps[2] if self.loss == "noise_aware" else None,
            "mask": mask,
        }


@st.composite
def tokens_cases(draw) -> TokensCase:
    kinds = draw(st.lists(dtypes, min_size=3, max_size=3))
    if draw(st.booleans()):
        kinds = kinds[:1] * 3
    options = draw(pair_options(True))
    used = kinds[: 3 if options["loss"] == "noise_aware" else 2]
    used += [options["weights_dtype"]] if options["weights"] else []
    impl = draw(impls(torch.float64 if torch.float64 in used else torch.float32))
    slow = impl == "triton"
    holes = st.one_of(st.none(), st.integers(0, 99)) if options["loss"] in SIGMOID else st.none()
    return TokensCase(
        **options,
        lengths=draw(pair_lengths(40, 3 if slow else 10)),
        impl=impl,
        dtypes=tuple(kinds),
        layouts=tuple(draw(layouts) for _ in range(3)),
        tokens=draw(st.booleans()),
        scale=draw(st.sampled_from((1.0, 0.01, 30.0))),
        same=draw(st.booleans()),
        hole=draw(holes),
        mask=draw(st.sampled_from((None, "bool", "bool", "integers", "none"))),
        mask_layout=draw(layouts),
        poison=draw(st.booleans()),
        needs=draw(st.sampled_from((True, True, True, False))),
        block=draw(st.sampled_from((16, 1024))),
        seed=draw(seeds),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeCase(PairCase):
    """A call of ``linear_preference_loss``: a head's case, its rows cut into pairs."""

    head: HeadCase = HeadCase(lead=(3,), needs="hw")
    tokens: bool = True
    ref_dtype: torch.dtype = torch.float32
    reduction: str = "none"
    pair_tile: int = 4096

    def build(self) -> dict[str, Tensor | None]:
        """Return every tensor of a call by name, ``live`` rows too."""
        found = self.head.build() | self.build_pairs()
        del found["g"], found["e"]
        sums = found.pop("ref_logps").to(self.ref_dtype)
        if self.tokens:
            return found | {"ref_logps": None}
        return found | {name: None for name in ("ref_hidden", "ref_weight", "ref_bias")} | {
            "ref_logps": sums
        }  # fmt: skip


@st.composite
def whole_cases(draw) -> WholeCase:
    head = draw(head_cases(triple=True))
    # An impossible target is -inf under both models: NaN, in any formula.
    bias = "-inf" if head.bias == "-inf target" else head.bias
    reduction = draw(st.sampled_from(("none", "mean")))
    slow = head.impl == "triton"
    options = draw(pair_options(head.dtype == torch.float64))
    lengths = draw(pair_lengths(9 if slow else 17, 2 if slow else 5))
    ignored, workspace, needs, V = head.ignored, head.workspace, head.needs, head.V
    if head.dtype.itemsize > 2 and not slow and draw(st.booleans()):
        # Enough rows for chunks of whole pairs, and a budget for one, two or more chunks.
        lengths = draw(st.lists(st.integers(60, 170), min_size=6, max_size=10))
        lengths = tuple(lengths[: len(lengths) // 2 * 2])
        options["loss"] = "sigmoid" if options["loss"] == "noise_aware" else options["loss"]
        options["smoothing"] = min(options["smoothing"], 0.5)
        options["smoothing"] *= options["loss"] == "sigmoid"
        reduction, ignored = "mean", min(ignored, 0.3)
        needs = draw(st.sampled_from(("hwb", "hw", "w", "b" if head.bias else "wb")))
        workspace = draw(st.sampled_from((None, 100_000, 200_000, 400_000, 800_000)))
        V = draw(sizes(70))
    head = dataclasses.replace(
        head, lead=(sum(lengths),), bias=bias, ignored=ignored, workspace=workspace, needs=needs,
        V=V, outputs=(), roots="logps", rows=head.rows if workspace else None,
        tile=head.tile if workspace else None,
        extrapolation=head.extrapolation if options["loss"] == "noise_aware" else 0.0,
    )  # fmt: skip
    tokens = draw(st.booleans()) or head.extrapolation != 0.0
    return WholeCase(
        **options,
        lengths=lengths,
        head=head,
        tokens=tokens,
        ref_dtype=draw(st.sampled_from((torch.float32, torch.float16, head.dtype))),
        reduction=reduction,
        pair_tile=draw(st.sampled_from((4096, 16, 33))),
    )
