"""Hypothesis strategies for the ops: small frozen cases whose repr is the whole reproduction.

A case holds numbers and names; ``build`` makes tensors of it, from its seed. Every tensor may lie
in memory in any of ``LAYOUTS``.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS = ("contiguous", "permuted", "offset", "stepped", "expanded", "gapped")
UPSTREAMS = ("normal", "one row", "zeros", "large", "tiny", "expanded")
HALF = (torch.float16, torch.bfloat16)
SINGLE = (torch.float32, *HALF)
EXTRAS = ("lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
# Where code goes wrong: one, primes, and either side of the blocks of 16, 32 and 64.
EDGES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """Return a tensor of the values (or of fewer, expanded) that lies in memory as asked."""
    if values.ndim == 0 or layout == "contiguous":
        return values.contiguous()
    if layout == "permuted":
        order = list(range(values.ndim))[::-1]
        return values.permute(order).contiguous().permute(order)
    if layout == "expanded":
        return values[:1].contiguous().expand(values.shape) if values.shape[0] else values
    if layout == "offset":
        store = values.new_zeros(values.numel() + 3)
        store[3:] = values.flatten()
        return store[3:].view(values.shape)
    wider = [2 * size if layout == "stepped" else size + 3 for size in values.shape]
    store = values.new_zeros(wider)
    stepped = tuple(slice(1, None, 2) for _ in wider)
    gapped = tuple(slice(1, 1 + size) for size in values.shape)
    place = stepped if layout == "stepped" else gapped
    store[place] = values
    return store[place]


def upstream(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return an upstream gradient of the given kind, in float32."""
    values = torch.randn(shape, generator=generator)
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "one row":
        only = torch.zeros(values.numel())
        only[: min(1, values.numel())] = 2.0
        return only.view(shape)
    if kind == "expanded":
        return torch.tensor(0.7).expand(shape)
    return values * {"normal": 1.0, "large": 1e3, "tiny": 1e-5}[kind]


@st.composite
def leads(draw, most: int) -> tuple[int, ...]:
    """Draw a leading shape of at most ``most`` rows."""
    kind = draw(st.sampled_from(("flat", "flat", "flat", "two", "three", "none", "empty")))
    if kind == "none":
        return ()
    if kind == "empty":
        return draw(st.sampled_from(((0,), (2, 0), (0, 3))))
    if kind == "flat":
        return (draw(st.one_of(st.integers(1, most), st.just(min(17, most)))),)
    side = max(1, math.isqrt(most))
    two = (draw(st.integers(1, side)), draw(st.integers(1, side)))
    return two if kind == "two" else (*two, draw(st.integers(1, 2)))


def sizes(most: int) -> st.SearchStrategy[int]:
    """Draw a size: half of the time one at an edge."""
    edges = [edge for edge in EDGES if edge <= most]
    return st.one_of(st.sampled_from(edges), st.integers(1, most))


def impls(dtype: torch.dtype) -> st.SearchStrategy[str]:
    """Draw an implementation that takes ``dtype``; the interpreter is slow, hence seldom."""
    if dtype == torch.float64:
        return st.just("chunked")
    return st.sampled_from(("chunked", "chunked", "triton"))


def ignore_indices(V: int, int32: bool) -> st.SearchStrategy[int]:
    """Draw an ``ignore_index``: also one inside the vocabulary, and one far beyond any."""
    return st.sampled_from((-100, -100, -1, 0, V - 1, -100 if int32 else 2**40))


dtypes = st.sampled_from((*SINGLE, torch.float32, torch.float64))
layouts = st.sampled_from(LAYOUTS)
upstreams = st.sampled_from(UPSTREAMS)
seeds = st.integers(0, 2**16)
temperatures = st.sampled_from((1.0, 1.0, 0.7, 1.3, 0.05, 20.0))
softcaps = st.sampled_from((None, None, 5.0, 30.0, 0.5))
ignored = st.sampled_from((0.0, 0.3, 0.3, 1.0))
extras = st.lists(st.sampled_from(EXTRAS), unique=True).map(tuple)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsCase:
    """A call of ``token_logps``."""

    impl: str = "chunked"
    lead: tuple[int, ...] = (3,)
    V: int = 7
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    target_layout: str = "contiguous"
    int32: bool = False
    scale: float = 3.0
    confident: bool = False
    shift: float = 0.0
    holes: str = "none"
    ignored: float = 0.3
    ignore_index: int = -100
    poison: bool = True
    temperature: float = 1.0
    softcap: float | None = None
    outputs: tuple[str, ...] = ()
    roots: str = "logps"
    upstream: str = "normal"
    upstream_layout: str = "contiguous"
    block: int = 4096
    seed: int = 0

    def build(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return logits, targets, which rows count, and upstreams of logps and of entropy."""
        gen = torch.Generator().manual_seed(self.seed)
        shape = (*self.lead, self.V)
        logits = torch.randn(shape, generator=gen, dtype=torch.float64) * self.scale + self.shift
        targets = torch.randint(self.V, self.lead, generator=gen)
        if self.confident:  # probabilities near 1, whose gradients cancel
            logits.scatter_add_(-1, targets[..., None], torch.full_like(logits[..., :1], 15))
        dropped = torch.rand(self.lead, generator=gen) < self.ignored
        targets = lay_out(targets.masked_fill(dropped, self.ignore_index), self.target_layout)
        logits = lay_out(logits.to(self.dtype), self.layout)
        live = targets != self.ignore_index
        if self.holes != "none" and self.V > 1 and self.layout != "expanded":
            hole = torch.rand(shape, generator=gen) < 0.3
            if self.holes == "block":
                hole = torch.zeros(shape, dtype=torch.bool)
                hole[..., : self.V // 2] = True
            at = torch.where(live, targets, 0)[..., None]
            logits.masked_fill_(hole.scatter(-1, at, self.holes == "target"), -math.inf)
            if self.holes == "target":  # at least one finite logit in every row
                other = (at + 1) % self.V
                logits.scatter_(-1, other, torch.full(other.shape, self.shift, dtype=self.dtype))
        roots = [
            lay_out(upstream(self.upstream, self.lead, gen), self.upstream_layout)
            if self.upstream != "expanded"
            else upstream("expanded", self.lead, gen)
            for _ in range(2)
        ]
        return logits, targets.int() if self.int32 else targets, live, *roots


@st.composite
def logits_cases(draw) -> LogitsCase:
    dtype = draw(dtypes)
    impl = draw(impls(dtype))
    slow = impl == "triton"
    names = draw(extras)
    V = draw(st.one_of(sizes(70), sizes(70), st.sampled_from((127, 129, 1031) + () if slow else (
        127, 129, 1031, 4095, 4096, 4097))))  # fmt: skip
    roots = ("logps", "entropy", "both") if "entropy" in names else ("logps",)
    int32 = draw(st.booleans())
    shift = draw(st.sampled_from((0.0, 0.0, 0.0, 1e4, -1e4)))
    softcap = draw(softcaps)
    return LogitsCase(
        impl=impl,
        lead=draw(leads(8 if slow else 40)),
        V=V,
        dtype=dtype,
        layout=draw(layouts),
        target_layout=draw(layouts),
        int32=int32,
        scale=draw(st.sampled_from((3.0, 3.0, 0.01, 50.0, 1000.0))),
        confident=draw(st.booleans()),
        shift=shift,
        holes=draw(st.sampled_from(("none", "none", "some", "block", "target"))),
        ignored=draw(ignored),
        ignore_index=draw(ignore_indices(V, int32)),
        poison=draw(st.booleans()),
        temperature=draw(temperatures),
        softcap=softcap,
        outputs=names,
        roots=draw(st.sampled_from(roots)),
        upstream=draw(upstreams),
        upstream_layout=draw(layouts),
        block=draw(st.sampled_from((16, 64, 4096))),
        seed=draw(seeds),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadCase:
    """A call of ``linear_token_logps`` or, with a reference model, of its triple."""

    impl: str = "chunked"
    lead: tuple[int, ...] = (3,)
    V: int = 7
    D: int = 4
    dtype: torch.dtype = torch.float32
    layouts: tuple[str, str, str] = ("contiguous",) * 3
    int32: bool = False
    scale: float = 2.0
    confident: bool = False
    bias: str | None = None
    bias_dtype: torch.dtype | None = None
    ignored: float = 0.3
    ignore_index: int = -100
    poison: bool = True
    logit_scale: float = 1.0
    temperature: float = 1.0
    softcap: float | None = None
    outputs: tuple[str, ...] = ()
    roots: str = "logps"
    needs: str = "h"
    upstream: str = "normal"
    upstream_layout: str = "contiguous"
    workspace: int | None = None
    rows: int | None = None
    tile: int | None = None
    recompute: bool = False
    two_heads: bool = False
    ref_bias: bool = False
    same: bool = False
    extrapolation: float = 0.5
    seed: int = 0

    @property
    def options(self) -> dict:
        """The scalars of the call."""
        return {
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "temperature": self.temperature,
            "ignore_index": self.ignore_index,
        }

    def _bias(self, targets: Tensor, gen: torch.Generator) -> Tensor | None:
        if self.bias is None:
            return None
        values = torch.randn(self.V, generator=gen)
        if self.bias == "-inf":
            gone = torch.zeros(self.V, dtype=torch.bool)
            gone[: self.V // 2] = True
            live = targets[targets != self.ignore_index]
            gone[live] = False  # an impossible target is a case of its own
            values[gone] = -math.inf
        elif self.bias == "-inf target" and self.V > 1:
            values[self.V // 3 % (self.V - 1)] = -math.inf
        elif self.bias != "normal":
            values += {"1e4": 1e4, "-1e4": -1e4}.get(self.bias, 0.0)
        return values.to(self.bias_dtype or self.dtype)

    def build(self) -> dict[str, Tensor | None]:
        """Return every tensor of a call by name, ``live`` rows and the upstreams ``g`` and ``e``.

        Rows without a target hold zeros here; ``poisoned`` fills them.
        """
        gen = torch.Generator().manual_seed(self.seed)

        def normal(*shape, by=1.0):
            return (torch.randn(shape, generator=gen, dtype=torch.float64) * by).to(self.dtype)

        own = torch.randint(self.V, self.lead, generator=gen)
        dropped = torch.rand(self.lead, generator=gen) < self.ignored
        targets = lay_out(own.masked_fill(dropped, self.ignore_index), self.layouts[2])
        live = targets != self.ignore_index
        by = self.scale / self.D**0.5
        hidden = normal(*self.lead, self.D)
        weight = lay_out(normal(self.V, self.D, by=by), self.layouts[1])
        if self.confident:  # probabilities near 1, whose gradients cancel
            direction = torch.nn.functional.normalize(weight.double()[own], dim=-1)
            hidden = (hidden.double() + 8 * direction).to(self.dtype)
        hidden = lay_out(hidden, self.layouts[0])
        ref_hidden = lay_out(hidden + 0.3 * normal(*self.lead, self.D), self.layouts[0])
        ref_weight = lay_out(normal(self.V, self.D, by=by), self.layouts[1])
        bias = self._bias(targets, gen)
        if self.same:
            ref_hidden = hidden.clone()
        g, e = (
            lay_out(upstream(self.upstream, self.lead, gen), self.upstream_layout)
            if self.upstream != "expanded"
            else upstream("expanded", self.lead, gen)
            for _ in range(2)
        )
        return {
            "hidden": hidden,
            "ref_hidden": ref_hidden,
            "weight": weight,
            "ref_weight": ref_weight if self.two_heads else None,
            "bias": bias,
            "ref_bias": normal(self.V) if self.ref_bias else None,
            "targets": targets.int() if self.int32 else targets,
            "live": live,
            "g": g,
            "e": e,
        }


@st.composite
def head_cases(draw, triple: bool = False) -> HeadCase:
    dtype = draw(dtypes)
    impl = draw(impls(dtype))
    slow = impl == "triton"
    names = () if triple else draw(extras)
    V = draw(sizes(40) if slow else st.one_of(sizes(70), sizes(70), st.sampled_from((131, 300))))
    roots = ("logps", "entropy", "both") if "entropy" in names else ("logps",)
    int32 = draw(st.booleans())
    planned = draw(st.booleans())
    tiled = planned and draw(st.booleans())
    bias = draw(st.sampled_from((None, None, "normal", "-inf", "-inf target", "1e4", "-1e4")))
    # A logit of +inf, or of 0 times inf, is NaN in any formula.
    scales = (1.0, 1.0, 0.3) if bias and bias.startswith("-inf") else (1.0, 1.0, 0.3, -1.5, 0.0)
    floats = (None, None, torch.float32, *HALF)
    return HeadCase(
        impl=impl,
        lead=draw(leads(18 if slow else 40)),
        V=V,
        D=draw(st.one_of(st.sampled_from((1, 2, 15, 16, 17)), st.integers(1, 40))),
        dtype=dtype,
        layouts=(draw(layouts), draw(layouts), draw(layouts)),
        int32=int32,
        scale=draw(st.sampled_from((2.0, 2.0, 0.01, 40.0))),
        confident=draw(st.booleans()),
        bias=bias,
        bias_dtype=draw(st.sampled_from(floats)) if bias != "1e4" else None,
        ignored=draw(ignored),
        ignore_index=draw(ignore_indices(V, int32)),
        poison=draw(st.booleans()),
        logit_scale=draw(st.sampled_from(scales)),
        temperature=draw(temperatures),
        softcap=draw(softcaps),
        outputs=names,
        roots=draw(st.sampled_from(roots)),
        needs=draw(st.sampled_from(("", "h", "h", "w", "b", "hw", "hb", "wb", "hwb"))),
        upstream=draw(upstreams),
        upstream_layout=draw(layouts),
        workspace=draw(st.sampled_from((1, 3_000, 20_000, 100_000))) if planned else None,
        rows=draw(st.sampled_from((1, 5, 16, 17))) if tiled else None,
        tile=draw(st.sampled_from((1, 7, 16, 32, 33, 64))) if tiled else None,
        recompute=draw(st.booleans()) if planned else False,
        two_heads=triple and draw(st.booleans()),
        ref_bias=triple and bias is not None and draw(st.booleans()),
        same=triple and draw(st.booleans()),
        extrapolation=draw(st.sampled_from((0.0, 0.5, 2.0, -1.0))) if triple else 0.5,
        seed=draw(seeds),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceCase:
    """A call of ``sequence_logps``: packed when ``lengths`` is given, else ``[S, T]``."""

    impl: str = "chunked"
    lengths: tuple[int, ...] | None = None
    shape: tuple[int, int] = (2, 3)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    mask: str | None = None
    mask_layout: str = "contiguous"
    int32: bool = False
    holes: bool = False
    poison: bool = True
    upstream: str = "normal"
    upstream_layout: str = "contiguous"
    block: int = 1024
    seed: int = 0

    def build(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Return token log-probs, cu_seqlens, mask and the sums' upstream."""
        gen = torch.Generator().manual_seed(self.seed)
        cu = None
        shape, sequences = self.shape, self.shape[0]
        if self.lengths is not None:
            cu = torch.tensor([0, *self.lengths]).cumsum(0)
            cu = cu.int() if self.int32 else cu
            shape, sequences = (int(cu[-1]),), len(self.lengths)
        logps = -torch.randn(shape, generator=gen, dtype=torch.float64).exp()
        if self.holes:
            logps[torch.rand(shape, generator=gen) < 0.1] = -math.inf
        logps = lay_out(logps.to(self.dtype), self.layout)
        mask = None
        if self.mask is not None:
            mask = torch.rand(shape, generator=gen) < 0.6
            if self.mask == "none":
                mask = torch.zeros(shape, dtype=torch.bool)
            mask = lay_out(mask, self.mask_layout)
            mask = mask.to(torch.int64) * 3 if self.mask == "integers" else mask
        given = lay_out(upstream(self.upstream, (sequences,), gen), self.upstream_layout)
        return logps, cu, mask, given


@st.composite
def sequence_cases(draw) -> SequenceCase:
    dtype = draw(dtypes)
    impl = draw(impls(dtype))
    slow = impl == "triton"
    lengths = st.lists(
        st.one_of(st.just(0), st.just(1), st.integers(0, 40)), max_size=8 if slow else 30
    )
    counts = st.integers(0, 6 if slow else 20)
    return SequenceCase(
        impl=impl,
        lengths=draw(st.one_of(st.none(), lengths.map(tuple))),
        shape=(draw(counts), draw(sizes(65))) if draw(st.booleans()) else (draw(counts), 0),
        dtype=dtype,
        layout=draw(layouts),
        mask=draw(st.sampled_from((None, "bool", "bool", "integers", "none"))),
        mask_layout=draw(layouts),
        int32=draw(st.booleans()),
        holes=draw(st.booleans()),
        poison=draw(st.booleans()),
        upstream=draw(upstreams),
        upstream_layout=draw(layouts),
        block=draw(st.sampled_from((16, 1024))),
        seed=draw(seeds),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsCase:
    """A call of ``preference_loss`` or ``noise_aware_loss``."""

    impl: str = "chunked"
    B: int = 3
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 7
    layouts: tuple[str, ...] = ("contiguous",) * 7
    scale: float = 3.0
    infinite: tuple[int, ...] = ()
    needs: str = "cr"
    weights: str | None = None
    beta: float = 0.1
    smoothing: float = 0.0
    threshold: float = 0.5
    scalars: bool = False
    upstream: str = "normal"
    upstream_layout: str = "contiguous"
    seed: int = 0

    def build(self) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """Return six log-probs ``[B]``, -inf in those of ``infinite``, the weights and upstream."""
        gen = torch.Generator().manual_seed(self.seed)
        values = []
        for which, (dtype, layout) in enumerate(zip(self.dtypes[:6], self.layouts, strict=False)):
            x = torch.randn(self.B, generator=gen, dtype=torch.float64) * self.scale - 5
            if which in self.infinite and self.B:
                x[self.B // 2] = -math.inf
            values.append(lay_out(x.to(dtype), layout))
        weights = None
        if self.weights is not None:
            weights = torch.rand(self.B, generator=gen).to(self.dtypes[6])
            weights = (
                weights * (torch.rand(self.B, generator=gen) < 0.5)
                if self.weights == "zeros"
                else weights
            )  # noqa: E501
            weights = lay_out(weights, self.layouts[6])
        given = lay_out(upstream(self.upstream, (self.B,), gen), self.upstream_layout)
        return values, weights, given


@st.composite
def pairs_cases(draw, noise_aware: bool = False) -> PairsCase:
    kinds = draw(st.lists(dtypes, min_size=7, max_size=7))
    if draw(st.booleans()):
        kinds = kinds[:1] * 7
    weighted = draw(st.sampled_from((None, "normal", "zeros")))
    used = kinds[: 6 if noise_aware else 4] + (kinds[6:] if weighted else [])
    double = torch.float64 if torch.float64 in used else torch.float32
    infinite = draw(st.sampled_from(((), (), (), (0,), (1,), (2,), (3,), (4,), (5,))))
    tops = (0.0, 0.1, 0.5, 1.0) if noise_aware else (0.0, 0.1, 0.5)
    return PairsCase(
        impl=draw(impls(double)),
        B=draw(st.one_of(st.integers(0, 12), st.sampled_from((127, 128, 129, 300)))),
        dtypes=tuple(kinds),
        layouts=tuple(draw(layouts) for _ in range(7)),
        scale=draw(st.sampled_from((3.0, 0.0, 1e-3, 300.0))),
        infinite=infinite,
        needs=draw(st.sampled_from(("cr", "cr", "c", "r", ""))),
        weights=weighted,
        beta=draw(st.sampled_from((0.1, 0.37, 5.0))),
        smoothing=draw(st.sampled_from(tops)),
        threshold=draw(st.sampled_from((0.0, 0.5, 0.7, 1.0))),
        scalars=draw(st.booleans()),
        upstream=draw(upstreams),
        upstream_layout=draw(layouts),
        seed=draw(seeds),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupsCase:
    """A call of ``pairwise_preference_logits``."""

    impl: str = "chunked"
    sizes: tuple[int, ...] = (2, 3)
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32,) * 2
    layouts: tuple[str, str] = ("contiguous",) * 2
    scale: float = 3.0
    beta: float = 0.1
    layout: str = "padded"
    given: str = "sizes"
    needs: bool = True
    upstream: str = "normal"
    upstream_layout: str = "contiguous"
    block: int = 1024
    seed: int = 0

    def build(self) -> tuple[Tensor, Tensor, dict, Tensor]:
        """Return the log-probs, the groups as a keyword argument, and the upstream."""
        gen = torch.Generator().manual_seed(self.seed)
        logps = [
            lay_out(
                (torch.randn(sum(self.sizes), generator=gen).double() * self.scale - 5).to(dtype),
                layout,
            )
            for dtype, layout in zip(self.dtypes, self.layouts, strict=True)
        ]
        groups = {
            "sizes": {"group_sizes": list(self.sizes)},
            "tensor": {"group_sizes": torch.tensor(self.sizes, dtype=torch.int32)},
            "cu": {"cu_groups": torch.tensor([0, *self.sizes]).cumsum(0)},
        }[self.given]
        widest = max(self.sizes, default=0)
        shape = (len(self.sizes), widest, widest)
        if self.layout == "flat":
            shape = (sum(size * size for size in self.sizes),)
        given = lay_out(upstream(self.upstream, shape, gen), self.upstream_layout)
        return *logps, groups, given


@st.composite
def groups_cases(draw) -> GroupsCase:
    kinds = draw(dtypes), draw(dtypes)
    impl = draw(impls(torch.float64 if torch.float64 in kinds else torch.float32))
    slow = impl == "triton"
    counts = st.lists(
        st.one_of(st.sampled_from((0, 1, 2)), sizes(7 if slow else 33)), max_size=4 if slow else 6
    )
    return GroupsCase(
        impl=impl,
        sizes=tuple(draw(counts)),
        dtypes=kinds,
        layouts=(draw(layouts), draw(layouts)),
        scale=draw(st.sampled_from((3.0, 0.0, 300.0))),
        beta=draw(st.sampled_from((0.1, 0.37, 5.0))),
        layout=draw(st.sampled_from(("padded", "flat"))),
        given=draw(st.sampled_from(("sizes", "tensor", "cu"))),
        needs=draw(st.booleans()),
        upstream=draw(upstreams),
        upstream_layout=draw(layouts),
        block=draw(st.sampled_from((16, 1024))),
        seed=draw(seeds),
    )
