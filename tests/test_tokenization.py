"""From text to tokens: chat templates, ends of turns, cutting, groups."""

import logging

import pytest
from datasets import Dataset
from texts import (
    CHATML,
    NO_CLOSER,
    PAIR,
    REFUSES,
    REWRITES,
    ROWS,
    TURN_AND_EOS,
    assistant,
    byte_tokenizer,
    metaspace_tokenizer,
    user,
    write,
)

from prefalign import data, tokenization
from prefalign.errors import DataError, UserError
from prefalign.packing import pack


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
