"""Every setting of a run, with its default. The command line and the YAML file are made from these.

Defaults are the paper's (Selfee, arXiv 2406.04412), where it names a value.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .errors import RunError


@dataclass(frozen=True)
class LoraSettings:
    """Train a low-rank adapter instead of the whole model (needs the extra ``peft``).

    Args:
        r: Rank; 0 trains the whole model.
        alpha: Scale of the update, divided by ``r``.
        dropout: Dropout on the adapter's input.
        target_modules: Modules to adapt, or ``all-linear`` (the head is never adapted).
    """

    r: int = 0
    alpha: int = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True)
class ModelSettings:
    """The model to align.

    Args:
        path: A Hugging Face causal language model: a folder or a hub name. It is π_init, so
            already fine-tuned to follow the prompts.
        tokenizer: Folder or hub name of the tokenizer; the model's own if not given.
        dtype: Dtype of the weights; ``auto`` is the checkpoint's own.
        lora: Low-rank adapter.
    """

    path: str = ""
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    lora: LoraSettings = field(default_factory=LoraSettings)


@dataclass(frozen=True)
class DataSettings:
    """What the model learns from.

    Args:
        preferences: The human-labelled seed: rows of prompt, chosen, rejected (plain or
            conversational; the prompt may be implied). A hub name, folder, JSON lines or Parquet.
        prompts: Fresh prompts for the iterations: rows with a prompt.
        prompts_per_iteration: How many prompts each iteration takes; all of them in equal parts if
            not given. The paper: 8000, 20000, 30000.
        max_length: Tokens of a prompt and its response together.
        max_prompt_length: Tokens of a prompt; a longer one keeps its end.
    """

    preferences: str = ""
    prompts: str = ""
    prompts_per_iteration: list[int] | None = None
    max_length: int = 2048
    max_prompt_length: int = 1024


@dataclass(frozen=True)
class TrainingSettings:
    """How the model is trained, in the seed phase and in every iteration.

    Args:
        learning_rate: Peak learning rate.
        lr_scheduler: A schedule that transformers knows.
        warmup_ratio: Share of the steps over which the learning rate rises.
        batch_size: Pairs in one optimiser step, over all processes.
        max_tokens: Tokens in one forward and backward pass on one device; a step takes as many
            passes as it needs.
        seed_epochs: Epochs over the labelled seed.
        epochs: Epochs over an iteration's self-labelled pairs.
        optimizer: An optimiser that transformers knows.
        weight_decay: AdamW's weight decay.
        max_grad_norm: Gradient clipping; 0 for none.
        mixed_precision: Autocast dtype over float32 weights.
        gradient_checkpointing: Recompute activations in the backward pass.
        logging_steps: Steps between log lines.
        save_steps: Steps between checkpoints.
        report_to: Integrations of transformers that also receive the metrics.
        arguments: Anything else that transformers.TrainingArguments takes (fsdp, deepspeed, ...).
    """

    learning_rate: float = 5e-7
    lr_scheduler: str = "cosine"
    warmup_ratio: float = 0.1
    batch_size: int = 32
    max_tokens: int = 16384
    seed_epochs: int = 3
    epochs: int = 1
    optimizer: str = "adamw_torch"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    logging_steps: int = 10
    save_steps: int = 100
    report_to: list[str] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationSettings:
    """How responses are sampled, for the iterations and for evaluation.

    Args:
        backend: transformers' own ``generate``, or vLLM (needs the extra ``vllm``).
        samples_per_prompt: K, responses to one prompt.
        temperature: Sampling temperature.
        top_p: Nucleus sampling.
        max_new_tokens: Length limit of a response.
        batch_size: Responses generated at a time.
        chunk_size: Prompts between two saves of what was generated.
    """

    backend: Literal["transformers", "vllm"] = "transformers"
    samples_per_prompt: int = 2
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 300
    batch_size: int = 32
    chunk_size: int = 256


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
class GaugeSettings:
    """The gauge against collapse: the judge learns from itself, so it is watched from outside.

    Args:
        holdout: Share of the human labels that is held out from training for it.
        holdout_minimum: Pairs held out at least.
        min_accuracy: Lowest accuracy of the judge on the held-out labels.
        max_length_ratio: Highest mean response length, relative to the labelled responses'.
        max_cut: Highest share of responses cut at the length limit.
        on_collapse: What a reading past its threshold does: ``warn``, or ``stop`` before the
            iteration trains.
    """

    holdout: float = 0.1
    holdout_minimum: int = 16
    min_accuracy: float = 0.55
    max_length_ratio: float = 2.0
    max_cut: float = 0.5
    on_collapse: Literal["warn", "stop"] = "warn"


@dataclass(frozen=True)
class EvaluationSettings:
    """Win rates against π_init by a reward of your own, and the controls to compare with.

    Args:
        reward: ``file.py:function`` or ``module:function``, called as
            ``f(prompts, completions) -> list[float]``; no evaluation if not given.
        prompts: Rows with a prompt, apart from the training prompts.
        control: Also train plain DPO on the seed for as many steps as SPA takes in all.
        all_labels: Rows of labelled pairs; also train plain DPO on the seed and these.
    """

    reward: str | None = None
    prompts: str | None = None
    control: bool = False
    all_labels: str | None = None


@dataclass(frozen=True)
class SPASettings:
    """Spread Preference Annotation (SPA; Selfee, arXiv 2406.04412).

    Args:
        output_dir: Folder for everything that the run writes.
        resume: Go on with the run that ``output_dir`` holds.
        overwrite: Remove the run that ``output_dir`` holds.
        seed: Seed of every random choice.
        iterations: Rounds of generating, judging and training after the seed.
        beta: DPO's and the judge's inverse temperature.
        model: The model.
        data: The data.
        training: Training.
        generation: Generation.
        judge: The judge.
        noise: The noise-aware loss.
        gauge: The gauge against collapse.
        evaluation: Evaluation.
    """

    output_dir: str = "runs/spa"
    resume: bool = False
    overwrite: bool = False
    seed: int = 0
    iterations: int = 3
    beta: float = 0.1
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    gauge: GaugeSettings = field(default_factory=GaugeSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain nested dictionaries."""
        return asdict(self)

    def validate(self) -> None:
        """Raise RunError, naming the option, where a value cannot be used."""
        g, n, t = self.generation, self.noise, self.training
        checks = [
            ("model.path", self.model.path, bool(self.model.path), "a model's folder or name"),
            ("data.preferences", self.data.preferences, bool(self.data.preferences), "a dataset"),
            ("iterations", self.iterations, self.iterations >= 0, "0 or more"),
            ("beta", self.beta, self.beta > 0, "more than 0"),
            ("training.batch_size", t.batch_size, t.batch_size >= 1, "1 or more"),
            ("training.max_tokens", t.max_tokens, t.max_tokens >= 1, "1 or more"),
            ("training.learning_rate", t.learning_rate, t.learning_rate >= 0, "0 or more"),
            ("training.warmup_ratio", t.warmup_ratio, 0 <= t.warmup_ratio <= 1, "from 0 to 1"),
            ("training.save_steps", t.save_steps, t.save_steps >= 1, "1 or more"),
            ("training.logging_steps", t.logging_steps, t.logging_steps >= 1, "1 or more"),
            (
                "generation.samples_per_prompt",
                g.samples_per_prompt,
                g.samples_per_prompt >= 2,
                "2 or more",
            ),
            ("generation.temperature", g.temperature, g.temperature > 0, "more than 0"),
            ("generation.top_p", g.top_p, 0 < g.top_p <= 1, "more than 0 and at most 1"),
            ("generation.max_new_tokens", g.max_new_tokens, g.max_new_tokens >= 1, "1 or more"),
            ("generation.batch_size", g.batch_size, g.batch_size >= 1, "1 or more"),
            ("generation.chunk_size", g.chunk_size, g.chunk_size >= 1, "1 or more"),
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
            ("gauge.holdout", self.gauge.holdout, 0 < self.gauge.holdout < 1, "between 0 and 1"),
            (
                "gauge.holdout_minimum",
                self.gauge.holdout_minimum,
                self.gauge.holdout_minimum >= 1,
                "1 or more",
            ),
            (
                "data.prompts",
                self.data.prompts,
                bool(self.data.prompts) or self.iterations == 0,
                "a dataset of prompts for the iterations",
            ),
            (
                "data.prompts_per_iteration",
                self.data.prompts_per_iteration,
                self.data.prompts_per_iteration is None
                or len(self.data.prompts_per_iteration) == self.iterations,
                f"one number for each of the {self.iterations} iterations",
            ),
            (
                "data.max_prompt_length",
                self.data.max_prompt_length,
                1 <= self.data.max_prompt_length < self.data.max_length,
                f"from 1 to less than data.max_length ({self.data.max_length})",
            ),
            (
                "evaluation.prompts",
                self.evaluation.prompts,
                self.evaluation.reward is None or bool(self.evaluation.prompts),
                "a dataset of prompts, since evaluation.reward is given",
            ),
        ]
        for name, value, holds, expected in checks:
            if not holds:
                raise RunError(f"{name}: expected {expected}, got {value!r}")
