"""The settings of ``prefalign spa``. Defaults are the paper's (Selfee, arXiv 2406.04412)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .config import (
    Check,
    EvaluationSettings,
    GaugeSettings,
    GenerationSettings,
    IterationDataSettings,
    RunSettings,
    TrainingSettings,
    iteration_checks,
)


@dataclass(frozen=True)
class SPADataSettings(IterationDataSettings):
    """What the model learns from.

    Args:
        preferences: The human-labelled seed: rows of prompt, chosen, rejected (plain or
            conversational; the prompt may be implied). A hub name, folder, JSON lines or Parquet.
        prompts_per_iteration: How many prompts each iteration takes; all of them in equal parts if
            not given. The paper: 8000, 20000, 30000.
    """

    preferences: str = ""


@dataclass(frozen=True)
class SPATrainingSettings(TrainingSettings):
    """How the model is trained, in the seed phase and in every iteration.

    Args:
        seed_epochs: Epochs over the labelled seed.
    """

    seed_epochs: int = 3


@dataclass(frozen=True)
class SPAGenerationSettings(GenerationSettings):
    """How responses are sampled, for the iterations and for evaluation.

    Args:
        samples_per_prompt: K, responses to one prompt.
    """

    samples_per_prompt: int = 2


@dataclass(frozen=True)
class JudgeSettings:
    """How the model labels its own responses (equation 7).

    Args:
        reference: The judge's reference policy: ``init`` (the paper's best), ``previous`` (the
            policy before the last iteration) or ``none``.
        pairing: Which pairs are made of K responses: best against worst, or every pair.
    """

    reference: Literal["init", "previous", "none"] = "init"
    pairing: Literal["best_worst", "all"] = "best_worst"


@dataclass(frozen=True)
class NoiseSettings:
    """The noise-aware loss (section 4.3) and de-coupled noise detection (equations 11 and 12).

    Args:
        alpha: Label smoothing of a pair judged noisy.
        alpha_warmup: Share of an iteration's steps over which alpha is 0.
        lambdas: Extrapolation by iteration; the last value goes on. 0 for none.
        quantile: Share of the pairs judged noisy: the threshold is this quantile of confidences.
        threshold: ``rolling`` takes the quantile over the last ``window`` pairs trained on,
            ``exact`` over all of the iteration's pairs, once, where alpha's warm-up ends.
        window: Pairs in the rolling window; until it is full no pair is judged noisy.
    """

    alpha: float = 0.1
    alpha_warmup: float = 0.2
    lambdas: list[float] = field(default_factory=lambda: [0.5, 0.25, 0.125])
    quantile: float = 0.1
    threshold: Literal["rolling", "exact"] = "rolling"
    window: int = 64


@dataclass(frozen=True)
class SPAGaugeSettings(GaugeSettings):
    """The gauge against collapse: the judge learns from itself, so it is watched from outside.

    Args:
        holdout: Share of the human labels that is held out from training for it.
        holdout_minimum: Pairs held out at least.
        min_accuracy: Lowest accuracy of the judge on the held-out labels.
    """

    holdout: float = 0.1
    holdout_minimum: int = 16
    min_accuracy: float = 0.55


@dataclass(frozen=True)
class SPAEvaluationSettings(EvaluationSettings):
    """Win rates against π_init by a reward of your own, and the controls to compare with.

    Args:
        control: Also train plain DPO on the seed for as many steps as SPA takes in all.
        all_labels: Rows of labelled pairs; also train plain DPO on the seed and these.
    """

    control: bool = False
    all_labels: str | None = None


@dataclass(frozen=True)
class SPASettings(RunSettings):
    """Spread Preference Annotation (SPA; Selfee, arXiv 2406.04412).

    Args:
        iterations: Rounds of generating, judging and training after the seed.
        beta: DPO's and the judge's inverse temperature.
        judge: The judge.
        noise: The noise-aware loss.
        gauge: The gauge against collapse.
    """

    output_dir: str = "runs/spa"
    iterations: int = 3
    beta: float = 0.1
    data: SPADataSettings = field(default_factory=SPADataSettings)
    training: SPATrainingSettings = field(default_factory=SPATrainingSettings)
    generation: SPAGenerationSettings = field(default_factory=SPAGenerationSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    gauge: SPAGaugeSettings = field(default_factory=SPAGaugeSettings)
    evaluation: SPAEvaluationSettings = field(default_factory=SPAEvaluationSettings)

    @property
    def num_models(self) -> int:
        """How many models the run leaves."""
        more = self.evaluation.control + bool(self.evaluation.all_labels)
        return 1 + self.iterations + more

    def checks(self) -> list[Check]:
        """Return what must hold."""
        g, n, samples = self.gauge, self.noise, self.generation.samples_per_prompt
        return [
            *super().checks(),
            *iteration_checks(self.data, self.iterations),
            ("data.preferences", self.data.preferences, bool(self.data.preferences), "a dataset"),
            ("beta", self.beta, self.beta > 0, "more than 0"),
            ("generation.samples_per_prompt", samples, samples >= 2, "2 or more"),
            ("noise.alpha", n.alpha, 0 <= n.alpha <= 0.5, "from 0 to 0.5"),
            ("noise.alpha_warmup", n.alpha_warmup, 0 <= n.alpha_warmup <= 1, "from 0 to 1"),
            (
                "noise.lambdas",
                n.lambdas,
                bool(n.lambdas) and min(n.lambdas) >= 0,
                "values of 0 or more",
            ),
            ("noise.quantile", n.quantile, 0 <= n.quantile <= 1, "from 0 to 1"),
            ("noise.window", n.window, n.window >= 2, "2 or more"),
            ("gauge.holdout", g.holdout, 0 < g.holdout < 1, "between 0 and 1"),
            ("gauge.holdout_minimum", g.holdout_minimum, g.holdout_minimum >= 1, "1 or more"),
        ]
