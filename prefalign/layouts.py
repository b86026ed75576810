"""The layouts in which datasets keep a prompt and its completions, brought to one.

Plain text or lists of messages; the prompt in a column of its own, or implied by what the chosen
and the rejected text begin with.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from .encoding import Message, Text
from .errors import DataError
from .sources import Row, kind_of, shortened

# Parts of a message that change what a chat template prints, and that are not carried over.
UNSUPPORTED_PARTS = ("tool_calls", "function_call", "reasoning_content", "thinking")


def common_text_prefix(chosen: str, rejected: str) -> str:
    """Return the prompt of two texts that begin alike, or "" if there is none.

    It ends where the texts part, moved back to the start of the word, so that both completions
    begin with a whole one, and before the space in front of it, which goes with the completion.
    """
    room = min(len(chosen), len(rejected))
    end = next((i for i in range(room) if chosen[i] != rejected[i]), room)
    if end == room:  # one text begins the other; its last word is left to be its completion
        end = len(chosen[:end].rstrip())
        while end and not chosen[end - 1].isspace():
            end -= 1
    elif _in_word(chosen[end]) or _in_word(rejected[end]):
        while end and _in_word(chosen[end - 1]):
            end -= 1
    if end and chosen[end - 1] == " ":
        end -= 1
    return chosen[:end]


def _in_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M")


class Layout:
    """The layout of one source: what its first row showed, which later rows must keep to."""

    def __init__(self, names: Mapping[str, str]):
        self.names = names
        self.explicit: bool | None = None
        self.conversational: bool | None = None

    def has_prompt(self, row: Row) -> bool:
        """Say whether the prompt is a column of its own, as in the source's first row."""
        here = self.names["prompt"] in row.values
        if self.explicit is None:
            # A name that was asked for has to be there.
            self.explicit = here or self.names["prompt"] != "prompt"
        if here and not self.explicit:
            raise row.error("is there, and in the rows before it is not", self.names["prompt"])
        return self.explicit

    def parse(self, row: Row, field: str) -> Text:
        """Return a column's text or messages, with nothing wrong in their types."""
        name = self.names[field]
        if name not in row.values:
            found = ", ".join(map(repr, row.columns)) or "none"
            raise row.error(f"the column is missing; found: {found}", name)
        value = row.values[name]
        if isinstance(value, str):
            return _encodable(row, name, value)
        if isinstance(value, dict) and set(value) >= {"role", "content"}:
            # Older datasets keep a list of messages as a message of lists.
            parts = list(value.values())
            if all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts):
                value = [dict(zip(value, x, strict=True)) for x in zip(*parts, strict=True)]
        if not isinstance(value, list):
            raise row.error(f"expected text or a list of messages, got {kind_of(value)}", name)
        if not value:
            raise row.error("is empty", name)
        return [_message(row, name, i, message) for i, message in enumerate(value, 1)]

    def split(
        self, row: Row, prompt: Text | None, chosen: Text, rejected: Text
    ) -> tuple[Text, Text, Text]:
        """Take the prompt out of the completions, whichever layout they came in."""
        names = self.names
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise row.error(
                f"expected {_form(chosen)}, like the chosen completion, got {_form(rejected)}",
                names["rejected"],
            )
        if isinstance(chosen, str) and isinstance(rejected, str):
            if prompt is None:
                prompt = common_text_prefix(chosen, rejected)
                if not prompt.strip():
                    raise row.error("shares no prompt with the rejected text", names["chosen"])
                return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
            if isinstance(prompt, str):
                return prompt, chosen, rejected
        chosen, rejected = as_messages(chosen, "assistant"), as_messages(rejected, "assistant")
        if isinstance(prompt, list):
            size = len(prompt)
            if chosen[:size] == prompt and rejected[:size] == prompt:
                return prompt, chosen[size:], rejected[size:]
        if prompt is not None and chosen[0]["role"] == rejected[0]["role"] == "assistant":
            return as_messages(prompt, "user"), chosen, rejected
        if isinstance(prompt, list):
            raise row.error("does not go on from the prompt's messages", names["chosen"])
        pairs = zip(chosen[:-1], rejected[:-1], strict=False)
        shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        size = len(shared)
        if not shared:
            raise row.error("shares no message with the rejected conversation", names["chosen"])
        if prompt is not None and not any(
            prompt.strip() == message["content"].strip() for message in shared
        ):
            raise row.error(
                "is none of the messages with which both conversations begin", names["prompt"]
            )
        return shared, chosen[size:], rejected[size:]

    def split_last_turn(self, row: Row, field: str) -> tuple[Text, Text]:
        """Divide a conversation before the assistant's last turn, with which it ends."""
        name = self.names[field]
        messages = self.parse(row, field)
        if isinstance(messages, str) or len(messages) < 2:
            raise row.error("expected a list of two messages or more", name)
        if messages[-1]["role"] != "assistant":
            raise row.error(
                "expected the conversation to end with the assistant's message, got the role "
                f"{shortened(messages[-1]['role'])}",
                name,
            )
        end = list(takewhile(lambda message: message["role"] == "assistant", reversed(messages)))
        if len(end) == len(messages):
            raise row.error("nobody but the assistant says anything", name)
        return messages[: -len(end)], messages[-len(end) :]

    def check_prompt(self, row: Row, prompt: Text, field: str = "prompt") -> None:
        """Raise unless the prompt says something and is of the same kind as in the first row."""
        name = self.names[field]
        if is_blank(prompt):
            raise row.error("is empty", name)
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            raise row.error("ends with the assistant's message: nothing to respond to", name)
        conversational = isinstance(prompt, list)
        if self.conversational is None:
            self.conversational = conversational
        if conversational != self.conversational:
            before = "messages" if self.conversational else "plain text"
            raise row.error(f"expected {before}, as in the first row, got {_form(prompt)}", name)

    def check_completion(self, row: Row, field: str, completion: Text) -> None:
        """Raise unless the completion says something, and the assistant says it."""
        name = self.names[field]
        if isinstance(completion, list) and completion[0]["role"] != "assistant":
            raise row.error(
                "expected the completion to begin with the assistant's message, got the role "
                f"{shortened(completion[0]['role'])}",
                name,
            )
        if is_blank(completion):
            raise row.error("is empty", name)


def _message(row: Row, name: str, number: int, message: Any) -> Message:
    def error(text: str) -> DataError:
        return row.error(f"message {number}: {text}", name)

    if not isinstance(message, dict):
        raise error(f"expected an object with 'role' and 'content', got {kind_of(message)}")
    for part in UNSUPPORTED_PARTS:
        if message.get(part):
            raise error(f"{part!r} is not supported")
    for part in ("role", "content"):
        if message.get(part) is None:
            raise error(f"{part!r} is missing")
    role, content = message["role"], message["content"]
    if not isinstance(role, str):
        raise error(f"expected 'role' to be text, got {kind_of(role)}")
    if not role.strip():
        raise error("'role' is empty")
    if isinstance(content, list):  # parts, as for models that also see images
        if not all(isinstance(x, dict) and isinstance(x.get("text"), str) for x in content):
            raise error("'content' has parts that are not text")
        content = "".join(x["text"] for x in content)
    if not isinstance(content, str):
        raise error(f"expected 'content' to be text, got {kind_of(content)}")
    return {"role": _encodable(row, name, role), "content": _encodable(row, name, content)}


def as_messages(value: Text, role: str) -> list[Message]:
    """Return text as one message of ``role``; messages as they are."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _encodable(row: Row, name: str, text: str) -> str:
    # JSON can spell half a surrogate pair, which neither Arrow nor a tokenizer takes.
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise row.error(f"half a surrogate pair at character {error.start + 1}", name) from None
    return text


def _form(value: Text) -> str:
    return "plain text" if isinstance(value, str) else "messages"


def stripped(value: Text) -> Text:
    """Return text, or messages, without the blanks around them."""
    if isinstance(value, str):
        return value.strip()
    return [{**message, "content": message["content"].strip()} for message in value]


def is_blank(value: Text) -> bool:
    """Say whether nobody but the system says anything."""
    if isinstance(value, str):
        return not value.strip()
    return not any(m["content"].strip() for m in value if m["role"] not in ("system", "developer"))
