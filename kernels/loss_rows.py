"""The functions of the loss table: values and derivatives in torch, and both at once in Triton.

``losses.LOSSES`` names them, says what each comes from and what it takes. Two shapes:

- of a scaled margin ``z = beta * (a - b)``: ``f(z, beta, label_smoothing, extra)``, value and
  derivative by z, where a and b are the scores of the chosen and the rejected sequence;
- of the two scores themselves: ``f(a, b, beta, label_smoothing, extra)``, value and derivatives by
  a and by b.

``label_smoothing`` is a number or one per pair, and so is ``beta``; ``extra`` is the one number
that a row may take besides (see its entry in the table). Autograd goes through the values in the
eager reference; the derivatives are checked against it in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import expm1, jit, log1p, tl

Number = float | Tensor


def scaled(weight: Number, values: Tensor) -> Tensor:
    """Return ``weight * values``, where a weight of 0 makes 0 of an infinity too."""
    if isinstance(weight, Tensor):
        return (weight * values).masked_fill(weight == 0, 0)
    return weight * values if weight else torch.zeros_like(values)


@jit
def softplus_device(z):
    """Return log(1 + exp(z)), which is -log sigmoid(-z), with no overflow."""
    return log1p(tl.exp(-tl.abs(z))) + tl.maximum(z, 0.0)


@jit
def confidence_device(z):
    """Return sigmoid(z) with no overflow, SPA's confidence in a label."""
    tail = tl.exp(-tl.abs(z))
    return tl.where(z >= 0.0, 1.0, tail) / (1.0 + tail)


# Of a scaled margin


def sigmoid_value(z: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return ``-(1 - e) * log sigmoid(z) - e * log sigmoid(-z)``, e the label smoothing.

    As ``log(1 + exp(-|z|)) + (e * z if z > 0 else (e - 1) * z)``: the same, with nothing that
    cancels, not even infinities, and exactly log 2 at ``z = 0`` for every e.
    """
    positive = z > 0  # and not relu and abs, whose derivatives at 0 are those of neither side
    size = torch.where(positive, z, -z)
    tilt = scaled(label_smoothing, size.masked_fill(~positive, 0))
    tilt = tilt + scaled(1 - label_smoothing, size.masked_fill(positive, 0))
    return tilt - F.logsigmoid(size)


def sigmoid_slope(z: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return the derivative of ``sigmoid_value`` by ``z``."""
    return label_smoothing - (-z).sigmoid()


@jit
def sigmoid_device(z, beta, label_smoothing, extra):
    """Return the value and the slope of the sigmoid loss."""
    tail = tl.exp(-tl.abs(z))
    # A weight of 0 must not turn an infinite margin into 0 * inf.
    flip = tl.where(label_smoothing == 0.0, 0.0, label_smoothing * tl.maximum(z, 0.0))
    keep = tl.where(label_smoothing == 1.0, 0.0, (1.0 - label_smoothing) * tl.maximum(-z, 0.0))
    value = log1p(tail) + (flip + keep)
    slope = label_smoothing - tl.where(z >= 0.0, tail, 1.0) / (1.0 + tail)
    return value, slope


def simpo_value(z: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return the sigmoid loss of ``z - gamma``, where ``extra`` is gamma."""
    return sigmoid_value(z - extra, beta, label_smoothing, extra)


def simpo_slope(z: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return the derivative of ``simpo_value`` by ``z``."""
    return sigmoid_slope(z - extra, beta, label_smoothing, extra)


@jit
def simpo_device(z, beta, label_smoothing, extra):
    """Return value and slope of SimPO's loss."""
    return sigmoid_device(z - extra, beta, label_smoothing, extra)


def hinge_value(z: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return ``max(0, extra - z)``, where ``extra`` is the margin asked for."""
    return (extra - z).relu()


def hinge_slope(z: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return the derivative of ``hinge_value`` by ``z``, 0 where the margin is just met."""
    return -(z < extra).to(z.dtype)


@jit
def hinge_device(z, beta, label_smoothing, extra):
    """Return value and slope of the hinge loss."""
    return tl.maximum(extra - z, 0.0), tl.where(z < extra, -1.0, 0.0)


def squared_value(z: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return ``(z / beta - 1 / (2 * beta)) ** 2``: IPO's, of the margin in nats."""
    return ((z - 0.5) / beta).square()


def squared_slope(z: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return the derivative of ``squared_value`` by ``z``."""
    return 2 * (z - 0.5) / beta / beta


@jit
def squared_device(z, beta, label_smoothing, extra):
    """Return value and slope of IPO's loss."""
    error = (z - 0.5) / beta
    return error * error, 2.0 * error / beta


def _logit(label_smoothing: Number, like: Tensor) -> Tensor:
    share = torch.as_tensor(label_smoothing, dtype=like.dtype, device=like.device)
    return torch.log1p(-share) - share.log()


def exo_value(z: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return KL(q || p) of two choices: q = sigmoid(z) and p = 1 - e for the chosen one.

    As ``log sigmoid(-z) - log e + q * (z - logit(1 - e))``, in which one product is left.
    """
    share = torch.as_tensor(label_smoothing, dtype=z.dtype, device=z.device)
    return F.logsigmoid(-z) - share.log() + z.sigmoid() * (z - _logit(label_smoothing, z))


def exo_slope(z: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return the derivative of ``exo_value`` by ``z``."""
    return z.sigmoid() * (-z).sigmoid() * (z - _logit(label_smoothing, z))


@jit
def exo_device(z, beta, label_smoothing, extra):
    """Return value and slope of EXO's loss of pairs."""
    apart = z - (tl.log(1.0 - label_smoothing) - tl.log(label_smoothing))
    q = confidence_device(z)
    value = q * apart - softplus_device(z) - tl.log(label_smoothing)
    return value, q * confidence_device(-z) * apart


def robust_value(z: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return ``(-(1 - e) * log sigmoid(z) + e * log sigmoid(-z)) / (1 - 2 * e)``, e below 1/2.

    As ``-log sigmoid(z) - e / (1 - 2 * e) * z``, since log sigmoid(-z) = log sigmoid(z) - z.
    """
    return -F.logsigmoid(z) - scaled(label_smoothing / (1 - 2 * label_smoothing), z)


def robust_slope(z: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return the derivative of ``robust_value`` by ``z``."""
    return -(-z).sigmoid() - label_smoothing / (1 - 2 * label_smoothing)


@jit
def robust_device(z, beta, label_smoothing, extra):
    """Return value and slope of robust DPO."""
    tilt = label_smoothing / (1.0 - 2.0 * label_smoothing)
    value = softplus_device(-z) - tl.where(tilt == 0.0, 0.0, tilt * z)
    return value, -confidence_device(-z) - tilt


def discopop_value(z: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return ``-log sigmoid(z) * (1 - m) + exp(-z) * m``, m = sigmoid(z / tau), tau ``extra``.

    The second term is one exponential: at a large negative z its factors are inf and 0.
    """
    away = (-z / extra).sigmoid()
    return -F.logsigmoid(z) * away + (F.logsigmoid(z / extra) - z).exp()


def discopop_slope(z: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return the derivative of ``discopop_value`` by ``z``."""
    away = (-z / extra).sigmoid()
    exponential = (F.logsigmoid(z / extra) - z).exp()
    turn = F.logsigmoid(z) * (z / extra).sigmoid() * away / extra
    return turn - (-z).sigmoid() * away + exponential * (away / extra - 1)


@jit
def discopop_device(z, beta, label_smoothing, extra):
    """Return value and slope of DiscoPOP's log-ratio modulated loss."""
    m = confidence_device(z / extra)
    away = confidence_device(-z / extra)
    logistic = softplus_device(-z)
    exponential = tl.exp(-softplus_device(-z / extra) - z)
    slope = exponential * (away / extra - 1.0) - logistic * m * away / extra
    return logistic * away + exponential, slope - confidence_device(-z) * away


# Of the two scores


def nca_value(a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return ``-log s(x) - log s(-x) / 2 - log s(-y) / 2`` of x = beta * a, y = beta * b."""
    x, y = beta * a, beta * b
    return -F.logsigmoid(x) - 0.5 * F.logsigmoid(-x) - 0.5 * F.logsigmoid(-y)


def nca_slopes(a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float):
    """Return the derivatives of ``nca_value`` by ``a`` and ``b``."""
    x, y = beta * a, beta * b
    return beta * (0.5 * x.sigmoid() - (-x).sigmoid()), 0.5 * beta * y.sigmoid()


@jit
def nca_device(a, b, beta, label_smoothing, extra, INNER: tl.constexpr):
    """Return value and slopes of NCA's loss of pairs."""
    x = beta * a
    y = beta * b
    value = softplus_device(-x) + 0.5 * softplus_device(x) + 0.5 * softplus_device(y)
    slope = beta * (0.5 * confidence_device(x) - confidence_device(-x))
    return value, slope, 0.5 * beta * confidence_device(y)


def bco_value(a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return ``-log sigmoid(beta * a) - log sigmoid(-beta * b)``."""
    return -F.logsigmoid(beta * a) - F.logsigmoid(-beta * b)


def bco_slopes(a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float):
    """Return the derivatives of ``bco_value`` by ``a`` and ``b``."""
    return -beta * (-beta * a).sigmoid(), beta * (beta * b).sigmoid()


@jit
def bco_device(a, b, beta, label_smoothing, extra, INNER: tl.constexpr):
    """Return value and slopes of BCO's loss of pairs."""
    value = softplus_device(-beta * a) + softplus_device(beta * b)
    return value, -beta * confidence_device(-beta * a), beta * confidence_device(beta * b)


def sppo_value(a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return ``(a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2``."""
    return (a - 0.5 / beta).square() + (b + 0.5 / beta).square()


def sppo_slopes(a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float):
    """Return the derivatives of ``sppo_value`` by ``a`` and ``b``."""
    return 2 * (a - 0.5 / beta), 2 * (b + 0.5 / beta)


@jit
def sppo_device(a, b, beta, label_smoothing, extra, INNER: tl.constexpr):
    """Return value and slopes of SPPO with hard labels."""
    u = a - 0.5 / beta
    v = b + 0.5 / beta
    return u * u + v * v, 2.0 * u, 2.0 * v


def apo_zero_value(
    a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float
) -> Tensor:
    """Return ``1 - sigmoid(beta * a) + sigmoid(beta * b)``."""
    return (-beta * a).sigmoid() + (beta * b).sigmoid()


def apo_zero_slopes(a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float):
    """Return the derivatives of ``apo_zero_value`` by ``a`` and ``b``."""
    x, y = beta * a, beta * b
    return -beta * x.sigmoid() * (-x).sigmoid(), beta * y.sigmoid() * (-y).sigmoid()


@jit
def apo_zero_device(a, b, beta, label_smoothing, extra, INNER: tl.constexpr):
    """Return value and slopes of APO-zero."""
    lost = confidence_device(-beta * a)
    kept = confidence_device(beta * b)
    slope_a = -beta * lost * confidence_device(beta * a)
    return lost + kept, slope_a, beta * kept * confidence_device(-beta * b)


def apo_down_value(
    a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float
) -> Tensor:
    """Return ``sigmoid(beta * a) + 1 - sigmoid(beta * (a - b))``."""
    return (beta * a).sigmoid() + (-beta * (a - b)).sigmoid()


def apo_down_slopes(a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float):
    """Return the derivatives of ``apo_down_value`` by ``a`` and ``b``."""
    x, z = beta * a, beta * (a - b)
    turn = beta * z.sigmoid() * (-z).sigmoid()
    return beta * x.sigmoid() * (-x).sigmoid() - turn, turn


@jit
def apo_down_device(a, b, beta, label_smoothing, extra, INNER: tl.constexpr):
    """Return value and slopes of APO-down."""
    kept = confidence_device(beta * a)
    lost = confidence_device(-beta * (a - b))
    turn = beta * lost * confidence_device(beta * (a - b))
    return kept + lost, beta * kept * confidence_device(-beta * a) - turn, turn


# A mean log-prob of 0 has infinite odds. Those of one so near to it, and their slope, are finite.
_NEARLY_SURE = -(2.0**-100)
_NEARLY_SURE_DEVICE = tl.constexpr(_NEARLY_SURE)


def log_odds(a: Tensor) -> Tensor:
    """Return log(e^a / (1 - e^a)), the log odds of a probability e^a, a below 0."""
    a = a.clamp(max=_NEARLY_SURE)
    return a - (-a.expm1()).log()


def odds_ratio_value(
    a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float
) -> Tensor:
    """Return ``-beta * log sigmoid(log odds(a) - log odds(b))``, odds(a) = e^a / (1 - e^a)."""
    return -beta * F.logsigmoid(log_odds(a) - log_odds(b))


def odds_ratio_slopes(a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float):
    """Return the derivatives of ``odds_ratio_value`` by ``a`` and ``b``."""
    slope = -beta * (log_odds(b) - log_odds(a)).sigmoid()
    a, b = (
        torch.where(x <= _NEARLY_SURE, -1 / x.clamp(max=_NEARLY_SURE).expm1(), 0) for x in (a, b)
    )
    return slope * a, -slope * b


@jit
def _odds_device(a):
    """Return log(e^a / (1 - e^a)) and its derivative, 1 / (1 - e^a)."""
    sure = a > _NEARLY_SURE_DEVICE
    a = tl.minimum(a, _NEARLY_SURE_DEVICE)
    rest = -expm1(a)
    return a - tl.log(rest), tl.where(sure, 0.0, 1.0 / rest)


@jit
def odds_ratio_device(a, b, beta, label_smoothing, extra, INNER: tl.constexpr):
    """Return value and slopes of ORPO's odds ratio."""
    odds_a, turn_a = _odds_device(a)
    odds_b, turn_b = _odds_device(b)
    slope = -beta * confidence_device(odds_b - odds_a)
    return beta * softplus_device(odds_b - odds_a), slope * turn_a, -slope * turn_b


def nll_value(a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return ``-a``, the negative log-likelihood of the chosen sequence."""
    return -a


def nll_slopes(a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float):
    """Return -1 and 0."""
    return -torch.ones_like(a), torch.zeros_like(b)


@jit
def nll_device(a, b, beta, label_smoothing, extra, INNER: tl.constexpr):
    """Return value and slopes of the negative log-likelihood of the chosen sequence."""
    return -a, -1.0, 0.0


def rank_value(a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float) -> Tensor:
    """Return ``max(0, b - a)``."""
    return (b - a).relu()


def rank_slopes(a: Tensor, b: Tensor, beta: Number, label_smoothing: Number, extra: float):
    """Return the derivatives of ``rank_value``, 0 where the two are equal."""
    behind = (a < b).to(a.dtype)
    return -behind, behind


@jit
def rank_device(a, b, beta, label_smoothing, extra, INNER: tl.constexpr):
    """Return value and slopes of RRHF's ranking."""
    behind = tl.where(a < b, 1.0, 0.0)
    return tl.maximum(b - a, 0.0), -behind, behind
