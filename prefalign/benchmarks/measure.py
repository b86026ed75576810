"""Time, memory and launches of a step, and the machine's own peaks in the same run."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Mapping[str, Tensor]]

_MIB = 2**20
# Larger than any last-level cache that it runs on; zeroed before each step on a GPU.
_FLUSH_BYTES = 256 * _MIB
_PEAK_SIDE = {"cpu": 2048, "cuda": 8192}


class Clock:
    """Milliseconds of one step, from a cold cache on a GPU; by events there, so no host wait."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, step: Callable[[], Any]) -> float:
        """Run ``step`` once and return how long it took."""
        if not self.on_gpu:
            start = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def interleaved(
    steps: Mapping[str, Step], clock: Clock, *, seconds: float, fewest: int, most: int
) -> dict[str, list[float]]:
    """Time every step once per round, each round from another first one.

    So what drifts on the machine (clocks, other users) hits all alike. Rounds go on for
    ``seconds``, at least ``fewest`` and at most ``most`` of them.
    """
    names = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for turn in range(most if names else 0):
        if turn >= fewest and time.perf_counter() - start > seconds:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(clock(steps[name]))
    return samples


def percentiles(samples: list[float]) -> dict[str, float]:
    """Return the median, the 10th and 90th percentiles and the least."""
    p10, median, p90 = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    )
    return {
        "median": median.item(), "p10": p10.item(), "p90": p90.item(), "min": min(samples)
    }  # fmt: skip


def memory(step: Step, forward: Step, outputs: int, device: torch.device) -> dict[str, int]:
    """Return ``peak``, bytes held beyond inputs and outputs, and ``saved`` for backward.

    ``outputs`` is the bytes of the first results, those of ``forward``. On a CPU every allocation
    is watched, and those that survive the step are the outputs. On a GPU torch's counters are read
    after forward and after the step: peak less outputs, the larger of the two.
    """
    if device.type == "cuda":
        return _gpu_memory(step, forward, outputs, device)
    saved = _watched(forward)[1] - outputs
    return {"peak": _watched(step)[0], "saved": max(0, saved)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what a build of the profiler prints from C++ (two lines a use) off the terminal."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _watched(work: Step) -> tuple[int, int]:
    """Return (peak bytes of what did not survive ``work``, bytes of what did)."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        results = work()
    events, found = list(profile.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.extra_fields))
    found.sort(key=lambda pair: pair[0])
    # Which allocation, by the place in time, a block's address belongs to.
    alive: dict[int, int] = {}
    for place, (_, fields) in enumerate(found):
        if fields.alloc_size > 0:
            alive[fields.ptr] = place
        else:
            alive.pop(fields.ptr, None)
    kept = set(alive.values())
    survived = sum(found[place][1].alloc_size for place in kept)
    held = peak = 0
    known: set[int] = set()
    for place, (_, fields) in enumerate(found):
        if place in kept:
            continue
        if fields.alloc_size > 0:
            known.add(fields.ptr)
        elif fields.ptr not in known:
            continue  # made before
        else:
            known.discard(fields.ptr)
        held += fields.alloc_size
        peak = max(peak, held)
    del results
    return peak, survived


def _gpu_memory(step: Step, forward: Step, outputs: int, device: torch.device) -> dict[str, int]:
    def watch(work: Step) -> tuple[int, int, int]:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = work()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        after = torch.cuda.memory_allocated(device) - before
        return peak, after, sum(value.nbytes for value in results.values())

    peak_forward, after, _ = watch(forward)
    peak, _, everything = watch(step)
    return {
        "peak": max(0, peak_forward - outputs, peak - everything),
        "saved": max(0, after - outputs),
    }


def launches(step: Step, device: torch.device) -> int | None:
    """Return how many kernels a step starts on a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with _quiet(), torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize(device)
    kinds = (torch.autograd.DeviceType.CUDA,)
    names = [event.name for event in profile.events() if event.device_type in kinds]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def machine_peaks(
    device: torch.device, dtypes: tuple[torch.dtype, ...], *, side: int | None = None
) -> dict[str, float]:
    """Return the best rate of a square matmul by dtype (FLOP/s), and of a copy (bytes/s).

    Best of several, as a ceiling ought to be.
    """
    clock = Clock(device)
    side = side or _PEAK_SIDE[device.type]
    peaks = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        multiply = functools.partial(torch.mm, a, b, out=out)
        times = [clock(multiply) for _ in range(10)]
        peaks[str(dtype).removeprefix("torch.")] = 2 * side**3 / (1e-3 * min(times))
    source = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    target.zero_()

    times = [clock(functools.partial(target.copy_, source)) for _ in range(10)]
    return peaks | {"copy": 2 * _FLUSH_BYTES / (1e-3 * min(times))}
