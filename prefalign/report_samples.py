"""The samples of a report: some prompts, with what the models made of them side by side."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from .report_tables import cell, model_name
from .run_figures import Row, RunFigures, number_of, rows_of, text_of

SAMPLES = 8  # prompts shown side by side
_SAMPLE_CHARACTERS = 1500

# A prompt, and each answer to it: whose it is, facts about it, its text.
Sample = tuple[str, list[tuple[str, str, str]]]


def samples_of(run: RunFigures, result: str | None) -> tuple[str, list[Sample]]:
    """Return a heading and some prompts with what the models, or an iteration, made of them.

    The rows lie evenly spread over the file, so the same run shows the same samples.

    Args:
        run: The run.
        result: Key of the model that the run came to.
    """
    first = run.evaluation[0]["key"] if run.evaluation else None
    keys = [key for key in dict.fromkeys((first, "seed", "sft", result)) if key in run.models]
    count = sum(1 for _ in run.completions(keys[0])) if keys else 0
    if count:
        picked = [_evenly(run.completions(key), count) for key in keys]
        names = [model_name(run.models[key]) for key in keys]
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
    return _pairs(run)


def _pairs(run: RunFigures) -> tuple[str, list[Sample]]:
    found = [iteration for iteration in run.iterations if iteration.pairs]
    if not found:
        return "", []
    last = found[-1]
    rows = _evenly(rows_of(run.folder / last.name / "pairs.jsonl"), last.pairs)
    # A pair of a guided and a plain response says whether it is ranked; the judge's is a label.
    guided = any("ranked" in row for row in rows)
    names = ("guided", "plain") if guided else ("chosen", "rejected")
    label = "reward" if guided else "judge's reward"
    samples = [
        _sample(
            row.get("prompt"),
            [
                (name, row.get(side), label, row.get(f"{side}_reward"), {})
                for name, side in zip(names, ("chosen", "rejected"), strict=True)
            ],
        )
        for row in rows
    ]
    if guided:
        return f"guided and plain responses of {last.name}", samples
    return f"pairs of {last.name}, as the judge labelled them", samples


def _evenly(rows: Iterable[Row], count: int) -> list[Row]:
    places = {count * i // SAMPLES for i in range(SAMPLES)}
    return [row for place, row in enumerate(rows) if place in places]


def _sample(prompt: Any, answers: list[tuple[str, Any, str, Any, Row]]) -> Sample:
    texts = []
    for name, text, label, reward, row in answers:
        facts = [f"{label} {cell(reward)}"]
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
