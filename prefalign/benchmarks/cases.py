"""One op at one shape and dtype: the inputs that every provider shares, and one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .shapes import Shape

Outputs = dict[str, Tensor]
Forward = Callable[[], Mapping[str, Tensor]]


class Unsupported(Exception):
    """A provider cannot do this case; the message says why."""


@dataclass(frozen=True)
class Case:
    """Inputs by name, which of them get a gradient, and the gradient that comes from above.

    ``upstream`` is by output's name, and never uniform where the output has elements: a uniform
    one hides providers that look at its first element only. ``per_row`` names the inputs whose
    rows are independent, so that the exact answer can be made chunk by chunk. ``scalars`` are the
    op's other arguments.
    """

    shape: Shape
    inputs: dict[str, Tensor]
    wrt: tuple[str, ...] = ()
    upstream: dict[str, Tensor] = field(default_factory=dict)
    per_row: tuple[str, ...] = ()
    scalars: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """Return an input or a scalar."""
        return self.inputs[name] if name in self.inputs else self.scalars[name]

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return next(iter(self.inputs.values())).device

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> Case:
        """Return the case with every float tensor changed, leaves again."""
        inputs = {
            name: change(name, value.detach()).requires_grad_(name in self.wrt)
            for name, value in self.inputs.items()
        }
        upstream = {name: change("upstream", value) for name, value in self.upstream.items()}
        return dataclasses.replace(self, inputs=inputs, upstream=upstream)

    def to(self, dtype: torch.dtype) -> Case:
        """Return the case with its float tensors in ``dtype``."""
        return self.changed(lambda _, x: x.to(dtype) if x.is_floating_point() else x)

    def rows(self, start: int, end: int) -> Case:
        """Return the case with rows ``start`` to ``end`` of what has independent rows."""
        names = (*self.per_row, "upstream")
        return self.changed(lambda name, x: x[start:end] if name in names else x)


def step(forward: Forward, case: Case) -> Outputs:
    """Run forward and, where the case has gradients, backward; return outputs and gradients.

    The gradient of input ``x`` is the output ``dx``. Bare work has no outputs, and no backward.
    """
    if not case.wrt:
        with torch.no_grad():
            return dict(forward())
    outputs = forward()
    if not outputs:
        return {}
    above = [(outputs[name], value) for name, value in case.upstream.items()]
    grads = torch.autograd.grad(
        [output for output, _ in above],
        [case.inputs[name] for name in case.wrt],
        [value.to(output.dtype) for output, value in above],
    )
    results = {name: value.detach() for name, value in outputs.items()}
    return results | {f"d{name}": grad for name, grad in zip(case.wrt, grads, strict=True)}


def chunked_step(build: Callable[[Case], Forward], case: Case, chunk: int) -> Outputs:
    """Run one step in chunks of independent rows, which takes ``chunk / N`` of the memory.

    Gradients of inputs that all rows share are summed in float64, and rounded once.
    """
    if not case.per_row:
        return step(build(case), case)
    total = case.inputs[case.per_row[0]].shape[0]
    parts: dict[str, list[Tensor]] = {}
    sums: Outputs = {}
    shared = {f"d{name}" for name in case.wrt if name not in case.per_row}
    for start in range(0, total, chunk):
        part = case.rows(start, min(start + chunk, total))
        for name, value in step(build(part), part).items():
            if name in shared:
                sums[name] = sums[name].add_(value) if name in sums else value.double()
            else:
                parts.setdefault(name, []).append(value)
    for name in sums:
        sums[name] = sums[name].to(case.inputs[name.removeprefix("d")].dtype)
    return {name: torch.cat(values) for name, values in parts.items()} | sums
