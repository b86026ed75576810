"""The report of a run: ``report.html``, one file that opens anywhere, and the table for the end.

Both are made from the run folder as it stands, so a run that was stopped has a report too; what is
not there is said.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from . import plots
from .run_figures import (
    IterationFigures,
    Row,
    RunFigures,
    clean,
    iteration_number,
    mapping_of,
    number_of,
    read_run,
    rows_of,
    text_of,
)
from .run_folder import written_whole

SAMPLES = 8  # prompts shown side by side
_SAMPLE_CHARACTERS = 1500
_MISSING = "-"

# A prompt, and each answer to it: whose it is, facts about it, its text.
Sample = tuple[str, list[tuple[str, str, str]]]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder, replacing an older one whole.

    Args:
        run_dir: The folder of a run, finished or not.

    Returns:
        The report's path. The file needs nothing outside itself and runs no script.

    Raises:
        RunError: There is no such folder.
    """
    run = read_run(Path(run_dir))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    versions = mapping_of(run.state.get("versions"))
    samples_title, samples = _samples(run)
    page = environment.from_string(template).render(
        algorithm=clean(run.state.get("algorithm") or "run").upper(),
        model=clean(run.setting("model.path") or "model unknown"),
        date=_date(run.folder),
        versions=[f"{clean(name)} {clean(version)}" for name, version in versions.items()],
        finished=[clean(stage) for stage in mapping_of(run.state.get("finished"))],
        verdict=_verdict(run),
        warnings=[clean(warning) for warning in run.warnings],
        missing=run.missing,
        evaluation=_evaluation_cells(run),
        iterations=_iteration_cells(run),
        sections=_sections(run),
        samples_title=samples_title,
        samples=samples,
        settings=clean(run.settings_text),
    )
    path = run.folder / "report.html"
    with written_whole(path) as temporary:
        temporary.write_text(page, "utf-8")
    return path


def summary_table(run_dir: Path) -> str:
    """Return what a run came to, as plain text of at most 100 columns.

    Args:
        run_dir: The folder of a run, finished or not.

    Returns:
        A table of the models and one of the iterations, with ``-`` where a figure is missing, then
        the verdict and the warnings.

    Raises:
        RunError: There is no such folder.
    """
    run = read_run(Path(run_dir))
    names = ("win rate against SFT", "mean reward", "mean tokens", "cut at limit", "steps")
    blocks = [_aligned([("model", *names), *_evaluation_cells(run)])]
    if rows := [(*cells[:4], cells[-1]) for cells in _iteration_cells(run)]:
        own = ("label accuracy", "held-out accuracy", "pairs", "noisy")
        blocks.append(_aligned([("iteration", *own), *rows]))
    lines = [*_verdict(run), *(f"warning: {clean(text)}" for text in run.warnings)]
    blocks.append("\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in lines))
    return "\n\n".join(blocks)


def _aligned(rows: list[tuple[str, ...]]) -> str:
    rows = [(_shortened(row[0], 30), *(_shortened(cell, 20) for cell in row[1:])) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join(lines)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _date(folder: Path) -> str:
    paths = [*folder.glob("*.json"), *folder.glob("*.jsonl"), *folder.glob("*/*.jsonl")]
    if not paths:
        return "date unknown"
    latest = max(path.stat().st_mtime for path in paths)
    return datetime.fromtimestamp(latest, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


# Figures in cells and words.


def _cell(value: Any, digits: int = 3) -> str:
    number = number_of(value)
    if number is None:
        return _MISSING
    return f"{number:.{digits}f}" if abs(number) < 1e6 else f"{number:.3g}"


def _percent(value: Any) -> str:
    number = number_of(value)
    return _MISSING if number is None else f"{100 * number:.1f} %"


def _rate(rate: Any, error: Any) -> str:
    known = number_of(rate) is not None and number_of(error) is not None
    return f"{_cell(rate)} ± {_cell(error)}" if known else _cell(rate)


def _evaluation_cells(run: RunFigures) -> list[tuple[str, ...]]:
    return [
        (
            _name(row),
            _rate(row.get("win_rate"), row.get("win_rate_stderr")),
            _cell(row.get("mean_reward")),
            _cell(row.get("mean_tokens"), 1),
            _percent(row.get("cut_share")),
            _cell(row.get("steps"), 0),
        )
        for row in run.evaluation
    ]


def _iteration_cells(run: RunFigures) -> list[tuple[str, ...]]:
    def accuracy(iteration: IterationFigures, name: str, pairs: str) -> str:
        text, count = _cell(iteration.gauged(name)), iteration.gauged(pairs)
        return f"{text} of {count:.0f}" if count and text != _MISSING else text

    return [
        (
            str(iteration.number),
            accuracy(iteration, "label_accuracy", "label_pairs"),
            accuracy(iteration, "judge_accuracy", "held_out_pairs"),
            str(iteration.pairs or _MISSING),
            _cell(iteration.gauged("mean_tokens"), 1),
            _cell(iteration.gauged("length_ratio"), 2),
            _percent(iteration.gauged("cut_share")),
            _percent(iteration.noisy),
        )
        for iteration in run.iterations
    ]


def _name(row: Row) -> str:
    return " ".join(clean(row.get("name") or row["key"]).split())


def _verdict(run: RunFigures) -> list[str]:
    """Say in sentences how the last iteration did against each of the others."""
    if not run.evaluation:
        return ["No verdict: there is no evaluation."]
    if run.last is None:
        return ["No verdict: no iteration has been evaluated."]
    models, last = run.models, run.models[run.last]
    sentences, outcomes = [], {}
    for key in ("init", "seed", "control", "all-labels"):
        if key not in models:
            continue
        if key == "init":
            rate, error = number_of(last.get("win_rate")), number_of(last.get("win_rate_stderr"))
        else:
            rate, error = run.head_to_head(run.last, key)
        pair = f"{_name(last)} {{}} {_name(models[key])}"
        if rate is None:
            sentences.append(pair.replace("{}", "was not compared with") + ".")
            continue
        outcomes[key] = _outcome(rate, error)
        wins = f"it wins {_rate(rate, error)} of the prompts"
        sentences.append(f"{pair.replace('{}', outcomes[key])}: {wins}.")
    if "control" not in models:
        sentences.append(
            "There is no control trained for as many steps, so more steps alone may explain a gain."
        )
    elif outcomes.get("seed") == "beats" and outcomes.get("control") != "beats":
        sentences.append("So more steps on the human labels alone gain as much over the seed.")
    rates = {k: number_of(row.get("win_rate")) for k, row in models.items() if iteration_number(k)}
    known = {key: rate for key, rate in rates.items() if rate is not None}
    if run.last in known:
        best = max(known, key=known.__getitem__)
        slack = 2 * (number_of(last.get("win_rate_stderr")) or 0.0)
        if known[best] > known[run.last] + slack:
            fell = f"from {known[best]:.3f} against SFT to {known[run.last]:.3f}"
            sentences.append(f"It got worse after {_name(models[best])}: {fell}.")
    return sentences


def _outcome(rate: float, error: float | None) -> str:
    if abs(rate - 0.5) <= 2 * (error or 0.0):
        return "cannot be told apart from"
    return "beats" if rate > 0.5 else "loses to"


# Plots and samples.


def _sections(run: RunFigures) -> list[tuple[str, list[plots.Plot]]]:
    rates = [
        (row["key"], _name(row), rate, number_of(row.get("win_rate_stderr")))
        for row in run.evaluation
        if (rate := number_of(row.get("win_rate"))) is not None
    ]
    gauge = {it.number: it for it in run.iterations}
    held_out = {
        n: (p, int(it.gauged("held_out_pairs") or 0))
        for n, it in gauge.items()
        if (p := it.gauged("judge_accuracy")) is not None
    }
    labels = {n: p for n, it in gauge.items() if (p := it.gauged("label_accuracy")) is not None}
    cut = {n: it.cut for n, it in gauge.items() if it.cut is not None}
    quantile = number_of(run.setting("noise.quantile"))

    def limit(name: str) -> float | None:
        return number_of(run.setting(name))

    sections = [
        ("Evaluation", [plots.win_rates(rates)]),
        (
            "Gauge against collapse",
            [
                plots.judge(held_out, labels, limit("gauge.min_accuracy")),
                plots.lengths(
                    {n: s for n, it in gauge.items() if (s := _spread(it)) is not None},
                    limit("generation.max_new_tokens"),
                    _longest(run),
                ),
                plots.shares(
                    "Responses cut at the length limit",
                    "share of responses",
                    cut,
                    limit("gauge.max_cut"),
                    "A cut response has no end; many of them are a model that does not stop.",
                ),
                plots.margins({n: np.asarray(it.margins) for n, it in gauge.items()}),
            ],
        ),
        (
            "Training",
            [
                plots.over_steps(
                    "Margins in training",
                    "reward of chosen − rejected (nats)",
                    run.series("rewards/margins"),
                    note="Against each stage's own reference, so every stage begins at 0.",
                ),
                plots.over_steps(
                    "Accuracy in training",
                    "share of pairs",
                    run.series("rewards/accuracies"),
                    note="Pairs whose chosen response has the higher reward.",
                    share=True,
                ),
                plots.over_steps("Loss", "loss (nats per pair)", run.series("loss")),
            ],
        ),
        (
            "Noise detection",
            [
                plots.over_steps(
                    "Pairs flagged noisy",
                    "share of pairs",
                    run.series("noise/share"),
                    lines={} if quantile is None else {"quantile asked for": quantile},
                    note="Flagged: confidence below the threshold.",
                ),
                plots.over_steps(
                    "Threshold of confidence",
                    "confidence (probability)",
                    run.series("noise/threshold"),
                    note="A pair whose confidence is lower is flagged.",
                ),
                plots.shares(
                    "Pairs flagged noisy, whole iteration",
                    "share of pairs",
                    {n: it.noisy for n, it in gauge.items() if it.noisy is not None},
                    None,
                    "Of the pairs trained on while there was a threshold.",
                ),
            ],
        ),
    ]
    drawn = [(title, [plot for plot in found if plot]) for title, found in sections]
    return [(title, found) for title, found in drawn if found]


def _spread(iteration: IterationFigures) -> plots.Spread | None:
    if iteration.tokens:
        quantiles = np.quantile(iteration.tokens, (0.1, 0.25, 0.75, 0.9))
        return plots.Spread(float(np.mean(iteration.tokens)), tuple(map(float, quantiles)))
    mean = iteration.gauged("mean_tokens")
    return None if mean is None else plots.Spread(mean)


def _longest(run: RunFigures) -> float | None:
    """Return the mean length past which the gauge warns, from a ratio it has reported."""
    most = number_of(run.setting("gauge.max_length_ratio"))
    for iteration in run.iterations:
        mean, ratio = iteration.gauged("mean_tokens"), iteration.gauged("length_ratio")
        if most is not None and mean is not None and ratio:
            return most * mean / ratio
    return None


def _samples(run: RunFigures) -> tuple[str, list[Sample]]:
    """Return a heading and some prompts with what the models, or the judge, made of them.

    The rows lie evenly spread over the file, so the same run shows the same samples.
    """
    keys = [key for key in ("init", "seed", run.last) if key in run.models]
    count = sum(1 for _ in run.completions(keys[0])) if keys else 0
    if count:
        picked = [_evenly(run.completions(key), count) for key in keys]
        names = [_name(run.models[key]) for key in keys]
        samples = [
            _sample(
                rows[0].get("prompt"),
                [
                    (name, row.get("completion"), "reward", row.get("reward"), row)
                    for name, row in zip(names, rows, strict=True)
                    if row.get("prompt") == rows[0].get("prompt")
                ],
            )
            for rows in itertools.zip_longest(*picked, fillvalue={})
        ]
        return "the evaluation's prompts", samples
    paths = [run.folder / it.name / "pairs.jsonl" for it in run.iterations if it.pairs]
    if not paths:
        return "", []
    rows = _evenly(rows_of(paths[-1]), run.iterations[-1].pairs)
    samples = [
        _sample(
            row.get("prompt"),
            [
                (side, row.get(side), "judge's reward", row.get(f"{side}_reward"), {})
                for side in ("chosen", "rejected")
            ],
        )
        for row in rows
    ]
    return f"pairs of {paths[-1].parent.name}, as the judge labelled them", samples


def _evenly(rows: Iterable[Row], count: int) -> list[Row]:
    places = {count * i // SAMPLES for i in range(SAMPLES)}
    return [row for place, row in enumerate(rows) if place in places]


def _sample(prompt: Any, answers: list[tuple[str, Any, str, Any, Row]]) -> Sample:
    texts = []
    for name, text, label, reward, row in answers:
        facts = [f"{label} {_cell(reward)}"]
        if (tokens := number_of(row.get("tokens"))) is not None:
            facts.append(f"{tokens:.0f} tokens")
        if row.get("cut") is True:
            facts.append("cut at the limit")
        texts.append((name, ", ".join(facts), _excerpt(text)))
    return _excerpt(prompt), texts


def _excerpt(content: Any) -> str:
    text = text_of(content)
    if len(text) <= _SAMPLE_CHARACTERS:
        return text
    return f"{text[:_SAMPLE_CHARACTERS]}… [{len(text):,} characters in all]"
