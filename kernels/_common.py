"""What the ops share: which implementation runs, the guarded Triton import, argument checks.

Every page of this package takes Triton from here: ``from ._common import jit, tl, triton``. On a
machine without Triton the names still exist, so that each page can be imported and its chunked and
reference paths used; only ``impl="triton"`` is then refused.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ._autograd import wants_grad

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # macOS, Windows: the kernels' bodies are never run, only their signatures read
    triton = None

    class _NoTriton:
        """Stand in for ``triton.language`` where signatures and constants mention it."""

        def __getattr__(self, name: str) -> Callable[..., Any]:
            return lambda *args, **kwargs: args[0] if args else None

    tl = _NoTriton()

    def jit(fn: Callable | None = None, **options: Any) -> Callable:
        """Return the function unchanged, as ``@jit`` and as ``@jit(...)``."""
        return (lambda inner: inner) if fn is None else fn


IMPLS = ("auto", "triton", "chunked", "reference")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton kernels run in Triton's interpreter, on any device. Read once, as Triton does."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def resolve_impl(impl: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Return the implementation that ``impl`` means on ``device`` for inputs of ``dtype``.

    ``"auto"`` is Triton on a GPU and chunked torch elsewhere, or where the inputs are float64. An
    explicit choice is returned as it is, or refused where it cannot run: it never falls back.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    double = dtype == torch.float64
    if impl == "auto":
        fused = device.type == "cuda" and triton is not None and not double
        return "triton" if fused else "chunked"
    if impl == "triton":
        if triton is None:
            raise ValueError("impl: 'triton' needs the package triton, which cannot be imported")
        if device.type != "cuda" and not INTERPRETED:
            raise ValueError(
                f"impl: 'triton' needs a GPU tensor (or TRITON_INTERPRET=1), got one on {device}"
            )
        if double:
            raise ValueError(
                "impl: 'triton' computes in float32, got float64 inputs; "
                "use 'chunked' or 'reference'"
            )
    return impl


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Return float64 when any tensor is float64, else float32: the dtype inside and out."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU current, since Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def row_views(logits: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield ``([outer, inner, V] view, its first row)`` covering all rows in order, uncopied.

    Leading dimensions that one stride can walk are merged. Two remain for any slice of a
    contiguous tensor, hence one view; more are walked one index at a time.
    """
    *dims, (vocab, stride_v) = zip(logits.shape, logits.stride(), strict=True)
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    merged = [(1, 0)] * (2 - len(merged)) + merged
    walked, (outer, inner) = merged[:-2], merged[-2:]
    rows = outer[0] * inner[0]
    for count, index in enumerate(itertools.product(*(range(size) for size, _ in walked))):
        skip = sum(i * stride for i, (_, stride) in zip(index, walked, strict=True))
        yield (
            logits.as_strided(
                (outer[0], inner[0], vocab),
                (outer[1], inner[1], stride_v),
                logits.storage_offset() + skip,
            ),
            count * rows,
        )


# Argument checks. Each names the argument, what was expected and what came.


def check_tensor(
    name: str,
    value: Any,
    *,
    dtypes: Sequence[torch.dtype] = FLOATS,
    ndim: int | None = None,
    min_ndim: int = 0,
    shape: Sequence[int] | None = None,
    like: tuple[str, torch.Tensor] | None = None,
    constant: bool = False,
) -> None:
    """Check that ``value`` is a tensor of one of ``dtypes`` and of the shape asked for.

    ``like`` is ``(name, tensor)`` of the argument whose device it must share. ``constant`` refuses
    a tensor that asks for a gradient which the op does not give.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {wanted}, got {_dtype_name(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name}: expected a whole tensor, got a DTensor (a shard of FSDP2's): take an output "
            "head from prefalign.models.with_head, which gathers it and its gradient"
        )
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimension(s), got shape {_shape(value)}")
    if value.ndim < min_ndim:
        raise ValueError(
            f"{name}: expected at least {min_ndim} dimension(s), got shape {_shape(value)}"
        )
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {_shape(value)}")
    if like is not None and value.device != like[1].device:
        raise ValueError(
            f"{name}: expected a tensor on {like[1].device}, as {like[0]}, got {value.device}"
        )
    if constant and torch.is_grad_enabled() and wants_grad(value):
        raise ValueError(
            f"{name}: expected a constant, got a tensor that requires grad; "
            f"this op gives it none, so pass {name}.detach()"
        )


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    low: float | None = None,
    high: float | None = None,
) -> float:
    """Return ``value`` as a float after checking ``above < value`` and ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if above is not None and not value > above:
        raise ValueError(f"{name}: expected a number above {above:g}, got {value}")
    if low is not None and not value >= low:
        raise ValueError(f"{name}: expected a number of at least {low:g}, got {value}")
    if high is not None and not value <= high:
        raise ValueError(f"{name}: expected a number of at most {high:g}, got {value}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond every float
        number = float("inf")
    if number in (float("inf"), float("-inf")) or number != number:
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def check_ignore_index(value: Any) -> int:
    """Return ``value`` after checking that it is an integer that targets can hold."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"ignore_index: expected an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index: expected an int of 64 bits, got {value}")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_outputs(outputs: Any, choices: Sequence[str]) -> tuple[str, ...]:
    """Return ``outputs`` as a tuple of distinct names out of ``choices``, in the order given."""
    if isinstance(outputs, str):
        raise TypeError(f"outputs: expected a sequence of names, got the string {outputs!r}")
    if not isinstance(outputs, Iterable):
        raise TypeError(f"outputs: expected a sequence of names, got {type(outputs).__name__}")
    names = tuple(outputs)
    for name in names:
        check_choice("outputs", name, choices)
    if len(set(names)) != len(names):
        raise ValueError(f"outputs: expected distinct names, got {names}")
    return names


def check_labels(name: str, targets: torch.Tensor, size: int, ignore_index: int) -> None:
    """Check that every label is in ``[0, size)`` or is ``ignore_index``.

    A ValueError on a CPU. On a GPU an asynchronous assertion that stops the stream, with no host
    sync: it surfaces at the next synchronisation. Call it inside a custom op, where tensors hold
    values under ``torch.compile`` too.
    """
    bad = ((targets < 0) | (targets >= size)) & (targets != ignore_index)
    message = f"{name}: expected labels in [0, {size}) or ignore_index={ignore_index}"
    if targets.is_cuda:
        torch._assert_async(~bad.any(), message)
    elif bad.any():
        raise ValueError(f"{message}, got {targets[bad][0].item()}")


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# Device functions that Triton's own language lacks or that its interpreter cannot run.


_IN_INTERPRETER = tl.constexpr(INTERPRETED)


@jit
def store_rounded(ptr, x, mask):
    """Store float32 ``x`` in the dtype of ``ptr``, rounded to nearest even as GPUs round.

    The interpreter truncates to bfloat16, so there the bits are rounded first. NaN stays NaN.
    """
    if _IN_INTERPRETER:
        if ptr.dtype.element_ty == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@jit
def log1p(x):
    """Return log(1 + x) for x >= 0 with a small relative error, where tl.log(1 + x) has none.

    The factor x / ((1 + x) - 1) undoes the rounding of 1 + x. At x = 1 it is exactly log(2).
    """
    u = 1.0 + x
    d = u - 1.0
    return tl.where(d == 0.0, x, tl.log(u) * (x / tl.where(d == 0.0, 1.0, d)))


@jit
def tanh(x):
    """Return the hyperbolic tangent with a small relative error near zero too, unlike exp alone.

    The polynomial is an odd fit for |x| < 0.9 whose largest relative error there is 1e-9; with
    rounding both branches err at most 1e-7.
    """
    z = x * x
    p = -4.5908e-4 * z + 2.59282e-3
    p = p * z - 8.27568e-3
    p = p * z + 2.166955e-2
    p = p * z - 5.393094e-2
    p = p * z + 1.3332999e-1
    p = p * z - 3.3333323e-1
    near = x + x * (z * p)
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return tl.where(z < 0.81, near, far)


@jit
def expm1(x):
    """Return exp(x) - 1 with a small relative error near zero too: tanh(x / 2) * (exp(x) + 1)."""
    return tanh(0.5 * x) * (tl.exp(x) + 1.0)
