"""Principles: what a guided prompt says before the query, and how it is put there.

PLE samples two responses to a query: one to the query alone, one to the query guided by principles
(arXiv 2408.02599). In a conversation the principles are a system message, or the end of the one
that is there; where the chat template knows no system role, they begin the first user message. In
plain text they are lines before the prompt. Rewards and training see the query alone.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from .encoding import Message, Place, Text
from .errors import DataError, UserError
from .sources import kind_of
from .tokenization import is_conversational, tokenize_prompts

DEFAULT_PRINCIPLES = Path(__file__).with_name("principles.txt")
SYSTEM_ROLES = ("system", "developer")
_NO_LIMIT = 2**31


def load_principles(
    source: str | os.PathLike[str] | Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Return the principles of a text file or a list.

    Args:
        source: A file with one principle on a line, where lines that begin with ``#`` and blank
            ones do not count; or the principles themselves; or None for the project's own.

    Raises:
        DataError: The file cannot be read, is not UTF-8 or holds no principle.
        UserError: The list is empty, or one of its members is blank or no text.
    """
    if source is None or isinstance(source, str | os.PathLike):
        path = DEFAULT_PRINCIPLES if source is None else Path(source).expanduser()
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", source=path) from error
        except UnicodeDecodeError as error:
            raise DataError("not UTF-8", source=path) from error
        principles = [line.strip() for line in lines]
        principles = [line for line in principles if line and not line.startswith("#")]
        if not principles:
            raise DataError("holds no principles", source=path)
        return tuple(principles)
    for number, principle in enumerate(source, 1):
        if not isinstance(principle, str):
            raise UserError(
                f"principles: expected text, got {kind_of(principle)} as number {number}"
            )
        if not principle.strip():
            raise UserError(f"principles: number {number} is empty")
    if not source:
        raise UserError("principles: expected one principle or more, got none")
    return tuple(" ".join(principle.split()) for principle in source)


def guidance(principles: Sequence[str]) -> str:
    """Return the text that stands before a query."""
    return "\n".join(["Answer by these principles:", *(f"- {line}" for line in principles)])


def guided_messages(prompt: Text, principles: Sequence[str], *, system_role: bool = True) -> Text:
    """Return a prompt with the principles in front of it.

    Args:
        prompt: Plain text, or messages; it is not changed itself.
        principles: The principles.
        system_role: Whether the chat template knows a system role; see :func:`has_system_role`.

    Returns:
        Text with the principles before it; or messages of which the first says them, as a system
        message of its own or at the end of the one that is there; or messages of which the user's
        first begins with them.
    """
    text = guidance(principles)
    if isinstance(prompt, str):
        return f"{text}\n\n{prompt}"
    messages: list[Message] = [dict(message) for message in prompt]
    if not system_role:
        users = [message for message in messages if message["role"] == "user"]
        asked = (users or messages)[0]
        asked["content"] = f"{text}\n\n{asked['content']}"
    elif messages[0]["role"] in SYSTEM_ROLES:
        said = messages[0]["content"]
        messages[0]["content"] = f"{said}\n\n{text}" if said.strip() else text
    else:
        messages.insert(0, {"role": "system", "content": text})
    return messages


def has_system_role(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether the chat template prints a system message; some refuse it, some pass it over."""
    mark = "principles"
    sample = [{"role": "system", "content": mark}, {"role": "user", "content": "a"}]
    try:
        return mark in str(tokenizer.apply_chat_template(sample, tokenize=False))
    except Exception:  # a template is a program that came with the model
        return False


def tokenize_guided(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    principles: Sequence[str],
    *,
    max_length: int = 2048,
    max_prompt_length: int | None = 1024,
    max_guided_length: int | None = None,
    source: str | None = None,
) -> Dataset:
    """Tokenise prompts twice: as they are, and guided by the principles.

    Where a prompt is cut to ``max_prompt_length``, the guided one is cut alike and keeps the
    principles, which come on top of that limit.

    Args:
        dataset: ``prompt``, as :func:`~prefalign.data.load_prompts` returns it.
        tokenizer: The model's. Conversations need its chat template.
        principles: The principles.
        max_length: Most tokens in a prompt and its response together, without the principles.
        max_prompt_length: Most tokens in a prompt, without the principles; None cuts no prompt.
        max_guided_length: Most tokens in a guided prompt: the model's context less what it may
            generate. None for no limit.
        source: The dataset's name, for messages.

    Returns:
        The dataset with the int32 lists ``prompt_ids``, as
        :func:`~prefalign.tokenization.tokenize_prompts` makes them, and ``guided_ids`` added.

    Raises:
        DataError: As :func:`~prefalign.tokenization.tokenize_prompts`, or a guided prompt of more
            than ``max_guided_length`` tokens.
    """
    limits: dict[str, Any] = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    plain = tokenize_prompts(dataset, tokenizer, **limits, source=source)
    system_role = is_conversational(dataset) and has_system_role(tokenizer)

    def guide(row: dict[str, Any]) -> dict[str, Text]:
        return {"prompt": guided_messages(row["prompt"], principles, system_role=system_role)}

    guided = _mapped(dataset, guide)
    limits = {"max_length": _NO_LIMIT, "max_prompt_length": None}
    guided = tokenize_prompts(guided, tokenizer, **limits, source=source)
    kept_ids = plain["prompt_ids"]
    cut = [i for i, ids in enumerate(kept_ids) if len(ids) == max_prompt_length]
    wholes: dict[int, list[list[int]]] = {}
    if cut:  # what a cut is made by: the whole prompt, and what is before the query's own text
        few = dataset.select(cut)
        marked = _mapped(_mapped(few, _marked), guide)
        pairs = zip(
            tokenize_prompts(few, tokenizer, **limits)["prompt_ids"],
            tokenize_prompts(marked, tokenizer, **limits)["prompt_ids"],
            strict=True,
        )
        wholes = {
            i: [list(whole), list(other)] for i, (whole, other) in zip(cut, pairs, strict=True)
        }
    own = len(tokenizer(guidance(principles), add_special_tokens=False)["input_ids"])

    def fit(row: dict[str, Any], index: int) -> dict[str, list[int]]:
        ids = row["prompt_ids"]
        if index in wholes:
            whole, other = wholes[index]
            ids = _cut_alike(ids, whole, other, kept_ids[index], own)
        if max_guided_length is not None and len(ids) > max_guided_length:
            raise Place(row.get("file", source), row.get("row", index + 1)).error(
                f"{len(ids)} tokens with the principles, and there is room for {max_guided_length}"
                "; use shorter principles, or cut prompts (max_prompt_length)",
                "prompt",
            )
        return {"prompt_ids": ids}

    guided = _mapped(guided, fit, with_indices=True)
    column = guided.select_columns("prompt_ids").rename_column("prompt_ids", "guided_ids")
    return concatenate_datasets([plain, column], axis=1)


def _mapped(dataset: Dataset, convert: Callable[..., dict], **options: Any) -> Dataset:
    return dataset.map(
        convert,
        features=Features(dataset.features),
        keep_in_memory=True,
        load_from_cache_file=False,
        # Nothing is cached, so there is no need to hash what converts for a fingerprint.
        new_fingerprint=uuid.uuid4().hex,
        desc="Guiding",
        **options,
    )


def _marked(row: dict[str, Any]) -> dict[str, Text]:
    """Return the prompt with another text in the place of the first that is not the system's."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return {"prompt": _other_text(prompt)}
    messages: list[Message] = [dict(message) for message in prompt]
    first = next((m for m in messages if m["role"] not in SYSTEM_ROLES), messages[0])
    first["content"] = _other_text(first["content"])
    return {"prompt": messages}


def _other_text(text: str) -> str:
    return "b" if text[:1] == "a" else "a"


def _cut_alike(
    guided: list[int], whole: list[int], other: list[int], kept: list[int], own: int
) -> list[int]:
    """Cut a guided prompt as its plain one was cut: to the same last tokens.

    Args:
        guided: The guided prompt's ids, whole.
        whole: The plain prompt's ids, whole.
        other: The guided ids of another query, to tell where the query's own text begins.
        kept: The plain prompt's ids, cut: its last ones, perhaps after a BOS token.
        own: How many tokens the principles take.
    """
    if len(kept) == len(whole):
        return guided
    last = len(kept) if kept == whole[len(whole) - len(kept) :] else len(kept) - 1
    pairs = zip(guided, other, strict=False)
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if start + last <= len(guided):
        return guided[:start] + guided[len(guided) - last :]
    # The cut falls before the query's own text: the principles come on top of what was kept.
    return kept[: len(kept) - last] + guided[max(0, len(guided) - last - own) :]
