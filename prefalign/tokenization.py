"""From text to token ids: what the model is trained on is what it sees when it generates.

Prompt and completion are tokenised apart, never as one text that is cut afterwards: a token that
spans the border would make the trained prompt another than the one that generation starts from.
Conversations go through the tokenizer's chat template. The prompt is the template's text with the
opening of the assistant's turn, the completion what the template adds to it, up to the token that
ends the turn.
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, overload

import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from .encoding import Encoder, Place, turn_closers
from .errors import UserError
from .packing import Group

logger = logging.getLogger(__name__)

TOKENIZE_BATCH = 256


def tokenize_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 2048,
    max_prompt_length: int | None = 1024,
    source: str | None = None,
) -> Dataset:
    """Tokenise preference pairs.

    - A longer prompt than ``max_prompt_length`` keeps its last tokens, after the BOS token if it
      has one. A completion is cut where ``max_length`` is reached, and then has no EOS token. A
      warning says how many were cut.
    - Every other completion ends with one EOS token, or with the token that ends a turn in the
      chat template.

    Args:
        dataset: ``prompt``, ``chosen`` and ``rejected``, as
            :func:`~prefalign.data.load_preferences` returns them.
        tokenizer: The model's. Conversations need its chat template.
        max_length: Most tokens in a prompt and completion together.
        max_prompt_length: Most tokens in a prompt; None cuts no prompt.
        source: The dataset's name, for messages.

    Returns:
        The dataset with the int32 lists ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` added.

    Raises:
        DataError: A prompt of ``max_length`` tokens or more; text without any token; chosen and
            rejected equal in their tokens; a chat template that is missing, fails, or writes the
            prompt in another way when a completion follows.
    """
    return _tokenize(
        dataset, tokenizer, ("chosen", "rejected"), max_length, max_prompt_length, source
    )


def tokenize_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 2048,
    max_prompt_length: int | None = 1024,
    source: str | None = None,
) -> Dataset:
    """Tokenise prompts to generate from: add ``prompt_ids``, by :func:`tokenize_preferences`."""
    return _tokenize(dataset, tokenizer, (), max_length, max_prompt_length, source)


def tokenize_sft(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 2048,
    max_prompt_length: int | None = 1024,
    source: str | None = None,
) -> Dataset:
    """Tokenise demonstrations, by the rules of :func:`tokenize_preferences`.

    Args:
        dataset: ``prompt`` and ``completion``, as :func:`~prefalign.data.load_sft` returns them.
        tokenizer: The model's. Conversations need its chat template.
        max_length: Most tokens in a prompt and completion together.
        max_prompt_length: Most tokens in a prompt; None cuts no prompt.
        source: The dataset's name, for messages.

    Returns:
        The dataset with the int32 lists ``prompt_ids`` and ``response_ids`` added.

    Raises:
        DataError: As :func:`tokenize_preferences`.
    """
    tokenized = _tokenize(
        dataset, tokenizer, ("completion",), max_length, max_prompt_length, source
    )
    return tokenized.rename_column("completion_ids", "response_ids")


def is_conversational(dataset: Dataset) -> bool:
    """Say whether the prompts are lists of messages."""
    return not isinstance(dataset.features["prompt"], Value)


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens at which generation stops: EOS, and the chat template's end of a turn."""
    closers = turn_closers(tokenizer) if tokenizer.chat_template is not None else []
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids += [tokenizer.convert_tokens_to_ids(closer) for closer in closers[:1]]
    return list(dict.fromkeys(ids))


def check_vocabulary(dataset: Dataset, vocab_size: int, source: str | None = None) -> None:
    """Raise a :class:`DataError` at the first token id of ``vocab_size`` or more."""
    fields = [name for name in dataset.column_names if name.endswith("_ids")]
    start = 0
    for table in dataset.with_format("arrow").select_columns(fields).iter(1000):
        for field in fields:
            column = table[field]
            if (pc.max(pc.list_flatten(column)).as_py() or 0) < vocab_size:
                continue
            for index, ids in enumerate(column.to_pylist(), start):
                if max(ids, default=0) >= vocab_size:
                    row = dataset[index]
                    text = {"response_ids": "completion"}.get(field, field.removesuffix("_ids"))
                    raise Place(row.get("file", source), row.get("row", index + 1)).error(
                        f"token {max(ids)} is outside the model's vocabulary of {vocab_size}; "
                        "the tokenizer is another model's",
                        text,
                    )
        start += table.num_rows


class TokenGroups(Sequence[Group]):
    """The tokenised rows of a dataset as groups, made when they are asked for.

    Args:
        dataset: Rows with ``prompt_ids``.
        responses: The columns of each response's ids, in the group's order.
        extras: Further columns that travel with the groups.
    """

    def __init__(self, dataset: Dataset, responses: Sequence[str], extras: Sequence[str] = ()):
        columns = ["prompt_ids", *responses, *extras]
        self._dataset = dataset.with_format(None).select_columns(columns)
        self._responses = tuple(responses)
        self._extras = tuple(extras)

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected one within {len(self)} groups, got {index}")
        index %= len(self)
        return self._group(self._dataset[index], index)

    def __iter__(self) -> Iterator[Group]:
        for start in range(0, len(self), 1000):
            columns = self._dataset[start : start + 1000]
            rows = zip(*columns.values(), strict=True)
            for index, values in enumerate(rows, start):
                yield self._group(dict(zip(columns, values, strict=True)), index)

    def _group(self, row: dict[str, Any], index: int) -> Group:
        return Group(
            prompt_ids=row["prompt_ids"],
            response_ids=[row[name] for name in self._responses],
            example_id=index,
            extras={
                name: row[name] if isinstance(row[name], list) else [row[name]]
                for name in self._extras
            },
        )

    @property
    def num_tokens(self) -> list[int]:
        """Each group's tokens in a batch, without making the groups."""
        lengths: list[int] = []
        for table in self._dataset.with_format("arrow").iter(1000):
            prompt, *responses = (
                pc.list_value_length(table[name]) for name in ("prompt_ids", *self._responses)
            )
            total = pc.multiply(prompt, len(responses))
            for response in responses:
                total = pc.add(total, response)
            lengths += total.to_pylist()
        return lengths


def groups_from_pairs(dataset: Dataset, extras: Sequence[str] = ()) -> TokenGroups:
    """Present tokenised pairs as :class:`~prefalign.packing.Group`, one for each row.

    Args:
        dataset: From :func:`tokenize_preferences`.
        extras: Further columns, of a number or a list of numbers, that travel with the groups.

    Returns:
        A sequence that reads a row when it is indexed, chosen first. ``example_id`` is the row's
        index.
    """
    return TokenGroups(dataset, ("chosen_ids", "rejected_ids"), extras)


def groups_from_sft(dataset: Dataset, extras: Sequence[str] = ()) -> TokenGroups:
    """Present tokenised demonstrations, of :func:`tokenize_sft`, as groups of one response."""
    return TokenGroups(dataset, ("response_ids",), extras)


def _tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[str],
    max_length: int,
    max_prompt_length: int | None,
    source: str | None,
) -> Dataset:
    if max_length < 2:
        raise UserError(f"max_length: expected 2 or more, got {max_length}")
    if max_prompt_length is not None and max_prompt_length < 1:
        raise UserError(f"max_prompt_length: expected 1 or more, got {max_prompt_length}")
    encoder = Encoder(tokenizer, is_conversational(dataset), source)
    cut: Counter[str] = Counter()

    def fit(ids: dict[str, list[int]], place: Place) -> None:
        """Cut one row's ids to their limits, in place."""
        for name in ids:
            if not ids[name]:
                raise place.error("the tokenizer makes no token of it", name)
        prompt_length = len(ids["prompt"])
        if prompt_length >= max_length:
            raise place.error(
                f"{prompt_length} tokens fill max_length={max_length} and leave no room for a "
                "response",
                "prompt",
            )
        if max_prompt_length is not None and prompt_length > max_prompt_length:
            cut["prompts"] += 1
            ids["prompt"] = encoder.last_tokens(ids["prompt"], max_prompt_length)
        room = max_length - len(ids["prompt"])
        whole = {name: ids[name] for name in completions}
        for name in completions:
            cut["completions"] += len(ids[name]) > room
            ids[name] = ids[name][:room]
        if completions == ("chosen", "rejected") and ids["chosen"] == ids["rejected"]:
            if whole["chosen"] == whole["rejected"]:
                raise place.error("has the same tokens as the chosen completion", "rejected")
            raise place.error(
                f"has the same tokens as the chosen completion once both are cut to {room}, which "
                f"is what the prompt leaves of max_length={max_length}",
                "rejected",
            )

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[list[int]]]:
        rows = batch.get("row") or [index + 1 for index in indices]
        files = batch.get("file") or [source] * len(rows)
        places = [Place(file, row) for file, row in zip(files, rows, strict=True)]
        encoded = encoder(batch, completions, places)
        for i, place in enumerate(places):
            ids = {name: encoded[name][i] for name in encoded}
            fit(ids, place)
            for name in encoded:
                encoded[name][i] = ids[name]
        return {f"{name}_ids": encoded[name] for name in encoded}

    features = dict(dataset.features)
    for name in ("prompt", *completions):
        features[f"{name}_ids"] = List(Value("int32"))
    tokenized = dataset.map(
        encode,
        with_indices=True,
        batched=True,
        batch_size=TOKENIZE_BATCH,
        features=Features(features),
        keep_in_memory=True,
        load_from_cache_file=False,
        # Nothing is cached, so there is no need to hash the tokenizer for a fingerprint.
        new_fingerprint=uuid.uuid4().hex,
        desc="Tokenizing",
    )
    name = source or "dataset"
    if cut["prompts"]:
        logger.warning(
            "%s: %d of %d prompts were cut to their last %d tokens (max_prompt_length)",
            name,
            cut["prompts"],
            len(dataset),
            max_prompt_length,
        )
    if cut["completions"]:
        logger.warning(
            "%s: %d of %d completions were cut to fit into %d tokens (max_length)",
            name,
            cut["completions"],
            len(dataset) * len(completions),
            max_length,
        )
    return tokenized
