"""Sums over the vocabulary, tile by tile: the online log-sum-exp, its extras, the Jacobian's."""

from __future__ import annotations

import torch

from ._head_math import accumulate, dot, gradient_dtype

# Below every logit, yet finite: a tile of -inf logits gives exp(-inf) = 0 and never inf - inf.
LOWEST = -1e30
# exp of it is 0 in float64 too, and 0 times it is 0 where 0 times -inf would be NaN.
UNDERFLOW = -1e4
# How far, in nats, logits may rise above the m that sums are relative to: e^30 times a vocabulary
# is far from float32's limit, and what is e^57 below the largest is nothing.
SLACK = 30.0
_LOG2_E = 1.4426950408889634


class Online:
    """Running statistics of rows of logits, all but each row's target: sums of exp(z - m).

    The target's logit ``zy`` joins at the end, so that a confident token's log-prob, -log(1 + x)
    with a small x, keeps its digits. ``m`` is 0 while no logit is far from it, then a maximum that
    the rows may leave behind by ``SLACK``: mostly nothing is subtracted, and nothing that was
    summed is rescaled. What the entropy sums, e·(z - top), is relative to the maximum itself: it
    would be a small difference of large sums else.
    """

    def __init__(self, zy: torch.Tensor, extras: tuple[str, ...] = ()):
        self.m = torch.zeros_like(zy)
        self.s = torch.zeros_like(zy)
        self.zy = zy
        self.extras = extras
        self.begun = self.shifted = False
        self.sums = {name: torch.zeros_like(zy) for name in extras}
        self.top = torch.full_like(zy, LOWEST)

    def update(self, z, scratch=None):
        """Take in one tile of logits, -inf at the targets; ``z``'s buffer is used up.

        Return (e = exp(z - m), r): sums so far shrink by r [n], or None where by nothing.
        """
        tops = z.amax(1)
        top = torch.maximum(self.top, tops)
        r = self._move(tops)
        if self.shifted:
            z.sub_(self.m[:, None])
        if "entropy" in self.extras:
            e = _exp(z, out=scratch)
            x = z.sub_((top - self.m)[:, None]).clamp_(min=UNDERFLOW)
            self.sums["entropy"] += self.s * (self.top - top) + x.mul_(e).sum(1)
        else:
            e = _exp(z, out=z)
        if "log_sum_sq_probs" in self.extras:
            squares = torch.mul(e, e, out=z if e is scratch else scratch)
            self.sums["log_sum_sq_probs"] += squares.sum(1)
        self.s += e.sum(1)
        self.top = top
        return e, r

    def _move(self, top: torch.Tensor) -> torch.Tensor | None:
        """Let ``m`` follow the tile's maximum; return what the sums shrink by, or None."""
        far = top > self.m + SLACK if self.begun else top.abs() > SLACK
        if not far.any():
            self.begun = True
            return None
        m = torch.where(far, top.clamp(min=LOWEST), self.m)
        step, self.m, self.shifted = self.m - m, m, True
        if not self.begun:
            self.begun = True
            return None
        r = step.exp()
        if "entropy" in self.extras:
            self.sums["entropy"] *= r
        if "log_sum_sq_probs" in self.extras:
            self.sums["log_sum_sq_probs"] *= r * r
        self.s *= r
        return r

    def finish(self, V: int) -> dict[str, torch.Tensor]:
        """Let the target join ``m``, ``s`` and the extras, and return the op's outputs.

        ``m`` ends near the log-sum-exp and ``s`` near 1, for log s to have a small rounding error;
        ``shrink`` is what sums over e are to be multiplied with.
        """
        others = self.s.log() + (self.m - self.zy)
        m = torch.maximum(self.m + self.s.log().clamp(min=LOWEST).round(), self.zy)
        step, x = self.m - m, self.zy - m
        r, e = step.exp(), x.exp()
        top = torch.maximum(self.top, self.zy)
        for name, value in self.sums.items():
            if name == "entropy":
                value = r * (value + self.s * (self.top - top))
                value = value + e * (self.zy - top).clamp(min=UNDERFLOW)
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
                out[name] = (log_s + (m - top)) - value / self.s
            elif name == "mean_logits":
                out[name] = value / V
            elif name == "log_sum_sq_probs":
                out[name] = value.log() - 2 * log_s
            elif name == "is_top1":
                out[name] = value >= self.top
        return out


class JacobianSum:
    """Sum of e @ weight over tiles, [n, D] in the computing dtype.

    Where the operands are to be rounded, e is gathered over ``width`` vocabulary entries for one
    GEMM, since its result is rounded too, and cast before it is added.
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, rows: int, width: int):
        self.weight = weight
        self.sums = weight.new_empty(rows, weight.shape[1], dtype=dtype)
        narrow = gradient_dtype(weight)
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
            self.acc.add_(dot(e, w.T))
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
            accumulate(self.acc, torch.mm(self.held[:, : self.filled], w))
            self.filled = 0

    def finish(self) -> torch.Tensor:
        """Return the sum."""
        self._flush()
        return self.acc


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
