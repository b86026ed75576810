"""One model's log-probs in a file (see ``logp_cache``): SQLite, many processes, whole rows."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import RunError

FORMAT = 1
"""The format of a file; one of another is refused."""

_WAIT_SECONDS = 60.0  # for another process's transaction, of a few milliseconds
_MAPPED_BYTES = 2**30  # of a file, read without copies
_KEYS_A_QUERY = 500  # SQLite's limit was 999 once

_TABLES = (
    "CREATE TABLE metadata (name TEXT PRIMARY KEY, value TEXT)",
    "CREATE TABLE logps (tokens BLOB PRIMARY KEY, logps BLOB NOT NULL, crc INTEGER NOT NULL)",
)


class LogpFile:
    """The log-probs of one model.

    Args:
        path: The file; made when it is first used.
        metadata: What to write into a new one.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]):
        self.path = path
        self.metadata = metadata

    def read(self, names: Iterable[bytes]) -> dict[bytes, Tensor]:
        """Return the log-probs of those responses that the file holds, by ``tokens_hash``."""
        with self._open() as database:
            return self._read(database, names)

    def add(self, rows: Iterable[tuple[bytes, Tensor]]) -> dict[bytes, Tensor]:
        """Keep log-probs in one transaction; return what the file then holds of them.

        Another process may have computed the same meanwhile: its log-probs stay.
        """
        blobs = [(name, logps.float().numpy().tobytes()) for name, logps in rows]
        with self._open() as database:
            with _transaction(database):
                database.executemany(
                    "INSERT OR IGNORE INTO logps VALUES (?, ?, ?)",
                    [(name, blob, zlib.crc32(name + blob)) for name, blob in blobs],
                )
            return self._read(database, [name for name, _ in blobs])

    def _read(self, database: sqlite3.Connection, names: Iterable[bytes]) -> dict[bytes, Tensor]:
        found: dict[bytes, Tensor] = {}
        left = iter(dict.fromkeys(names))
        while some := list(islice(left, _KEYS_A_QUERY)):
            marks = ", ".join("?" * len(some))
            query = f"SELECT tokens, logps, crc FROM logps WHERE tokens IN ({marks})"
            for name, blob, crc in database.execute(query, some):
                if zlib.crc32(name + blob) != crc:
                    raise sqlite3.DatabaseError("a checksum does not match")
                found[name] = torch.frombuffer(bytearray(blob), dtype=torch.float32)
        return found

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # Opened for a window and closed: no lock, handle or snapshot lives through a forward pass.
        with _one_line_errors(self.path):
            connection = sqlite3.connect(self.path, timeout=_WAIT_SECONDS, isolation_level=None)
            with closing(connection) as database:
                database.execute(f"PRAGMA mmap_size = {_MAPPED_BYTES}")
                if _format(database) != FORMAT:
                    self._create(database)
                yield database

    def _create(self, database: sqlite3.Connection) -> None:
        with _transaction(database):
            if (found := _format(database)) == FORMAT:  # another process was faster
                return
            if database.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise RunError(
                    f"reference_cache: {self.path} is of format {found}, expected {FORMAT}: remove "
                    "it, or name another folder"
                )
            for table in _TABLES:
                database.execute(table)
            values = [(name, json.dumps(value)) for name, value in self.metadata.items()]
            database.executemany("INSERT INTO metadata VALUES (?, ?)", values)
            database.execute(f"PRAGMA user_version = {FORMAT}")


def _format(database: sqlite3.Connection) -> int:
    return database.execute("PRAGMA user_version").fetchone()[0]


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    # Immediate: two that first read and then write would wait for each other.
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ones that name the file."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        text = str(error)
        if "disk is full" in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if "locked" in text:
            what = f"was locked by another process for {_WAIT_SECONDS:.0f} s"
        elif "readonly" in text or "unable to open" in text or "I/O" in text:
            what = f"cannot be read and written ({text})"
        else:
            what = (
                f"is damaged, or no cache of log-probs ({text}); remove it, and what it held is "
                "computed again"
            )
        raise RunError(f"reference_cache: {path} {what}") from error
