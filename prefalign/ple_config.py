"""The settings of ``prefalign ple``; the paper's (arXiv 2408.02599), where it names a value."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .config import (
    Check,
    EvaluationSettings,
    GaugeSettings,
    IterationDataSettings,
    LoraSettings,
    ModelSettings,
    RunSettings,
    TrainingSettings,
    iteration_checks,
)


@dataclass(frozen=True)
class PLEDataSettings(IterationDataSettings):
    """What the model learns from.

    Args:
        sft: Demonstrations for the SFT that comes first: rows of prompt and completion, or of
            messages. A hub name, folder, JSON lines or Parquet. None leaves that stage out.
    """

    sft: str | None = None


@dataclass(frozen=True)
class PLETrainingSettings(TrainingSettings):
    """How the model is trained, in the SFT phase and in every iteration.

    Args:
        learning_rate: Peak learning rate of the iterations (the paper names none; for LoRA).
        sft_learning_rate: Peak learning rate of the SFT phase; ``learning_rate`` if not given.
        sft_epochs: Epochs over the demonstrations.
    """

    learning_rate: float = 1e-4
    sft_learning_rate: float | None = None
    sft_epochs: int = 1


@dataclass(frozen=True)
class RewardSettings:
    """What scores the responses that the model learns from.

    Args:
        functions: One or several of ``file.py:function`` or ``module:function``, called as
            ``f(prompts=..., completions=..., **columns) -> list[float]``, and folders or hub names
            of sequence-classification models.
        weights: A weight for each; 1 if not given.
        columns: Columns of the prompts' rows that the functions get too, by these names.
        normalise: ``standard`` takes an iteration's scores to mean 0 and standard deviation 1.
        batch_size: Prompts whose responses are given to the functions at a time.
        dtype: Dtype of a reward model's weights; ``auto`` is the checkpoint's own.
        max_tokens: Tokens in one forward pass of a reward model, padding included.
    """

    functions: list[str] = field(default_factory=list)
    weights: list[float] | None = None
    columns: list[str] = field(default_factory=list)
    normalise: Literal["none", "standard"] = "none"
    batch_size: int = 1024
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_tokens: int = 16384


@dataclass(frozen=True)
class EnhancementSettings:
    """PLE's dynamic threshold and its two losses (arXiv 2408.02599, section 4).

    Args:
        threshold: τ_0; a pair whose reward gap is above τ is ranked, any other is imitated.
        decay: α, what τ is multiplied with.
        decay_every: When: after every ``iteration``, or after every optimiser ``step``.
        ranking: The ranking loss's score: ``mean`` or ``sum`` of log-probs, ``probability`` (the
            paper's text, which underflows for real lengths), or ``logistic``, smooth, of means.
        sft: The weighted SFT loss's log-probs: ``mean`` over a response's tokens, or their ``sum``.
        temperature: Temperature of the softmax that turns two rewards into weights.
    """

    threshold: float = 0.2
    decay: float = 0.9
    decay_every: Literal["iteration", "step"] = "iteration"
    ranking: Literal["mean", "sum", "probability", "logistic"] = "mean"
    sft: Literal["mean", "sum"] = "mean"
    temperature: float = 1.0


@dataclass(frozen=True)
class ReleasedSettings:
    """``variant: released``: what the authors' code does, a weighted DPO on the best and worst.

    Args:
        samples: Responses to each prompt, of which the best and the worst make a pair.
        fractions: Share of the pairs, by reward gap, that gets weight 1, by iteration; the last
            value goes on.
    """

    samples: int = 8
    fractions: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5])


Baseline = Literal[
    "raft", "distillation", "dpo", "ranking-only", "sft-only", "fixed-threshold", "released"
]


@dataclass(frozen=True)
class PLEEvaluationSettings(EvaluationSettings):
    """Rewards and win rates by a reward of your own, and what to compare PLE with.

    Args:
        guided: Also evaluate the given model with the principles before the prompt.
        baselines: What else to train, on the same prompts: ``raft`` (SFT on the best of
            ``raft_samples`` responses), ``distillation`` (SFT on the guided response), ``dpo`` (on
            guided against plain), PLE with one of its losses for every pair (``ranking-only``,
            ``sft-only``), with a ``fixed-threshold``, and the ``released`` code's algorithm.
        raft_samples: Responses of which RAFT keeps the best.
    """

    guided: bool = False
    baselines: list[Baseline] = field(default_factory=list)
    raft_samples: int = 4


@dataclass(frozen=True)
class PLESettings(RunSettings):
    """Progressively Label Enhancement (PLE; arXiv 2408.02599).

    Args:
        variant: ``paper``, or ``released``: what the authors' code does instead (``released.*``).
        iterations: Rounds of generating, scoring and training after SFT.
        principles: A text file with one principle a line; the default set if not given.
        rewards: What scores the responses.
        enhancement: The threshold and the losses.
        released: The released code's algorithm.
        beta: Inverse temperature of DPO, in ``variant: released`` and in the baseline.
        gauge: The gauge against collapse.
    """

    output_dir: str = "runs/ple"
    variant: Literal["paper", "released"] = "paper"
    iterations: int = 8
    principles: str | None = None
    model: ModelSettings = field(
        default_factory=lambda: ModelSettings(lora=LoraSettings(r=8, alpha=16))
    )
    data: PLEDataSettings = field(default_factory=PLEDataSettings)
    rewards: RewardSettings = field(default_factory=RewardSettings)
    enhancement: EnhancementSettings = field(default_factory=EnhancementSettings)
    released: ReleasedSettings = field(default_factory=ReleasedSettings)
    beta: float = 0.1
    training: PLETrainingSettings = field(default_factory=PLETrainingSettings)
    gauge: GaugeSettings = field(default_factory=GaugeSettings)
    evaluation: PLEEvaluationSettings = field(default_factory=PLEEvaluationSettings)

    @property
    def num_models(self) -> int:
        """How many models the run leaves."""
        return bool(self.data.sft) + self.iterations * (1 + len(self.evaluation.baselines))

    def checks(self) -> list[Check]:
        """Return what must hold."""
        e, r, w = self.enhancement, self.released, self.rewards
        names = self.evaluation.baselines
        rate = self.training.sft_learning_rate
        return [
            *super().checks(),
            *iteration_checks(self.data, self.iterations),
            (
                "rewards.functions",
                w.functions,
                bool(w.functions) or self.iterations == 0,
                "a reward function or model to score the responses with",
            ),
            (
                "rewards.weights",
                w.weights,
                w.weights is None or len(w.weights) == len(w.functions),
                f"one number for each of the {len(w.functions)} functions",
            ),
            ("rewards.batch_size", w.batch_size, w.batch_size >= 1, "1 or more"),
            ("rewards.max_tokens", w.max_tokens, w.max_tokens >= 1, "1 or more"),
            ("enhancement.threshold", e.threshold, not math.isnan(e.threshold), "a number"),
            ("enhancement.decay", e.decay, 0 < e.decay <= 1, "more than 0 and at most 1"),
            ("enhancement.temperature", e.temperature, e.temperature > 0, "more than 0"),
            ("released.samples", r.samples, r.samples >= 2, "2 or more"),
            (
                "released.fractions",
                r.fractions,
                bool(r.fractions) and all(0 <= q <= 1 for q in r.fractions),
                "values from 0 to 1",
            ),
            ("beta", self.beta, self.beta > 0, "more than 0"),
            ("training.sft_learning_rate", rate, rate is None or rate >= 0, "0 or more"),
            (
                "evaluation.baselines",
                names,
                len(set(names)) == len(names),
                "each baseline once",
            ),
            (
                "evaluation.raft_samples",
                self.evaluation.raft_samples,
                self.evaluation.raft_samples >= 2,
                "2 or more",
            ),
        ]
