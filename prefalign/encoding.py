"""Prompts and completions to token ids: a tokenizer's habits and its chat template's.

The rules are :mod:`prefalign.tokenization`'s; here they meet one batch of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from .errors import DataError

Message = dict[str, str]
Text = str | list[Message]


@dataclass(frozen=True)
class Place:
    """A row's place in its source, for errors."""

    source: str | None
    row: int

    def error(self, message: str, field: str) -> DataError:
        """Return an error that names the row and the field."""
        return DataError(message, source=self.source, row=self.row, field=field)


class Encoder:
    """A tokenizer's habits, looked up once, and the rules for prompts and completions."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, conversational: bool, source: str | None
    ):
        self.tokenizer = tokenizer
        self.conversational = conversational
        self.source = source
        self.bos = tokenizer.bos_token_id
        self.eos = tokenizer.eos_token_id
        self.closers: list[str] = []
        if conversational:
            if tokenizer.chat_template is None:
                raise DataError(
                    "the prompts are messages, and the tokenizer has no chat template; give it "
                    "one, or give plain text",
                    source=source,
                )
            self.closers = turn_closers(tokenizer)
        bare = self._ids(["a"])[0]
        with_specials = tokenizer("a")["input_ids"]
        self.appends_eos = with_specials[-1:] == [self.eos] and bare[-1:] != [self.eos]
        # Some tokenizers put a space before the first word of a text, which a completion that goes
        # on from a prompt does not have. After a line break they put none that is not there.
        first = tokenizer.convert_ids_to_tokens(bare[:1])
        self.anchor: list[int] = []
        if first and first[0][:1] in "▁Ġ":
            self.anchor = self._ids(["\n"])[0]

    def __call__(
        self, batch: dict[str, list[Any]], completions: Sequence[str], places: Sequence[Place]
    ) -> dict[str, list[list[int]]]:
        """Return the ids of a batch's prompts and completions, by name, not yet cut."""
        texts: dict[str, list[str]] = {name: batch[name] for name in ("prompt", *completions)}
        if self.conversational:
            rendered = [self._render(batch, i, completions, x) for i, x in enumerate(places)]
            texts = {name: [row[name] for row in rendered] for name in texts}
            ids = {"prompt": self._ids(texts["prompt"])}
        else:
            ids = {"prompt": self.tokenizer(texts["prompt"], verbose=False)["input_ids"]}
            if self.appends_eos:
                ids["prompt"] = [prompt[:-1] for prompt in ids["prompt"]]
        for name in completions:
            ids[name] = [
                self._end(x, text)
                for x, text in zip(self._continuations(texts[name]), texts[name], strict=True)
            ]
        return ids

    def last_tokens(self, ids: list[int], length: int) -> list[int]:
        """Cut a prompt to its last tokens, and keep a BOS token in front."""
        if length > 1 and self.bos is not None and ids[0] == self.bos:
            return [self.bos, *ids[len(ids) - length + 1 :]]
        return ids[len(ids) - length :]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _continuations(self, texts: list[str]) -> list[list[int]]:
        if not self.anchor:
            return self._ids(texts)
        size = len(self.anchor)
        anchored = self._ids(["\n" + text for text in texts])
        return [
            ids[size:] if ids[:size] == self.anchor else self._ids([text])[0]
            for ids, text in zip(anchored, texts, strict=True)
        ]

    def _end(self, ids: list[int], text: str) -> list[int]:
        if not ids or ids[-1] == self.eos or (self.closers and text.endswith(tuple(self.closers))):
            return ids
        if self.eos is None:
            raise DataError(
                "the tokenizer has no EOS token to end a completion with", source=self.source
            )
        return [*ids, self.eos]

    def _render(
        self, batch: dict[str, list[Any]], index: int, completions: Sequence[str], place: Place
    ) -> dict[str, str]:
        prompt: list[Message] = batch["prompt"][index]
        opening = self._template(prompt, place, "prompt", opens_turn=True)
        texts = {"prompt": opening}
        for name in completions:
            whole = self._template(prompt + batch[name][index], place, name)
            if not whole.startswith(opening):
                raise place.error(
                    "the chat template writes the prompt in another way when a completion "
                    "follows, so the model cannot be trained on what generation sees",
                    name,
                )
            texts[name] = cut_after_closer(whole[len(opening) :], self.closers)
        return texts

    def _template(
        self, messages: list[Message], place: Place, field: str, opens_turn: bool = False
    ) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opens_turn
            )
        except Exception as error:  # a template is a program that came with the model
            raise place.error(
                f"the chat template fails: {' '.join(str(error).split())}", field
            ) from error
        return cast(str, text)


def turn_closers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that may end the assistant's turn: first the template's, then EOS."""
    answer = "prefalign"
    sample = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    try:
        text = cast(str, tokenizer.apply_chat_template(sample, tokenize=False))
    except Exception:  # a template that asks for more; its rows will say what
        text = ""
    tail = text.rpartition(answer)[2]
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    tokens |= set(tokenizer.all_special_tokens)
    closers = sorted((t for t in tokens if t.strip() and t in tail), key=tail.index)
    if tokenizer.eos_token is not None and tokenizer.eos_token not in closers:
        closers.append(tokenizer.eos_token)
    return closers


def cut_after_closer(text: str, closers: Sequence[str]) -> str:
    """Drop what a template writes after the end of the turn: generation never gets there."""
    end = len(text)
    rest = text
    while rest := rest.rstrip():
        closer = next((closer for closer in closers if rest.endswith(closer)), None)
        if closer is None:
            break
        end = len(rest)
        rest = rest[: -len(closer)]
    return text[:end]
