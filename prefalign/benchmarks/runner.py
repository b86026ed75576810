"""The loop: suites, shapes and dtypes; gate, then time, then memory; a file after each case."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import logging
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import UserError
from . import gate, measure, report
from .cases import Case, Unsupported, chunked_step, step
from .providers import BARE, EAGER, OURS, Provider
from .shapes import FULL, QUICK, Shape
from .suites import SUITES, Suite

log = logging.getLogger(__name__)

_EXACT_ROWS = 1024  # rows of a float64 logits tile: 2 GiB at a vocabulary of 262,144
_MOST_ROUNDS = 200
_QUICK_SECONDS = 0.5


def run(options: Any) -> int:
    """Run what the options name; return 1 where prefalign failed its gate, else 0."""
    if options.list:
        print(_listing())
        return 0
    device = _device(options.device)
    suites = [SUITES[name] for name in _chosen("suite", options.suite, list(SUITES))]
    plan = [
        (suite, shape, dtype)
        for suite in suites
        for shape in _shapes(suite, device, options)
        for dtype in _dtypes(suite, options.dtype)
    ]
    if not plan:
        raise UserError("suite, shape, dtype: no case is left; --list prints what there is")
    machine = describe_machine(device, options.revision)
    folder = Path(options.out or Path("bench-results") / machine["slug"])
    dtypes = tuple(dict.fromkeys(dtype for _, _, dtype in plan))
    peaks = measure.machine_peaks(device, dtypes, side=256 if options.quick else None)
    failures = []
    for number, (suite, shape, dtype) in enumerate(plan, 1):
        if number == 1 or plan[number - 2][0] is not suite:
            torch._dynamo.reset()  # past eight compiled cases it would run eagerly, in silence
        log.info("[%d/%d] %s, %s, %s", number, len(plan), suite.name, shape.name, _name(dtype))
        found = run_case(suite, shape, dtype, device, peaks, options)
        failures += found["failures"]
        last = number == len(plan) or plan[number][0] is not suite
        report.add(folder, suite, {**machine, "peaks": peaks}, found, with_plot=last)
    for failure in failures:
        log.error("gate: %s", failure)
    print(f"Results: {folder / 'README.md'}")
    return 1 if failures else 0


def run_case(
    suite: Suite,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    peaks: Mapping[str, float],
    options: Any,
) -> dict[str, Any]:
    """Gate, time and watch every provider at one shape and dtype."""
    case = suite.make(shape, dtype, device)
    found: dict[str, Any] = {
        "shape": shape.name,
        "sizes": str(shape),
        "dtype": _name(dtype),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": [round(os.getloadavg()[0], 2)],
        "work": suite.work(case),
        "failures": [],
        "rows": [],
    }
    forwards = _gate(suite, case, found)
    steps = {name: lambda f=f: step(f, case) for name, f in forwards.items()}
    samples = measure.interleaved(
        steps,
        measure.Clock(device),
        seconds=min(options.seconds, _QUICK_SECONDS) if options.quick else options.seconds,
        fewest=options.rounds,
        most=_MOST_ROUNDS,
    )
    found["load"].append(round(os.getloadavg()[0], 2))
    _add_times(suite, found, samples, peaks)
    if not options.no_memory:
        for row in found["rows"]:
            if row["provider"] in steps and row["status"] != BARE:
                name = row["provider"]
                row["memory"] = _memory(forwards[name], case, device)
                row["launches"] = measure.launches(steps[name], device)
    return found


def _gate(suite: Suite, case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """Fill in a row for every provider; return the forwards of those that may be timed."""
    eager = next(provider for provider in suite.providers if provider.role == EAGER)
    forwards: dict[str, Any] = {}
    try:
        exact = chunked_step(eager.build, case.to(torch.float64), _EXACT_ROWS)
        house = chunked_step(eager.build, case, _EXACT_ROWS)
    except torch.OutOfMemoryError:
        found["failures"].append(f"{suite.name}, {found['shape']}: no memory for the exact answer")
        return forwards
    for provider in suite.providers:
        row: dict[str, Any] = {
            "provider": provider.name,
            "role": provider.role,
            "version": _version(provider.package),
            "compared_version": provider.version,
        }
        found["rows"].append(row)
        results, forward = None, None
        try:
            forward = provider.build(case)
            results = step(forward, case)
            if provider.role != BARE:
                row["errors"] = gate.errors(results, house, exact)
            row["status"] = gate.verdict(row["errors"]) if "errors" in row else BARE
        except Exception as error:
            row["status"], row["reason"] = _reason(provider, error)
        del results
        gc.collect()
        if provider.role == OURS and row["status"] != gate.OK:
            worst = {n: f"{e['contract']:.2f}" for n, e in row.get("errors", {}).items()}
            found["failures"].append(
                f"{suite.name}, {found['shape']}, {found['dtype']}: {provider.name} is "
                f"{row['status']} {row.get('reason', '')}{worst or ''}"
            )
        elif row["status"] in (gate.OK, gate.COARSE, BARE):
            forwards[provider.name] = forward
    return forwards


def _reason(provider: Provider, error: Exception) -> tuple[str, str]:
    """Return the status and the reason of a provider that did not run."""
    line = re.sub(r"\s+", " ", str(error)).strip()[:160]
    if isinstance(error, ImportError):
        return "missing", f"{provider.package or provider.name} cannot be imported: {line}"
    if isinstance(error, Unsupported):
        return "unsupported", line
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of memory", ""
    return "failed", f"{type(error).__name__}: {line}"


def _add_times(
    suite: Suite, found: dict[str, Any], samples: dict[str, list[float]], peaks: Mapping[str, float]
) -> None:
    """Fill in times, ratios to the baseline (of the same rounds) and shares of the peak."""
    base = samples.get(suite.baseline)
    bound = found["dtype"] if suite.traffic is None else "copy"
    peak = peaks[bound]
    if suite.traffic is None and base:
        peak = max(peak, found["work"] / (1e-3 * min(base)))
    found["peak"] = peak
    for row in found["rows"]:
        times = samples.get(row["provider"])
        if not times:
            continue
        row["ms"] = measure.percentiles(times)
        row["rounds"] = len(times)
        row["share"] = found["work"] / (1e-3 * row["ms"]["median"]) / peak
        if base:
            ratios = [time / other for time, other in zip(times, base, strict=True)]
            row["ratio"] = measure.percentiles(ratios)["median"]


def _memory(forward: Any, case: Case, device: torch.device) -> dict[str, int]:
    def alone() -> Mapping[str, torch.Tensor]:
        if case.wrt:
            return forward()
        with torch.no_grad():
            return forward()

    outputs = sum(value.nbytes for value in alone().values())
    return measure.memory(lambda: step(forward, case), alone, outputs, device)


# --- What the options name ---


def _chosen(option: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    for name in names:
        if name not in known:
            raise UserError(f"{option}: expected one of {', '.join(known)}, got {name}")
    return list(names or known)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: expected auto, cpu or cuda, got {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {name} was asked for, and torch sees no GPU")
    return device


def _shapes(suite: Suite, device: torch.device, options: Any) -> list[Shape]:
    known = {shape.name: shape for each in SUITES.values() for shape in each.shapes}
    names = _chosen("shape", options.shape, list(known))
    wanted = {QUICK} if options.quick else {device.type}
    if options.full and not options.quick:
        wanted.add(FULL)
    here = [shape for shape in suite.shapes if shape.name in names]
    return here if options.shape else [shape for shape in here if wanted & set(shape.sets)]


def _dtypes(suite: Suite, names: Sequence[str]) -> list[torch.dtype]:
    names = _chosen("dtype", names, ("float32", "bfloat16"))
    return [dtype for dtype in suite.dtypes if _name(dtype) in names]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listing() -> str:
    shapes = {shape.name: shape for suite in SUITES.values() for shape in suite.shapes}
    lines = ["Suites", *(f"  {name:<18} {suite.title}" for name, suite in SUITES.items())]
    lines += ["Shapes"]
    lines += [f"  {s.name:<18} {str(s):<40} {', '.join(s.sets)}" for s in shapes.values()]
    return "\n".join(lines)


# --- What the results were measured on ---


def describe_machine(device: torch.device, revision: str | None = None) -> dict[str, Any]:
    """Return the device, the versions and the git revision; nothing that names the machine."""
    name = _processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = f"cpu {name} {cores} cores" if device.type == "cpu" else name
    packages = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")
    return {
        "device": {
            "type": device.type,
            "name": name,
            "cores": cores,
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
        },
        "slug": re.sub(r"[^a-z0-9]+", "-", where.lower()).strip("-"),
        "versions": {
            "prefalign": __version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in packages},
        },
        "revision": revision or _revision(),
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
        return fields.get("model name", platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def _version(package: str | None) -> str | None:
    if package is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision() -> str:
    """Return the revision of the source, with + where the kernels' files differ from it."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "kernels" / "plan.py").exists():
        return "installed"  # a repository around it would be somebody else's

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "kernels", "prefalign")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
