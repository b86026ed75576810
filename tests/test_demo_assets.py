"""The files that `make demo` runs on: intact, small, well-formed and kept apart."""

import gzip
import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
DATA, MODEL = DEMO / "data", DEMO / "model"


def load_module(name):
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gold = load_module("gold")
build_corpus = load_module("build_corpus")


def rows_of(name):
    path = DATA / name
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open()
    with opened as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def test_model_matches_its_sums():
    sums = dict(
        reversed(line.split("  ")) for line in (MODEL / "SHA256SUMS").read_text().splitlines()
    )
    files = {path.name for path in MODEL.iterdir()} - {"SHA256SUMS"}
    assert files == set(sums)
    for name, expected in sums.items():
        assert hashlib.sha256((MODEL / name).read_bytes()).hexdigest() == expected, name
    readme = (DEMO / "README.md").read_text()
    assert sums["model.safetensors"] in readme


def test_sizes():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 16e6
    assert (MODEL / "model.safetensors").stat().st_size <= 6e6
    assert sum(path.stat().st_size for path in DATA.iterdir()) <= 4e6
    assert "Princeton University" in (DEMO / "LICENSE.wordnet").read_text()


def test_tokenizer_round_trip(tokenizer):
    texts = [row["completion"] for row in rows_of("glosses.jsonl.gz")[::500]]
    texts += ["  two  spaces , and a stop .", "naïve ☃ 漢字\n\ttab", "\"quoted\" 's n't <s> x", ""]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_tokenizer_puts_bos_first_and_no_eos(tokenizer):
    prompt, completion = "define harbor (noun):", ' a sheltered port; "ships in the harbor"'
    ids = tokenizer(prompt)["input_ids"]
    bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(completion, add_special_tokens=False)["input_ids"]
    assert ids == [tokenizer.bos_token_id, *bare]
    assert tokenizer.eos_token_id not in ids + answer
    # Tokenised apart or together, the same tokens.
    assert tokenizer(prompt + completion)["input_ids"] == ids + answer
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer.padding_side == "left"


def test_model_loads_and_ends_its_answers(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    assert len(tokenizer) == model.config.vocab_size
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    batch = tokenizer("define happily (adverb):", return_tensors="pt")
    output = model.generate(**batch, do_sample=False, max_new_tokens=48)[0]
    assert output[-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id
    text = tokenizer.decode(output[batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.startswith(" ") and len(text.split()) >= 3


def test_rows_are_well_formed(tokenizer):
    glosses = rows_of("glosses.jsonl.gz")
    assert len(glosses) > 50_000
    quoted = sum(row["completion"].endswith('"') for row in glosses)
    assert 0.4 < quoted / len(glosses) < 0.6
    for row in glosses:
        assert set(row) == {"prompt", "completion"}
        assert row["prompt"].startswith("define ") and row["prompt"].endswith("):")
        assert row["completion"].startswith(" ") and len(row["completion"]) > 8
    prompts = {}
    for name, size in build_corpus.SPLITS.items():
        rows = rows_of(f"{name}_prompts.jsonl")
        assert len(rows) == size and all(set(row) == {"prompt"} for row in rows)
        prompts[name] = {row["prompt"] for row in rows}
    for name, split, least in (("seed_pairs", "seed", 72), ("all_pairs", "iteration", 500)):
        rows = rows_of(f"{name}.jsonl")
        assert len(rows) >= least
        assert len({row["prompt"] for row in rows}) == len(rows)
        for row in rows:
            assert set(row) == {"prompt", "chosen", "rejected"}
            assert row["prompt"] in prompts[split]
            assert row["chosen"].strip() and row["rejected"].strip()
            better, worse = gold.gold_reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
            assert better > worse


def test_splits_are_disjoint():
    splits = [
        {row["prompt"] for row in rows_of(f"{name}_prompts.jsonl")} for name in build_corpus.SPLITS
    ]
    splits.append({row["prompt"] for row in rows_of("glosses.jsonl.gz")})
    assert len(set.union(*splits)) == sum(len(split) for split in splits)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (' a sheltered port; "the ships in the harbor"', 1),
        (' a sheltered port; "Harbors are for ships"', 1),
        (' give shelter to; "she harbored a grudge."', 1),
        (' a sheltered port; "they were harboring a thief".', 1),
        (' a sheltered port; "the ships in the port"', 1),
        (' a harbor; "the ships in the port"', 1),
        (' a port; "ships rest here"; "the harbor was full"', 1),
        (" a sheltered port where ships can take on cargo", 0),
        (' a sheltered port; "the ships in the harbor', 0),
        (' a port; "ships rest in harbor"; "the', 0),
        (' a port; "ships rest in harbor" of the of or of the', 0),
        (' a port; ""', 0),
        (' a port; "   "', 0),
        (' a port; "the harbor"', 0),
        (' a port; "harbor harbor harbor harbor harbor harbor"', 0),
        (" a port" + " of the of or" * 12, 0),
        (' a port; "of the of or"', 0),
        (' a port; "' + "of the of or " * 10 + 'harbor"', 0),
        ('"', 0),
        ("", 0),
    ],
)
def test_gold_reward(completion, reward):
    assert gold.gold_reward(["define harbor (noun):"], [completion]) == [float(reward)]


def test_gold_reward_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="expected 1 completions, got 0"):
        gold.gold_reward(["define harbor (noun):"], [])


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (" a sheltered port", 0),
        ("", 0),
        (' a port; "ships', 0.3),
        (' a port; "of the of or"', 0.3),
        (' a port; "ships rest" and more', 0.3),
        (' a port; "ships rest here"', 0.6),
        (' a port; "ships rest here."', 0.6),
        (' a port; "the ships rest here"', 0.65),
        (' a port; "ships need harbor"', 0.75),
        (' a port; "one two three four five six seven eight"', 0.85),
        (' a port; "one two three four five six seven eight nine ten"', 0.85),
        (' a port; "one two three four five six seven Harbor nine ten"', 1),
    ],
)
def test_the_reader_likes_examples_by_degrees(completion, reward):
    reader = load_module("reader")
    found = reader.reader_reward(["define harbor (noun):"], [completion])
    assert found == pytest.approx([reward])
    # Prompts and completions go together, row by row.
    rows = reader.reader_reward(["define x (noun):", "define harbor (noun):"], ["", completion])
    assert rows == pytest.approx([0, reward])
    assert reader.reader_reward(["harbor?"], [completion]) == pytest.approx(
        [reward - 0.15 * ("harbor" in completion.lower() and reward > 0.3)]
    )


def test_demonstrations_are_made_again_alike(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO))  # as a script has it
    make_sft = load_module("make_sft")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "glosses.jsonl.gz").symlink_to(DATA / "glosses.jsonl.gz")
    (tmp_path / "principles.txt").symlink_to(DEMO / "principles.txt")
    monkeypatch.setattr(make_sft, "HERE", tmp_path)
    make_sft.main()
    # Another zlib may pack the same bytes in another way.
    made, shipped = ((at / "data" / "sft.jsonl.gz").read_bytes() for at in (tmp_path, DEMO))
    assert gzip.decompress(made) == gzip.decompress(shipped)
    make_sft.main()
    assert (tmp_path / "data" / "sft.jsonl.gz").read_bytes() == made


def test_half_of_the_demonstrations_do_as_the_principles_ask():
    rows = rows_of("sft.jsonl.gz")
    guided = [row for row in rows if row["prompt"].startswith("Answer by these principles:\n- ")]
    plain = [row for row in rows if row not in guided]
    assert len(guided) == len(plain) == 1024
    scores = gold.gold_reward([row["prompt"] for row in guided], [r["completion"] for r in guided])
    assert set(scores) == {1.0}
    shown = gold.gold_reward([row["prompt"] for row in plain], [r["completion"] for r in plain])
    assert 0.3 < sum(shown) / len(shown) < 0.7
    asked = {
        row["prompt"] for name in ("eval", "iteration") for row in rows_of(f"{name}_prompts.jsonl")
    }
    assert not any(row["prompt"].rpartition("\n")[2] in asked for row in rows)


def test_annotate_skips_ties():
    prompts = ["define harbor (noun):", "define run (verb):"]
    plain, quoted = " a port", ' a port; "ships rest here"'
    assert gold.annotate(prompts, [[plain, quoted, quoted], [plain, plain]]) == [
        {"prompt": prompts[0], "chosen": quoted, "rejected": plain}
    ]


def test_corpus_is_cut_from_glosses():
    gloss = 'a sheltered port where ships rest; "the ships in the harbor"; "a haven for all"'
    assert build_corpus.make_rows(["seaport", "haven", "harbor"], gloss, "noun") == [
        {
            "prompt": "define harbor (noun):",
            "completion": ' a sheltered port where ships rest; "the ships in the harbor"',
        },
        {
            "prompt": "define haven (noun):",
            "completion": ' a sheltered port where ships rest; "a haven for all"',
        },
    ]
    plain = build_corpus.make_rows(["seaport"], "a sheltered port", "noun")
    assert plain == [{"prompt": "define seaport (noun):", "completion": " a sheltered port"}]
    assert build_corpus.make_rows(["New_York"], "a sheltered port", "noun") == []
