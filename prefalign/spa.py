"""Spread Preference Annotation (SPA): a few human labels, then the model labels for itself.

Selfee, arXiv 2406.04412 (ICLR 2025). The algorithm is ``SPA.run`` and reads from top to bottom; the
parts that it is put together from are in ``pipeline``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset

from .data import hold_out, split_prompts, warn_shared_prompts
from .evaluation import Evaluated
from .gauge import read_gauge
from .judging import judge
from .loop import Arm, Run
from .noise_aware import NoiseAwareTrainer
from .packed_trainer import PackedTrainer
from .packing import Group
from .pipeline import INIT, Pipeline
from .planner import Work
from .references import snapshot_reference
from .rewards import call_reward
from .run_folder import read_rows, write_rows
from .spa_config import SPASettings
from .tokenization import groups_from_pairs, is_conversational
from .trainer import PreferenceTrainer

SEED, CONTROL, ALL_LABELS = "seed", "control", "all-labels"
ITSELF = Arm(SEED)


class SPAPipeline(Pipeline):
    """The parts, with the judge and the noise flags that training leaves."""

    def judge(
        self, name: str, stage: str, against: str | None, groups: Sequence[Group], *, beta: float
    ) -> Iterator[dict[str, Any]]:
        """Judge each group's responses by ``stage``'s policy, against another's or nothing.

        Yields:
            A row for each group, read back file by file: ``Judgement``'s fields.
        """
        with contextlib.ExitStack() as loaded:
            models: list[Any] = []  # loaded when there is something left to judge

            def work(chunk: Sequence[Group], seed: int) -> list[dict[str, Any]]:
                if not models:
                    models.append(self.fixed(stage))
                    beside = self.beside(against) if against else contextlib.nullcontext()
                    models.append(loaded.enter_context(beside))
                with self.autocast():
                    judgements = judge(
                        models[0],
                        models[1],
                        chunk,
                        beta=beta,
                        max_tokens=self.scoring_tokens,
                        share_prompts=self.settings.training.share_prompts,
                    )
                    return [{**j._asdict(), "table": j.table.tolist()} for j in judgements]

            size = self.settings.generation.chunk_size
            files = self.chunk_files(name, groups, work, size)
        return (row for file in files for row in read_rows(file))

    def _after_training(self, stage: str, trainer: PackedTrainer) -> dict[str, Any]:
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


class SPA(Run[SPASettings]):
    """The whole algorithm, over one output folder. ``Run.run`` is its loop.

    Args:
        settings: Every setting; the paper's values are the defaults.

    Raises:
        UserError: Something in the settings, the data or the model cannot be used; before training.
    """

    algorithm = "spa"
    pipeline = SPAPipeline
    parts: SPAPipeline

    # 0. The data

    def read_data(self) -> None:
        """Read the labelled seed, of which a part is held out, and the fresh prompts."""
        settings = self.settings
        self.labelled = self.read_pairs(settings.data.preferences)
        self.seed_pairs, self.held_out = hold_out(
            self.labelled,
            fraction=settings.gauge.holdout,
            minimum=settings.gauge.holdout_minimum,
            seed=settings.seed,
            source=settings.data.preferences,
        )
        if settings.iterations:
            fresh = self.read_prompts(settings.data.prompts)
            self.prompts = split_prompts(
                fresh,
                settings.data.prompts_per_iteration,
                iterations=settings.iterations,
                seed=settings.seed,
                source=settings.data.prompts,
            )
            warn_shared_prompts(self.labelled, fresh, source=settings.data.prompts)
        if settings.evaluation.all_labels:
            self.all_pairs = self.read_pairs(settings.evaluation.all_labels)

    @property
    def conversational(self) -> bool:
        """Whether the labelled pairs are conversations."""
        return is_conversational(self.labelled)

    def works(self) -> list[Work]:
        """Return the seed's training, the iterations', and that on all labels."""
        works = [self.work(SEED, groups_from_pairs(self.seed_pairs), scored=True)]
        if self.prompts:
            ids = (x for prompts in self.prompts for x in prompts["prompt_ids"])
            extrapolated = any(self.settings.noise.lambdas)
            works.append(
                self.work(
                    "iterations",
                    self.awaited(ids, 2),
                    reference="copy" if extrapolated else "logps",
                    extrapolated=extrapolated,
                    scored=True,
                )
            )
        if self.settings.evaluation.all_labels:
            works.append(self.work(ALL_LABELS, groups_from_pairs(self.all_pairs), scored=True))
        return works

    def arms(self) -> Sequence[Arm]:
        """Return the one way through the iterations."""
        return (ITSELF,)

    # 1. Seed: π_0 is DPO on the human labels, against π_init

    def start(self) -> None:
        """Train π_0."""
        self.say(
            f"{SEED}: DPO on {len(self.seed_pairs)} labelled pairs; "
            f"{len(self.held_out)} more are held out to watch the judge"
        )
        groups = self.with_reference("seed/reference", INIT, groups_from_pairs(self.seed_pairs))
        self.train_dpo(SEED, groups, epochs=self.settings.training.seed_epochs)

    def train_dpo(self, stage: str, groups: Sequence[Group], **length: Any) -> None:
        """Train plain DPO on labels, from π_init."""
        self.parts.train(
            stage,
            INIT,
            groups,
            trainer_class=PreferenceTrainer,
            beta=self.settings.beta,
            **length,
        )

    # 2a. Generate K responses to each fresh prompt from π_{i-1}

    def generate(self, arm: Arm, i: int, prompts: Dataset) -> list[dict[str, Any]]:
        """Sample responses; a row for each prompt."""
        rows = self.parts.generate(
            f"{arm.stage(i)}/generated",
            arm.stage(i - 1),
            prompts["prompt_ids"],
            samples=self.settings.generation.samples_per_prompt,
        )
        return [
            {"prompt": prompt, **row} for prompt, row in zip(prompts["prompt"], rows, strict=True)
        ]

    # 2b. Judge them by π_{i-1}'s own logits, against π_init (equation 7)

    def score(self, arm: Arm, i: int, responses: list[dict[str, Any]]) -> list[Group]:
        """Judge the responses, watch the judge, and return the pairs it makes."""
        stage, previous = arm.stage(i), arm.stage(i - 1)
        pairs, held_out_margins = self.judge(stage, previous, responses)
        self.watch(stage, responses, pairs, held_out_margins)
        return [
            Group(
                pair["prompt_ids"],
                (pair["chosen_ids"], pair["rejected_ids"]),
                pair["example_id"],
                {"reference_logps": pair["reference_logps"]},
            )
            for pair in pairs
        ]

    def judge(
        self, stage: str, previous: str, responses: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[float]]:
        """Score the responses and pair them; writes ``responses.jsonl`` and ``pairs.jsonl``.

        Returns:
            The pairs, and the judge's margin on each held-out human pair.
        """
        groups = [Group(row["prompt_ids"], row["ids"], i) for i, row in enumerate(responses)]
        held_out = groups_from_pairs(self.held_out)
        judged = self.parts.judge(
            f"{stage}/judged",
            previous,
            self.judge_reference(previous),
            [*groups, *held_out],
            beta=self.settings.beta,
        )
        pairs: list[dict[str, Any]] = []
        for row, found in zip(responses, judged):  # noqa: B905 - the held-out pairs come after
            table = torch.tensor(found.pop("table"))
            row |= found
            row["tokens"] = [len(ids) for ids in row["ids"]]
            row["responses"] = [self.parts.decode(ids) for ids in row["ids"]]
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
                        "reference_logps": [row["policy_logps"][k] for k in (winner, loser)],
                    }
                )
        margins = []
        for found in judged:
            ratios = zip(found["policy_logps"], found["reference_logps"], strict=True)
            chosen, rejected = (p - r for p, r in ratios)
            margins.append(self.settings.beta * (chosen - rejected))
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

    def judge_reference(self, previous: str) -> str | None:
        """Return the stage whose policy the judge is compared with."""
        match self.settings.judge.reference:
            case "none":
                return None
            case "previous" if previous != SEED:
                return ITSELF.stage(int(previous.rsplit("-", 1)[1]) - 1)
            case _:
                return INIT

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

    def watch(
        self,
        stage: str,
        responses: list[dict[str, Any]],
        pairs: list[dict[str, Any]],
        held_out_margins: list[float],
    ) -> None:
        """Read the gauge; warn, or stop the run, where a reading is past its threshold."""
        labelled = [
            len(ids)
            for rows in (self.seed_pairs, self.held_out)
            for column in ("chosen_ids", "rejected_ids")
            for ids in rows[column]
        ]
        reading = read_gauge(
            [n for row in responses for n in row["tokens"]],
            [c for row in responses for c in row["cut"]],
            sum(labelled) / len(labelled),
            held_out_margins,
        )
        self.say(
            f"{stage}: {len(pairs)} pairs from {len(responses)} prompts; the judge orders "
            f"{reading.judge_accuracy:.0%} of the held-out labels rightly; responses average "
            f"{reading.mean_tokens:.1f} tokens, {reading.cut_share:.0%} cut"
        )
        self.record_gauge(stage, self.settings.gauge, reading, **self.label_accuracy(pairs))

    def label_accuracy(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return how often the judge's labels agree with the evaluation's reward, ties left out."""
        if self.reward is None or not pairs:
            return {"label_accuracy": None, "label_pairs": 0}
        prompts = [pair["prompt"] for pair in pairs]
        chosen, rejected = (
            call_reward(self.reward, prompts, [pair[side] for pair in pairs])
            for side in ("chosen", "rejected")
        )
        decided = [a > b for a, b in zip(chosen, rejected, strict=True) if a != b]
        accuracy = sum(decided) / len(decided) if decided else None
        return {"label_accuracy": accuracy, "label_pairs": len(decided)}

    # 2c. Train π_i from π_{i-1} on its own labels, against π_{i-1}, with the noise-aware loss

    def train(self, arm: Arm, i: int, examples: Sequence[Group]) -> None:
        """Train π_i."""
        noise = self.settings.noise
        extrapolation = noise.lambdas[min(i, len(noise.lambdas)) - 1]
        self.parts.train(
            arm.stage(i),
            arm.stage(i - 1),
            examples,
            epochs=self.settings.training.epochs,
            trainer_class=NoiseAwareTrainer,
            beta=self.settings.beta,
            reference=snapshot_reference if extrapolation else None,
            noise=noise,
            extrapolation=extrapolation,
        )

    # 3. What to compare with

    def compare(self) -> None:
        """Train the controls: plain DPO for as many steps as SPA took in all."""
        evaluation = self.settings.evaluation
        steps = self.parts.steps_of(ITSELF.stage(self.settings.iterations))
        if evaluation.control:
            groups = self.with_reference("seed/reference", INIT, groups_from_pairs(self.seed_pairs))
            self.train_dpo(CONTROL, groups, max_steps=steps)
        if evaluation.all_labels:
            rows = [
                *groups_from_pairs(self.seed_pairs),
                *groups_from_pairs(self.all_pairs),
            ]
            groups = self.with_reference(f"{ALL_LABELS}/reference", INIT, rows)
            self.train_dpo(ALL_LABELS, groups, max_steps=steps)

    def models(self) -> list[Evaluated]:
        """Return every model that the run has made."""
        named = [(INIT, "SFT"), (SEED, "seed DPO")]
        if self.settings.evaluation.control:
            named.append((CONTROL, "seed DPO, as many steps"))
        iterations = range(1, self.settings.iterations + 1)
        named += [(ITSELF.stage(i), f"SPA {i}") for i in iterations]
        if self.settings.evaluation.all_labels:
            named.append((ALL_LABELS, "DPO, all labels"))
        return [self.evaluated(stage, name) for stage, name in named]
