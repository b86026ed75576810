"""The output folder of a run: what was asked for, what is finished, and writes that are whole.

A run is a list of named stages. A stage leaves its files, each written under a temporary name and
renamed, and is then entered in ``state.json``; a run that is taken up again skips what is entered
there. Nothing else is kept between processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ._version import __version__
from .errors import RunError

# Settings that say where and how a run goes on, not what it computes.
_NOT_IDENTITY = ("output_dir", "resume", "overwrite")
# Settings that may change when a run is taken up again: they do not enter into its results.
_CHANGEABLE = ("gauge.on_collapse ", "memory ", "memory.", "reference_cache ")
_TEMPORARY = ".partial"


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path to write a file or folder to, renamed to ``path`` on success."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + _TEMPORARY)
    remove(temporary)
    try:
        yield temporary
    except BaseException:
        remove(temporary)
        raise
    put_in_place(temporary, path)


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder to its name, once it is on the disk."""
    _sync(temporary)
    if path.is_dir():
        remove(path)  # os.replace cannot put a folder in the place of one with files
    os.replace(temporary, path)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    # A rename can reach the disk before the data it stands for; a power cut would leave it empty.
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    with written_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    with open(path, encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


class StepLog:
    """A log of JSON lines, one event of a training step each, that a resumed run can rewind.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self.path = path

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows, each with a ``stage`` and a ``step``."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(text)

    def rows(self, stage: str | None = None) -> list[dict[str, Any]]:
        """Return the rows, of one stage or of all; a line cut short by a kill is left out."""
        if not self.path.exists():
            return []
        rows = []
        with open(self.path, encoding="utf-8") as handle:
            for line in handle:
                with contextlib.suppress(json.JSONDecodeError):
                    row = json.loads(line)
                    if stage is None or row["stage"] == stage:
                        rows.append(row)
        return rows

    def rewind(self, stage: str, step: int) -> None:
        """Drop the rows of ``stage`` after ``step``: they will be computed again."""
        kept = [row for row in self.rows() if row["stage"] != stage or row["step"] <= step]
        write_rows(self.path, kept)


class RunFolder:
    """An output folder and the stages that it holds.

    Making one only looks; ``begin`` writes, when everything else has been found in order.

    Args:
        path: The folder.
        algorithm: Name of the algorithm that runs.
        settings: All settings, as nested dictionaries.
        resume: Go on with the run that the folder holds; a new run if it holds none.
        overwrite: Remove the run that the folder holds first.
        main_process: Whether this process writes (rank 0 does).

    Raises:
        RunError: The folder holds another run, or something that is not a run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        algorithm: str,
        settings: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        main_process: bool = True,
    ):
        self.path = Path(path)
        self.main_process = main_process
        self._state_path = self.path / "state.json"
        settings = json.loads(json.dumps(settings))
        identity = {name: value for name, value in settings.items() if name not in _NOT_IDENTITY}
        if resume and overwrite:
            raise RunError("resume and overwrite: expected one of them at most, got both")
        self._start: dict[str, Any] = {
            "algorithm": algorithm,
            "settings": identity,
            "versions": _versions(),
            "finished": {},
        }
        self._overwrite = overwrite
        self.metrics = StepLog(self.path / "metrics.jsonl")
        if main_process:
            self._look(resume=resume, overwrite=overwrite)

    def _look(self, *, resume: bool, overwrite: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"output_dir: {self.path} is a file, expected a folder")
        if self._state_path.exists():
            state = json.loads(self._state_path.read_text("utf-8"))
            if not resume and not overwrite:
                raise RunError(
                    f"output_dir: {self.path} already holds a run; continue it with "
                    "--resume, replace it with --overwrite, or name another folder"
                )
            changed = [
                change
                for change in _differences(
                    {"algorithm": state["algorithm"], **state["settings"]},
                    {"algorithm": self._start["algorithm"], **self._start["settings"]},
                )
                if not change.startswith(_CHANGEABLE)
            ]
            if resume and changed:
                raise RunError(
                    f"output_dir: {self.path} holds another run and cannot be resumed with "
                    f"other settings: {'; '.join(changed)}"
                )
        elif self.path.exists() and any(self.path.iterdir()):
            raise RunError(f"output_dir: {self.path} is not empty and does not hold a run")

    def begun_with(self, name: str) -> Any:
        """Return a fact that the run which goes on was begun with, or None."""
        if self._overwrite or not self._state_path.exists():
            return None
        return json.loads(self._state_path.read_text("utf-8")).get(name)

    def begin(self, **facts: Any) -> None:
        """Make the folder, or go on with the one that is there.

        Args:
            **facts: What a run that is taken up again is to know of how this one was begun.
        """
        if not self.main_process:
            return
        if self._overwrite:
            remove(self.path)
        if self._state_path.exists():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"output_dir: {self.path} cannot be made: {error.strerror}") from None
        with written_whole(self.path / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(self._start["settings"], sort_keys=False), "utf-8")
        self._write_state({**self._start, **facts})

    def _write_state(self, state: dict[str, Any]) -> None:
        write_json(self._state_path, state)

    def finished(self, stage: str) -> dict[str, Any] | None:
        """Return what ``finish`` kept of a stage, or None if it is not finished."""
        return json.loads(self._state_path.read_text("utf-8"))["finished"].get(stage)

    def finish(self, stage: str, **facts: Any) -> None:
        """Enter a stage as finished, with facts that later stages or a reader may want."""
        if self.main_process:
            state = json.loads(self._state_path.read_text("utf-8"))
            state["finished"][stage] = facts
            self._write_state(state)


def require_space(path: Path, needed: int) -> None:
    """Raise RunError where the disk that ``path`` is on has less than ``needed`` bytes free."""
    place = path
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise RunError(
            f"output_dir: {path} has {free / 2**30:.2f} GiB of disk space left, and the run's "
            f"models and checkpoints take about {needed / 2**30:.2f} GiB"
        )


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            changed.append(f"{prefix}{name} was {a!r}, is {b!r}")
    return changed


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"prefalign": __version__}
    for package in ("torch", "triton", "transformers", "datasets", "accelerate", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
