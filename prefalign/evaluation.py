"""Evaluation: a response of every model to the same prompts, their rewards, their wins."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from datasets import Dataset

from .data import as_text
from .pipeline import Pipeline
from .rewards import Reward, Rewards, call_reward
from .run_folder import write_json, write_rows


class Evaluated(NamedTuple):
    """A model that is evaluated, and the prompts that it is given.

    Args:
        key: Name of its row and files.
        name: What tables call it.
        stage: The stage whose weights it has.
        prompt_ids: What it answers, one prompt for each of the evaluation's.
    """

    key: str
    name: str
    stage: str
    prompt_ids: Sequence[list[int]]


def evaluate(
    parts: Pipeline, models: Sequence[Evaluated], prompts: Dataset, reward: Reward
) -> None:
    """Sample a response to each prompt from each model and compare rewards with the first's.

    Writes ``evaluation/<key>.jsonl`` and ``evaluation.json``.

    Args:
        parts: The run's parts.
        models: The models; the first is the baseline.
        prompts: The prompts, as the reward gets them.
        reward: The reward.
    """
    given = list(prompts["prompt"])
    texts = [as_text(prompt) for prompt in given]
    rewards: dict[str, list[float]] = {}
    table = []
    for key, name, stage, prompt_ids in models:
        rows = parts.generate(f"evaluation/{key}/generated", stage, prompt_ids, samples=1)
        completions = [parts.decode(row["ids"][0]) for row in rows]
        with Rewards(reward).on_device(parts.process.device):
            rewards[key] = call_reward(reward, given, completions)
        tokens = [len(row["ids"][0]) for row in rows]
        cut = [row["cut"][0] for row in rows]
        if parts.process.is_main_process:
            write_rows(
                parts.run.path / "evaluation" / f"{key}.jsonl",
                (
                    dict(
                        zip(
                            ("prompt", "completion", "reward", "tokens", "cut"),
                            row,
                            strict=True,
                        )
                    )
                    for row in zip(texts, completions, rewards[key], tokens, cut, strict=True)
                ),
            )
        baseline = rewards[models[0].key]
        wins = [
            0.5 + 0.5 * ((ours > theirs) - (ours < theirs))
            for ours, theirs in zip(rewards[key], baseline, strict=True)
        ]
        table.append(
            {
                "name": name,
                "key": key,
                "win_rate": statistics.fmean(wins),
                "win_rate_stderr": statistics.pstdev(wins) / math.sqrt(len(wins)),
                "mean_reward": statistics.fmean(rewards[key]),
                "mean_tokens": statistics.fmean(tokens),
                "cut_share": statistics.fmean(cut),
                "steps": parts.steps_of(stage),
                "prompts": len(texts),
            }
        )
    if parts.process.is_main_process:
        write_json(parts.run.path / "evaluation.json", table)
