"""Principles: read, put before a query in every form, tokenised without a change to the query."""

import copy
import logging
from pathlib import Path

import pytest
from datasets import Dataset
from texts import CHATML, REFUSES, assistant, byte_tokenizer, user, write

from prefalign.data import load_prompts
from prefalign.errors import DataError, UserError
from prefalign.principles import (
    DEFAULT_PRINCIPLES,
    guidance,
    guided_messages,
    has_system_role,
    load_principles,
    tokenize_guided,
)
from prefalign.tokenization import check_vocabulary, tokenize_prompts

TWO = ("Help.", "Be brief.")
TEXT = "Answer by these principles:\n- Help.\n- Be brief."


def system(content):
    return {"role": "system", "content": content}


# Reading


def test_the_default_set():
    principles = load_principles()
    assert principles == load_principles(DEFAULT_PRINCIPLES)
    assert len(principles) == 6
    for word in ("help", "know", "harm", "clear", "question", "brief"):
        assert any(word in principle.lower() for principle in principles)
    assert DEFAULT_PRINCIPLES.read_text().startswith("# ")
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    assert " · ".join(principles) in " ".join(page.replace("\n>", "").split())


def test_a_file_and_a_list(tmp_path):
    path = tmp_path / "principles.txt"
    path.write_bytes("\ufeff# Ours\n\n Help. \r\n  # no\n\t\nBe #1 and naïve.".encode())
    assert load_principles(path) == load_principles(str(path)) == ("Help.", "Be #1 and naïve.")
    assert load_principles(["Help.", " Be\n  brief. "]) == TWO
    assert load_principles(TWO) == TWO


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no principles"),
        (b"# Help.\n \n", "holds no principles"),
        (b"caf\xe9", "not UTF-8"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_files_without_principles(content, message, tmp_path):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_principles(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "principles: expected one principle or more, got none"),
        (["Help.", " "], "principles: number 2 is empty"),
        (["Help.", 3], "principles: expected text, got a number (3) as number 2"),
    ],
)
def test_lists_without_principles(source, message):
    with pytest.raises(UserError) as caught:
        load_principles(source)
    assert str(caught.value) == message


# Guided prompts


@pytest.mark.parametrize(
    ("prompt", "system_role", "expected"),
    [
        ("Q?", True, f"{TEXT}\n\nQ?"),
        ("Q?", False, f"{TEXT}\n\nQ?"),
        ([user("Q?")], True, [system(TEXT), user("Q?")]),
        ([system("Be."), user("Q?")], True, [system(f"Be.\n\n{TEXT}"), user("Q?")]),
        ([system(" "), user("Q?")], True, [system(TEXT), user("Q?")]),
        (
            [{"role": "developer", "content": "Be."}, user("Q?")],
            True,
            [{"role": "developer", "content": f"Be.\n\n{TEXT}"}, user("Q?")],
        ),
        ([user("Q?")], False, [user(f"{TEXT}\n\nQ?")]),
        (
            [assistant("Hi"), user("Q?"), assistant("A"), user("Why?")],
            False,
            [assistant("Hi"), user(f"{TEXT}\n\nQ?"), assistant("A"), user("Why?")],
        ),
        (
            [{"role": "tool", "content": "x"}],
            False,
            [{"role": "tool", "content": f"{TEXT}\n\nx"}],
        ),
    ],
)
def test_the_principles_stand_before_the_query(prompt, system_role, expected):
    before = copy.deepcopy(prompt)
    assert guidance(TWO) == TEXT
    assert guided_messages(prompt, TWO, system_role=system_role) == expected
    assert prompt == before


IGNORES = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}:{{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "known"), [(CHATML, True), (REFUSES, False), (IGNORES, False)]
)
def test_templates_without_a_system_role(template, known):
    assert has_system_role(byte_tokenizer(template=template)) == known


# Tokens


def tokenized(prompts, tokenizer, principles=TWO, **kwargs):
    dataset = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    return tokenize_guided(dataset, tokenizer, principles, **kwargs)


@pytest.mark.parametrize(
    ("prompts", "options", "guided"),
    [
        (["Q: a", "b"], {}, [f"{TEXT}\n\nQ: a", f"{TEXT}\n\nb"]),
        (["Q: a"], {"bos": True, "eos": True}, [f"<s>{TEXT}\n\nQ: a"]),
        (
            [[user("Q?")], [system("Be."), user("Q?")]],
            {"template": CHATML},
            [
                f"<|im_start|>system\n{TEXT}<|im_end|>\n<|im_start|>user\nQ?<|im_end|>\n"
                "<|im_start|>assistant\n",
                f"<|im_start|>system\nBe.\n\n{TEXT}<|im_end|>\n<|im_start|>user\nQ?<|im_end|>\n"
                "<|im_start|>assistant\n",
            ],
        ),
        ([[user("Q?")]], {"template": REFUSES}, [f"{TEXT}\n\nQ?</s>"]),
        ([[user("Q?")]], {"template": IGNORES}, [f"user:{TEXT}\n\nQ?</s>assistant:"]),
    ],
)
def test_guided_prompts_are_tokenized_and_plain_ones_stay_as_they_are(prompts, options, guided):
    tokenizer = byte_tokenizer(**options)
    rows = tokenized(prompts, tokenizer)
    plain = tokenize_prompts(Dataset.from_list([{"prompt": p} for p in prompts]), tokenizer)
    assert rows.column_names == ["prompt", "prompt_ids", "guided_ids"]
    assert rows["prompt_ids"] == plain["prompt_ids"]
    assert rows["prompt"] == prompts
    assert [tokenizer.decode(ids) for ids in rows["guided_ids"]] == guided
    assert rows.features["guided_ids"] == rows.features["prompt_ids"]
    check_vocabulary(rows, len(tokenizer))


@pytest.mark.parametrize("bos", [False, True])
def test_a_cut_prompt_keeps_the_principles(bos, caplog):
    tokenizer = byte_tokenizer(bos=bos)
    first = "<s>" * bos
    prompts = ["short", "abcdefghij", "0123456789abcdef"]
    with caplog.at_level(logging.WARNING, logger="prefalign"):
        rows = tokenized(
            prompts, tokenizer, max_length=100, max_prompt_length=10 + bos, source="a.jsonl"
        )
    kept = [first + text for text in ("short", "abcdefghij", "6789abcdef")]
    assert [tokenizer.decode(ids) for ids in rows["prompt_ids"]] == kept
    assert [tokenizer.decode(ids) for ids in rows["guided_ids"]] == [
        f"{first}{TEXT}\n\n{text}" for text in ("short", "abcdefghij", "6789abcdef")
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"a.jsonl: 1 of 3 prompts were cut to their last {10 + bos} tokens (max_prompt_length)"
    ]


DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>I am.<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
)


@pytest.mark.parametrize(
    ("prompt", "template", "length", "plain", "guided"),
    [
        (
            [user("abcdef")],
            DEFAULT_SYSTEM,
            4,
            "def<|im_end|>",
            f"<|im_start|>{TEXT}<|im_end|><|im_start|>def<|im_end|>",
        ),
        (
            [user("abcdef")],
            DEFAULT_SYSTEM,
            11,
            "m.<|im_end|><|im_start|>abcdef<|im_end|>",
            f"<|im_start|>{TEXT}<|im_end|><|im_start|>abcdef<|im_end|>",
        ),
        # The cut falls in what the system says before the principles.
        (
            [system("012345"), user("abcdef")],
            DEFAULT_SYSTEM,
            12,
            "345<|im_end|><|im_start|>abcdef<|im_end|>",
            f"5\n\n{TEXT}<|im_end|><|im_start|>abcdef<|im_end|>",
        ),
        (
            [user("abcdef"), assistant("x"), user("y")],
            IGNORES,
            31,
            "f</s>assistant:x</s>user:y</s>assistant:",
            f"user:{TEXT}\n\nf</s>assistant:x</s>user:y</s>assistant:",
        ),
    ],
)
def test_a_cut_conversation_keeps_the_principles(prompt, template, length, plain, guided):
    tokenizer = byte_tokenizer(template=template)
    rows = tokenized([prompt, [user("y")]], tokenizer, max_length=100, max_prompt_length=length)
    assert len(rows[0]["prompt_ids"]) == length
    assert tokenizer.decode(rows[0]["prompt_ids"]) == plain
    assert tokenizer.decode(rows[0]["guided_ids"]) == guided
    assert TEXT in tokenizer.decode(rows[1]["guided_ids"])


def test_a_guided_prompt_that_is_too_long_names_its_row(tmp_path):
    tokenizer = byte_tokenizer()
    message = (
        "58 tokens with the principles, and there is room for 57; use shorter principles, or cut "
        "prompts (max_prompt_length)"
    )
    rows = [{"prompt": "abc"}, "", {"prompt": "abcdefghi"}]
    write(tmp_path / "b.jsonl", rows[0])
    source = write(tmp_path / "c.jsonl", *rows)
    for name in (source, str(tmp_path)):
        loaded = load_prompts(name)
        with pytest.raises(DataError) as caught:
            tokenize_guided(loaded, tokenizer, TWO, max_guided_length=57, source=name)
        assert str(caught.value) == f"{source}, row 3, field 'prompt': {message}"
        # Longer than max_length, which is about what is trained on.
        kept = tokenize_guided(
            loaded, tokenizer, TWO, max_length=20, max_guided_length=58, source=name
        )
        assert set(loaded.column_names) < set(kept.column_names)
    with pytest.raises(DataError, match="^a, row 2, field 'prompt': 58 tokens with"):
        tokenized(["abc", "abcdefghi"], tokenizer, max_guided_length=57, source="a")
    # A prompt that is too long by itself is the plain prompt's error.
    with pytest.raises(DataError, match="row 1, field 'prompt': 60 tokens fill max_length=58 and"):
        tokenized(["a" * 60], tokenizer, max_length=58)


def test_a_template_that_fails_says_so():
    with pytest.raises(DataError, match="field 'prompt': the chat template fails: No system turns"):
        tokenized([[system("Be."), user("Q?")]], byte_tokenizer(template=REFUSES))
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        tokenized([[user("Q?")]], byte_tokenizer())
