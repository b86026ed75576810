"""The settings of ``prefalign plan``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .config import LoraSettings, TrainingSettings
from .errors import RunError


@dataclass(frozen=True)
class PlanSettings:
    """Whether a training run fits in memory, and the settings that make it fit.

    Args:
        model: A Hugging Face causal language model: a folder or a hub name. Its configuration is
            read, its weights are not.
        gpu_memory: Memory of the device, such as 24GiB; this machine's own GPU if not given.
        device: What kind of device it is.
        preferences: Labelled pairs, for their lengths. If not given, every pair is as long as the
            two limits allow.
        tokenizer: Folder or hub name of the tokenizer; the model's own if not given.
        max_length: Tokens of a prompt and its response together.
        max_prompt_length: Tokens of a prompt; a longer one keeps its end.
        dtype: Dtype of the weights; ``auto`` is the checkpoint's own.
        load_in_4bit: Keep the weights of the linear layers in 4 bits.
        lora: Low-rank adapter.
        reference: What the policy is compared with in the step: ``logps`` computed before training,
            as ``prefalign dpo`` does; the ``base`` under an adapter; a ``copy`` of the policy.
        training: Training.
    """

    model: str = ""
    gpu_memory: str | None = None
    device: Literal["cuda", "cpu"] = "cuda"
    preferences: str | None = None
    tokenizer: str | None = None
    max_length: int = 2048
    max_prompt_length: int = 1024
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_in_4bit: bool = False
    lora: LoraSettings = field(default_factory=LoraSettings)
    reference: Literal["logps", "base", "copy"] = "logps"
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def validate(self) -> None:
        """Raise RunError, naming the option, where a value cannot be used."""
        prompt, training = self.max_prompt_length, self.training
        checks = [
            ("training.batch_size", training.batch_size, training.batch_size >= 1, "1 or more"),
            ("training.max_tokens", training.max_tokens, training.max_tokens >= 1, "1 or more"),
            ("lora.r", self.lora.r, self.lora.r >= 0, "0 or more"),
            ("model", self.model, bool(self.model), "a model's folder or name"),
            (
                "max_prompt_length",
                prompt,
                1 <= prompt < self.max_length,
                f"from 1 to less than max_length ({self.max_length})",
            ),
            (
                "reference",
                self.reference,
                self.reference != "base" or self.lora.r > 0,
                "logps or copy: a base model is one under an adapter (lora.r)",
            ),
            (
                "lora.r",
                self.lora.r,
                self.lora.r > 0 or not self.load_in_4bit,
                "1 or more, since load_in_4bit leaves nothing else to train",
            ),
        ]
        for name, value, holds, expected in checks:
            if not holds:
                raise RunError(f"{name}: expected {expected}, got {value!r}")
