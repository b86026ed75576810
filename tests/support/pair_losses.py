"""A loss of pairs whose two slopes are not opposite and depend on the lengths: what heads allow."""

from prefalign.kernels._common import jit, tl
from prefalign.kernels.losses import PairLoss


def _means(side):
    counts = side.counts.clamp(min=1)
    return (side.policy - side.reference) / counts, counts


def lopsided_value(chosen, rejected, beta, label_smoothing):
    (c, _), (r, _) = _means(chosen), _means(rejected)
    return 0.5 * (beta * c - 1).square() + beta * c * r - 0.3 * r


def lopsided_slopes(chosen, rejected, beta, label_smoothing):
    (c, nc), (r, nr) = _means(chosen), _means(rejected)
    return beta * (beta * c - 1 + r) / nc, (beta * c - 0.3) / nr


@jit
def lopsided_device(pc, rc, nc, pr, rr, nr, beta, label_smoothing, INNER: tl.constexpr):
    nc = tl.maximum(nc, 1).to(tl.float32)
    nr = tl.maximum(nr, 1).to(tl.float32)
    c = (pc - rc) / nc
    r = (pr - rr) / nr
    value = 0.5 * (beta * c - 1.0) * (beta * c - 1.0) + beta * c * r - 0.3 * r
    return value, beta * (beta * c - 1.0 + r) / nc, (beta * c - 0.3) / nr


LOPSIDED = PairLoss(lopsided_value, lopsided_slopes, lopsided_device, None, "this file")
