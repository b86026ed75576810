"""Every setting of a run, with its default. The command line and YAML files are made from these.

Each command has its class on top of what all runs share (``RunSettings``): ``DPOSettings`` and
``SFTSettings`` here, ``SPASettings`` in ``spa_config``, ``PLESettings`` in ``ple_config``.
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
        load_in_4bit: Keep the weights of the linear layers in 4 bits (NF4, QLoRA, arXiv 2305.14314;
            needs the extra ``bitsandbytes``); only a low-rank adapter is then trained.
        lora: Low-rank adapter.
    """

    path: str = ""
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_in_4bit: bool = False
    lora: LoraSettings = field(default_factory=LoraSettings)


@dataclass(frozen=True)
class DataSettings:
    """How long a prompt and a response may be.

    Args:
        max_length: Tokens of a prompt and its response together.
        max_prompt_length: Tokens of a prompt; a longer one keeps its end.
    """

    max_length: int = 2048
    max_prompt_length: int = 1024


@dataclass(frozen=True)
class IterationDataSettings(DataSettings):
    """What the model learns from.

    Args:
        prompts: Fresh prompts for the iterations: rows with a prompt.
        prompts_per_iteration: How many prompts each iteration takes; all of them in equal parts if
            not given.
    """

    prompts: str = ""
    prompts_per_iteration: list[int] | None = None


@dataclass(frozen=True)
class DPODataSettings(DataSettings):
    """What the model learns from.

    Args:
        preferences: Labelled pairs: rows of prompt, chosen, rejected (plain or conversational; the
            prompt may be implied). A hub name, folder, JSON lines or Parquet.
    """

    preferences: str = ""


@dataclass(frozen=True)
class SFTDataSettings(DataSettings):
    """What the model learns from.

    Args:
        sft: Demonstrations: rows of prompt and completion, or of messages, of which the last one
            is learned. A hub name, folder, JSON lines or Parquet.
    """

    sft: str = ""


@dataclass(frozen=True)
class TrainingSettings:
    """How the model is trained.

    Args:
        learning_rate: Peak learning rate.
        lr_scheduler: A schedule that transformers knows.
        warmup_ratio: Share of the steps over which the learning rate rises.
        batch_size: Pairs (demonstrations, in SFT) in one optimiser step, over all processes.
        max_tokens: Tokens in one forward and backward pass on one device; a step takes as many
            passes as it needs.
        share_prompts: Compute a prompt once for all its responses; false repeats it before each.
        split_pairs: Compute the responses of an example that is longer than max_tokens one after
            the other, with the same gradients, at one more forward pass of all but the longest;
            false gives such an example a pass of its own.
        epochs: Epochs over the data, or over an iteration's own.
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
    share_prompts: bool = True
    split_pairs: bool = True
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
class MemorySettings:
    """What is done before the first step about a run that would not fit in memory.

    Args:
        limit: Memory of one device, such as 24GiB; a GPU's own if not given. A run on a CPU is
            planned only where this is given.
        on_excess: What a predicted peak over the limit does: ``refuse`` the run; ``adapt`` the
            settings that change no result (token budget, gradient checkpointing), or refuse where
            that is not enough; ``warn``; or ``off``, which predicts nothing.
    """

    limit: str | None = None
    on_excess: Literal["refuse", "adapt", "warn", "off"] = "refuse"


@dataclass(frozen=True)
class GenerationSettings:
    """How responses are sampled, for the iterations and for evaluation.

    Args:
        backend: transformers' own ``generate``, or vLLM (needs the extra ``vllm``).
        temperature: Sampling temperature.
        top_p: Nucleus sampling.
        max_new_tokens: Length limit of a response.
        batch_size: Responses generated at a time.
        chunk_size: Prompts between two saves of what was generated.
    """

    backend: Literal["transformers", "vllm"] = "transformers"
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 300
    batch_size: int = 32
    chunk_size: int = 256


@dataclass(frozen=True)
class GaugeSettings:
    """The gauge against collapse: the model learns from itself, so it is watched from outside.

    Args:
        max_length_ratio: Highest mean response length, relative to the given responses'.
        max_cut: Highest share of responses cut at the length limit.
        on_collapse: What a reading past its threshold does: ``warn``, or ``stop`` before the
            iteration trains.
    """

    max_length_ratio: float = 2.0
    max_cut: float = 0.5
    on_collapse: Literal["warn", "stop"] = "warn"


@dataclass(frozen=True)
class LossSettings:
    """The preference loss.

    Args:
        loss_type: A loss of ``preference_loss``, or a list of them; see docs/custom_losses.md.
        loss_weights: A weight for each of several losses; all 1 if not given.
        beta: DPO's inverse temperature.
        label_smoothing: The share of flipped labels, in losses that have one (cDPO and others).
        f_divergence_type: What keeps the policy near the reference.
        f_alpha_divergence_coef: Alpha of the alpha-divergence.
        loss_options: Numbers that single losses take, by name, such as simpo_gamma.
    """

    loss_type: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"
    )
    f_alpha_divergence_coef: float = 1.0
    loss_options: dict[str, float] | None = None


@dataclass(frozen=True)
class EvaluationSettings:
    """Rewards and win rates against the model that was given, by a reward of your own.

    Args:
        reward: ``file.py:function``, ``module:function`` or a model, called as
            ``f(prompts=..., completions=...) -> list[float]``; no evaluation if not given.
        prompts: Rows with a prompt, apart from the training prompts.
    """

    reward: str | None = None
    prompts: str | None = None


Check = tuple[str, Any, bool, str]
"""A setting's name, its value, whether that can be used, and what is expected."""


@dataclass(frozen=True)
class RunSettings:
    """What every run has.

    Args:
        output_dir: Folder for everything that the run writes.
        resume: Go on with the run that ``output_dir`` holds.
        overwrite: Remove the run that ``output_dir`` holds.
        seed: Seed of every random choice.
        reference_cache: Folder of log-probs of fixed models, which runs share; none if not given.
        model: The model.
        data: The data.
        training: Training.
        memory: Memory.
        generation: Generation.
        evaluation: Evaluation.
    """

    output_dir: str = "runs/run"
    resume: bool = False
    overwrite: bool = False
    seed: int = 0
    reference_cache: str | None = None
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    @property
    def num_models(self) -> int:
        """How many models the run leaves."""
        return 1

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain nested dictionaries."""
        return asdict(self)

    def validate(self) -> None:
        """Raise RunError, naming the option, where a value cannot be used."""
        for name, value, holds, expected in self.checks():
            if not holds:
                raise RunError(f"{name}: expected {expected}, got {value!r}")

    def checks(self) -> list[Check]:
        """Return what must hold; a subclass adds to it."""
        d, e, g, t = self.data, self.evaluation, self.generation, self.training
        return [
            ("model.path", self.model.path, bool(self.model.path), "a model's folder or name"),
            (
                "model.lora.r",
                self.model.lora.r,
                self.model.lora.r > 0 or not self.model.load_in_4bit,
                "1 or more, since model.load_in_4bit leaves nothing else to train",
            ),
            ("training.batch_size", t.batch_size, t.batch_size >= 1, "1 or more"),
            ("training.max_tokens", t.max_tokens, t.max_tokens >= 1, "1 or more"),
            ("training.learning_rate", t.learning_rate, t.learning_rate >= 0, "0 or more"),
            ("training.warmup_ratio", t.warmup_ratio, 0 <= t.warmup_ratio <= 1, "from 0 to 1"),
            ("training.save_steps", t.save_steps, t.save_steps >= 1, "1 or more"),
            ("training.logging_steps", t.logging_steps, t.logging_steps >= 1, "1 or more"),
            ("generation.temperature", g.temperature, g.temperature > 0, "more than 0"),
            ("generation.top_p", g.top_p, 0 < g.top_p <= 1, "more than 0 and at most 1"),
            ("generation.max_new_tokens", g.max_new_tokens, g.max_new_tokens >= 1, "1 or more"),
            ("generation.batch_size", g.batch_size, g.batch_size >= 1, "1 or more"),
            ("generation.chunk_size", g.chunk_size, g.chunk_size >= 1, "1 or more"),
            (
                "data.max_prompt_length",
                d.max_prompt_length,
                1 <= d.max_prompt_length < d.max_length,
                f"from 1 to less than data.max_length ({d.max_length})",
            ),
            (
                "evaluation.prompts",
                e.prompts,
                e.reward is None or bool(e.prompts),
                "a dataset of prompts, since evaluation.reward is given",
            ),
        ]


def iteration_checks(data: IterationDataSettings, iterations: int) -> list[Check]:
    """Return what must hold of an algorithm that goes in iterations."""
    sizes = data.prompts_per_iteration
    return [
        ("iterations", iterations, iterations >= 0, "0 or more"),
        (
            "data.prompts",
            data.prompts,
            bool(data.prompts) or iterations == 0,
            "a dataset of prompts for the iterations",
        ),
        (
            "data.prompts_per_iteration",
            sizes,
            sizes is None or len(sizes) == iterations,
            f"one number for each of the {iterations} iterations",
        ),
    ]


@dataclass(frozen=True)
class DPOSettings(RunSettings):
    """Preference optimisation on labelled pairs (DPO, arXiv 2305.18290).

    Args:
        loss: The preference loss.
    """

    output_dir: str = "runs/dpo"
    data: DPODataSettings = field(default_factory=DPODataSettings)
    loss: LossSettings = field(default_factory=LossSettings)

    def checks(self) -> list[Check]:
        """Return what must hold."""
        loss = self.loss
        smoothing = loss.label_smoothing
        return [
            *super().checks(),
            ("data.preferences", self.data.preferences, bool(self.data.preferences), "a dataset"),
            ("loss.beta", loss.beta, loss.beta > 0, "more than 0"),
            ("loss.label_smoothing", smoothing, 0 <= smoothing <= 0.5, "from 0 to 0.5"),
        ]


@dataclass(frozen=True)
class SFTSettings(RunSettings):
    """Supervised fine-tuning on demonstrations: the mean negative log-prob of their tokens."""

    output_dir: str = "runs/sft"
    data: SFTDataSettings = field(default_factory=SFTDataSettings)
    training: TrainingSettings = field(default_factory=lambda: TrainingSettings(learning_rate=1e-5))

    def checks(self) -> list[Check]:
        """Return what must hold."""
        return [
            *super().checks(),
            ("data.sft", self.data.sft, bool(self.data.sft), "a dataset of demonstrations"),
        ]
