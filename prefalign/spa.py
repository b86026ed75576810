"""Spread Preference Annotation (SPA): a few human labels, then the model labels for itself.

Selfee, arXiv 2406.04412 (ICLR 2025). The algorithm is ``SPA.run`` and reads from top to bottom; the
parts that it is put together from are in ``pipeline``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from datasets import Dataset

from .config import SPASettings
from .data import (
    as_text,
    hold_out,
    load_preferences,
    load_prompts,
    split_prompts,
    warn_shared_prompts,
)
from .errors import CollapseError
from .gauge import read_gauge
from .kernels.pairwise_preference_logits import pairwise_preference_logits
from .noise_aware import NoiseAwareTrainer
from .packing import Group
from .pipeline import INIT, Pipeline, Reward, call_reward, load_reward
from .references import snapshot_reference
from .report import write_report
from .run_folder import StepLog, read_rows, write_rows
from .tokenization import (
    check_vocabulary,
    groups_from_pairs,
    is_conversational,
    tokenize_preferences,
    tokenize_prompts,
)
from .trainer import PreferenceTrainer

logger = logging.getLogger(__name__)

SEED, CONTROL, ALL_LABELS = "seed", "control", "all-labels"


def iteration_stage(i: int) -> str:
    """Return the name of iteration i's stage; π_0 is the seed's."""
    return SEED if i == 0 else f"iteration-{i}"


class SPA:
    """The whole algorithm, over one output folder.

    Args:
        settings: Every setting; the paper's values are the defaults.

    Raises:
        UserError: Something in the settings, the data or the model cannot be used; before training.
    """

    def __init__(self, settings: SPASettings):
        settings.validate()
        self.settings = settings
        self.reward: Reward | None = None
        if settings.evaluation.reward:
            self.reward = load_reward(settings.evaluation.reward)
        self.parts = SPAPipeline(settings, "spa")
        self.tokenizer = self.parts.tokenizer
        self.parts.check_model()
        self._read_data()
        self.parts.begin()

    def run(self) -> None:
        """Run the algorithm, or what is left of it."""
        settings, parts = self.settings, self.parts
        self.say(
            f"{SEED}: DPO on {len(self.seed_pairs)} labelled pairs; "
            f"{len(self.held_out)} more are held out to watch the judge"
        )
        self.train_seed()
        for i in range(1, settings.iterations + 1):
            stage, previous = iteration_stage(i), iteration_stage(i - 1)
            responses = self.generate(stage, previous, self.prompts[i - 1])
            pairs, held_out_margins = self.judge(stage, previous, responses)
            self.read_gauge(stage, responses, pairs, held_out_margins)
            self.train_iteration(i, pairs)
            self.report()
        self.train_controls()
        if self.reward is not None:
            parts.evaluate(self.models(), self.eval_prompts, self.reward)
        self.report()

    # 0. The data

    def _read_data(self) -> None:
        settings, tokenizer = self.settings, self.tokenizer
        lengths = {
            "max_length": settings.data.max_length,
            "max_prompt_length": settings.data.max_prompt_length,
        }

        def pairs(source: str) -> Dataset:
            rows = load_preferences(source)
            return checked(tokenize_preferences(rows, tokenizer, source=source, **lengths), source)

        def prompts(source: str) -> Dataset:
            # Beside conversations, a plain prompt is a user's message.
            rows = load_prompts(source, conversational=is_conversational(labelled))
            return checked(tokenize_prompts(rows, tokenizer, source=source, **lengths), source)

        def checked(rows: Dataset, source: str) -> Dataset:
            check_vocabulary(rows, self.parts.vocabulary, source)
            return rows

        labelled = pairs(settings.data.preferences)
        self.seed_pairs, self.held_out = hold_out(
            labelled,
            fraction=settings.gauge.holdout,
            minimum=settings.gauge.holdout_minimum,
            seed=settings.seed,
            source=settings.data.preferences,
        )
        self.prompts: list[Dataset] = []
        if settings.iterations:
            fresh = prompts(settings.data.prompts)
            sizes = settings.data.prompts_per_iteration
            self.prompts = split_prompts(
                fresh,
                sizes,
                iterations=settings.iterations,
                seed=settings.seed,
                source=settings.data.prompts,
            )
            warn_shared_prompts(labelled, fresh, source=settings.data.prompts)
        if self.reward is not None:
            assert settings.evaluation.prompts is not None
            self.eval_prompts = prompts(settings.evaluation.prompts)
        if settings.evaluation.all_labels:
            self.all_pairs = pairs(settings.evaluation.all_labels)

    # 1. Seed: π_0 is DPO on the human labels, against π_init

    def train_seed(self) -> None:
        """Train π_0."""
        groups = self.with_reference("seed/reference", INIT, groups_from_pairs(self.seed_pairs))
        self.parts.train(SEED, INIT, groups, epochs=self.settings.training.seed_epochs)

    def with_reference(self, name: str, stage: str, groups: Sequence[Group]) -> list[Group]:
        """Return pairs with the log-probs that ``stage``'s policy gives their responses."""
        logps = self.parts.score(name, stage, groups)
        return [
            Group(g.prompt_ids, g.response_ids, g.example_id, {"reference_logps": values})
            for g, values in zip(groups, logps, strict=True)
        ]

    # 2a. Generate K responses to each fresh prompt from π_{i-1}

    def generate(self, stage: str, previous: str, prompts: Dataset) -> list[dict[str, Any]]:
        """Sample responses; a row for each prompt."""
        rows = self.parts.generate(f"{stage}/generated", previous, prompts)
        return [
            {"prompt": prompt, **row} for prompt, row in zip(prompts["prompt"], rows, strict=True)
        ]

    # 2b. Judge them by π_{i-1}'s own logits, against π_init (equation 7)

    def judge(
        self, stage: str, previous: str, responses: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[float]]:
        """Score the responses and pair them; writes ``responses.jsonl`` and ``pairs.jsonl``.

        Returns:
            The pairs, and the judge's margin on each held-out human pair.
        """
        groups = [Group(row["prompt_ids"], row["ids"], i) for i, row in enumerate(responses)]
        held_out = groups_from_pairs(self.held_out)
        policy, reference = self.judge_logps(stage, previous, [*groups, *held_out])
        beta = self.settings.beta
        margins = [
            beta * ((p[0] - r[0]) - (p[1] - r[1]))
            for p, r in zip(policy[len(groups) :], reference[len(groups) :], strict=True)
        ]
        policy, reference = policy[: len(groups)], reference[: len(groups)]
        sizes = [len(row["ids"]) for row in responses]
        flat = [torch.tensor([x for row in rows for x in row]) for rows in (policy, reference)]
        logits = pairwise_preference_logits(*flat, group_sizes=sizes, beta=beta)
        pairs: list[dict[str, Any]] = []
        for index, row in enumerate(responses):
            row["policy_logps"], row["reference_logps"] = policy[index], reference[index]
            row["rewards"] = [
                beta * (p - r) for p, r in zip(policy[index], reference[index], strict=True)
            ]
            row["tokens"] = [len(ids) for ids in row["ids"]]
            row["responses"] = [self.parts.decode(ids) for ids in row["ids"]]
            table = logits[index, : sizes[index], : sizes[index]]
            for winner, loser in self.pairing(table, row["ids"]):
                pairs.append(
                    {
                        "prompt": row["prompt"],
                        "chosen": row["responses"][winner],
                        "rejected": row["responses"][loser],
                        "chosen_reward": row["rewards"][winner],
                        "rejected_reward": row["rewards"][loser],
                        "preference": torch.sigmoid(table[winner, loser]).item(),
                        "example_id": len(pairs),
                        "prompt_ids": row["prompt_ids"],
                        "chosen_ids": row["ids"][winner],
                        "rejected_ids": row["ids"][loser],
                        "reference_logps": [policy[index][winner], policy[index][loser]],
                    }
                )
        if dropped := len(responses) - len({id(p["prompt_ids"]) for p in pairs}):
            self.say(
                f"{stage}: {dropped} of {len(responses)} prompts gave equal responses or scores, "
                "and so no pair"
            )
        if self.parts.process.is_main_process and not self.parts.run.finished(stage):
            write_rows(self.parts.folder(stage) / "responses.jsonl", responses)
            write_rows(
                self.parts.folder(stage) / "pairs.jsonl",
                ({**pair, "confidence": None, "noisy": None} for pair in pairs),
            )
        self.parts.process.wait_for_everyone()
        return pairs, margins

    def judge_logps(
        self, stage: str, previous: str, groups: Sequence[Group]
    ) -> tuple[list[list[float]], list[list[float]]]:
        """Return the judge's two log-probs of each response: the policy's and its reference's."""
        policy = self.parts.score(f"{stage}/policy_logps", previous, groups)
        match self.settings.judge.reference:
            case "none":
                return policy, [[0.0] * len(logps) for logps in policy]
            case "previous":
                i = 0 if previous == SEED else int(previous.rsplit("-", 1)[1])
                against = INIT if i == 0 else iteration_stage(i - 1)
            case _:
                against = INIT
        return policy, self.parts.score(f"{stage}/reference_logps", against, groups)

    def pairing(self, logits: torch.Tensor, ids: list[list[int]]) -> list[tuple[int, int]]:
        """Return (winner, loser) of each pair made of one prompt's responses.

        Args:
            logits: Pairwise preference logits, ``[K, K]``.
            ids: The responses' tokens: equal responses make no pair.
        """
        count = len(ids)
        if self.settings.judge.pairing == "best_worst":
            # Row 0 orders all: logits[0, j] = r_0 - r_j.
            candidates = [(int(logits[0].argmin()), int(logits[0].argmax()))]
        else:
            candidates = [(a, b) for a in range(count) for b in range(count) if logits[a, b] > 0]
        return [(a, b) for a, b in candidates if logits[a, b] > 0 and ids[a] != ids[b]]

    # The gauge, before anything is trained on the labels

    def read_gauge(
        self,
        stage: str,
        responses: list[dict[str, Any]],
        pairs: list[dict[str, Any]],
        held_out_margins: list[float],
    ) -> None:
        """Read the gauge; warn, or stop the run, where a reading is past its threshold."""
        gauge = StepLog(self.parts.run.path / "gauge.jsonl")
        taken = gauge.rows(stage)
        self.parts.process.wait_for_everyone()  # all have looked before one writes
        if taken:
            self.stop_on_collapse(stage, taken[-1]["warnings"])
            return
        labelled = [
            len(ids)
            for rows in (self.seed_pairs, self.held_out)
            for column in ("chosen_ids", "rejected_ids")
            for ids in rows[column]
        ]
        reading = read_gauge(
            held_out_margins,
            [n for row in responses for n in row["tokens"]],
            [c for row in responses for c in row["cut"]],
            sum(labelled) / len(labelled),
        )
        warnings = reading.warnings(self.settings.gauge)
        self.say(
            f"{stage}: {len(pairs)} pairs from {len(responses)} prompts; the judge orders "
            f"{reading.judge_accuracy:.0%} of the held-out labels rightly; responses average "
            f"{reading.mean_tokens:.1f} tokens, {reading.cut_share:.0%} cut"
        )
        for warning in warnings:
            self.say(f"{stage}: warning: {warning}")
        if self.parts.process.is_main_process:
            row = {"stage": stage, "step": 0, **asdict(reading), "warnings": warnings}
            gauge.append([row | self.label_accuracy(pairs)])
        self.parts.process.wait_for_everyone()
        self.stop_on_collapse(stage, warnings)

    def stop_on_collapse(self, stage: str, warnings: list[str]) -> None:
        """Stop the run where the gauge warned and the settings say so."""
        if warnings and self.settings.gauge.on_collapse == "stop":
            self.report()
            raise CollapseError(
                f"{stage}: stopped before training: {'; '.join(warnings)} "
                "(go on with --resume --gauge.on_collapse warn)"
            )

    def label_accuracy(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return how often the judge's labels agree with the evaluation's reward, ties left out."""
        if self.reward is None or not pairs:
            return {"label_accuracy": None, "label_pairs": 0}
        prompts = [as_text(pair["prompt"]) for pair in pairs]
        chosen, rejected = (
            call_reward(self.reward, prompts, [pair[side] for pair in pairs])
            for side in ("chosen", "rejected")
        )
        decided = [a > b for a, b in zip(chosen, rejected, strict=True) if a != b]
        accuracy = sum(decided) / len(decided) if decided else None
        return {"label_accuracy": accuracy, "label_pairs": len(decided)}

    # 2c. Train π_i from π_{i-1} on its own labels, against π_{i-1}, with the noise-aware loss

    def train_iteration(self, i: int, pairs: list[dict[str, Any]]) -> None:
        """Train π_i."""
        groups = [
            Group(
                pair["prompt_ids"],
                (pair["chosen_ids"], pair["rejected_ids"]),
                pair["example_id"],
                {"reference_logps": pair["reference_logps"]},
            )
            for pair in pairs
        ]
        noise = self.settings.noise
        extrapolation = noise.lambdas[min(i, len(noise.lambdas)) - 1]
        self.parts.train(
            iteration_stage(i),
            iteration_stage(i - 1),
            groups,
            epochs=self.settings.training.epochs,
            trainer_class=NoiseAwareTrainer,
            reference=snapshot_reference if extrapolation else None,
            noise=noise,
            extrapolation=extrapolation,
        )

    # 3. What to compare with

    def train_controls(self) -> None:
        """Train the controls: plain DPO for as many steps as SPA took in all."""
        evaluation = self.settings.evaluation
        steps = self.parts.steps_of(iteration_stage(self.settings.iterations))
        if evaluation.control:
            groups = self.with_reference("seed/reference", INIT, groups_from_pairs(self.seed_pairs))
            self.parts.train(CONTROL, INIT, groups, max_steps=steps)
        if evaluation.all_labels:
            rows = [
                *groups_from_pairs(self.seed_pairs),
                *groups_from_pairs(self.all_pairs),
            ]
            groups = self.with_reference(f"{ALL_LABELS}/reference", INIT, rows)
            self.parts.train(ALL_LABELS, INIT, groups, max_steps=steps)

    def models(self) -> list[tuple[str, str]]:
        """Return the stage and shown name of every model that the run has made."""
        named = [(INIT, "SFT"), (SEED, "seed DPO")]
        if self.settings.evaluation.control:
            named.append((CONTROL, "seed DPO, as many steps"))
        named += [(iteration_stage(i), f"SPA {i}") for i in range(1, self.settings.iterations + 1)]
        if self.settings.evaluation.all_labels:
            named.append((ALL_LABELS, "DPO, all labels"))
        return named

    def say(self, message: str) -> None:
        """Tell the user, once and not from every process."""
        if self.parts.process.is_main_process:
            logger.info(message)

    def report(self) -> None:
        """Write ``report.html`` over what there is."""
        if self.parts.process.is_main_process:
            write_report(self.parts.run.path)
        self.parts.process.wait_for_everyone()


class SPAPipeline(Pipeline):
    """The parts, with the noise flags that training leaves."""

    def _after_training(self, stage: str, trainer: PreferenceTrainer) -> dict[str, Any]:
        if not isinstance(trainer, NoiseAwareTrainer):
            return {}
        judged = {
            int(example): (confidence, None if math.isnan(noisy) else bool(noisy))
            for example, confidence, noisy in trainer.threshold.rows()
        }
        path = self.folder(stage) / "pairs.jsonl"
        if self.process.is_main_process:
            rows = read_rows(path)
            for row in rows:
                row["confidence"], row["noisy"] = judged.get(row["example_id"], (None, None))
            write_rows(path, rows)
        flags = [noisy for _, noisy in judged.values() if noisy is not None]
        share = sum(flags) / len(flags) if flags else None
        return {"noisy_share": share, "pairs_examined": len(flags)}
