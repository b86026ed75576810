"""Live tensor bytes, op by op, by what the tensors are for.

Under torch's fake tensors, which have shapes and no numbers, this says what a step will hold on a
device before anything is loaded. What a kernel allocates and frees within itself is not seen, but
for the output head's workspace, which its plan tells (``kernels.plan``).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .kernels.plan import plan_head

WEIGHTS, REFERENCE, GRADIENTS, OPTIMIZER = "weights", "reference", "gradients", "optimizer"
ACTIVATIONS, ATTENTION, HEAD, CACHE = "activations", "attention", "head", "KV cache"
COMPONENTS = (WEIGHTS, REFERENCE, GRADIENTS, OPTIMIZER, ACTIVATIONS, ATTENTION, HEAD, CACHE)
"""What memory is for, as tables list it."""

_LABEL: ContextVar[str] = ContextVar("_LABEL", default=ACTIVATIONS)


@contextmanager
def labelled(label: str) -> Iterator[None]:
    """Count what ops inside the block make as ``label``; without one it is activations."""
    token = _LABEL.set(label)
    try:
        yield
    finally:
        _LABEL.reset(token)


class MemoryTrace(TorchDispatchMode):
    """Counts the bytes of all tensors made under it, and what they were made for.

    Args:
        device: The kind of device that is planned for, ``cpu`` or ``cuda``: the head's workspace
            differs.

    Attributes:
        peak: Most bytes live at a time.
        at_peak: The bytes of each component at that time.
        held: Tensors that live as long as the trace.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self.held: list[Tensor] = []
        self._live: dict[int, tuple[int, str]] = {}
        self._sums: Counter[str] = Counter()

    @property
    def now(self) -> int:
        """Bytes live at present."""
        return self._sums.total()

    def add(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count tensors that were made before, or label others anew."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = id(storage)
            if key in self._live:
                size, old = self._live[key]
                self._sums[old] -= size
            else:
                size = storage.nbytes()
                weakref.finalize(storage, self._drop, key)
            self._live[key] = (size, label)
            self._sums[label] += size
        self._look()

    @contextmanager
    def watch_gradients(self, model: nn.Module) -> Iterator[None]:
        """Count parameters' gradients as such inside the block, as soon as they are there."""
        handles = [
            parameter.register_post_accumulate_grad_hook(lambda p: self.add([p.grad], GRADIENTS))
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hold(self, size: int, label: str) -> None:
        """Look at the peak as if ``size`` further bytes were live for a moment."""
        self._look(Counter({label: size}))

    def restart(self) -> None:
        """Forget the peak, and start from what is live."""
        self.peak, self.at_peak = 0, Counter()
        self._look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op and count its results."""
        out = func(*args, **(kwargs or {}))
        label, workspace = self._kind(func, args, kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self._live:
                self.add([tensor], label)
        if workspace:
            self.hold(workspace, label)
        return out

    def _kind(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[str, int]:
        name: str = func._schema.name
        if not name.startswith("prefalign::"):
            return _LABEL.get(), 0
        named = {x.name: value for x, value in zip(func._schema.arguments, args, strict=False)}
        return HEAD, head_workspace(name, {**named, **kwargs}, self.device)

    def _look(self, more: Counter[str] | None = None) -> None:
        total = self.now + (more.total() if more else 0)
        if total > self.peak:
            self.peak = total
            self.at_peak = self._sums + (more or Counter())

    def _drop(self, key: int) -> None:
        size, label = self._live.pop(key)
        self._sums[label] -= size


def head_workspace(name: str, arguments: dict[str, Any], device: str) -> int:
    """Return what an op of the head holds beyond its inputs and outputs while it runs, bytes.

    Args:
        name: The op's.
        arguments: Its arguments, by name.
        device: ``cpu`` or ``cuda``.
    """
    if "weight" not in arguments:
        return 0  # an op on log-probs
    hidden, weight = arguments["hidden"], arguments["weight"]
    up = arguments.get("up")
    plan = plan_head(
        hidden.shape[0],
        weight.shape[0],
        hidden.shape[1],
        dtype=hidden.dtype,
        weight_grad="w" in arguments.get("needs", ""),
        adapter_rank=0 if up is None else up.shape[1],
        workspace_bytes=arguments.get("budget") or None,
        device=device,
    )
    single = name == "prefalign::linear_token_logps" and up is None
    if single and device == "cpu" and hidden.element_size() == 4:
        # The plan's bound is the triple's. This one holds a tile of logits and what oneDNN makes of
        # it, the sum of the Jacobian's rows and what is added to that.
        own = 4 * plan.row_chunk * (2 * plan.vocab_tile + 3 * plan.D)
        return min(plan.workspace_bytes, own)
    return plan.workspace_bytes
