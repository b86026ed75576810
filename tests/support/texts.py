"""Rows, messages and tokenizers that the tests of data share."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefalign import data
from prefalign.errors import DataError

ROWS = [
    {"prompt": f"Question {i}?", "chosen": f" Good {i}.", "rejected": f" Bad {i}."}
    for i in range(5)
]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


PAIR = {"prompt": "Q?", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": [user("Q?")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def triples(dataset):
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in dataset]


def fails_with(source, row, field, message):
    with pytest.raises(DataError) as caught:
        data.load_preferences(source)
    place = f"{source}, row {row}" + (f", field {field!r}" if field else "")
    assert str(caught.value).startswith(f"{place}: {message}")
    assert "\n" not in str(caught.value)
    return str(caught.value) == f"{place}: {message}"


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
