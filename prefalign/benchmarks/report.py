"""Results to read: JSON, a Markdown table and a plot of each suite, and a page of them all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import gate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .suites import Suite

_MIB = 2**20
_AS_ACCURATE = 4  # a peer within this factor of our error counts as accurate as we are
# Okabe and Ito's palette.
_COLOURS = {"ours": "#D55E00", "eager": "#8a8f98", "peer": "#0072B2", "bare": "#d0d7de"}
_STATUS = {"ok": "", "bare": "", "coarse": "coarse"}


def add(
    folder: Path,
    suite: Suite,
    machine: Mapping[str, Any],
    case: Mapping[str, Any],
    *,
    with_plot: bool,
) -> None:
    """Write one more case of a suite; it replaces the one of its shape and dtype.

    Cases that another machine, revision or version of a package left in the folder are dropped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite.name}.json"
    cases = []
    if path.exists():
        before = json.loads(path.read_text())
        if all(before.get(key) == machine[key] for key in ("device", "versions", "revision")):
            cases = [old for old in before["cases"] if _key(old) != _key(case)]
    results = {
        "suite": suite.name,
        "title": suite.title,
        "baseline": suite.baseline,
        "bound": "copy bandwidth" if suite.traffic else "matmul peak",
        **machine,
        "cases": [*cases, case],
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{suite.name}.md").write_text(table(results))
    if with_plot:
        plot(results, folder / f"{suite.name}.png")
    write_index(folder)


def _key(case: Mapping[str, Any]) -> tuple[str, str]:
    return case["shape"], case["dtype"]


def write_index(folder: Path) -> None:
    """Write README.md: the machine, and every suite's table and plot that the folder holds."""
    parts: list[str] = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())
        if not parts:
            parts.append(f"# {results['device']['name']}\n\n{_heading(results)}\n\n{_LEGEND}")
        picture = path.with_suffix(".png")
        parts.append(path.with_suffix(".md").read_text().rstrip())
        if picture.exists():
            parts.append(f"![{results['title']}]({picture.name})")
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")


_LEGEND = """\
Every provider gets the same inputs; rounds are interleaved. `vs` is the median, over rounds, of the
time over the baseline's in the same round. `share` is the least work there is over the median time,
as a part of the peak measured in the same run. `peak` is memory beyond inputs and outputs, what is
`saved` for backward included. Errors are against float64: the largest of the first output, and the
largest of any gradient over that gradient's largest entry. `coarse`: an error beyond twice that of
eager PyTorch in the same dtype; timed, and not ranked."""


def _heading(results: Mapping[str, Any]) -> str:
    device, versions = results["device"], results["versions"]
    where = f"{device['cores']} cores, {device['threads']} threads"
    if device["type"] == "cuda":
        where = f"CUDA {device['cuda']}"
    named = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    return f"{device['name']}, {where}. Revision {results['revision']}; {named}."


def table(results: Mapping[str, Any]) -> str:
    """Return a suite's results as Markdown, one table a case."""
    lines = [f"## {results['title']}", "", _heading(results)]
    for case in results["cases"]:
        unit, scale = ("TFLOP/s", 1e12) if results["bound"] == "matmul peak" else ("GB/s", 1e9)
        lines += [
            "",
            f"### {case['shape']}: {case['sizes']}, {case['dtype']}",
            "",
            f"{case['date']}, load {case['load'][0]} before and {case['load'][1]} after; "
            f"{results['bound']} {case.get('peak', 0) / scale:.3g} {unit}; "
            f"baseline: {results['baseline']}.",
            "",
            "| provider | median ms | p10 to p90 | vs | share | peak MiB | saved MiB | launches "
            "| error | gradient error | |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
            *map(_row, case["rows"]),
        ]
        lines += ["", *_verdicts(results, case)]
    return "\n".join(lines).rstrip() + "\n"


def _row(row: Mapping[str, Any]) -> str:
    ms, memory = row.get("ms"), row.get("memory")
    first, grad = _errors(row)
    name = row["provider"] + (f" {row['version']}" if row["version"] else "")
    cells = [
        f"**{name}**" if row["role"] == "ours" else name,
        f"{ms['median']:.4g}" if ms else "",
        f"{ms['p10']:.4g} to {ms['p90']:.4g}" if ms else "",
        f"{row['ratio']:.2f}" if "ratio" in row else "",
        f"{row['share']:.0%}" if "share" in row else "",
        f"{memory['peak'] / _MIB:.1f}" if memory else "",
        f"{memory['saved'] / _MIB:.1f}" if memory else "",
        str(row["launches"]) if row.get("launches") is not None else "",
        "" if first is None else f"{first:.1e}",
        "" if grad is None else f"{grad:.1e}",
        ": ".join(filter(None, (_STATUS.get(row["status"], row["status"]), row.get("reason")))),
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _errors(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return the largest error of the first output, and the largest relative one of a gradient."""
    found = row.get("errors")
    if not found:
        return None, None
    grads = [value["relative"] for name, value in found.items() if name.startswith("d")]
    return next(iter(found.values()))["max"], max(grads, default=None)


def _verdicts(results: Mapping[str, Any], case: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line that says how far prefalign is from the baseline and the peers."""
    timed = {row["provider"]: row for row in case["rows"] if "ms" in row}
    ours = timed.get("prefalign")
    if ours is None:
        yield "**prefalign was not timed.**"
        return
    text = []
    if "ratio" in ours:
        text.append(f"{ours['ratio']:.2f}x the time of {results['baseline']}")
    rivals = [
        row for row in timed.values() if row["role"] in ("peer", "eager") and row["status"] == "ok"
    ]
    allowed = _AS_ACCURATE * max(_errors(ours)[0] or 0.0, 1e-7)
    exact = [row for row in rivals if (_errors(row)[0] or 0.0) <= allowed]
    for which, rows in (("within the bound", rivals), ("as accurate", exact)):
        if rows:
            best = min(rows, key=lambda row: row["ms"]["median"])
            factor = ours["ms"]["median"] / best["ms"]["median"]
            text.append(f"{factor:.2f}x that of the fastest peer {which}, {best['provider']}")
        else:
            text.append(f"no peer is {which}")
    yield f"prefalign: {'; '.join(text)}."


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw each case: times with their 10th to 90th percentiles, and peak memory beside them."""
    from matplotlib.figure import Figure

    cases = results["cases"]
    heights = [0.6 + 0.24 * sum("ms" in row for row in case["rows"]) for case in cases]
    figure = Figure(figsize=(10, 0.8 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(cases), 2, squeeze=False, height_ratios=heights)
    for (left, right), case in zip(axes, cases, strict=True):
        rows = [row for row in case["rows"] if "ms" in row][::-1]
        base = next((r for r in rows if r["provider"] == results["baseline"]), None)
        _bars(left, rows, [row["ms"]["median"] for row in rows])
        for place, row in enumerate(rows):
            left.plot([row["ms"]["p10"], row["ms"]["p90"]], [place, place], color="#24292f", lw=1)
        if base:
            left.axvline(base["ms"]["median"], color="#24292f", lw=0.8, ls="--")
        _bars(right, rows, [_peak(row) for row in rows])
        right.set_yticklabels([])
        left.set_title(f"{case['sizes']}, {case['dtype']}", fontsize=9, loc="left")
    axes[-1][0].set_xlabel(f"ms (dashed: {results['baseline']}; hatched: coarse)")
    axes[-1][1].set_xlabel("peak MiB beyond inputs and outputs")
    figure.suptitle(f"{results['title']}\n{results['device']['name']}", fontsize=11)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _peak(row: Mapping[str, Any]) -> float | None:
    return row["memory"]["peak"] / _MIB if "memory" in row else None


def _bars(axes: Axes, rows: list[Any], values: Sequence[float | None]) -> None:
    colours = [_COLOURS[row["role"]] for row in rows]
    bars = axes.barh(range(len(rows)), [value or 0.0 for value in values], color=colours)
    for bar, row in zip(bars, rows, strict=True):
        bar.set_hatch("///" if row["status"] == gate.COARSE else "")
    labels = ["" if v is None else f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values]
    axes.bar_label(bars, labels, fontsize=7, padding=4)
    axes.set_yticks(range(len(rows)), [row["provider"] for row in rows], fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
