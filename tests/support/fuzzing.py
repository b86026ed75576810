"""What the fuzzed tests of the losses share: how many cases, and what every check asks."""

from __future__ import annotations

import math
import os
import random

import hypothesis
import torch
from tolerance import EPS, assert_as_exact_as_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONG = int(os.environ.get("PREFALIGN_FUZZ_EXAMPLES", 0))
SEED = int(os.environ.get("PREFALIGN_FUZZ_SEED", random.getrandbits(32)))


def examples(share: float):
    """Run a test on this share of all cases: of 2,000 in a long run, say, or of 160."""

    def wrap(test):
        count = max(1, round(share * (LONG or 160)))
        test = hypothesis.settings(
            max_examples=count, deadline=None, derandomize=not LONG, database=None,
            print_blob=False, suppress_health_check=list(hypothesis.HealthCheck),
        )(test)  # fmt: skip
        return hypothesis.seed(SEED)(test) if LONG else test

    return wrap


def moved(tensor):
    """Return the tensor where kernels are tested, with its strides."""
    if tensor is None or DEVICE == "cpu":
        return tensor
    store = torch.as_strided(
        tensor, (tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0
    )
    return store.to(DEVICE).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def same(a, b) -> bool:
    """Whether two tensors are the same bits, NaN included, or both None."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=7e4), b.nan_to_num(nan=7e4))


def assert_same(first, second, what):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert same(value, second[name]), f"{what}: {name}"


def spoil(tensor, dead):
    """Write NaN to the rows ``dead``, in place, where rows do not share their memory."""
    shared = any(st == 0 and n > 1 for st, n in zip(tensor.stride(), tensor.shape, strict=True))
    if not shared:
        tensor.masked_fill_(dead.view(dead.shape + (1,) * (tensor.ndim - dead.ndim)), math.nan)


def contract(actual, eager, exact, what, inside):
    """Check the house contract. An answer that ``actual``'s dtype cannot hold is infinite there."""
    most = torch.finfo(actual.dtype).max
    exact = torch.where(exact.abs() > most, exact.sign() * math.inf, exact)
    if actual.dtype == torch.float16:
        inside = inside + 2**-25 / EPS  # the spacing of its subnormal numbers
    assert_as_exact_as_eager(actual.cpu(), eager.cpu(), exact.cpu(), what, inside)


def largest(tensor) -> float:
    """Return the largest finite size of an element, 0 without one."""
    finite = tensor[tensor.isfinite()].abs()
    return finite.amax().item() if finite.numel() else 0.0
