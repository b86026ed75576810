"""What ``prefalign verify`` compares: gradients, log-probs and losses, and how far they may differ.

With an exact answer, an error may be twice that of eager PyTorch in the same dtype, in the mean and
at the most, times ``1 + 2 / sqrt(n)`` where that is found from n numbers: few may be close by luck.
Without one, the difference from eager PyTorch may be what roundings add up to: 8 eps of the largest
logit for each token's log-prob, as in ``models.verify_head``, and these as a random walk over a
response.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .packing import Group
from .verify_eager import Outcome

GRADIENT = "relative error of the gradient"
WORST = "relative error of the gradient, worst in"
BEFORE, AFTER = "before the step", "after it"
# Without an exact answer: eps of the whole gradient's size. Two layers of random weights in
# bfloat16 differ by 1 to 3 eps, in float32 by 1 to 3 times four of its own.
_GRADIENT = 16
# With one, the share of all this that is allowed whatever eager's error is; float32's rounding of
# the sums themselves is allowed whole.
_FLOOR = 1 / 8

_CHUNK = 1 << 24
_EPS = torch.finfo(torch.float32).eps

# Gradients


class GradientErrors(NamedTuple):
    """The errors of gradients: L2 norms of the difference and of what it is counted from.

    Args:
        difference: Of each parameter, by name.
        size: Of each parameter of the answer, by name.
        elements: How many each parameter has, by name.
    """

    difference: dict[str, float]
    size: dict[str, float]
    elements: dict[str, int]

    @property
    def whole(self) -> float:
        """The difference of all parameters together."""
        return math.hypot(*self.difference.values())

    @property
    def whole_size(self) -> float:
        """The size of all parameters' gradients together."""
        return math.hypot(*self.size.values())


Gradients = dict[str, Tensor]


def copy_gradients(model: nn.Module) -> Gradients:
    """Return a model's gradients, on the CPU."""
    return {name: grad.cpu().clone() for name, grad in _gradients(model)}


def _gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            yield name, torch.zeros_like(parameter) if grad is None else grad.detach()


def gradient_errors(found: Gradients | nn.Module, answer: Gradients) -> GradientErrors:
    """Compare gradients, a piece at a time, with others."""
    difference, size, elements = {}, {}, {}
    named = found.items() if isinstance(found, dict) else _gradients(found)
    for name, grad in named:
        squares = [0.0, 0.0]
        pieces = zip(
            grad.flatten().split(_CHUNK), answer[name].flatten().split(_CHUNK), strict=True
        )
        for got, expected in pieces:
            expected = expected.double()
            squares[0] += (got.cpu().double() - expected).square().sum().item()
            squares[1] += expected.square().sum().item()
        difference[name], size[name] = (math.sqrt(x) for x in squares)
        elements[name] = grad.numel()
    return GradientErrors(difference, size, elements)


# Errors, and what they may be


class Measure(NamedTuple):
    """One thing that is compared.

    Args:
        name: What it is.
        errors: Each side's, or None where a side does not tell.
        allowed: What prefalign's may be.
        step: The step that it belongs to in the table, or None where it has no line there. All
            measures are judged.
    """

    name: str
    errors: dict[str, float | None]
    allowed: float
    step: str | None = None

    def holds(self, side: str) -> bool:
        """Return whether a side's error is within what is allowed; NaN is not."""
        error = self.errors.get(side)
        return error is None or error <= self.allowed


class Limits:
    """How far numbers may be apart where nothing but roundings makes the difference.

    Args:
        dtype: What the model computes in.
        device: Where.
        groups: The pairs.
        eager: The eager side.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, groups: Sequence[Group], eager: Outcome
    ):
        epsilon = max(torch.finfo(dtype).eps, _EPS)
        if dtype == torch.float32 and device.type == "cuda":
            if torch.get_float32_matmul_precision() != "highest":
                epsilon = 2.0**-10
        self.epsilon = max(epsilon, 4 * _EPS)
        self.eager = eager
        tokens = [len(ids) for group in groups for ids in group.response_ids]
        walk = torch.tensor(tokens, dtype=torch.float64).sqrt()
        self.walk = 8 * epsilon * eager.largest_logit * walk

    @property
    def gradient(self) -> float:
        """Of the whole gradient, relative to its size."""
        return _GRADIENT * self.epsilon

    def logps(self, step: int, share: float = 1.0) -> Tensor:
        """Of each response's log-prob, ``[2B]``; of what makes more than float32's sums a share."""
        now, first = (self.eager.logps[i].double() for i in (step, 0))
        # An error of the gradient is one of what the step changed.
        changed = 4 * self.gradient * (now - first).abs().max()
        return share * ((1 + step) * self.walk + changed) + 4 * _EPS * now.abs()

    def losses(self, step: int, share: float = 1.0) -> Tensor:
        """Of each pair's loss, ``[B]``."""
        slopes = self.eager.slopes[step].double().abs()
        through = (slopes * self.logps(step, share)).view(-1, 2).sum(1)
        return 2 * through + 4 * _EPS * self.eager.losses[step].double().abs()


def measure(sides: Mapping[str, Outcome], answer: Outcome, limits: Limits) -> list[Measure]:
    """Return everything that is compared, in the table's order.

    Args:
        sides: What each side found, eager's first; gradients as ``GradientErrors``, eager's own
            where ``answer`` is another.
        answer: What errors are counted from: the exact answer, or eager's.
        limits: What roundings can add up to.
    """
    exact = answer is not sides["eager"]
    share = _FLOOR if exact else 1.0
    measures: list[Measure] = []
    for step, when in enumerate((BEFORE, AFTER)):
        losses, logps = [_gaps(sides, answer, step, name) for name in ("losses", "logps")]
        largest, mean = _judged(f"a pair's loss {when}", losses, limits.losses(step, share))
        measures += [largest._replace(step=when), mean]
        largest, mean = _judged(f"a log-prob {when}", logps, limits.logps(step, share))
        for i, name in enumerate(("a chosen log-prob", "a rejected log-prob")):
            # Two lines, one bound: more numbers tell better how large eager's errors are.
            found = {side: None if x is None else x[i::2].max().item() for side, x in logps.items()}
            name = f"largest error of {name} {when}"
            measures.append(Measure(name, found, largest.allowed, when))
        measures.append(mean)
        if step == 0:
            measures += _gradient_measures(sides, limits, exact)
    return measures


Gaps = dict[str, Tensor | None]
"""Each side's errors, or None where it does not tell."""


def _gaps(sides: Mapping[str, Outcome], answer: Outcome, step: int, field: str) -> Gaps:
    expected = getattr(answer, field)[step].double()
    return {
        side: (found[step].double() - expected).abs() if (found := getattr(x, field)) else None
        for side, x in sides.items()
        if x is not answer
    }


def _twice(error: float, count: int) -> float:
    """Return twice eager's error, and more where it was found from few numbers."""
    return 2 * error * (1 + 2 / math.sqrt(count))


def _judged(name: str, gaps: Gaps, limit: Tensor) -> list[Measure]:
    """Return the largest error and the mean one, both without a line in the table."""
    measures = []
    for what, reduce in (("largest", torch.amax), ("mean", torch.mean)):
        errors = {side: None if gap is None else reduce(gap).item() for side, gap in gaps.items()}
        allowed = max(_twice(errors.get("eager") or 0.0, len(limit)), reduce(limit).item())
        measures.append(Measure(f"{what} error of {name}", errors, allowed))
    return measures


def _gradient_measures(sides: Mapping[str, Outcome], limits: Limits, exact: bool) -> list[Measure]:
    found: dict[str, GradientErrors] = {
        side: outcome.gradients
        for side, outcome in sides.items()
        if isinstance(outcome.gradients, GradientErrors)
    }
    whole = found["prefalign"].whole_size
    tiny = torch.finfo(torch.float64).tiny
    eager = found["eager"].difference if exact else {}
    counts = found["prefalign"].elements

    def relative(side: GradientErrors, name: str) -> float:
        return side.difference[name] / max(side.size[name], tiny)

    share = _FLOOR if exact else 1.0
    allowed = share * limits.gradient * whole
    if exact:
        allowed = max(2 * found["eager"].whole, allowed)
    errors: dict[str, float | None] = {
        side: errors.whole / max(whole, tiny) for side, errors in found.items()
    }
    measures = [Measure(GRADIENT, errors, allowed / max(whole, tiny), BEFORE)]
    parameters = []
    for name, size in found["prefalign"].size.items():
        # A small parameter's may cancel further than the whole does, even to 0.
        allowed = share * limits.gradient * (4 * size + whole / 16)
        if exact:
            allowed = max(_twice(eager[name], counts[name]), allowed)
        each: dict[str, float | None] = {
            side: relative(errors, name) for side, errors in found.items()
        }
        parameters.append(Measure(name, each, allowed / max(size, tiny)))
    worst = max(parameters, key=lambda m: _excess(m))
    return [*measures, worst._replace(name=f"{WORST} {worst.name}", step=BEFORE)]


def _excess(measure: Measure) -> float:
    """Return prefalign's error as a multiple of what is allowed; a NaN is the largest."""
    error = measure.errors["prefalign"]
    assert error is not None
    return math.inf if math.isnan(error) else error / max(measure.allowed, 1e-300)
