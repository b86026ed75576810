"""A sequence-classification model as a reward function: its one logit is the reward.

A conversation is written by the reward model's own chat template; plain text is the prompt and the
completion in one, with the special tokens that the tokenizer puts around a text by itself. The
model stays on the CPU and is on a device inside ``on_device`` alone, so that the policy has the
device's memory while it trains and generates.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from .data import as_text
from .encoding import Text
from .errors import ModelError
from .layouts import as_messages
from .loading import checked_path, first_line
from .references import modules_in_eval

logger = logging.getLogger(__name__)


class RewardModel:
    """A reward function ``f(prompts, completions)`` that a model computes, in padded batches.

    Args:
        model: A sequence-classification model with one label, on any device.
        tokenizer: Its own, which need not be the policy's.
        name: What messages call it; the model's own name by default.
        max_tokens: Tokens of one forward pass, padding included.
        max_length: Most tokens of a prompt and completion together; a longer text loses its
            beginning, and a warning says so once. By default the lesser of what the tokenizer and
            the model's config name.

    Raises:
        ModelError: The model has more than one label, or neither a pad token nor an EOS token.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        max_tokens: int = 16384,
        max_length: int | None = None,
    ):
        config: Any = model.config
        text_config = config.get_text_config()
        self.name = name or config.name_or_path or type(model).__name__
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected 1 or more, got {max_tokens}")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length: expected 2 or more, got {max_length}")
        if config.num_labels != 1:
            labels = ", ".join(map(str, config.id2label.values()))
            raise ModelError(
                f"{self.name}: a reward model has one label, and this has {config.num_labels} "
                f"({labels})"
            )
        if tokenizer.pad_token_id is None:
            own = text_config.pad_token_id
            pad = tokenizer.eos_token if own is None else tokenizer.convert_ids_to_tokens(own)
            if pad is None:
                raise ModelError(f"{self.name}: the tokenizer has neither a pad nor an EOS token")
            tokenizer.pad_token = pad
        # The last token that is no padding is where a decoder's reward is read.
        text_config.pad_token_id = config.pad_token_id = tokenizer.pad_token_id
        limits = [tokenizer.model_max_length, getattr(text_config, "max_position_embeddings", None)]
        self.max_length = max_length or int(min(limit for limit in limits if limit is not None))
        self.max_tokens = max_tokens
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self._warned: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @contextmanager
    def on_device(self, device: torch.device | str) -> Iterator[None]:
        """Have the weights on ``device`` inside the block, and on the CPU after it."""
        try:
            self.model.to(device)
            yield
        finally:
            self.model.to("cpu")

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float]:
        """Return the reward of each completion, float32; other columns are not looked at."""
        ids = self._encode(prompts, completions)
        # Of similar length, so that little is padding; longest first, so that a batch that does
        # not fit in memory shows at once.
        order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
        rewards = [0.0] * len(ids)
        start = 0
        with modules_in_eval(self.model):
            while start < len(order):
                size = max(1, self.max_tokens // len(ids[order[start]]))
                batch = order[start : start + size]
                for i, reward in zip(batch, self._score([ids[i] for i in batch]), strict=True):
                    rewards[i] = reward
                start += size
        return rewards

    def _encode(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[list[int]]:
        pairs = list(zip(prompts, completions, strict=True))
        if not pairs:
            return []
        conversational = any(isinstance(text, list) for pair in pairs for text in pair)
        if conversational and self.tokenizer.chat_template is not None:
            ids = self._ids([self._rendered(*pair) for pair in pairs], special=False)
        elif conversational:
            self._warn_once(
                "its tokenizer has no chat template: messages are written as 'role: content' lines"
            )
            texts = [as_text(self._messages(*pair)) for pair in pairs]
            ids = self._ids(texts, special=True)
        else:
            ids = self._ids([f"{prompt}{completion}" for prompt, completion in pairs], special=True)
        for i, tokens in enumerate(ids):
            if not tokens:
                raise ModelError(f"{self.name}: its tokenizer makes no token of row {i}")
            if len(tokens) > self.max_length:
                self._warn_once(f"texts are cut to their last {self.max_length} tokens")
                first = [tokens[0]] if tokens[0] in self.tokenizer.all_special_ids else []
                ids[i] = first + tokens[len(tokens) - self.max_length + len(first) :]
        return ids

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s: %s", self.name, message)

    def _messages(self, prompt: Text, completion: Text) -> list[dict[str, str]]:
        return as_messages(prompt, "user") + as_messages(completion, "assistant")

    def _rendered(self, prompt: Text, completion: Text) -> str:
        messages = self._messages(prompt, completion)
        return cast(str, self.tokenizer.apply_chat_template(messages, tokenize=False))

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=special, verbose=False)
        return cast(list[list[int]], encoded["input_ids"])

    def _score(self, ids: list[list[int]]) -> list[float]:
        width = max(map(len, ids))
        pad = self.tokenizer.pad_token_id
        padded = [x + [pad] * (width - len(x)) for x in ids]
        mask = [[1] * len(x) + [0] * (width - len(x)) for x in ids]
        logits = self.model(
            input_ids=torch.tensor(padded, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
        ).logits
        return logits[:, 0].float().tolist()


def load_reward_model(
    path: str,
    *,
    dtype: str | torch.dtype = "auto",
    max_tokens: int = 16384,
    max_length: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> RewardModel:
    """Load a reward model and its tokenizer, onto the CPU.

    Args:
        path: A folder or a hub name.
        dtype: Dtype of the weights; ``"auto"`` is the checkpoint's own.
        max_tokens: As for ``RewardModel``.
        max_length: As for ``RewardModel``.
        revision: The hub's branch, tag or commit.
        trust_remote_code: Whether to run code that comes with the model.

    Raises:
        ModelError: There is no such model, it has no classification head, or as ``RewardModel``.
    """
    name = checked_path(path)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(f"{name}: the folder holds no model: there is no config.json")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        # safetensors and huggingface_hub have errors of their own, without a common base.
        raise ModelError(
            f"{name}: cannot load a sequence-classification model: {first_line(error)}"
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{name}: is no reward model: the checkpoint has no weights for {missing[0]}"
        )
    return RewardModel(model, tokenizer, name=path, max_tokens=max_tokens, max_length=max_length)
