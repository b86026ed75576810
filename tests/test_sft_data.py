"""Demonstrations: every layout, every bad row by its place, tokens, groups."""

import logging

import pytest
from datasets import Dataset
from texts import CHATML, REFUSES, assistant, byte_tokenizer, user, write

from prefalign import data, tokenization
from prefalign.errors import DataError, UserError
from prefalign.packing import pack

PAIR = {"prompt": "One?", "completion": " a"}
CHAT = {"prompt": [user("One?")], "completion": [assistant("a")]}
SYSTEM = {"role": "system", "content": "Be."}
LAYOUTS = {
    "plain": (PAIR, PAIR),
    "a response": ({"prompt": "One?", "response": " a"}, PAIR),
    "a response beside a completion": ({**PAIR, "response": "no"}, PAIR),
    "conversational": (CHAT, CHAT),
    "a prompt in plain text before messages": ({**CHAT, "prompt": "One?"}, CHAT),
    "a completion in plain text after messages": ({**CHAT, "completion": "a"}, CHAT),
    "messages": ({"messages": [user("One?"), assistant("a")]}, CHAT),
    "messages beside a prompt": (
        {"prompt": "One?", "prompt_id": 7, "messages": [user("One?"), assistant("a")]},
        CHAT,
    ),
    "messages beside a response that has no prompt": (
        {"response": "no", "messages": [user("One?"), assistant("a")]},
        CHAT,
    ),
    "messages beside a prompt and a response": (
        {"prompt": "One?", "response": " a", "messages": [user("No"), assistant("no")]},
        PAIR,
    ),
    "several turns": (
        {"messages": [SYSTEM, user("Hi"), assistant("Hello"), user("One?"), assistant("a")]},
        {
            "prompt": [SYSTEM, user("Hi"), assistant("Hello"), user("One?")],
            "completion": [assistant("a")],
        },
    ),
    "a turn of two messages": (
        {"messages": [user("One?"), assistant("a"), assistant("b")]},
        {"prompt": [user("One?")], "completion": [assistant("a"), assistant("b")]},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_layouts(name, suffix, tmp_path):
    row, expected = LAYOUTS[name]
    source = str(tmp_path / f"sft.{suffix}")
    if suffix == "jsonl":
        write(tmp_path / "sft.jsonl", row)
    else:
        Dataset.from_list([row]).to_parquet(source)
    loaded = data.load_sft(source)
    assert loaded.column_names == ["prompt", "completion", "row"]
    assert loaded[0] == {**expected, "row": 1}
    assert tokenization.is_conversational(loaded) == isinstance(expected["prompt"], list)


def test_demonstrations(tmp_path):
    source = write(tmp_path / "a.jsonl", {"prompt": "One?", "completion": " a"})
    loaded = data.load_sft(source)
    assert (loaded["prompt"], loaded["completion"]) == (["One?"], [" a"])
    source = write(tmp_path / "b.jsonl", {"messages": [user("One?"), assistant("a")]})
    loaded = data.load_sft(source)
    assert (loaded["prompt"], loaded["completion"]) == ([[user("One?")]], [[assistant("a")]])
    source = write(tmp_path / "c.jsonl", {"prompt": "One?", "messages": [user("One?")]})
    with pytest.raises(DataError, match="row 1, field 'messages': expected a list of two messages"):
        data.load_sft(source)
    assert data.as_text([user("One?"), assistant("a")]) == "user: One?\nassistant: a"


def test_columns_by_other_names(tmp_path):
    row = {"question": "One?", "answer": " a", "response": "no"}
    source = write(tmp_path / "a.jsonl", row)
    for field in ("completion", "response"):
        loaded = data.load_sft(source, columns={"prompt": "question", field: "answer"})
        assert (loaded["prompt"], loaded["completion"]) == (["One?"], [" a"])
    with pytest.raises(DataError, match="row 1, field 'output': the column is missing; found: "):
        data.load_sft(source, columns={"prompt": "question", "completion": "output"})
    with pytest.raises(UserError, match="names for prompt, completion, response, messages, got"):
        data.load_sft(source, columns={"chosen": "answer"})


@pytest.mark.parametrize(
    ("first", "row", "field", "message"),
    [
        (PAIR, {"prompt": "Q?"}, "completion", "the column is missing; found: 'prompt'"),
        (PAIR, {"completion": "a"}, "prompt", "the column is missing; found: 'completion'"),
        (PAIR, {"prompt": "Q?", "response": ""}, "response", "is empty"),
        (PAIR, {**PAIR, "completion": " \n"}, "completion", "is empty"),
        (PAIR, {**PAIR, "prompt": ""}, "prompt", "is empty"),
        (
            PAIR,
            {**PAIR, "completion": 3},
            "completion",
            "expected text or a list of messages, got a number (3)",
        ),
        (PAIR, CHAT, "prompt", "expected plain text, as in the first row, got messages"),
        (CHAT, PAIR, "prompt", "expected messages, as in the first row, got plain text"),
        (
            CHAT,
            {"messages": [user("Q?"), assistant("a"), user("Why?")]},
            "messages",
            "expected the conversation to end with the assistant's message, got the role 'user'",
        ),
        (CHAT, {"messages": "Q?"}, "messages", "expected a list of two messages or more"),
        (
            CHAT,
            {"messages": [assistant("a"), assistant("b")]},
            "messages",
            "nobody but the assistant says anything",
        ),
        (CHAT, {"messages": [user("Q?"), assistant(" ")]}, "messages", "is empty"),
        (CHAT, {"messages": [SYSTEM, assistant("a")]}, "messages", "is empty"),
        (
            CHAT,
            {"messages": [user("Q?"), {"role": "assistant"}]},
            "messages",
            "message 2: 'content' is missing",
        ),
        (
            CHAT,
            {**CHAT, "completion": [user("a")]},
            "completion",
            "expected the completion to begin with the assistant's message, got the role 'user'",
        ),
    ],
)
def test_bad_rows(first, row, field, message, tmp_path):
    source = write(tmp_path / "sft.jsonl", first, row, "never reached")
    with pytest.raises(DataError) as caught:
        data.load_sft(source)
    assert str(caught.value) == f"{source}, row 2, field {field!r}: {message}"


# Tokens


def test_demonstrations_are_tokenized():
    tokenizer = byte_tokenizer(template=CHATML, eos_token="<|im_end|>")
    rows = [{"prompt": [user("Q?")], "completion": [assistant("a")]}]
    row = tokenization.tokenize_sft(Dataset.from_list(rows), tokenizer)[0]
    assert tokenizer.decode(row["prompt_ids"] + row["response_ids"]) == (
        "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
    )


def test_a_demonstration_is_what_a_chosen_completion_would_be():
    tokenizer = byte_tokenizer(bos=True, eos=True, template=CHATML)
    for row in (PAIR, CHAT):
        pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "b"}
        if row is CHAT:
            pair["rejected"] = [assistant("b")]
        expected = tokenization.tokenize_preferences(Dataset.from_list([pair]), tokenizer)[0]
        tokenized = tokenization.tokenize_sft(Dataset.from_list([row]), tokenizer)
        assert tokenized.column_names == ["prompt", "completion", "prompt_ids", "response_ids"]
        assert tokenized[0]["prompt_ids"] == expected["prompt_ids"]
        assert tokenized[0]["response_ids"] == expected["chosen_ids"]


def test_cutting(caplog):
    tokenizer = byte_tokenizer(bos=True)
    rows = [{"prompt": "abcdefg", "completion": "1234"}, {"prompt": "ab", "completion": "1"}]
    with caplog.at_level(logging.WARNING, logger="prefalign"):
        cut = tokenization.tokenize_sft(
            Dataset.from_list(rows), tokenizer, max_length=9, max_prompt_length=6, source="a.jsonl"
        )
    assert [tokenizer.decode(ids) for ids in cut["prompt_ids"]] == ["<s>cdefg", "<s>ab"]
    assert [tokenizer.decode(ids) for ids in cut["response_ids"]] == ["123", "1</s>"]
    assert [record.getMessage() for record in caplog.records] == [
        "a.jsonl: 1 of 2 prompts were cut to their last 6 tokens (max_prompt_length)",
        "a.jsonl: 1 of 2 completions were cut to fit into 9 tokens (max_length)",
    ]


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        (
            {"prompt": "abcdefghi", "completion": "a"},
            "prompt",
            "9 tokens fill max_length=9 and leave no room for a response",
        ),
        (
            {"prompt": [SYSTEM, user("a")], "completion": [assistant("b")]},
            "prompt",
            "the chat template fails: No system turns",
        ),
    ],
)
def test_rows_that_cannot_be_tokenized(row, field, message):
    tokenizer = byte_tokenizer(template=REFUSES)
    with pytest.raises(DataError) as caught:
        tokenization.tokenize_sft(
            Dataset.from_list([row]), tokenizer, max_length=9, source="a.jsonl"
        )
    assert str(caught.value) == f"a.jsonl, row 1, field {field!r}: {message}"


def test_a_vocabulary_that_is_too_small():
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "a", "completion": text} for text in ("1", "~")]
    tokenized = tokenization.tokenize_sft(Dataset.from_list(rows), tokenizer)
    token = tokenizer.convert_tokens_to_ids("~")
    tokenization.check_vocabulary(tokenized, token + 1)
    with pytest.raises(DataError, match=f"a, row 2, field 'completion': token {token} is outside"):
        tokenization.check_vocabulary(tokenized, token, source="a")


def test_groups():
    rows = [{"prompt": f"{i}?", "completion": "x" * i, "weight": i / 2} for i in range(1, 5)]
    tokenized = tokenization.tokenize_sft(Dataset.from_list(rows), byte_tokenizer())
    groups = tokenization.groups_from_sft(tokenized.select([3, 1]), extras=["weight"])
    assert len(groups) == 2
    assert list(groups) == [groups[0], groups[-1]] == groups[:]
    assert groups[0].prompt_ids == tokenized[3]["prompt_ids"]
    assert groups[0].response_ids == [tokenized[3]["response_ids"]]
    assert [group.example_id for group in groups] == [0, 1]
    assert groups.num_tokens == [group.num_tokens for group in groups] == [7, 5]
    batch = pack(groups)
    assert (batch.num_groups, batch.targets.numel()) == (2, 8)
    assert batch.extras["weight"].tolist() == [2.0, 1.0]
