"""Every layout of a row, and every bad row by its place."""

import pytest
from datasets import Dataset
from texts import CHAT, PAIR, assistant, fails_with, triples, user, write

from prefalign import data, tokenization

QUESTION = "What is two and two?"
LAYOUTS = {
    "plain": (
        {"prompt": QUESTION, "chosen": " Four.", "rejected": " Five."},
        {"prompt": QUESTION, "chosen": " Four.", "rejected": " Five."},
    ),
    "plain, implicit": (
        {"chosen": "Q: one?\nA: It is so.", "rejected": "Q: one?\nA: It was not."},
        {"prompt": "Q: one?\nA: It", "chosen": " is so.", "rejected": " was not."},
    ),
    "plain, implicit, within a word": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " black."},
    ),
    "plain, implicit, one begins the other": (
        {"chosen": "Q: one?\nA: yes, sure", "rejected": "Q: one?\nA: yes"},
        {"prompt": "Q: one?\nA:", "chosen": " yes, sure", "rejected": " yes"},
    ),
    "plain, implicit, after a line break": (
        {"chosen": "Q: one?\nYes", "rejected": "Q: one?\nNo"},
        {"prompt": "Q: one?\n", "chosen": "Yes", "rejected": "No"},
    ),
    "plain, implicit, before an accent": (
        {"chosen": "Un cafe\u0301", "rejected": "Un cafe\u0300"},
        {"prompt": "Un", "chosen": " cafe\u0301", "rejected": " cafe\u0300"},
    ),
    "conversational": (
        {"prompt": [user(QUESTION)], "chosen": [assistant("4")], "rejected": [assistant("5")]},
        {"prompt": [user(QUESTION)], "chosen": [assistant("4")], "rejected": [assistant("5")]},
    ),
    "conversational, implicit": (
        {
            "chosen": [user("Hi"), assistant("Hello"), user(QUESTION), assistant("4")],
            "rejected": [user("Hi"), assistant("Hello"), user(QUESTION), assistant("5")],
        },
        {
            "prompt": [user("Hi"), assistant("Hello"), user(QUESTION)],
            "chosen": [assistant("4")],
            "rejected": [assistant("5")],
        },
    ),
    "conversational, implicit, one begins the other": (
        {
            "chosen": [user("Hi"), assistant("4")],
            "rejected": [user("Hi"), assistant("4"), user("No"), assistant("5")],
        },
        {
            "prompt": [user("Hi")],
            "chosen": [assistant("4")],
            "rejected": [assistant("4"), user("No"), assistant("5")],
        },
    ),
    "conversational, the prompt repeated in the completions": (
        {
            "prompt": [user(QUESTION)],
            "chosen": [user(QUESTION), assistant("4")],
            "rejected": [user(QUESTION), assistant("5")],
        },
        {"prompt": [user(QUESTION)], "chosen": [assistant("4")], "rejected": [assistant("5")]},
    ),
    "UltraFeedback": (
        {
            "prompt": QUESTION,
            "chosen": [user(QUESTION), assistant("4")],
            "rejected": [user(QUESTION), assistant("5")],
            "messages": [],
            "score_chosen": 9.0,
        },
        {"prompt": [user(QUESTION)], "chosen": [assistant("4")], "rejected": [assistant("5")]},
    ),
    "a prompt in plain text before messages": (
        {"prompt": QUESTION, "chosen": [assistant("4")], "rejected": [assistant("5")]},
        {"prompt": [user(QUESTION)], "chosen": [assistant("4")], "rejected": [assistant("5")]},
    ),
    "completions in plain text after messages": (
        {"prompt": [user(QUESTION)], "chosen": "4", "rejected": "5"},
        {"prompt": [user(QUESTION)], "chosen": [assistant("4")], "rejected": [assistant("5")]},
    ),
    "messages in parts, with names that are not used": (
        {
            "prompt": [{**user([{"type": "text", "text": "Hi"}]), "id": 7, "tool_calls": None}],
            "chosen": [assistant("4")],
            "rejected": [assistant("5")],
        },
        {"prompt": [user("Hi")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
    ),
    "messages as a message of lists": (
        {
            "prompt": {"role": ["system", "user"], "content": ["", "Hi"]},
            "chosen": [assistant("4")],
            "rejected": [assistant("5")],
        },
        {
            "prompt": [{"role": "system", "content": ""}, user("Hi")],
            "chosen": [assistant("4")],
            "rejected": [assistant("5")],
        },
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_layouts(name, suffix, tmp_path):
    row, expected = LAYOUTS[name]
    source = str(tmp_path / f"pairs.{suffix}")
    if suffix == "jsonl":
        write(tmp_path / "pairs.jsonl", row)
    else:
        Dataset.from_list([row]).to_parquet(source)
    loaded = data.load_preferences(source)
    assert triples(loaded) == [expected]
    assert tokenization.is_conversational(loaded) == isinstance(expected["prompt"], list)


@pytest.mark.parametrize("name", LAYOUTS)
def test_prompts_are_found_in_pairs(name, tmp_path):
    row, expected = LAYOUTS[name]
    source = write(tmp_path / "pairs.jsonl", row)
    assert data.load_prompts(source)["prompt"] == [expected["prompt"]]


def test_prompts_alone(tmp_path):
    source = write(tmp_path / "p.jsonl", {"prompt": "One?", "id": 1}, {"prompt": "Two?", "id": 2})
    loaded = data.load_prompts(source)
    assert loaded.column_names == ["prompt", "row"]
    assert loaded["prompt"] == ["One?", "Two?"]
    assert not tokenization.is_conversational(loaded)
    loaded = data.load_prompts(source, conversational=True)
    assert loaded["prompt"] == [[user("One?")], [user("Two?")]]


def test_prompts_of_pairs_whose_completions_are_equal(tmp_path):
    same = [user("One?"), assistant("a")]
    source = write(tmp_path / "p.jsonl", {"prompt": "One?", "chosen": same, "rejected": same})
    assert data.load_prompts(source)["prompt"] == [[user("One?")]]


# Bad rows

BAD_ROWS = {
    "broken JSON": ('{"prompt": ', None, "broken JSON: Expecting value at column 12"),
    "two values": ("{} {}", None, "broken JSON: Extra data at column 4"),
    "nested without end": ("[" * 200_000, None, "broken JSON: "),
    "no object": ("[1, 2]", None, "expected an object with named fields, got a list"),
    "a number": ("3", None, "expected an object with named fields, got a number (3)"),
    "missing column": (
        {"prompt": "Q?", "chosen": "a", "extra": 1},
        "rejected",
        "the column is missing; found: 'prompt', 'chosen', 'extra'",
    ),
    "missing prompt": (
        {"chosen": "a", "rejected": "b"},
        "prompt",
        "the column is missing; found: 'chosen', 'rejected'",
    ),
    "number": (
        {**PAIR, "chosen": 3},
        "chosen",
        "expected text or a list of messages, got a number (3)",
    ),
    "null": (
        {**PAIR, "rejected": None},
        "rejected",
        "expected text or a list of messages, got null",
    ),
    "truth value": (
        {**PAIR, "prompt": True},
        "prompt",
        "expected text or a list of messages, got a truth value (True)",
    ),
    "object": (
        {**PAIR, "prompt": {"text": "x"}},
        "prompt",
        "expected text or a list of messages, got an object",
    ),
    "empty prompt": ({**PAIR, "prompt": ""}, "prompt", "is empty"),
    "blank prompt": ({**PAIR, "prompt": " \n\t"}, "prompt", "is empty"),
    "empty chosen": ({**PAIR, "chosen": ""}, "chosen", "is empty"),
    "blank rejected": ({**PAIR, "rejected": "\u00a0 "}, "rejected", "is empty"),
    "equal": ({**PAIR, "rejected": "a"}, "rejected", "equals the chosen completion"),
    "equal but for blanks": ({**PAIR, "chosen": "b\n"}, "rejected", "equals the chosen completion"),
    "mixed kinds": (
        {**PAIR, "rejected": [assistant("b")]},
        "rejected",
        "expected plain text, like the chosen completion, got messages",
    ),
    "another kind than the first row": (
        CHAT,
        "prompt",
        "expected plain text, as in the first row, got messages",
    ),
    "half a surrogate pair": (
        {**PAIR, "chosen": "a \ud83d"},
        "chosen",
        "half a surrogate pair at character 3",
    ),
}
BAD_CHATS = {
    "no messages": ({**CHAT, "prompt": []}, "prompt", "is empty"),
    "no message": (
        {**CHAT, "chosen": ["a"]},
        "chosen",
        "message 1: expected an object with 'role' and 'content', got text",
    ),
    "no role": ({**CHAT, "prompt": [{"content": "Q?"}]}, "prompt", "message 1: 'role' is missing"),
    "no content": (
        {**CHAT, "chosen": [assistant("a"), {"role": "user"}]},
        "chosen",
        "message 2: 'content' is missing",
    ),
    "other structure": (
        {**CHAT, "prompt": [{"from": "human", "value": "Q?"}]},
        "prompt",
        "message 1: 'role' is missing",
    ),
    "content of another type": (
        {**CHAT, "prompt": [user(5)]},
        "prompt",
        "message 1: expected 'content' to be text, got a number (5)",
    ),
    "an image": (
        {**CHAT, "prompt": [user([{"type": "image"}])]},
        "prompt",
        "message 1: 'content' has parts that are not text",
    ),
    "a tool's call": (
        {**CHAT, "chosen": [{**assistant("a"), "tool_calls": [{"name": "f"}]}]},
        "chosen",
        "message 1: 'tool_calls' is not supported",
    ),
    "empty prompt": ({**CHAT, "prompt": [user(" ")]}, "prompt", "is empty"),
    "empty completion": ({**CHAT, "rejected": [assistant("")]}, "rejected", "is empty"),
    "equal": (
        {**CHAT, "rejected": [assistant("a ")]},
        "rejected",
        "equals the chosen completion",
    ),
    "nothing to respond to": (
        {**CHAT, "prompt": [user("Q?"), assistant("A")]},
        "prompt",
        "ends with the assistant's message: nothing to respond to",
    ),
    "user's completion": (
        {**CHAT, "chosen": [user("a"), assistant("a")]},
        "chosen",
        "does not go on from the prompt's messages",
    ),
    "other conversation": (
        {**CHAT, "prompt": "What?", "chosen": [user("Q?"), assistant("a")]}
        | {"rejected": [user("Q?"), assistant("b")]},
        "prompt",
        "is none of the messages with which both conversations begin",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(name, tmp_path):
    row, field, message = BAD_ROWS[name]
    source = write(tmp_path / "pairs.jsonl", PAIR, "", row, "never reached")
    assert fails_with(source, 3, field, message) or name == "nested without end"


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_messages(name, tmp_path):
    row, field, message = BAD_CHATS[name]
    source = write(tmp_path / "pairs.jsonl", CHAT, row, "never reached")
    assert fails_with(source, 2, field, message)


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "chosen", "shares no prompt with the rejected text"),
        (
            {"chosen": [user("a"), assistant("c")], "rejected": [user("b"), assistant("d")]},
            "chosen",
            "shares no message with the rejected conversation",
        ),
        (
            {"chosen": [user("q"), user("a")], "rejected": [user("q"), user("b")]},
            "chosen",
            "expected the completion to begin with the assistant's message, got the role 'user'",
        ),
    ],
)
def test_bad_implicit_prompts(row, field, message, tmp_path):
    assert fails_with(write(tmp_path / "pairs.jsonl", row), 1, field, message)


def test_a_prompt_where_the_first_row_has_none(tmp_path):
    source = write(tmp_path / "p.jsonl", {"chosen": "Q: a", "rejected": "Q: b"}, PAIR)
    assert fails_with(source, 2, "prompt", "is there, and in the rows before it is not")
