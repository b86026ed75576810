"""What the report of each algorithm shows: its tables, its plots and what it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .report_sections import Section, ple_sections, spa_sections, tuning_sections
from .report_tables import (
    BASELINE_COLUMNS,
    PLE_COLUMNS,
    SPA_COLUMNS,
    Column,
    Table,
    iteration_table,
)
from .run_figures import RunFigures


@dataclass(frozen=True)
class Layout:
    """The report of one algorithm.

    Args:
        sections: Draws its plots.
        columns: The columns of its iterations.
        note: How to read them.
        telling: A figure of the gauge that no other algorithm has.
        trained: Keys of the evaluated models that are its result where it has no iterations.
        control: Whether the verdict asks for a control of as many steps.
    """

    sections: Callable[[RunFigures], list[Section]]
    columns: Sequence[Column] = ()
    note: str = ""
    telling: str = ""
    trained: Sequence[str] = ()
    control: bool = False

    def result(self, run: RunFigures) -> str | None:
        """Return the key of the model that the run came to: its last iteration, if it has any."""
        return run.last or next((key for key in self.trained if key in run.models), None)

    def iteration_tables(self, run: RunFigures, *, plain: bool = False) -> list[Table]:
        """Return the table of the iterations and that of the baselines', where there are any."""
        if not self.columns:
            return []
        tables = [
            iteration_table("Iterations", self.columns, run.iterations, self.note, plain=plain),
            iteration_table("Baselines", BASELINE_COLUMNS, run.baselines, plain=plain),
        ]
        return [table for table in tables if table.rows]


_TUNING = Layout(tuning_sections, trained=("dpo", "sft"))

LAYOUTS = {
    "spa": Layout(
        spa_sections,
        SPA_COLUMNS,
        "Before each iteration's training, except for the noise. Accuracy of own labels: against "
        "the evaluation's reward, ties left out; held-out: against human labels. Length ratio: "
        "mean response length over the labelled responses'.",
        telling="label_accuracy",
        control=True,
    ),
    "ple": Layout(
        ple_sections,
        PLE_COLUMNS,
        "Before each iteration's training, by the rewards that it learns from. Ranked: pairs whose "
        "guided response is ahead by more than τ; the others are imitated. Mean tokens: guided "
        "and plain responses together. Length ratio: that over the demonstrations' mean length, "
        "or that of the first responses if there are no demonstrations.",
        telling="examples",
        trained=("sft",),
    ),
    "dpo": _TUNING,
    "sft": _TUNING,
}


def layout_of(run: RunFigures) -> Layout:
    """Return the layout of a run's algorithm; where it is not known, the one its rows fit."""
    named = run.state.get("algorithm")
    if isinstance(named, str) and named in LAYOUTS:
        return LAYOUTS[named]
    gauges = [iteration.gauge for iteration in run.iterations]
    for layout in LAYOUTS.values():
        if layout.telling and any(layout.telling in gauge for gauge in gauges):
            return layout
    return LAYOUTS["spa"] if run.iterations else _TUNING
