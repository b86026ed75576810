"""The plots whose axis is the iterations: what was generated and how it was labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .plots import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    Plot,
    draw_plot,
    listed,
    shortened,
    stage_label,
    style_of,
)


@dataclass(frozen=True)
class Spread:
    """Mean and quantiles (10, 25, 75 and 90 %) of the response lengths of one iteration."""

    mean: float
    quantiles: tuple[float, ...] = ()


_LABELLED = 12
"""With more iterations the figures at the points would run into one another."""
_LINES = [
    (BLUE, "-", "o"),
    (ORANGE, "--", "s"),
    (GREEN, "-.", "^"),
    (PURPLE, ":", "D"),
    (SKY, "-", "v"),
    (RED, "--", "P"),
    (GREY, "-.", "X"),
]


def _iteration_axis(axes: Axes, numbers: Sequence[int]) -> None:
    axes.set_xlabel("iteration")
    axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)


def lines(
    title: str, label: str, series: Mapping[str, Mapping[int, float]], note: str
) -> Plot | None:
    """Draw figures over the iterations, one line for each name.

    Args:
        title: What it shows.
        label: The values' name and unit.
        series: Values by iteration, by name.
        note: How to read it.
    """
    series = {name: values for name, values in series.items() if values}
    if not series:
        return None
    numbers = sorted({number for values in series.values() for number in values})
    labelled = len(series) <= 2 and len(numbers) <= _LABELLED

    def draw(axes: Axes) -> None:
        for index, (name, values) in enumerate(series.items()):
            colour, dash, marker = _LINES[index % len(_LINES)]
            axes.plot(
                list(values),
                list(values.values()),
                color=colour,
                linestyle=dash,
                marker=marker,
                label=shortened(name, 28),
            )
            for number, value in values.items() if labelled else ():
                # The higher line's figures above it, the lower one's below.
                top = value >= max(other.get(number, value) for other in series.values())
                axes.annotate(
                    f"{value:.3g}",
                    (number, value),
                    (0, 7 if top else -7),
                    textcoords="offset points",
                    ha="center",
                    va="bottom" if top else "top",
                )
        axes.margins(y=0.2)
        _iteration_axis(axes, numbers)
        axes.set_ylabel(label)

    alt = [
        (f"{name}, iteration {number}", f"{value:.3f}")
        for name, values in series.items()
        for number, value in values.items()
    ]
    return draw_plot(title, listed(alt), note, draw, height=3.5 + 0.16 * max(0, len(series) - 3))


def ranked(
    shares: Mapping[int, float], ahead: Mapping[int, float], thresholds: Mapping[int, float]
) -> Plot | None:
    """Draw how many pairs of an iteration are ranked.

    Args:
        shares: Share of the pairs that the threshold ranks, by iteration.
        ahead: Share of them whose guided response has the higher reward.
        thresholds: The thresholds, τ.
    """
    if not shares and not ahead:
        return None

    def draw(axes: Axes) -> None:
        if shares:
            axes.bar(
                list(shares),
                list(shares.values()),
                width=0.75,
                color=BLUE,
                label="ranked: gap over τ",
            )
        if ahead:
            axes.plot(
                list(ahead), list(ahead.values()), "s", color=ORANGE, label="guided ahead at all"
            )
        numbers = sorted({*shares, *ahead})
        _iteration_axis(axes, numbers)
        if len(numbers) <= _LABELLED:
            over: dict[str, Any] = {"textcoords": "offset points", "ha": "center"}
            inside = over | {"va": "top", "color": "white"}  # where no mark of "ahead" can be
            for number, value in shares.items():
                text, place = f"{100 * value:.0f} %", (number, value)
                high = value > 0.1
                axes.annotate(text, place, (0, -4 if high else 3), **(inside if high else over))
            for number, value in ahead.items():
                axes.annotate(f"{100 * value:.0f} %", (number, value), (0, 5), **over)
            found = [f"\n{thresholds[n]:.2g}" if n in thresholds else "" for n in numbers]
            axes.set_xticks(numbers, [f"{n}{tau}" for n, tau in zip(numbers, found, strict=True)])
            if thresholds:
                axes.set_xlabel("iteration, and its τ")
        axes.set_ylim(0, 1.15)
        axes.set_yticks(np.linspace(0, 1, 6))
        axes.set_ylabel("share of pairs")

    alt = [(f"iteration {n}", f"{100 * value:.1f} % ranked") for n, value in shares.items()]
    note = (
        "Ranked: the guided response's reward is ahead by more than τ. The other pairs are "
        "imitated, weighted by their rewards."
    )
    return draw_plot("Pairs ranked", listed(alt), note, draw)


def lengths(
    spreads: Mapping[int, Spread],
    limit: float | None,
    warned: float | None,
    note: str = "",
) -> Plot | None:
    """Draw the response lengths of each iteration.

    Args:
        spreads: Mean and quantiles, by iteration.
        limit: The length limit of generation.
        warned: The mean length past which the gauge warns.
        note: How to read it.
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
                axes.vlines(number, low, high, color=SKY, linewidth=2, label=names[0])
                axes.vlines(number, lower, upper, color=SKY, linewidth=8, label=names[1])
                first = False
            axes.annotate(
                f"{mean:.1f}", (number, mean), (9, -9), textcoords="offset points", va="top"
            )
        means = [spread.mean for spread in spreads.values()]
        axes.plot(list(spreads), means, "o-", color=BLUE, label="mean", zorder=3)
        for name, value, dash in (("length limit", limit, "--"), ("gauge warns", warned, ":")):
            if value is not None and value <= 2.5 * top:
                axes.axhline(value, color=RED, linestyle=dash, linewidth=1.4, label=name)
            elif value is not None:  # drawn, it would flatten everything else
                axes.plot([], [], color=RED, linestyle=dash, label=f"{name}: {value:.0f}, above")
        _iteration_axis(axes, list(spreads))
        axes.set_ylim(bottom=0)
        axes.set_ylabel("response length (tokens)")

    alt = listed([(f"iteration {n}", f"mean {s.mean:.1f} tokens") for n, s in spreads.items()])
    return draw_plot("Response length", alt, note, draw)


def shares(
    title: str, label: str, values: Mapping[int, float], threshold: float | None, note: str
) -> Plot | None:
    """Draw a share per iteration as bars, with the gauge's threshold."""
    if not values:
        return None

    def draw(axes: Axes) -> None:
        axes.bar(list(values), list(values.values()), width=0.5, color=BLUE)
        for number, value in values.items():
            text = f"{100 * value:.1f} %"
            axes.annotate(text, (number, value), (0, 3), textcoords="offset points", ha="center")
        if threshold is not None:
            axes.axhline(threshold, color=RED, linestyle=":", linewidth=1.4, label="gauge warns")
        _iteration_axis(axes, list(values))
        axes.set_ylim(0, min(1.08, 1.25 * max([*values.values(), threshold or 0, 0.04])))
        axes.set_ylabel(label)

    alt = listed([(f"iteration {n}", f"{100 * value:.1f} %") for n, value in values.items()])
    return draw_plot(title, alt, note, draw)


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
                places, rates, errors, fmt="o-", capsize=3, color=BLUE, label="held-out labels"
            )
        if labels:
            places = [number + 0.04 for number in labels]
            axes.plot(places, list(labels.values()), "s--", color=ORANGE, label="own labels")
        if minimum is not None:
            axes.axhline(minimum, color=RED, linestyle=":", linewidth=1.4, label="gauge warns")
        axes.axhline(0.5, color=INK, linewidth=1, linestyle="-", alpha=0.6, label="chance")
        _iteration_axis(axes, [*held_out, *labels])
        axes.set_ylim(-0.02, 1.04)
        axes.set_ylabel("accuracy (share of pairs)")

    pairs = [(f"iteration {n}, held-out labels", f"{p:.3f}") for n, (p, _) in held_out.items()]
    pairs += [(f"iteration {n}, own labels", f"{value:.3f}") for n, value in labels.items()]
    note = (
        "Held-out labels: the judge against human labels kept from training, one standard error. "
        "Own labels: its labels against the evaluation's reward, ties left out."
    )
    return draw_plot("Accuracy of the judge", listed(pairs), note, draw)


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
                **style_of(stage),
            )
        axes.set_xlabel("margin, reward of chosen − rejected (nats)")
        axes.set_ylabel("share of pairs")

    alt = listed([(f"iteration {n}", f"median {np.median(m):.3g}") for n, m in values.items()])
    note = "Reward: β · log-ratio to the judge's reference. Near 0 the judge hardly has a view."
    return draw_plot("The judge's margins", alt, note, draw)
