"""Errors that a person can act on: the command line prints them as one line and exits with 2."""

from __future__ import annotations

import os


class UserError(Exception):
    """Something in the input, the settings or the machine that the user has to mend."""


class DataError(UserError):
    """A row of a dataset that cannot be used.

    Args:
        message: What is wrong with it.
        source: The file or dataset's name.
        row: Its number, from 1: the line in a text file, the row elsewhere.
        field: The column.
    """

    def __init__(
        self,
        message: str,
        *,
        source: str | os.PathLike[str] | None = None,
        row: int | None = None,
        field: str | None = None,
    ):
        place = [] if source is None else [str(source)]
        if row is not None:
            place.append(f"row {row}")
        if field is not None:
            place.append(f"field {field!r}")
        super().__init__(f"{', '.join(place)}: {message}" if place else message)


class ModelError(UserError):
    """A model that the library cannot work with, or cannot reproduce."""


class RunError(UserError):
    """An output folder, a checkpoint or a resource that stands in the way of a run."""


class CollapseError(UserError):
    """The gauge found that the judge can no longer be trusted (``on_collapse="stop"``)."""
