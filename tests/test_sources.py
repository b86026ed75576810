"""Where rows come from: every type of source, and what is wrong in one by its place."""

import gzip
import json

import datasets
import pytest
from datasets import Dataset, DatasetDict
from texts import PAIR, ROWS, fails_with, triples, write

from prefalign import data
from prefalign.errors import DataError, UserError


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
