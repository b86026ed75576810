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
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, GRID = "#24292f", "#d0d7de"
# Okabe and Ito's palette; dashes and markers say the same without colour.
ORANGE, BLUE, GREEN, SKY = "#E69F00", "#0072B2", "#009E73", "#56B4E9"
RED, PURPLE, GREY = "#D55E00", "#CC79A7", "#8a8f98"
_STAGE_COLOURS = {
    "init": GREY,
    "init-guided": GREY,
    "seed": ORANGE,
    "sft": ORANGE,
    "control": PURPLE,
    "all-labels": RED,
}
_DASHES = ["-", "--", "-.", ":"]
_RC: Any = {
    **{f"{side}.color": INK for side in ("text", "xtick", "ytick")},
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
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


class ModelFigure(NamedTuple):
    """One figure of one evaluated model.

    Args:
        key: Its key in the evaluation.
        name: What tables call it.
        value: The figure.
        error: Its standard error, where there is one.
        tokens: Mean length of its responses, to stand beside the figure.
    """

    key: str
    name: str
    value: float
    error: float | None = None
    tokens: float | None = None


def stage_label(stage: str) -> str:
    """Return a stage's name as a reader would say it."""
    names = {"seed": "seed DPO", "control": "control", "all-labels": "DPO, all labels"}
    names |= {"sft": "SFT", "dpo": "DPO"}
    return names.get(stage, stage.replace("iteration-", "iteration "))


def style_of(stage: str) -> dict[str, Any]:
    """Return the colour and dash of a stage or an evaluated model."""
    if iteration := re.fullmatch(r"iteration-(\d+)", stage):
        index = int(iteration.group(1)) - 1
        colours = (BLUE, GREEN, SKY)
        return {"color": colours[index % 3], "linestyle": _DASHES[index % 4]}
    dash = "-" if stage in ("seed", "sft", "dpo") else "--"
    return {"color": _STAGE_COLOURS.get(stage, PURPLE), "linestyle": dash}


def shortened(text: str, length: int) -> str:
    """Return a text of at most ``length`` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def draw_plot(
    title: str,
    alt: str,
    note: str,
    draw: Callable[[Axes], None],
    *,
    height: float = 3.5,
    legend: bool = True,
) -> Plot:
    """Draw one plot on a figure of its own.

    Args:
        title: What it shows.
        alt: It in words, for who does not see it.
        note: How to read it.
        draw: Draws on the axes.
        height: Of the figure, in inches.
        legend: Whether to name what has a label.
    """
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
    svg = svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    head = f'<svg role="img" aria-label="{escape(title)}. {escape(alt)}" {view.group()}>'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1))


def listed(pairs: Sequence[tuple[str, str]]) -> str:
    """Return figures by their names, as a sentence."""
    return "; ".join(f"{name} {value}" for name, value in pairs) + "."


def win_rates(rows: Sequence[ModelFigure], baseline: str = "SFT") -> Plot | None:
    """Draw each model's win rate against the first.

    Args:
        rows: The win rates.
        baseline: Name of the model that they are against.
    """
    against = f"win rate against {shortened(baseline, 28)}"
    note = (
        "Bars: two standard errors over the evaluation prompts. "
        f"Dashed: as good as {shortened(baseline, 28)}."
    )
    return by_model(
        f"W{against[1:]}",
        f"{against} (share of prompts)",
        rows,
        note,
        middle=0.5,
        limits=(-0.02, 1.02),
    )


def by_model(
    title: str,
    label: str,
    rows: Sequence[ModelFigure],
    note: str,
    *,
    middle: float | None = None,
    limits: tuple[float, float] | None = None,
) -> Plot | None:
    """Draw one figure of every evaluated model, with the mean length of its responses beside it.

    Args:
        title: What it shows.
        label: The figure's name and unit.
        rows: The figures.
        note: How to read it.
        middle: A value to compare with.
        limits: Ends of the axis.
    """
    if not rows:
        return None

    def draw(axes: Axes) -> None:
        # In columns of their own, where no bar or line runs through them.
        def beside(y: float, text: str, points: int) -> None:
            axes.annotate(
                text,
                (1, y),
                (points, 0),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                ha="right",
                va="center",
                annotation_clip=False,
            )

        for y, row in enumerate(rows):
            bar = 2 * row.error if row.error else None
            axes.errorbar(row.value, y, xerr=bar, fmt="o", color=style_of(row.key)["color"])
            beside(y, f"{row.value:.2f}" if abs(row.value) < 100 else f"{row.value:.3g}", 40)
            if row.tokens is not None:
                beside(y, f"{row.tokens:.1f}", 86)
        if any(row.tokens is not None for row in rows):
            beside(-0.9, "mean tokens", 90)
        if middle is not None:
            axes.axvline(middle, color=INK, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(rows)), [shortened(row.name, 28) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.6)
        if limits is not None:
            axes.set_xlim(*limits)
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)

    alt = [
        (
            row.name,
            f"{row.value:.3f}"
            + ("" if row.tokens is None else f" at a mean of {row.tokens:.1f} tokens"),
        )
        for row in rows
    ]
    return draw_plot(title, listed(alt), note, draw, height=1.2 + 0.42 * len(rows))


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
            axes.plot(steps, values, label=stage_label(stage), marker=marker, **style_of(stage))
        for name, value in (lines or {}).items():
            axes.axhline(value, color=INK, linestyle=":", linewidth=1.3, label=name)
        axes.set_xlabel("optimiser step of the stage")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if share:
            axes.set_ylim(-0.02, 1.02)

    ends = [(stage_label(s), f"from {p[0][1]:.3g} to {p[-1][1]:.3g}") for s, p in series.items()]
    return draw_plot(title, listed(ends), note, draw)
