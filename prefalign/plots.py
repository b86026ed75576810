"""The plots of a run's report, as SVG that stands inside a page.

Each function takes plain figures and gives one :class:`Plot`, or None where there is nothing to
draw. Ink and grid are CSS variables of the page (``--ink``, ``--grid``), so one drawing serves a
light and a dark page; text is drawn as outlines, so no font and no markup of the data is in it.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_INK, _GRID = "#24292f", "#d0d7de"
# Okabe and Ito's palette; dashes and markers say the same without colour.
_ORANGE, _BLUE, _GREEN, _SKY = "#E69F00", "#0072B2", "#009E73", "#56B4E9"
_RED, _PURPLE, _GREY = "#D55E00", "#CC79A7", "#8a8f98"
_STAGE_COLOURS = {"seed": _ORANGE, "control": _PURPLE, "all-labels": _RED, "init": _GREY}
_DASHES = ["-", "--", "-.", ":"]
_RC: Any = {
    **{f"{side}.color": _INK for side in ("text", "xtick", "ytick")},
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": _GRID,
    "grid.linestyle": "-",
    "grid.linewidth": 0.7,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "text.usetex": False,
    "text.parse_math": False,  # a "$" in a name is a "$"
    "svg.fonttype": "path",
    "svg.hashsalt": "prefalign",
}


@dataclass(frozen=True)
class Plot:
    """A finished plot.

    Args:
        title: What it shows.
        svg: The drawing, with its alternative text.
        note: How to read it.
    """

    title: str
    svg: Markup
    note: str


@dataclass(frozen=True)
class Spread:
    """Mean and quantiles (10, 25, 75 and 90 %) of the response lengths of one iteration."""

    mean: float
    quantiles: tuple[float, ...] = ()


def stage_label(stage: str) -> str:
    """Return a stage's name as a reader would say it."""
    names = {"seed": "seed DPO", "control": "control", "all-labels": "DPO, all labels"}
    return names.get(stage, stage.replace("iteration-", "iteration "))


def _style(stage: str) -> dict[str, Any]:
    if stage in _STAGE_COLOURS:
        dash = "-" if stage == "seed" else "--"
        return {"color": _STAGE_COLOURS[stage], "linestyle": dash}
    digits = re.search(r"\d+", stage)
    index = int(digits.group()) - 1 if digits else 0
    colours = (_BLUE, _GREEN, _SKY)
    return {"color": colours[index % 3], "linestyle": _DASHES[index % 4]}


def _draw(
    title: str,
    alt: str,
    note: str,
    draw: Callable[[Axes], None],
    *,
    height: float = 3.5,
    legend: bool = True,
) -> Plot:
    # rc_context sets and restores; nothing of a notebook's or a user's own style comes in or stays.
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(5.4, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if legend and handles:
            columns = min(len(handles), 3 if max(map(len, labels)) < 18 else 2)
            figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return Plot(title, _inline(buffer.getvalue(), title, alt), note)


def _inline(svg: str, title: str, alt: str) -> Markup:
    """Make a part of a page of a whole SVG file."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\s*|<style.*?</style>|<metadata>.*?</metadata>", "", svg, flags=re.S)
    # Several drawings share the page's one space of ids.
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = svg.replace(_INK, "var(--ink)").replace(_GRID, "var(--grid)")
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    head = f'<svg role="img" aria-label="{escape(title)}. {escape(alt)}" {view.group()}>'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1))


def _iteration_axis(axes: Axes, numbers: Sequence[int]) -> None:
    axes.set_xlabel("iteration")
    axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)


def _listed(pairs: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{name} {value}" for name, value in pairs) + "."


def win_rates(rows: Sequence[tuple[str, str, float, float | None]]) -> Plot | None:
    """Draw each model's win rate against SFT.

    Args:
        rows: Key, name, win rate and its standard error (or None) of each model.
    """
    if not rows:
        return None

    def draw(axes: Axes) -> None:
        for y, (key, _, rate, error) in enumerate(rows):
            colour = _style(key)["color"]
            axes.errorbar(rate, y, xerr=2 * error if error else None, fmt="o", color=colour)
            # In a column of their own, where no bar or line runs through them.
            place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
            axes.text(1.02, y, f"{rate:.2f}", **place)
        axes.axvline(0.5, color=_INK, linewidth=1, linestyle="--")
        names = [name if len(name) <= 28 else name[:27] + "…" for _, name, _, _ in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.5, -0.6)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("win rate against SFT (share of prompts)")
        axes.grid(axis="y", visible=False)

    alt = _listed([(name, f"{rate:.3f}") for _, name, rate, _ in rows])
    note = "Bars: two standard errors over the evaluation prompts. Dashed: as good as SFT."
    return _draw("Win rate against SFT", alt, note, draw, height=1.2 + 0.42 * len(rows))


def over_steps(
    title: str,
    label: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    note: str = "",
    lines: Mapping[str, float] | None = None,
    share: bool = False,
) -> Plot | None:
    """Draw one metric over the optimiser steps of each stage.

    Args:
        title: What it shows.
        label: The value's name and unit.
        series: Step and value, by stage.
        note: How to read it.
        lines: Values to compare with, by name.
        share: Whether the value is a share, so that the axis is 0 to 1.
    """
    series = {stage: points for stage, points in series.items() if points}
    if not series:
        return None

    def draw(axes: Axes) -> None:
        for stage, points in series.items():
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) < 10 else None
            axes.plot(steps, values, label=stage_label(stage), marker=marker, **_style(stage))
        for name, value in (lines or {}).items():
            axes.axhline(value, color=_INK, linestyle=":", linewidth=1.3, label=name)
        axes.set_xlabel("optimiser step of the stage")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if share:
            axes.set_ylim(-0.02, 1.02)

    ends = [(stage_label(s), f"from {p[0][1]:.3g} to {p[-1][1]:.3g}") for s, p in series.items()]
    return _draw(title, _listed(ends), note, draw)


def lengths(
    spreads: Mapping[int, Spread], limit: float | None, warned: float | None
) -> Plot | None:
    """Draw the response lengths of each iteration.

    Args:
        spreads: Mean and quantiles, by iteration.
        limit: The length limit of generation.
        warned: The mean length past which the gauge warns.
    """
    if not spreads:
        return None
    top = max(max(spread.quantiles, default=spread.mean) for spread in spreads.values())

    def draw(axes: Axes) -> None:
        first = True
        for number, (mean, quantiles) in ((n, (s.mean, s.quantiles)) for n, s in spreads.items()):
            if quantiles:
                low, lower, upper, high = quantiles
                names = ("10 to 90 %", "25 to 75 %") if first else ("", "")
                axes.vlines(number, low, high, color=_SKY, linewidth=2, label=names[0])
                axes.vlines(number, lower, upper, color=_SKY, linewidth=8, label=names[1])
                first = False
            axes.annotate(
                f"{mean:.1f}", (number, mean), (9, -9), textcoords="offset points", va="top"
            )
        means = [spread.mean for spread in spreads.values()]
        axes.plot(list(spreads), means, "o-", color=_BLUE, label="mean", zorder=3)
        for name, value, dash in (("length limit", limit, "--"), ("gauge warns", warned, ":")):
            if value is not None and value <= 2.5 * top:
                axes.axhline(value, color=_RED, linestyle=dash, linewidth=1.4, label=name)
            elif value is not None:  # drawn, it would flatten everything else
                axes.plot([], [], color=_RED, linestyle=dash, label=f"{name}: {value:.0f}, above")
        _iteration_axis(axes, list(spreads))
        axes.set_ylim(bottom=0)
        axes.set_ylabel("response length (tokens)")

    alt = _listed([(f"iteration {n}", f"mean {s.mean:.1f} tokens") for n, s in spreads.items()])
    note = "Longer at every iteration, towards the limit, is how a judge that fools itself looks."
    return _draw("Response length", alt, note, draw)


def shares(
    title: str, label: str, values: Mapping[int, float], threshold: float | None, note: str
) -> Plot | None:
    """Draw a share per iteration as bars, with the gauge's threshold."""
    if not values:
        return None

    def draw(axes: Axes) -> None:
        axes.bar(list(values), list(values.values()), width=0.5, color=_BLUE)
        for number, value in values.items():
            text = f"{100 * value:.1f} %"
            axes.annotate(text, (number, value), (0, 3), textcoords="offset points", ha="center")
        if threshold is not None:
            axes.axhline(threshold, color=_RED, linestyle=":", linewidth=1.4, label="gauge warns")
        _iteration_axis(axes, list(values))
        axes.set_ylim(0, min(1.08, 1.25 * max([*values.values(), threshold or 0, 0.04])))
        axes.set_ylabel(label)

    alt = _listed([(f"iteration {n}", f"{100 * value:.1f} %") for n, value in values.items()])
    return _draw(title, alt, note, draw)


def judge(
    held_out: Mapping[int, tuple[float, int]], labels: Mapping[int, float], minimum: float | None
) -> Plot | None:
    """Draw how often the judge agrees with labels it was not trained on.

    Args:
        held_out: Accuracy on the held-out human labels and how many pairs they are, by iteration.
        labels: Accuracy of the labels it gave its own responses, by the evaluation's reward.
        minimum: The accuracy on held-out labels below which the gauge warns.
    """
    if not held_out and not labels:
        return None

    def draw(axes: Axes) -> None:
        if held_out:
            rates = [rate for rate, _ in held_out.values()]
            errors = [(p * (1 - p) / n) ** 0.5 if n else 0 for p, n in held_out.values()]
            places = [number - 0.04 for number in held_out]
            axes.errorbar(
                places, rates, errors, fmt="o-", capsize=3, color=_BLUE, label="held-out labels"
            )
        if labels:
            places = [number + 0.04 for number in labels]
            axes.plot(places, list(labels.values()), "s--", color=_ORANGE, label="own labels")
        if minimum is not None:
            axes.axhline(minimum, color=_RED, linestyle=":", linewidth=1.4, label="gauge warns")
        axes.axhline(0.5, color=_INK, linewidth=1, linestyle="-", alpha=0.6, label="chance")
        _iteration_axis(axes, [*held_out, *labels])
        axes.set_ylim(-0.02, 1.04)
        axes.set_ylabel("accuracy (share of pairs)")

    pairs = [(f"iteration {n}, held-out labels", f"{p:.3f}") for n, (p, _) in held_out.items()]
    pairs += [(f"iteration {n}, own labels", f"{value:.3f}") for n, value in labels.items()]
    note = (
        "Held-out labels: the judge against human labels kept from training, one standard error. "
        "Own labels: its labels against the evaluation's reward, ties left out."
    )
    return _draw("Accuracy of the judge", _listed(pairs), note, draw)


def margins(values: Mapping[int, np.ndarray]) -> Plot | None:
    """Draw the distribution of the judge's margins in each iteration."""
    values = {number: margins for number, margins in values.items() if len(margins)}
    if not values:
        return None
    low = min(0.0, *(float(np.quantile(m, 0.005)) for m in values.values()))
    high = max(float(np.quantile(m, 0.995)) for m in values.values())
    edges = np.linspace(low, high if high > low else low + 1, 31)

    def draw(axes: Axes) -> None:
        for number, margins in values.items():
            stage = f"iteration-{number}"
            # What lies past the edge is in the last bin, so that the bins add up to all pairs.
            counts, _ = np.histogram(np.clip(margins, edges[0], edges[-1]), edges)
            axes.stairs(
                counts / len(margins),
                edges,
                linewidth=1.8,
                label=f"{stage_label(stage)} (median {np.median(margins):.2g})",
                **_style(stage),
            )
        axes.set_xlabel("margin, reward of chosen − rejected (nats)")
        axes.set_ylabel("share of pairs")

    alt = _listed([(f"iteration {n}", f"median {np.median(m):.3g}") for n, m in values.items()])
    note = "Reward: β · log-ratio to the judge's reference. Near 0 the judge hardly has a view."
    return _draw("The judge's margins", alt, note, draw)
