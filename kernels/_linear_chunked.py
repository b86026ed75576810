"""The linear head's log-probs in plain torch, tile by tile: what runs on a CPU.

For a chunk of rows and a tile of vocabulary entries, with ``k = logit_scale / temperature``:

    z = f(hidden @ weight.T + bias), but z_y = -inf      one GEMM
    m' = m or, far above it, max_v z;  r = exp(m - m')   online log-sum-exp
    e = exp(z - m');  s' = r·s + sum_v e
    A' = r·A + (e·f') @ weight                           only for the row Jacobian
    at the end: logp = -log(1 + s·exp(m - z_y)), p_y = exp(logp),
                J = k·(f'_y·(1 - p_y)·weight[y] - p_y·exp(m - z_y)·A)

A low-rank adapter adds low @ up.T to the first line's sum and has a Jacobian of its own, with
``up`` in the place of ``weight``.

The triple does the same for two logits tiles over one weight tile and takes the extrapolated logits
from the two. Nothing has N·V elements.

Logits of 16-bit inputs are made by a float32 GEMM, so that none is rounded; bfloat16-valued float32
numbers may go through oneDNN's bfloat16 path, where the products are exact and the sums float32.
What only feeds a gradient (e, and the logits' gradients) is rounded to bfloat16 for a true
bfloat16 GEMM, twice as fast, whose tiles are summed in float32.

The target's own entry is kept out of all sums and GEMMs and joins them at the end: a confident
token has a log-prob and a Jacobian near 0, which p_y near 1 would drown, and its gradient in the
weight is so much larger than the others' that adding those to it one by one would lose them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ._common import compute_dtype
from ._low_rank import Adapter, Factors, add_product, times
from .plan import hidden_grad_fits

# Below every logit, yet finite: a tile of -inf logits gives exp(-inf) = 0 and never inf - inf.
LOWEST = -1e30
# exp of it is 0 in float64 too, and 0 times it is 0 where 0 times -inf would be NaN.
_UNDERFLOW = -1e4
# How far, in nats, a row's maximum may rise above the m that its sums are relative to.
SLACK = 8.0
_LOG2_E = 1.4426950408889634
_TILES_A_GEMM = 4  # of rounded operands; the tiles themselves are small, to stay in the caches


class Head(NamedTuple):
    """The scalars between a GEMM's result x and a logit: cap·tanh(scale·x / cap) / temperature."""

    scale: float
    softcap: float | None
    temperature: float


class Reference(NamedTuple):
    """The second model of the triple; ``weight`` is None when the policy's serves both."""

    hidden: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    extrapolation: float


_precision_lock = threading.Lock()
_precision_users = 0
_precision_before = ""


@contextlib.contextmanager
def _gemm_precision(tensor: torch.Tensor) -> Iterator[None]:
    """Let float32 GEMMs of bfloat16-valued inputs on a CPU use oneDNN's bfloat16 products.

    2 to 2.4 times faster than the float32 GEMM where it was measured. The switch is global, hence
    counted: the first user sets it, the last one restores it. Without the switch (an older torch,
    a build without oneDNN) the GEMM is plain float32: slower, and as accurate.
    """
    global _precision_users, _precision_before
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    if tensor.dtype != torch.bfloat16 or tensor.is_cuda or not hasattr(switch, "fp32_precision"):
        yield
        return
    with _precision_lock:
        if _precision_users == 0:
            _precision_before = switch.fp32_precision
            switch.fp32_precision = "bf16"
        _precision_users += 1
    try:
        yield
    finally:
        with _precision_lock:
            _precision_users -= 1
            if _precision_users == 0:
                switch.fp32_precision = _precision_before


# torch.mm's float32 GEMM is MKL's, which on an AMD Zen 5 runs at 220 GFLOP/s where oneDNN's runs at
# 480. This op is the way to oneDNN's; it takes any strides. It adds D products in one row: errors
# 1.5 (D 896) to 2.1 (D 2048) times MKL's, hence ``_target_logits``.
_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# Rounded probabilities average out over a large vocabulary; a small one has no time to save.
_NARROW_VOCAB = 4096
_onednn_has_bf16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)


def _dot(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x @ w.T``."""
    if _onednn_linear is None or x.dtype != torch.float32 or x.is_cuda:
        return torch.mm(x, w.T)
    return _onednn_linear(x, w, None, "none", [], "")


def _gradient_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype in which GEMMs that only feed a gradient take their operands."""
    if (
        weight.dtype == torch.bfloat16
        and weight.shape[0] >= _NARROW_VOCAB
        and (weight.is_cuda or _onednn_has_bf16())
    ):
        return torch.bfloat16
    return compute_dtype(weight)


def _gradient_dot(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x @ w.T`` in ``w``'s dtype, to be summed in float32."""
    return torch.mm(x.to(w.dtype), w.T) if w.dtype == torch.bfloat16 else _dot(x, w)


def _accumulate(sums: torch.Tensor, part: torch.Tensor, alpha: float = 1.0) -> None:
    """Add ``part``, in blocks where it must be cast, since the cast makes a temporary."""
    step = len(sums) if part.dtype == sums.dtype else 256
    for lo in range(0, len(sums), step):
        sums[lo : lo + step].add_(part[lo : lo + step], alpha=alpha)


class _Tiles:
    """Preallocated [rows, tile] buffers, handed out as contiguous [n, v] views."""

    def __init__(self, like: torch.Tensor, dtype: torch.dtype, rows: int, tile: int, count: int):
        self.flat = [like.new_empty(rows * tile, dtype=dtype) for _ in range(count)]

    def view(self, which: int, n: int, v: int) -> torch.Tensor:
        return self.flat[which][: n * v].view(n, v)


class _Slices:
    """Slices of a weight in the computing dtype: a view, or a copy in one reused buffer."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, tile: int):
        self.weight = weight
        same = weight.dtype == dtype
        self.buffer = None if same else weight.new_empty(tile, weight.shape[1], dtype=dtype)

    def __call__(self, start: int, end: int) -> torch.Tensor:
        part = self.weight[start:end]
        return part if self.buffer is None else self.buffer[: end - start].copy_(part)


class _JacobianSum:
    """Sum of e @ weight over tiles, [n, D] in the computing dtype.

    Where the operands are to be rounded, e is gathered over ``width`` vocabulary entries for one
    GEMM, since its result is rounded too, and cast before it is added.
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, rows: int, width: int):
        self.weight = weight
        self.sums = weight.new_empty(rows, weight.shape[1], dtype=dtype)
        narrow = _gradient_dtype(weight)
        self.buffer = None if narrow == dtype else weight.new_empty(rows * width, dtype=narrow)
        self.width = width

    def begin(self, n: int) -> None:
        """Start with ``n`` rows."""
        self.acc = self.sums[:n].zero_()
        self.first = self.filled = 0
        if self.buffer is not None:
            self.held = self.buffer[: n * self.width].view(n, self.width)

    def rescale(self, r: torch.Tensor) -> None:
        """Shrink what was summed so far by r [n]."""
        self.acc.mul_(r[:, None])
        if self.filled:
            self.held[:, : self.filled].mul_(r[:, None])

    def add(self, e: torch.Tensor, w: torch.Tensor, lo: int) -> None:
        """Add ``e @ w``, with ``w`` the weight's slice from ``lo`` on in the computing dtype."""
        if self.buffer is None:
            self.acc.add_(_dot(e, w.T))
            return
        if self.filled + e.shape[1] > self.width:
            self._flush()
        if not self.filled:
            self.first = lo
        self.held[:, self.filled : self.filled + e.shape[1]] = e
        self.filled += e.shape[1]

    def _flush(self) -> None:
        if self.filled:
            w = self.weight[self.first : self.first + self.filled]
            _accumulate(self.acc, torch.mm(self.held[:, : self.filled], w))
            self.filled = 0

    def finish(self) -> torch.Tensor:
        """Return the sum."""
        self._flush()
        return self.acc


class _Online:
    """Running statistics of rows of logits, all but each row's target: sums of exp(z - m).

    The target's logit ``zy`` joins at the end, so that a confident token's log-prob, -log(1 + x)
    with a small x, keeps its digits. ``m`` follows the rows' maximum only where it falls behind by
    more than ``SLACK``: then what was summed must be rescaled, which is seldom after the first
    tile.
    """

    def __init__(self, zy: torch.Tensor, extras: tuple[str, ...] = ()):
        self.m = torch.full_like(zy, LOWEST)
        self.s = torch.zeros_like(zy)
        self.zy = zy
        self.extras = extras
        self.sums = {name: torch.zeros_like(zy) for name in extras}
        if "is_top1" in extras:
            self.sums["is_top1"].fill_(LOWEST)

    def update(self, z, scratch=None):
        """Take in one tile of logits, -inf at the targets; ``z``'s buffer is used up.

        Return (e = exp(z - m), r): sums so far shrink by r [n], or None where by nothing.
        """
        top = z.amax(1)
        if "is_top1" in self.extras:
            self.sums["is_top1"] = torch.maximum(self.sums["is_top1"], top)
        behind = top > self.m + SLACK
        r = None
        if behind.any():
            m = torch.where(behind, top, self.m)
            step = self.m - m
            r = step.exp()
            if "entropy" in self.extras:
                self.sums["entropy"] = r * (self.sums["entropy"] + self.s * step)
            if "log_sum_sq_probs" in self.extras:
                self.sums["log_sum_sq_probs"] *= r * r
            self.s *= r
            self.m = m
        z.sub_(self.m[:, None])
        if "entropy" in self.extras:
            e = _exp(z, out=scratch)
            self.sums["entropy"] += z.clamp_(min=_UNDERFLOW).mul_(e).sum(1)
        else:
            e = _exp(z, out=z)
        if "log_sum_sq_probs" in self.extras:
            squares = torch.mul(e, e, out=z if e is scratch else scratch)
            self.sums["log_sum_sq_probs"] += squares.sum(1)
        self.s += e.sum(1)
        return e, r

    def finish(self, V: int) -> dict[str, torch.Tensor]:
        """Let the target join ``m``, ``s`` and the extras, and return the op's outputs."""
        others = self.s.log() + (self.m - self.zy)
        m = torch.maximum(self.m, self.zy)
        step, x = self.m - m, self.zy - m
        r, e = step.exp(), x.exp()
        for name, value in self.sums.items():
            if name == "entropy":
                value = r * (value + self.s * step) + e * x.clamp(min=_UNDERFLOW)
            elif name == "log_sum_sq_probs":
                value = r * r * value + e * e
            elif name == "mean_logits":
                value = value + self.zy
            self.sums[name] = value
        self.m, self.s, self.shrink = m, r * self.s + e, r
        log_s = self.s.log()
        # Below one half, one rounding less; above, the digits that 1 + x would lose.
        logps = torch.where(others < 0, -torch.log1p(others.exp()), x - log_s)
        out = {"logps": logps, "lse": m + log_s}
        for name, value in self.sums.items():
            if name == "entropy":
                out[name] = log_s - value / self.s
            elif name == "mean_logits":
                out[name] = value / V
            elif name == "log_sum_sq_probs":
                out[name] = value.log() - 2 * log_s
            elif name == "is_top1":
                out[name] = self.zy >= value
        return out


def _exp(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """exp, as exp2: a quarter of the time where torch gives exp to MKL (AMD Zen 5)."""
    return torch.mul(x, _LOG2_E, out=out).exp2_()


def _exp(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """exp, as exp2: a quarter of the time where torch gives exp to MKL (AMD Zen 5)."""
    return torch.mul(x, _LOG2_E, out=out).exp2_()


def finish_stats(m, s, zy, sums, V) -> dict[str, torch.Tensor]:
    """Turn running statistics into the op's outputs. ``sums`` holds those of the extras."""
    log_s = s.log()
    # (z_y - m) first: m + log s rounds to m's last bit, which is 1e-3 at logits of 1e4.
    out = {"logps": (zy - m) - log_s, "lse": m + log_s}
    for name, value in sums.items():
        if name == "entropy":
            out[name] = log_s - value / s
        elif name == "mean_logits":
            out[name] = value / V
        elif name == "log_sum_sq_probs":
            out[name] = value.log() - 2 * log_s
        elif name == "is_top1":
            out[name] = zy >= m
    return out


def _logits(h, w, bias, head: Head, low=None, up=None) -> torch.Tensor:
    out = _dot(h, w)
    if low is not None:
        add_product(out, low, up)
    return _cap(out if bias is None else out.add_(bias), head)


def _cap(out: torch.Tensor, head: Head) -> torch.Tensor:
    if head.softcap is None:
        scale = head.scale / head.temperature
        return out if scale == 1.0 else out.mul_(scale)
    out.mul_(head.scale / head.softcap).tanh_()
    return out.mul_(head.softcap / head.temperature)


def _target_logits(h, weight, y, bias, head: Head, adapter: Adapter | None = None) -> torch.Tensor:
    """The logits of each row's own target, [n], to put in the place of the GEMM's.

    The target's error goes straight into the log-prob, that of the others is averaged. A GEMM adds
    D products one after another, ``sum`` adds them pairwise.
    """
    y = y.clamp(0, weight.shape[0] - 1)
    u = weight[y].to(h.dtype).mul_(h).sum(1)
    if adapter is not None:
        u += adapter.up[y].to(h.dtype).mul_(adapter.low).sum(1)
    return _cap(u if bias is None else u.add_(bias[y]), head)


def _slope(z: torch.Tensor, head: Head, out: torch.Tensor) -> torch.Tensor:
    """dz/du up to the factor 1 / temperature: 1 - tanh², from the logit itself."""
    t = head.temperature / head.softcap
    return torch.mul(z, z, out=out).mul_(-t * t).add_(1.0)


def _rows_with_targets(targets: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
    """Indices of the rows to compute; None means all, in place, with no gather.

    Dropping rows needs to know how many are left, which on a GPU is a host sync: there every row
    is computed and the ignored ones are masked at the end.
    """
    if targets.is_cuda:
        return None
    keep = targets != ignore_index
    return None if keep.all() else keep.nonzero()[:, 0]


def forward(
    hidden, weight, targets, bias, head, ignore_index, extras, jacobian, rows, tile, reference=None,
    adapter=None,
):  # fmt: skip
    """Return ({name: [N] statistic}, norm [2, N], J [N, D], J [N, r]) of the head's rows.

    The Jacobians, by hidden and by the adapter's ``low``, are None where they are not asked for.

    ``norm`` is (m, s), from which backward makes p = exp(z - m) / s. With a ``reference`` the dict
    also has ``"reference"`` and ``"extrapolated"`` log-probs.
    """
    N, D = hidden.shape
    V = weight.shape[0]
    dtype = compute_dtype(hidden)
    names = ("logps", "lse", *extras) + (("reference", "extrapolated") if reference else ())
    result = {
        name: hidden.new_zeros(N, dtype=torch.bool if name == "is_top1" else dtype)
        for name in names
    }
    norm = hidden.new_ones(2, N, dtype=dtype)
    J = hidden.new_zeros(N, D) if jacobian else None
    J_low = torch.zeros_like(adapter.low) if jacobian and adapter else None
    kept = _rows_with_targets(targets, ignore_index)
    total = N if kept is None else kept.numel()
    if total == 0:
        return result, norm, J, J_low
    rows = min(rows, total)
    sloped = jacobian and head.softcap is not None
    # The first: extrapolated, or scratch of the extras. The last: the slope.
    tiles = _Tiles(hidden, dtype, rows, tile, (bool(extras) or reference is not None) + sloped)
    slices = _Slices(weight, dtype, tile)
    ref_slices = None
    if reference and reference.weight is not None:
        ref_slices = _Slices(reference.weight, dtype, tile)
    if jacobian:
        # In the room that is left where no other tiles are held.
        width = tile if extras or reference or sloped else min(V, _TILES_A_GEMM * tile)
        product = _JacobianSum(weight, dtype, rows, width)
    factors = Factors(adapter, hidden) if adapter else None
    low = up = None
    with _gemm_precision(hidden):
        for start in range(0, total, rows):
            end = min(start + rows, total)
            index = slice(start, end) if kept is None else kept[start:end]
            n = end - start
            h = hidden[index].to(dtype)
            y = targets[index]
            here = adapter.at(index) if adapter else None
            stats = _Online(_target_logits(h, weight, y, bias, head, here), extras)
            if jacobian:
                product.begin(n)
            if adapter:
                low = factors.rows(index)
                acc_low = torch.zeros_like(here.low) if jacobian else None
            if reference:
                ref_h = reference.hidden[index].to(dtype)
                ref_w = weight if reference.weight is None else reference.weight
                ref_stats = _Online(_target_logits(ref_h, ref_w, y, reference.bias, head))
                ext_stats = _Online(
                    _extrapolate(stats.zy, ref_stats.zy, reference.extrapolation, bias is not None)
                )
            for lo in range(0, V, tile):
                hi = min(lo + tile, V)
                v = hi - lo
                w = slices(lo, hi)
                local = (y - lo).clamp_(0, v - 1)[:, None]
                inside = (y >= lo) & (y < hi)
                if adapter:
                    up = factors.entries(lo, hi)
                z = _logits(h, w, _part(bias, lo, hi), head, low, up)
                if reference:
                    ref_w = w if ref_slices is None else ref_slices(lo, hi)
                    ref_z = _logits(ref_h, ref_w, _part(reference.bias, lo, hi), head)
                    ext = tiles.view(0, n, v)
                    _extrapolate(z, ref_z, reference.extrapolation, bias is not None, out=ext)
                    for other, values in ((ext_stats, ext), (ref_stats, ref_z)):
                        _put(values, local, inside, -torch.inf)
                        other.update(values)
                    del ref_z, values
                slope = _slope(z, head, tiles.view(-1, n, v)) if sloped else None
                if "mean_logits" in extras:
                    _put(z, local, inside, 0)
                    stats.sums["mean_logits"] += z.sum(1)
                _put(z, local, inside, -torch.inf)
                e, r = stats.update(z, tiles.view(0, n, v) if extras else None)
                if jacobian:
                    e = e if slope is None else e.mul_(slope)
                    if r is not None:
                        product.rescale(r)
                    product.add(e, w, lo)
                    if adapter:
                        if r is not None:
                            acc_low.mul_(r[:, None])
                        acc_low.add_(times(e, up))
                del z, e  # before the next tile is made
            out = stats.finish(V)
            if reference:
                out["reference"] = ref_stats.finish(V)["logps"]
                out["extrapolated"] = ext_stats.finish(V)["logps"]
            for name in names:
                result[name][index] = out[name]
            norm[0, index], norm[1, index] = stats.m, stats.s
            if jacobian:
                logps = out["logps"]
                J[index] = _finish_jacobian(product.finish(), stats, logps, weight, y, head).to(
                    J.dtype
                )
                if adapter:
                    J_low[index] = _finish_jacobian(acc_low, stats, logps, adapter.up, y, head)
    if targets.is_cuda:
        live = targets != ignore_index
        result = {name: value.masked_fill(~live, 0) for name, value in result.items()}
        norm.masked_fill_(~live, 1)
        for jac in (J, J_low):
            if jac is not None:
                jac.masked_fill_(~live[:, None], 0)
    return result, norm, J, J_low


def _put(tile: torch.Tensor, local, inside, values) -> None:
    """Write ``values`` ([n] or a number) at the rows' targets, where those lie inside the tile."""
    kept = tile.gather(1, local)[:, 0]
    tile.scatter_(1, local, torch.where(inside, values, kept).to(tile.dtype)[:, None])


def _extrapolate(z, ref_z, extrapolation: float, biased: bool, out=None):
    ext = torch.mul(ref_z, -extrapolation, out=out).add_(z, alpha=1.0 + extrapolation)
    # -inf in both (a padded vocabulary) is -inf, not NaN; only a bias makes it.
    return ext.masked_fill_(z == -torch.inf, -torch.inf) if biased else ext


def _finish_jacobian(acc, stats, logps, weight, y, head):
    """k·(f'_y·(1 - p_y)·weight[y] - acc / s), in the accumulator's buffer."""
    acc.mul_((-stats.shrink / stats.s)[:, None])
    factor = torch.expm1(logps).neg_()
    if head.softcap is not None:
        factor *= _slope(stats.zy, head, torch.empty_like(stats.zy))
    acc.addcmul_(factor[:, None], weight[y.clamp(0, weight.shape[0] - 1)].to(acc.dtype))
    return acc.mul_(head.scale / head.temperature)


def _part(bias: torch.Tensor | None, lo: int, hi: int) -> torch.Tensor | None:
    return None if bias is None else bias[lo:hi]


def backward(
    grad_logps, grad_entropy, hidden, weight, targets, bias, norm, entropy, head, ignore_index,
    needs, rows, tile, spare, adapter=None,
):  # fmt: skip
    """Return (dHidden, dWeight, dBias, dLow, dUp) from recomputed logits.

    Those that ``needs`` says not are None.
    """
    kept = _rows_with_targets(targets, ignore_index)
    if targets.is_cuda:
        # Rows cannot be dropped without a host sync; a masked row must add 0, also from NaN.
        live = targets != ignore_index
        hidden = hidden.masked_fill(~live[:, None], 0)
        grad_logps, grad_entropy = (
            None if g is None else g.masked_fill(~live, 0) for g in (grad_logps, grad_entropy)
        )

    def run(first, last, *grads):
        _backward_tiles(
            grad_logps, grad_entropy, hidden, weight, targets, bias, norm, entropy, head, tile,
            kept, rows, first, last, *grads, adapter,
        )  # fmt: skip

    with _gemm_precision(hidden):
        return arrange_backward(run, hidden, weight, bias, adapter, needs, kept, rows, spare)


def arrange_backward(run, hidden, weight, bias, adapter, needs, kept, rows, spare):
    """Allocate the gradients and sum each where float32 sums fit.

    ``run(first, last, dh, dw, db, dlow, dup)`` goes over vocabulary slices outside, row chunks
    inside: a slice of dWeight (and of dUp) is summed in float32 over all rows, cast and written
    once. dHidden is summed in float32 over all slices: in the output, in a float32 copy where
    ``spare`` bytes hold it, else row chunk by row chunk in a pass of its own. dLow, as wide as its
    sums, is made beside dHidden.
    """
    need_h, need_w, need_b, need_low, need_up = needs
    N, D = hidden.shape
    dtype = compute_dtype(hidden)
    dh = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need_h else None
    dw = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_w else None
    db = torch.zeros_like(bias) if need_b else None
    dlow = torch.zeros_like(adapter.low) if need_low else None
    dup = torch.zeros_like(adapter.up) if need_up else None
    total = N if kept is None else kept.numel()
    if total == 0:
        return dh, dw, db, dlow, dup
    if need_h and dh.dtype == dtype:
        run(0, total, dh, dw, db, dlow, dup)
    elif need_h and hidden_grad_fits(total, D, hidden.dtype, spare):
        sums = hidden.new_zeros(total, D, dtype=dtype)
        run(0, total, sums, dw, db, dlow, dup)
        _store_rows(dh, sums, kept, 0, total, rows)
    else:
        if need_h:
            block = hidden.new_empty(min(rows, total), D, dtype=dtype)
            for start in range(0, total, rows):
                end = min(start + rows, total)
                sums = block[: end - start].zero_()
                run(start, end, sums, None, None, dlow, None)
                _store_rows(dh, sums, kept, start, end, rows)
        if need_w or need_b or need_up or not need_h:
            run(0, total, None, dw, db, None if need_h else dlow, dup)
    return dh, dw, db, dlow, dup


def _store_rows(out, sums, kept, start, end, rows):
    """Cast float32 sums into ``out``'s rows, in chunks, since a cast makes a temporary."""
    for lo in range(start, end, rows):
        hi = min(lo + rows, end)
        index = slice(lo, hi) if kept is None else kept[lo:hi]
        out[index] = sums[lo - start : hi - start].to(out.dtype)


def _backward_tiles(
    grad_logps, grad_entropy, hidden, weight, targets, bias, norm, entropy, head, tile, kept, rows,
    first, last, dh, dw, db, dlow=None, dup=None, adapter=None,
):  # fmt: skip
    """Add the gradients of rows ``first`` to ``last`` (of those kept) to those that are not None.

    ``dh`` has either all of hidden's rows, or just these; ``dlow`` has all.
    """
    V, D = weight.shape
    dtype = compute_dtype(hidden)
    rows = min(rows, last - first)
    k = head.scale / head.temperature
    scattered = dh is not None and kept is not None and dh.shape[0] == hidden.shape[0]
    narrow = _gradient_dtype(weight)
    slices = _Slices(weight, dtype, tile)
    factors = Factors(adapter, hidden) if adapter else None
    low = up = None
    at_target = norm.new_empty(last - first)
    for start, end, index in _row_chunks(first, last, rows, kept):
        here = adapter.at(index) if adapter else None
        zy = _target_logits(hidden[index].to(dtype), weight, targets[index], bias, head, here)
        at_target[start - first : end - first] = _target_grads(
            zy, norm[:, index], _rows(grad_logps, index, zy), _rows(grad_entropy, index, zy),
            _rows(entropy, index, zy), head,
        )  # fmt: skip
    copy_w = dw is not None and dw.dtype != dtype
    dw_buffer = weight.new_empty(tile, D, dtype=dtype) if copy_w else None
    for lo in range(0, V, tile):
        hi = min(lo + tile, V)
        v = hi - lo
        w = slices(lo, hi)
        if dw is not None:
            dw_slice = dw_buffer[:v].zero_() if copy_w else dw[lo:hi]
        db_slice = None if db is None else weight.new_zeros(v, dtype=dtype)
        if adapter:
            up = factors.entries(lo, hi)
            dup_slice = None if dup is None else weight.new_zeros(v, dup.shape[1], dtype=dtype)
        for start, end, index in _row_chunks(first, last, rows, kept):
            h = hidden[index].to(dtype)
            if adapter:
                low = factors.rows(index)
            z = _logits(h, w, _part(bias, lo, hi), head, low, up)
            dz = _logit_grads(
                z, norm[:, index], _rows(grad_logps, index, z), _rows(grad_entropy, index, z),
                _rows(entropy, index, z), head,
            )  # fmt: skip
            local = targets[index] - lo
            inside = (local >= 0) & (local < v)
            local = local.clamp_(0, v - 1)[:, None]
            _put(dz, local, inside, 0)  # the targets' entries go apart: large, and not rounded
            hit = inside.nonzero()[:, 0]
            entries = local[hit, 0]
            g = at_target[start - first : end - first][hit].mul_(k)[:, None]
            if db is not None:
                db_slice.add_(dz.sum(0), alpha=k)
                _add_rows(db_slice, entries, g[:, 0])
            if dup is not None:
                dup_slice.add_(times(dz.T, low), alpha=k)
                _add_rows(dup_slice, entries, adapter.at(index).low[hit] * g)
            if dlow is not None:
                dlow[index] += times(dz, up).mul_(k)
            if dw is not None:
                g = h[hit].mul_(g)
            if narrow != dtype:
                dz, h, z = dz.to(narrow), hidden[index], None
            if dw is not None:
                _accumulate(dw_slice, _gradient_dot(dz.T, h.T), k)
                _add_rows(dw_slice, entries, g)
            if dh is not None:
                part = _gradient_dot(dz, (w if narrow == dtype else weight[lo:hi]).T)
                if scattered:
                    dh.index_add_(0, index, part.to(dtype), alpha=k)
                else:
                    _accumulate(dh[start - first : end - first], part, k)
            del z, dz
        if copy_w:
            dw[lo:hi] = dw_slice
        if db is not None:
            db[lo:hi] = db_slice
        if dup is not None:
            dup[lo:hi] = dup_slice
    if dlow is not None:
        for start, end, index in _row_chunks(first, last, rows, kept):
            part = adapter.up[targets[index].clamp(0, V - 1)].to(dtype)
            dlow[index] += part.mul_(at_target[start - first : end - first, None]).mul_(k)
    if dh is not None:
        for start, end, index in _row_chunks(first, last, rows, kept):
            part = weight[targets[index].clamp(0, V - 1)].to(dtype)
            part.mul_(at_target[start - first : end - first, None])
            if scattered:
                dh.index_add_(0, index, part, alpha=k)
            else:
                dh[start - first : end - first].add_(part, alpha=k)


def _add_rows(out: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """Add ``rows`` to those of ``out`` that ``index`` names, in order, repeated ones too."""
    if out.is_cuda:
        out.index_put_((index,), rows, accumulate=True)  # sorts, where index_add_ has atomics
    else:
        out.index_add_(0, index, rows)


def _row_chunks(first: int, last: int, rows: int, kept: torch.Tensor | None) -> Iterator[tuple]:
    """(start, end, index into all rows) of each chunk."""
    for start in range(first, last, rows):
        end = min(start + rows, last)
        yield start, end, slice(start, end) if kept is None else kept[start:end]


def _rows(values: torch.Tensor | None, index, like: torch.Tensor) -> torch.Tensor | None:
    return None if values is None else values[index].to(like.dtype)


def _target_grads(zy, norm, g, g_entropy, entropy, head):
    """Gradient by the GEMM's result at each row's target, up to k, [n]."""
    m, s = norm
    logp = (zy - m) - s.log()
    grads = torch.zeros_like(zy) if g is None else -g * torch.expm1(logp)
    if g_entropy is not None:
        grads -= g_entropy * logp.exp() * (logp.clamp(min=_UNDERFLOW) + entropy)
    return grads if head.softcap is None else grads * _slope(zy, head, torch.empty_like(zy))


def _logit_grads(z, norm, g, g_entropy, entropy, head):
    """Gradient by the GEMM's result up to k, in ``z``'s buffer, as if no entry were the target.

    f'(z)·(-g·p - g_entropy·p·(log p + entropy)); 0·log 0 is 0.
    """
    m, s = norm
    g = torch.zeros_like(m) if g is None else g
    slope = None if head.softcap is None else _slope(z, head, torch.empty_like(z))
    z.sub_(m[:, None])
    if g_entropy is None:
        dz = z.exp_().mul_((-g / s)[:, None])
    else:
        e = torch.exp(z)
        z.clamp_(min=_UNDERFLOW).add_((entropy - s.log())[:, None])
        z.mul_((-g_entropy / s)[:, None]).sub_((g / s)[:, None])
        dz = z.mul_(e)
    return dz if slope is None else dz.mul_(slope)
