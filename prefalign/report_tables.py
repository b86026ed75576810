"""The tables of a report: which columns an algorithm's have, and figures as cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .run_figures import IterationFigures, Row, RunFigures, clean, number_of

MISSING = "-"


class Column(NamedTuple):
    """One column of a table of iterations.

    Args:
        title: Its heading on the page.
        cell: Makes an iteration's cell; ``MISSING`` where there is no figure.
        short: Its heading in the plain-text table; empty to leave it out there.
        always: Whether it stands even where no iteration has a figure.
    """

    title: str
    cell: Callable[[IterationFigures], str]
    short: str = ""
    always: bool = False


class Table(NamedTuple):
    """A table of text.

    Args:
        title: What it shows.
        header: The headings.
        rows: The cells.
        note: How to read it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


# Figures in cells.


def cell(value: Any, digits: int = 3) -> str:
    """Return a number with so many digits after the point."""
    number = number_of(value)
    if number is None:
        return MISSING
    return f"{number:.{digits}f}" if abs(number) < 1e6 else f"{number:.3g}"


def percent(value: Any) -> str:
    """Return a share as a percentage."""
    number = number_of(value)
    return MISSING if number is None else f"{100 * number:.1f} %"


def with_error(value: Any, error: Any) -> str:
    """Return a number and its standard error, where that is known."""
    known = number_of(value) is not None and number_of(error) is not None
    return f"{cell(value)} ± {cell(error)}" if known else cell(value)


def model_name(row: Row) -> str:
    """Return what tables call an evaluated model, on one line."""
    return " ".join(clean(row.get("name") or row["key"]).split())


def _gauged(name: str, digits: int = 3) -> Callable[[IterationFigures], str]:
    return lambda iteration: cell(iteration.gauged(name), digits)


def _share(name: str) -> Callable[[IterationFigures], str]:
    return lambda iteration: percent(iteration.gauged(name))


def _accuracy(name: str, pairs: str) -> Callable[[IterationFigures], str]:
    def accuracy(iteration: IterationFigures) -> str:
        text, count = cell(iteration.gauged(name)), iteration.gauged(pairs)
        return f"{text} of {count:.0f}" if count and text != MISSING else text

    return accuracy


# The columns.

_NUMBER = Column("iteration", lambda iteration: str(iteration.number), "iteration", always=True)

SPA_COLUMNS = [
    _NUMBER,
    Column(
        "accuracy of own labels",
        _accuracy("label_accuracy", "label_pairs"),
        "label accuracy",
        always=True,
    ),
    Column(
        "held-out accuracy",
        _accuracy("judge_accuracy", "held_out_pairs"),
        "held-out accuracy",
        always=True,
    ),
    Column("pairs", lambda it: str(it.pairs or MISSING), "pairs", always=True),
    Column("mean tokens", _gauged("mean_tokens", 1), always=True),
    Column("length ratio", _gauged("length_ratio", 2), always=True),
    Column("cut at limit", _share("cut_share"), always=True),
    Column("flagged noisy", lambda it: percent(it.noisy), "noisy", always=True),
]

_PLE_FIGURES = [
    Column("threshold τ", _gauged("threshold"), "τ"),
    Column("ranked", _share("ranked_share"), "ranked"),
    Column("guided ahead", _share("guided_ahead"), "guided ahead"),
    Column("reward, plain", _gauged("plain_reward"), "plain reward"),
    Column("reward, guided", _gauged("guided_reward"), "guided reward"),
    Column("examples", _gauged("examples", 0)),
    Column("mean tokens", _gauged("mean_tokens", 1), "mean tokens"),
    Column("length ratio", _gauged("length_ratio", 2)),
    Column("cut at limit", _share("cut_share"), "cut"),
]
PLE_COLUMNS = [_NUMBER, *_PLE_FIGURES]
BASELINE_COLUMNS = [
    Column("baseline", lambda it: it.name, "baseline", always=True),
    *(column for column in _PLE_FIGURES if column.title not in ("guided ahead", "length ratio")),
]


# The tables.


def evaluation_table(run: RunFigures) -> Table:
    """Return the table of the evaluated models."""
    baseline = model_name(run.evaluation[0]) if run.evaluation else ""
    against = f"win rate against {baseline}" if baseline else "win rate"
    rows = [
        (
            model_name(row),
            with_error(row.get("win_rate"), row.get("win_rate_stderr")),
            cell(row.get("mean_reward")),
            cell(row.get("mean_tokens"), 1),
            percent(row.get("cut_share")),
            cell(row.get("steps"), 0),
        )
        for row in run.evaluation
    ]
    return Table(
        "Models",
        ("model", against, "mean reward", "mean tokens", "cut at limit", "steps"),
        rows,
        "One response to each prompt, compared by the reward of the evaluation; a tie counts "
        "half. ± is one standard error over the prompts; another seed would differ by more. "
        "“Beats” and “loses to” mean more than two standard errors from a half.",
    )


def iteration_table(
    title: str,
    columns: Sequence[Column],
    iterations: Sequence[IterationFigures],
    note: str = "",
    *,
    plain: bool = False,
) -> Table:
    """Return a table of iterations, without the columns that are empty.

    Args:
        title: What it shows.
        columns: Its columns.
        iterations: Its rows.
        note: How to read it.
        plain: Whether it is the plain-text one.
    """
    columns = [column for column in columns if column.short or not plain]
    found = [(column, [column.cell(iteration) for iteration in iterations]) for column in columns]
    kept = [
        (column.short if plain else column.title, cells)
        for column, cells in found
        if column.always or set(cells) != {MISSING}
    ]
    rows = list(zip(*(cells for _, cells in kept), strict=True))
    return Table(title, [name for name, _ in kept], rows, note)
