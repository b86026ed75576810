"""Where rows come from: files, folders, the hub; row by row, so that an error names its place."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from datasets.utils import tqdm

from .errors import DataError

# Rows that are parsed before they are moved to Arrow memory, which is several times smaller.
CHUNK_ROWS = 1000
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".ndjson", ".ndjson.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")
# Words in a file's name that tell its split, where a folder holds several.
SPLIT_WORDS = {"train", "training", "test", "testing", "eval", "dev", "valid", "validation"}


@dataclass(frozen=True)
class Row:
    """A row as it was read, and where."""

    source: str
    number: int
    values: Mapping[str, Any]
    columns: Sequence[str]

    def error(self, message: str, field: str | None = None) -> DataError:
        """Return an error that names this row."""
        return DataError(message, source=self.source, row=self.number, field=field)


def collect(
    source: str,
    split: str,
    names: Mapping[str, str],
    convert: Callable[[Row], dict[str, Any]],
) -> Dataset:
    """Convert rows as they are read, and keep them in Arrow memory."""
    source = str(source)
    chunks: list[Dataset] = []
    chunk: list[dict[str, Any]] = []
    features: Features | None = None

    def flush() -> None:
        nonlocal features
        if features is None:
            message = List({"role": Value("string"), "content": Value("string")})
            features = Features(
                {
                    name: {int: Value("int64"), str: Value("string"), list: message}[type(value)]
                    for name, value in chunk[0].items()
                }
            )
        columns = {name: [row[name] for row in chunk] for name in features}
        chunks.append(Dataset.from_dict(columns, features=features))
        chunk.clear()

    rows = _read_rows(source, split, list(names.values()))
    # The bar shows itself only where reading takes a while.
    for row in tqdm(rows, desc=f"Reading {Path(source).name}", unit=" rows", delay=2):
        place: dict[str, Any] = {"row": row.number}
        if row.source != source:
            place["file"] = row.source
        chunk.append({**convert(row), **place})
        if len(chunk) == CHUNK_ROWS:
            flush()
    if chunk:
        flush()
    if not chunks:
        raise DataError("holds no rows", source=source)
    return concatenate_datasets(chunks)


def _read_rows(source: str, split: str, wanted: Sequence[str]) -> Iterator[Row]:
    path = Path(source).expanduser()
    if path.is_dir():
        markers = ("state.json", "dataset_dict.json")
        if any((path / marker).is_file() for marker in markers):
            yield from _dataset_rows(_load_saved(path, source, split), source, wanted)
        else:
            for file in _split_files(path, source, split):
                yield from _file_rows(file, str(file), wanted)
    elif path.is_file():
        if split != "train":
            raise DataError(f"a single file has no split {split!r}", source=source)
        yield from _file_rows(path, source, wanted)
    elif source.endswith(SUFFIXES) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError("no such file or folder", source=source)
    else:
        yield from _dataset_rows(_load_hub(source, split), source, wanted)


def _load_saved(path: Path, source: str, split: str) -> Dataset:
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the library stumbles over in a damaged folder
        raise DataError(f"cannot be loaded: {_first_line(error)}", source=source) from error
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            found = ", ".join(map(repr, loaded))
            raise DataError(f"has no split {split!r}; found: {found}", source=source)
        return loaded[split]
    if split != "train":
        raise DataError(f"a single saved dataset has no split {split!r}", source=source)
    return loaded


def _load_hub(source: str, split: str) -> Dataset:
    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # a dozen types, from network to parser
        raise DataError(
            f"neither a file or folder here, nor could it be loaded from the hub: "
            f"{_first_line(error)}",
            source=source,
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _split_files(folder: Path, source: str, split: str) -> list[Path]:
    """Return a folder's files of one split; those that name no split count as training data."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.name.endswith(SUFFIXES)
        and path.is_file()
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    )
    if not files:
        raise DataError(
            f"no dataset that save_to_disk wrote, nor files that end in {', '.join(SUFFIXES)}",
            source=source,
        )

    def words(path: Path) -> set[str]:
        return set(re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower()))

    found = [path for path in files if path.name.startswith(split) or split.lower() in words(path)]
    if not found and split == "train":
        found = [path for path in files if not words(path) & SPLIT_WORDS]
    if not found:
        raise DataError(f"has no files of the split {split!r}", source=source)
    return found


def _dataset_rows(dataset: Dataset, source: str, wanted: Sequence[str]) -> Iterator[Row]:
    columns = dataset.column_names
    here = [name for name in columns if name in wanted]
    if not here and len(dataset):
        yield Row(source, 1, {}, columns)
        return
    number = 0
    for batch in dataset.with_format(None).select_columns(here).iter(CHUNK_ROWS):
        for values in zip(*(batch[name] for name in here), strict=True):
            number += 1
            yield Row(source, number, dict(zip(here, values, strict=True)), columns)


def _file_rows(path: Path, source: str, wanted: Sequence[str]) -> Iterator[Row]:
    if path.name.endswith(".parquet"):
        yield from _parquet_rows(path, source, wanted)
    elif path.name.endswith(JSON_SUFFIXES):
        for number, value in _json_values(path, source):
            if not isinstance(value, dict):
                raise DataError(
                    f"expected an object with named fields, got {kind_of(value)}",
                    source=source,
                    row=number,
                )
            yield Row(source, number, value, list(value))
    else:
        raise DataError(
            f"expected a file that ends in {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}",
            source=source,
        )


def _parquet_rows(path: Path, source: str, wanted: Sequence[str]) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            here = [name for name in columns if name in wanted]
            for batch in file.iter_batches(CHUNK_ROWS, columns=here):
                for index in range(batch.num_rows):
                    number += 1
                    values = {name: batch.column(name)[index].as_py() for name in here}
                    yield Row(source, number, values, columns)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {_bad_byte(error)}", source=source, row=number) from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot be read: {_first_line(error)}", source=source) from error


def _json_values(path: Path, source: str) -> Iterator[tuple[int, Any]]:
    """Give each row's number and value; a line each, except in a file that is one JSON array."""

    def parse(text: str, number: int) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            number += error.lineno - 1
        except (ValueError, RecursionError) as error:  # digits or brackets without end
            reason = _first_line(error)
        raise DataError(f"broken JSON: {reason}", source=source, row=number)

    lines = _lines(path, source)
    may_be_array = path.name.endswith((".json", ".json.gz"))
    for number, line in lines:
        if may_be_array and line.lstrip().startswith("["):
            yield from enumerate(parse(line + "".join(rest for _, rest in lines), number), 1)
        elif line.strip():
            may_be_array = False
            yield number, parse(line.rstrip("\r\n"), number)


def _lines(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """Give each line's number, from 1, and text; decoded one by one, to know the bad one."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            for line in stream:
                number += 1
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"not UTF-8: {_bad_byte(error)}", source=source, row=number
                    ) from None
                yield number, text
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise DataError(f"cannot be read after line {number}: {reason}", source=source) from error


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}"


def kind_of(value: object) -> str:
    """Return what a JSON value is, for messages."""
    if value is None:
        return "null"
    if isinstance(value, (bool, int, float)):
        return f"{'a truth value' if isinstance(value, bool) else 'a number'} ({shortened(value)})"
    kinds: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def shortened(value: object) -> str:
    """Return a value's text, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
