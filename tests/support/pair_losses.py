"""A loss of pairs whose slopes are not opposite and depend on the lengths: the table allows it."""

from prefalign.kernels._common import jit, tl
from prefalign.kernels.losses import PairLoss


def lopsided_value(a, b, beta, label_smoothing, extra):
    return 0.5 * (beta * a - 1).square() + beta * a * b - 0.3 * b


def lopsided_slopes(a, b, beta, label_smoothing, extra):
    return beta * (beta * a - 1 + b), beta * a - 0.3


@jit
def lopsided_device(a, b, beta, label_smoothing, extra, INNER: tl.constexpr):
    value = 0.5 * (beta * a - 1.0) * (beta * a - 1.0) + beta * a * b - 0.3 * b
    return value, beta * (beta * a - 1.0 + b), beta * a - 0.3


LOPSIDED = PairLoss(lopsided_value, lopsided_slopes, lopsided_device, "this file", per_token=True)
