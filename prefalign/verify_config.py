"""The settings of ``prefalign verify``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .config import Check, LoraSettings
from .errors import RunError


@dataclass(frozen=True)
class VerifySettings:
    """What is compared, on which model and which pairs.

    Args:
        model: A Hugging Face causal language model: a folder or a hub name.
        preferences: Labelled pairs, of which the first are taken: rows of prompt, chosen, rejected,
            as ``prefalign dpo`` reads them. Random tokens, with lengths like UltraFeedback's, if
            not given.
        pairs: How many pairs.
        tokenizer: Folder or hub name of the tokenizer; the model's own if not given.
        dtype: Dtype of the weights; ``auto`` is the checkpoint's own.
        device: Where to run; ``auto`` is an accelerator where there is one.
        exact: Dtype of the answer that errors are counted from. ``auto`` is float64 for models of
            up to 200 M parameters and ``none`` above, where eager PyTorch is compared with instead.
        trl: Run TRL's DPOTrainer too, where it is installed.
        max_length: Tokens of a prompt and its response together; the model's context if shorter.
        max_prompt_length: Tokens of a prompt, less than max_length; a longer one keeps its end.
        max_tokens: Tokens in one forward and backward pass of prefalign's.
        share_prompts: Compute a prompt once for all its responses.
        split_pairs: Compute the responses of a pair that is longer than max_tokens one after the
            other.
        gradient_checkpointing: Recompute activations in the backward pass, on every side.
        loss_type: A loss of ``preference_loss``.
        beta: DPO's inverse temperature.
        label_smoothing: cDPO's share of flipped labels.
        lora: Train a low-rank adapter instead of the whole model; the reference is then the model
            without it.
        seed: Seed of random tokens and of a fresh adapter.
    """

    model: str = ""
    preferences: str | None = None
    pairs: int = 8
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    exact: Literal["auto", "float64", "float32", "none"] = "auto"
    trl: bool = True
    max_length: int = 2048
    max_prompt_length: int = 1024
    max_tokens: int = 16384
    share_prompts: bool = True
    split_pairs: bool = True
    gradient_checkpointing: bool = False
    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    lora: LoraSettings = field(default_factory=LoraSettings)
    seed: int = 0

    def validate(self) -> None:
        """Raise RunError, naming the option, where a value cannot be used."""
        for name, value, holds, expected in self.checks():
            if not holds:
                raise RunError(f"{name}: expected {expected}, got {value!r}")

    def checks(self) -> list[Check]:
        """Return what must hold."""
        prompt, smoothing = self.max_prompt_length, self.label_smoothing
        return [
            ("model", self.model, bool(self.model), "a model's folder or name"),
            ("pairs", self.pairs, self.pairs >= 1, "1 or more"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more"),
            ("max_length", self.max_length, self.max_length >= 2, "2 or more"),
            ("max_prompt_length", prompt, prompt >= 1, "1 or more"),
            ("beta", self.beta, self.beta > 0, "more than 0"),
            ("label_smoothing", smoothing, 0 <= smoothing <= 0.5, "from 0 to 0.5"),
            ("lora.r", self.lora.r, self.lora.r >= 0, "0 or more"),
        ]
