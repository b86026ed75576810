"""PLE's own method and the baselines that it is compared with: what each learns from responses.

A method asks for responses of π_{i-1} (so many plain ones, and a guided one or none), makes
examples of those and their rewards, and names the trainer. Everything else is ``ple``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .enhancement import EnhancementTrainer
from .kernels.enhancement_loss import released_weights
from .loop import Arm
from .packing import Group
from .ple_config import PLESettings
from .run_folder import write_rows
from .sft_trainer import SFTTrainer
from .trainer import PreferenceTrainer

if TYPE_CHECKING:
    from .ple import PLE

Row = dict[str, Any]
"""A prompt's ``prompt``, ``prompt_ids`` and, one for each response, ``ids``, ``cut``, ``guided``,
``responses`` (text), ``tokens``, ``rewards`` and ``scores`` (the rewards, normalised or not)."""


def ranked(gaps: Sequence[float], threshold: float) -> list[bool]:
    """Say of each reward gap whether it is above the threshold, as the loss does: in float32."""
    return (torch.tensor(gaps, dtype=torch.float32) > threshold).tolist()


class Method:
    """What an arm learns from.

    Args:
        name: What tables call it; formatted with the evaluation's settings.
    """

    guided = False

    def __init__(self, name: str):
        self.name = name

    def samples(self, settings: PLESettings) -> int:
        """Return how many plain responses to ask for."""
        return 1

    def examples(self, run: PLE, arm: Arm, i: int, rows: Sequence[Row]) -> list[Group]:
        """Return what to train on."""
        raise NotImplementedError

    def training(self, run: PLE, arm: Arm, i: int) -> dict[str, Any]:
        """Return the trainer and its arguments."""
        raise NotImplementedError

    def facts(self, run: PLE, arm: Arm, i: int, examples: Sequence[Group]) -> dict[str, Any]:
        """Return what the gauge's line says of the examples."""
        return {}


class Enhancement(Method):
    """PLE: ranking above the threshold, weighted SFT below.

    Args:
        name: What tables call it.
        threshold: Takes the settings' (τ, decay by step) to the arm's; by default as it is.
    """

    guided = True

    def __init__(
        self,
        name: str,
        threshold: Callable[[PLE, Arm, int], tuple[float, float]] | None = None,
    ):
        super().__init__(name)
        self._threshold = threshold

    def threshold(self, run: PLE, arm: Arm, i: int) -> tuple[float, float]:
        """Return (τ, what every step multiplies it with) as iteration i begins."""
        return (self._threshold or type(run).threshold)(run, arm, i)

    def examples(self, run: PLE, arm: Arm, i: int, rows: Sequence[Row]) -> list[Group]:
        """Return guided and plain response of every prompt, with their rewards."""
        stage, (threshold, _) = arm.stage(i), self.threshold(run, arm, i)
        gaps = [row["scores"][0] - row["scores"][1] for row in rows]
        if run.parts.process.is_main_process and not run.parts.run.finished(stage):
            write_rows(
                run.parts.folder(stage) / "pairs.jsonl",
                (
                    {
                        "prompt": row["prompt"],
                        "chosen": row["responses"][0],
                        "rejected": row["responses"][1],
                        "chosen_reward": row["scores"][0],
                        "rejected_reward": row["scores"][1],
                        "ranked": is_ranked,
                        "example_id": index,
                    }
                    for index, (row, is_ranked) in enumerate(
                        zip(rows, ranked(gaps, threshold), strict=True)
                    )
                ),
            )
        run.parts.process.wait_for_everyone()
        return [
            # Rewards relative to the plain response's. A difference of two rewards in float32 would
            # be rounded twice: 0.3 less 0.1 is then above a threshold of 0.2.
            Group(row["prompt_ids"], row["ids"], index, {"rewards": [gap, 0.0]})
            for index, (row, gap) in enumerate(zip(rows, gaps, strict=True))
        ]

    def training(self, run: PLE, arm: Arm, i: int) -> dict[str, Any]:
        """Return PLE's trainer."""
        threshold, decay = self.threshold(run, arm, i)
        return {
            "trainer_class": EnhancementTrainer,
            "enhancement": run.settings.enhancement,
            "threshold": threshold,
            "step_decay": decay,
        }

    def facts(self, run: PLE, arm: Arm, i: int, examples: Sequence[Group]) -> dict[str, Any]:
        """Return τ and the share of the pairs that it ranks, as the iteration begins."""
        threshold, _ = self.threshold(run, arm, i)
        gaps = [group.extras["rewards"][0] - group.extras["rewards"][1] for group in examples]
        return {
            "threshold": threshold if math.isfinite(threshold) else None,
            "ranked_share": sum(ranked(gaps, threshold)) / len(gaps),
            "guided_ahead": sum(gap > 0 for gap in gaps) / len(gaps),
        }


class RAFT(Method):
    """SFT on the best of K plain responses (RAFT, arXiv 2304.06767)."""

    def samples(self, settings: PLESettings) -> int:
        """Return K."""
        return settings.evaluation.raft_samples

    def examples(self, run: PLE, arm: Arm, i: int, rows: Sequence[Row]) -> list[Group]:
        """Return the best response to every prompt; of equals the first."""
        best = [row["scores"].index(max(row["scores"])) for row in rows]
        return [
            Group(row["prompt_ids"], (row["ids"][place],), index)
            for index, (row, place) in enumerate(zip(rows, best, strict=True))
        ]

    def training(self, run: PLE, arm: Arm, i: int) -> dict[str, Any]:
        """Return SFT's trainer."""
        return {"trainer_class": SFTTrainer}


class Distillation(Method):
    """Context distillation: SFT on the guided response to the plain query."""

    guided = True

    def samples(self, settings: PLESettings) -> int:
        """Return 0: no plain response is needed."""
        return 0

    def examples(self, run: PLE, arm: Arm, i: int, rows: Sequence[Row]) -> list[Group]:
        """Return the guided response to every prompt."""
        return [Group(row["prompt_ids"], row["ids"], index) for index, row in enumerate(rows)]

    def training(self, run: PLE, arm: Arm, i: int) -> dict[str, Any]:
        """Return SFT's trainer."""
        return {"trainer_class": SFTTrainer}


class GuidedDPO(Method):
    """DPO on guided (chosen) against plain (rejected), against π_{i-1}; rewards are not used."""

    guided = True

    def examples(self, run: PLE, arm: Arm, i: int, rows: Sequence[Row]) -> list[Group]:
        """Return the pairs whose responses differ, with π_{i-1}'s log-probs."""
        groups = [
            Group(row["prompt_ids"], row["ids"], index)
            for index, row in enumerate(rows)
            if row["ids"][0] != row["ids"][1]
        ]
        return run.with_reference(f"{arm.stage(i)}/reference", arm.stage(i - 1), groups)

    def training(self, run: PLE, arm: Arm, i: int) -> dict[str, Any]:
        """Return DPO's trainer."""
        return {"trainer_class": PreferenceTrainer, "beta": run.settings.beta}


class Released(Method):
    """The authors' code: weighted DPO on the best and worst of K responses, against π_0."""

    def samples(self, settings: PLESettings) -> int:
        """Return K."""
        return settings.released.samples

    def examples(self, run: PLE, arm: Arm, i: int, rows: Sequence[Row]) -> list[Group]:
        """Return a pair for every prompt whose responses differ in reward, with its weight."""
        groups, gaps = [], []
        for index, row in enumerate(rows):
            scores = row["scores"]
            best, worst = scores.index(max(scores)), scores.index(min(scores))
            if scores[best] > scores[worst]:
                groups.append((row["prompt_ids"], (row["ids"][best], row["ids"][worst]), index))
                gaps.append(scores[best] - scores[worst])
        weights = released_weights(
            torch.tensor(gaps, dtype=torch.float64),
            iteration=i,
            fractions=run.settings.released.fractions,
        )
        pairs = [
            Group(*group, {"weights": [weight]})
            for group, weight in zip(groups, weights.tolist(), strict=True)
        ]
        return run.with_reference(f"{arm.stage(i)}/reference", arm.stage(0), pairs)

    def training(self, run: PLE, arm: Arm, i: int) -> dict[str, Any]:
        """Return weighted DPO's trainer."""
        beta = run.settings.beta
        return {"trainer_class": PreferenceTrainer, "beta": beta, "weighted_mean": True}


METHODS: dict[str, Method] = {
    "ple": Enhancement("PLE"),
    "ranking-only": Enhancement("PLE, ranking only", lambda run, arm, i: (-math.inf, 1.0)),
    "sft-only": Enhancement("PLE, weighted SFT only", lambda run, arm, i: (math.inf, 1.0)),
    "fixed-threshold": Enhancement(
        "PLE, fixed threshold", lambda run, arm, i: (run.settings.enhancement.threshold, 1.0)
    ),
    "raft": RAFT("RAFT-{0.raft_samples}"),
    "distillation": Distillation("context distillation"),
    "dpo": GuidedDPO("DPO, guided over plain"),
    "released": Released("PLE, released code"),
}
"""By the names of ``evaluation.baselines``, and PLE itself."""
