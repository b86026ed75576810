"""Preference data: every layout and file type, every bad row by its place, tokens, and parts."""

import gzip
import json
import logging

import datasets
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefalign import data, tokenization
from prefalign.errors import DataError, UserError
from prefalign.packing import pack

ROWS = [
    {"prompt": f"Question {i}?", "chosen": f" Good {i}.", "rejected": f" Bad {i}."}
    for i in range(5)
]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def triples(dataset):
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in dataset]


# Sources


def as_jsonl(folder):
    return write(folder / "pairs.jsonl", *ROWS)


def as_jsonl_gz(folder):
    path = folder / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    return str(path)


def as_json_array(folder):
    (folder / "pairs.json").write_text("\n" + json.dumps(ROWS, indent=1))
    return str(folder / "pairs.json")


def as_json_lines(folder):
    return write(folder / "pairs.json", *ROWS)


def as_parquet(folder):
    Dataset.from_list(ROWS).to_parquet(folder / "pairs.parquet")
    return str(folder / "pairs.parquet")


def as_saved(folder):
    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_saved_dict(folder):
    parts = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}
    DatasetDict(parts).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_folder(folder):
    (folder / "data").mkdir()
    write(folder / "data" / "train-00000-of-00002.jsonl", *ROWS[:3])
    Dataset.from_list(ROWS[3:]).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    write(folder / "data" / "test.jsonl", ROWS[0])
    return str(folder)


SOURCES = [
    as_jsonl,
    as_jsonl_gz,
    as_json_array,
    as_json_lines,
    as_parquet,
    as_saved,
    as_saved_dict,
    as_folder,
]


@pytest.mark.parametrize("make", SOURCES)
def test_every_source_gives_the_same_rows(make, tmp_path):
    assert triples(data.load_preferences(make(tmp_path))) == ROWS


@pytest.mark.parametrize("make", [as_saved_dict, as_folder])
def test_a_split_is_chosen(make, tmp_path):
    assert triples(data.load_preferences(make(tmp_path), split="test")) == ROWS[:1]


def test_files_that_name_no_split_are_training_data(tmp_path):
    write(tmp_path / "a.jsonl", *ROWS[:2])
    write(tmp_path / "b.jsonl", *ROWS[2:])
    write(tmp_path / "b-validation.jsonl", ROWS[0])
    loaded = data.load_preferences(str(tmp_path))
    assert triples(loaded) == ROWS
    assert loaded["row"] == [1, 2, 1, 2, 3]
    assert loaded["file"][1:3] == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def test_more_rows_than_a_chunk(tmp_path):
    rows = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(2500)]
    loaded = data.load_preferences(write(tmp_path / "pairs.jsonl", *rows))
    assert triples(loaded) == rows
    assert loaded["row"] == list(range(1, 2501))


def test_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = ["", *map(json.dumps, ROWS[:2]), "  ", json.dumps(ROWS[2])]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    loaded = data.load_preferences(str(path))
    assert triples(loaded) == ROWS[:3]
    assert loaded["row"] == [2, 3, 5]


def test_a_hub_dataset_and_its_configuration(monkeypatch):
    def load_dataset(name, config, split):
        assert (name, config, split) == ("owner/pairs", "small", "train_prefs")
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = data.load_preferences("owner/pairs:small", split="train_prefs")
    assert triples(loaded) == ROWS


def test_a_hub_dataset_that_cannot_be_reached(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/pairs' on the Hub\n(and a long story)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        data.load_preferences("owner/pairs")
    assert str(caught.value) == (
        "owner/pairs: neither a file or folder here, nor could it be loaded from the hub: "
        "Couldn't reach 'owner/pairs' on the Hub"
    )


def test_columns_by_other_names(tmp_path):
    source = write(tmp_path / "p.jsonl", {"question": "Q?", "good": "a", "bad": "b", "prompt": 1})
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    loaded = data.load_preferences(source, columns=columns)
    assert triples(loaded) == [{"prompt": "Q?", "chosen": "a", "rejected": "b"}]
    with pytest.raises(DataError, match="row 1, field 'q': the column is missing; found: 'quest"):
        data.load_preferences(source, columns={**columns, "prompt": "q"})
    with pytest.raises(UserError, match="columns: expected names for prompt, chosen, rejected"):
        data.load_preferences(source, columns={"promt": "question"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "none.jsonl", "no such file or folder"),
        (lambda d: d / "none", "no such file or folder"),
        (lambda d: write(d / "a.csv", "x"), "expected a file that ends in .jsonl, .jsonl.gz, "),
        (lambda d: write(d / "a.jsonl", "", " "), "holds no rows"),
        (lambda d: write(d / "a.json", "[]"), "holds no rows"),
        (lambda d: d, "no dataset that save_to_disk wrote, nor files that end in .jsonl, "),
        (lambda d: write(d / "a.parquet", "x"), "cannot be read: "),
    ],
)
def test_sources_that_cannot_be_read(make, message, tmp_path):
    source = str(make(tmp_path))
    with pytest.raises(DataError) as caught:
        data.load_preferences(source)
    assert str(caught.value).startswith(f"{source}: {message}")
    assert "\n" not in str(caught.value)


def test_splits_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="a single file has no split 'test'"):
        data.load_preferences(as_jsonl(tmp_path), split="test")
    with pytest.raises(DataError, match="has no files of the split 'test'"):
        data.load_preferences(str(tmp_path), split="test")
    with pytest.raises(DataError, match="has no split 'dev'; found: 'train', 'test'"):
        data.load_preferences(as_saved_dict(tmp_path), split="dev")


def test_a_damaged_archive_and_a_damaged_folder(tmp_path):
    whole = gzip.compress(b"\n".join(json.dumps(row).encode() for row in ROWS * 100))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read after line \d+: Compressed"):
        data.load_preferences(str(path))
    path.write_bytes(b"not an archive")
    with pytest.raises(DataError, match="cannot be read after line 0: Not a gzipped file"):
        data.load_preferences(str(path))
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state.json").write_text("{")
    with pytest.raises(DataError, match="saved: cannot be loaded: "):
        data.load_preferences(str(saved))


# Layouts

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


# Bad rows

PAIR = {"prompt": "Q?", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": [user("Q?")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
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


def fails_with(source, row, field, message):
    with pytest.raises(DataError) as caught:
        data.load_preferences(source)
    place = f"{source}, row {row}" + (f", field {field!r}" if field else "")
    assert str(caught.value).startswith(f"{place}: {message}")
    assert "\n" not in str(caught.value)
    return str(caught.value) == f"{place}: {message}"


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


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "caf\xe9"}\n')
    assert fails_with(str(path), 2, None, "not UTF-8: byte 0xe9 at position 16")
    path.write_bytes(json.dumps(PAIR).encode("utf-16"))
    assert fails_with(str(path), 1, None, "not UTF-8: byte 0xff at position 1")


def test_a_json_array_with_errors(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text('[\n{"prompt": "a"},\n{"prompt" "b"}\n]')
    assert fails_with(str(path), 3, None, "broken JSON: Expecting ':' delimiter at column 11")
    path.write_text(json.dumps([PAIR, {**PAIR, "chosen": ""}]))
    assert fails_with(str(path), 2, "chosen", "is empty")
    path.write_text(json.dumps([PAIR, 4]))
    assert fails_with(str(path), 2, None, "expected an object with named fields, got a number (4)")


@pytest.mark.parametrize("make", ["parquet", "saved"])
def test_bad_rows_in_tables(make, tmp_path):
    source = str(tmp_path / f"pairs.{make}")

    def save(*rows):
        table = Dataset.from_list(list(rows))
        table.to_parquet(source) if make == "parquet" else table.save_to_disk(source)

    save(PAIR, {**PAIR, "chosen": "  "})
    assert fails_with(source, 2, "chosen", "is empty")
    save(PAIR, {**PAIR, "chosen": None})
    assert fails_with(source, 2, "chosen", "expected text or a list of messages, got null")
    save({"text": "x", "label": 1})
    assert fails_with(source, 1, "chosen", "the column is missing; found: 'text', 'label'")


def test_parquet_text_that_is_not_utf8(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    chosen = pa.array([b"a", b"caf\xe9"]).view(pa.string())
    table = pa.table({"prompt": ["Q?", "Q?"], "chosen": chosen, "rejected": ["b", "b"]})
    pq.write_table(table, tmp_path / "p.parquet")
    source = str(tmp_path / "p.parquet")
    assert fails_with(source, 2, None, "not UTF-8: byte 0xe9 at position 4")


def test_a_folder_names_the_file(tmp_path):
    write(tmp_path / "a.jsonl", PAIR)
    bad = write(tmp_path / "b.jsonl", PAIR, {**PAIR, "prompt": ""})
    with pytest.raises(DataError) as caught:
        data.load_preferences(str(tmp_path))
    assert str(caught.value) == f"{bad}, row 2, field 'prompt': is empty"


# Tokens

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An end of turn that is not EOS, then EOS after the last turn, as Phi-3 writes it; BOS in front.
TURN_AND_EOS = (
    "<s>{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}</s>{% endif %}"
)
NO_CLOSER = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REWRITES = "{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system\nturns') }}"
    "{% endif %}{{ m.content }}</s>{% endfor %}"
)


def byte_tokenizer(*, bos=False, eos=False, template=None, eos_token="</s>"):
    """One token for a byte, but for ': ', a token that spans the border of 'A:' and ' B'."""
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), ":Ġ"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(":", "Ġ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in special])
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos),
            special_tokens=[("<s>", 1), ("</s>", 2)],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos_token, pad_token="<pad>"
    )
    fast.chat_template = template
    return fast


def metaspace_tokenizer():
    """A tokenizer in SentencePiece's manner, with a space before the first word."""
    pieces = ["<s>", "</s>", "\n", "▁", "▁Hello", "Hello", "▁Q", ":", "H", "e", "l", "o", "Q"]
    vocab = [(piece, -len(pieces) + 5.0 * len(piece)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def chat(prompt, chosen="yes", rejected="no"):
    if isinstance(prompt, str):
        prompt = [user(prompt)]
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def tokenize(rows, tokenizer, **kwargs):
    return tokenization.tokenize_preferences(Dataset.from_list(rows), tokenizer, **kwargs)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_plain_text(bos, eos):
    tokenizer = byte_tokenizer(bos=bos, eos=eos)
    rows = [{"prompt": "Q:", "chosen": " a", "rejected": " bc"}]
    row = tokenize(rows, tokenizer)[0]
    assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == ["<s>"] * bos + ["Q", ":"]
    assert tokenizer.convert_ids_to_tokens(row["chosen_ids"]) == ["Ġ", "a", "</s>"]
    assert tokenizer.convert_ids_to_tokens(row["rejected_ids"]) == ["Ġ", "b", "c", "</s>"]
    assert [row[name] for name in rows[0]] == list(rows[0].values())


def test_the_prompt_is_what_generation_sees():
    # As one text, the space would be drawn into the prompt's last token (trl#5213).
    tokenizer = byte_tokenizer(bos=True)
    rows = [{"prompt": "Q:", "chosen": " a", "rejected": " b"}]
    whole = tokenizer("Q: a")["input_ids"]
    seen = tokenizer("Q:")["input_ids"]
    assert whole[: len(seen)] != seen
    assert tokenize(rows, tokenizer)["prompt_ids"] == [seen]
    prompts = tokenization.tokenize_prompts(Dataset.from_list([{"prompt": "Q:"}]), tokenizer)
    assert prompts["prompt_ids"] == [seen]

    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = byte_tokenizer(template=template)
    seen = tokenizer.apply_chat_template([user("Q")], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    row = tokenize([chat("Q", " a", " b")], tokenizer)[0]
    assert row["prompt_ids"] == seen
    assert tokenizer.decode(row["chosen_ids"]) == " a</s>"
    whole = tokenizer.apply_chat_template([user("Q"), assistant(" a")], return_dict=True)
    assert whole["input_ids"][: len(seen)] != seen


@pytest.mark.parametrize(
    ("template", "eos_token", "completion", "ends"),
    [
        (CHATML, "<|im_end|>", "yes<|im_end|>", [4]),
        (CHATML, "</s>", "yes<|im_end|>", [2, 4]),
        (TURN_AND_EOS, "</s>", "yes<|im_end|>", [2, 4]),
        (NO_CLOSER, "</s>", "yes\n</s>", [2]),
    ],
)
def test_a_turn_ends_once(template, eos_token, completion, ends):
    tokenizer = byte_tokenizer(bos=True, eos=True, template=template, eos_token=eos_token)
    row = tokenize([chat("Q?")], tokenizer)[0]
    assert tokenizer.decode(row["chosen_ids"]) == completion
    assert sorted(tokenization.end_token_ids(tokenizer)) == ends
    assert row["chosen_ids"][-1] in ends
    text = tokenizer.apply_chat_template([user("Q?")], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(row["prompt_ids"]) == text
    assert row["prompt_ids"].count(tokenizer.bos_token_id) == text.count("<s>")


def test_a_completion_that_already_ends_with_eos():
    tokenizer = byte_tokenizer()
    row = tokenize([{"prompt": "Q", "chosen": "a</s>", "rejected": "b"}], tokenizer)[0]
    assert tokenizer.decode(row["chosen_ids"]) == "a</s>"


def test_no_space_is_put_before_a_completion():
    tokenizer = metaspace_tokenizer()
    rows = [{"prompt": "Q:", "chosen": "Hello", "rejected": " Hello"}]
    row = tokenize(rows, tokenizer)[0]
    assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == ["▁Q", ":"]
    assert tokenizer.convert_ids_to_tokens(row["chosen_ids"]) == ["Hello", "</s>"]
    assert tokenizer.convert_ids_to_tokens(row["rejected_ids"]) == ["▁Hello", "</s>"]


def test_demonstrations_are_tokenized():
    tokenizer = byte_tokenizer(template=CHATML, eos_token="<|im_end|>")
    rows = [{"prompt": [user("Q?")], "completion": [assistant("a")]}]
    row = tokenization.tokenize_sft(Dataset.from_list(rows), tokenizer)[0]
    assert tokenizer.decode(row["prompt_ids"] + row["completion_ids"]) == (
        "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
    )


def test_cutting(caplog):
    tokenizer = byte_tokenizer(bos=True)
    rows = [
        {"prompt": "abcdefg", "chosen": "1234", "rejected": "5"},
        {"prompt": "ab", "chosen": "1", "rejected": "2"},
    ]
    with caplog.at_level(logging.WARNING, logger="prefalign"):
        cut = tokenize(rows, tokenizer, max_length=9, max_prompt_length=5, source="a.jsonl")
    decoded = [{name: tokenizer.decode(row[f"{name}_ids"]) for name in rows[0]} for row in cut]
    assert decoded == [
        {"prompt": "<s>defg", "chosen": "1234", "rejected": "5</s>"},
        {"prompt": "<s>ab", "chosen": "1</s>", "rejected": "2</s>"},
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "a.jsonl: 1 of 2 prompts were cut to their last 5 tokens (max_prompt_length)",
        "a.jsonl: 1 of 4 completions were cut to fit into 9 tokens (max_length)",
    ]
    assert tokenize(rows, tokenizer, max_length=9, max_prompt_length=1)["prompt_ids"] == [
        tokenizer("g", add_special_tokens=False)["input_ids"],
        tokenizer("b", add_special_tokens=False)["input_ids"],
    ]
    whole = tokenize(rows, tokenizer, max_length=9, max_prompt_length=None)
    assert [len(ids) for ids in whole["prompt_ids"]] == [8, 3]
    assert len(whole[0]["chosen_ids"]) == 1
    no_bos = tokenize(rows, byte_tokenizer(), max_length=9, max_prompt_length=5)
    assert tokenizer.decode(no_bos[0]["prompt_ids"]) == "cdefg"


@pytest.mark.parametrize(
    ("row", "tokenizer", "field", "message"),
    [
        (
            {"prompt": "abcdefgh", "chosen": "1", "rejected": "2"},
            byte_tokenizer(),
            "prompt",
            "8 tokens fill max_length=8 and leave no room for a response",
        ),
        (
            {"prompt": "abcdef", "chosen": "123", "rejected": "124"},
            byte_tokenizer(),
            "rejected",
            "has the same tokens as the chosen completion once both are cut to 2, which is what "
            "the prompt leaves of max_length=8",
        ),
        (
            chat("a", "b", "b</s>"),
            byte_tokenizer(template="{% for m in messages %}{{ m.content }}</s>{% endfor %}"),
            "rejected",
            "has the same tokens as the chosen completion",
        ),
        (
            chat("a"),
            byte_tokenizer(template=REWRITES),
            "chosen",
            "the chat template writes the prompt in another way when a completion follows, so the "
            "model cannot be trained on what generation sees",
        ),
        (
            chat([{"role": "system", "content": "Be."}, user("a")]),
            byte_tokenizer(template=REFUSES),
            "prompt",
            "the chat template fails: No system turns",
        ),
    ],
)
def test_rows_that_cannot_be_tokenized(row, tokenizer, field, message):
    good = {"prompt": "a", "chosen": "1", "rejected": "2"}
    rows = [row] if isinstance(row["prompt"], list) else [good, row]
    with pytest.raises(DataError) as caught:
        tokenize(rows, tokenizer, max_length=8, source="a.jsonl")
    assert str(caught.value) == f"a.jsonl, row {len(rows)}, field {field!r}: {message}"


def test_an_error_names_the_row_of_the_file(tmp_path):
    write(tmp_path / "a.jsonl", PAIR)
    source = write(tmp_path / "b.jsonl", PAIR, "", {**PAIR, "prompt": "long" * 9})
    for name in (source, str(tmp_path)):
        loaded = data.load_preferences(name)
        with pytest.raises(DataError, match=r"b\.jsonl, row 3, field 'prompt': 36 tokens fill"):
            tokenization.tokenize_preferences(loaded, byte_tokenizer(), max_length=30, source=name)


def test_a_missing_chat_template_and_bad_limits():
    with pytest.raises(DataError) as caught:
        tokenize([chat("a")], byte_tokenizer(), source="a.jsonl")
    assert str(caught.value) == (
        "a.jsonl: the prompts are messages, and the tokenizer has no chat template; give it one, "
        "or give plain text"
    )
    with pytest.raises(UserError, match="max_length: expected 2 or more, got 1"):
        tokenize([PAIR], byte_tokenizer(), max_length=1)
    with pytest.raises(UserError, match="max_prompt_length: expected 1 or more, got 0"):
        tokenize([PAIR], byte_tokenizer(), max_prompt_length=0)


def test_a_vocabulary_that_is_too_small():
    rows = [{"prompt": "a", "chosen": f"{i}", "rejected": "~"} for i in range(3)]
    tokenizer = byte_tokenizer()
    tokenized = tokenize(rows, tokenizer)
    tokenization.check_vocabulary(tokenized, len(tokenizer))
    token = tokenizer.convert_tokens_to_ids("~")
    with pytest.raises(DataError) as caught:
        tokenization.check_vocabulary(tokenized.select([2, 1]), token, source="a.jsonl")
    assert str(caught.value) == (
        f"a.jsonl, row 1, field 'rejected': token {token} is outside the model's vocabulary of "
        f"{token}; the tokenizer is another model's"
    )


def test_groups():
    tokenized = tokenize([{**row, "weight": 0.5} for row in ROWS], byte_tokenizer())
    groups = tokenization.groups_from_pairs(tokenized.select([3, 1, 2]), extras=["weight"])
    assert len(groups) == 3
    first = groups[0]
    assert list(first.prompt_ids) == tokenized[3]["prompt_ids"]
    assert first.response_ids == [tokenized[3]["chosen_ids"], tokenized[3]["rejected_ids"]]
    assert [group.example_id for group in groups] == [0, 1, 2]
    assert list(groups) == [groups[i] for i in range(3)] == groups[:]
    assert groups[-1] == groups[2]
    assert groups.num_tokens == [group.num_tokens for group in groups]
    with pytest.raises(IndexError):
        groups[3]
    batch = pack(groups[:2])
    assert batch.num_groups == 2
    assert batch.extras["weight"].tolist() == [0.5, 0.5]


# Parts


def prompts(*texts):
    return Dataset.from_list([{"prompt": text, "i": i} for i, text in enumerate(texts)])


def test_hold_out():
    pairs = prompts(*(f"{i % 90}?" for i in range(100)))
    train, held = data.hold_out(pairs, seed=3)
    assert (len(train), len(held)) == (84, 16)
    assert not set(train["prompt"]) & set(held["prompt"])
    assert sorted([*train["i"], *held["i"]]) == list(range(100))
    assert list(train["i"]) == sorted(train["i"])
    again, held_again = data.hold_out(pairs, seed=3)
    assert list(train["i"]) == list(again["i"]) and list(held["i"]) == list(held_again["i"])
    assert list(data.hold_out(pairs, seed=4)[1]["i"]) != list(held["i"])
    assert len(data.hold_out(pairs, fraction=0.3, seed=3)[1]) == 30
    assert len(data.hold_out(pairs, fraction=0.0, minimum=0, seed=3)[1]) == 0


def test_hold_out_of_unequal_prompts():
    pairs = prompts(*["a"] * 30, *["b"] * 4)
    train, held = data.hold_out(pairs, minimum=3, fraction=0.0, seed=0)
    assert (set(train["prompt"]), set(held["prompt"])) == ({"a"}, {"b"})


def test_hold_out_of_conversations():
    pairs = Dataset.from_list([{"prompt": [user(f"{i % 5}")], "i": i} for i in range(20)])
    train, held = data.hold_out(pairs, minimum=4, seed=0)
    assert len(held) == 4
    assert not {p[0]["content"] for p in train["prompt"]} & {
        p[0]["content"] for p in held["prompt"]
    }


@pytest.mark.parametrize("texts", [["a"] * 100, [f"{i}" for i in range(16)]])
def test_hold_out_of_too_few(texts):
    with pytest.raises(DataError) as caught:
        data.hold_out(prompts(*texts), seed=0, source="a.jsonl")
    assert str(caught.value) == (
        f"a.jsonl: {len(texts)} rows with {len(set(texts))} different prompts are too few to hold "
        "out 16 and leave any to train on"
    )


def test_split_prompts(caplog):
    fresh = prompts(*(f"{i % 15}?" for i in range(20)))
    with caplog.at_level(logging.WARNING, logger="prefalign"):
        parts = data.split_prompts(fresh, [2, 3, 4], seed=1, source="a.jsonl")
    assert [record.getMessage() for record in caplog.records] == [
        "a.jsonl: 5 of 20 prompts repeat an earlier one and are left out"
    ]
    assert [len(part) for part in parts] == [2, 3, 4]
    used = [prompt for part in parts for prompt in part["prompt"]]
    assert len(set(used)) == 9
    again = data.split_prompts(fresh, [2, 3, 4], iterations=3, seed=1)
    assert [list(part["i"]) for part in again] == [list(part["i"]) for part in parts]
    equal = data.split_prompts(fresh, iterations=4, seed=1)
    assert [len(part) for part in equal] == [4, 4, 4, 3]
    assert len({prompt for part in equal for prompt in part["prompt"]}) == 15


def test_split_prompts_of_too_few():
    with pytest.raises(DataError) as caught:
        data.split_prompts(prompts("a", "b", "a"), [2, 2], seed=0, source="a.jsonl")
    assert str(caught.value) == (
        "a.jsonl: 4 prompts are asked for, for 2 iterations, and 2 different were found"
    )
    with pytest.raises(DataError, match="3 prompts are asked for, for 3 iterations, and 1 was fou"):
        data.split_prompts(prompts("a"), iterations=3, seed=0)
    with pytest.raises(UserError, match="expected 3 sizes, one for each iteration, got 2"):
        data.split_prompts(prompts("a"), [1, 1], iterations=3, seed=0)
    with pytest.raises(UserError, match="expected parts of 1 prompt or more"):
        data.split_prompts(prompts("a"), [0], seed=0)


def test_prompts_that_are_labelled_too(caplog):
    labelled = prompts("a", "b")
    fresh = Dataset.from_list([{"prompt": [user(text)]} for text in ("b", "c", "b")])
    with caplog.at_level(logging.WARNING, logger="prefalign"):
        assert data.warn_shared_prompts(labelled, fresh, source="p.jsonl") == 2
        assert data.warn_shared_prompts(labelled, prompts("c")) == 0
    assert [record.getMessage() for record in caplog.records] == [
        "p.jsonl: 2 of 3 prompts are also prompts of labelled pairs"
    ]
