"""``PREFALIGN_AUTOTUNE=1``: time the variants of a table row once and remember the fastest.

Only what changes no bit is varied: the second accumulator and the number of stages. The choices
are kept in ``$XDG_CACHE_HOME/prefalign/autotune.json`` (``~/.cache`` without it), by key.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from .configs import Blocks


def enabled() -> bool:
    """Whether the user opted in."""
    return os.environ.get("PREFALIGN_AUTOTUNE") == "1"


def cache_path() -> Path:
    """Return the file of choices."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "prefalign" / "autotune.json"


def candidates(blocks: Blocks) -> list[Blocks]:
    """Return ``blocks`` and its variants with one stage less or more, each lone and paired."""
    stages = [x for x in (blocks.num_stages, blocks.num_stages - 1, blocks.num_stages + 1) if x]
    pairs = (True, False) if blocks.pair else (False,)
    return [blocks._replace(num_stages=s, pair=p) for s in stages for p in pairs]


def best(key: str, blocks: Blocks, measure: Callable[[Blocks], float]) -> Blocks:
    """Return the remembered choice for ``key``, or measure every candidate and remember."""
    path = cache_path()
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or cut short: measured again
        known = {}
    choices = candidates(blocks)
    if key in known and Blocks(*known[key]) in choices:
        return Blocks(*known[key])
    times = []
    for choice in choices:
        try:
            times.append(measure(choice))
        except Exception as error:
            if type(error).__name__ != "OutOfResources":  # a stage too many for the card
                raise
            times.append(float("inf"))
    chosen = choices[times.index(min(times))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(known | {key: chosen}, file, indent=1)
    os.replace(file.name, path)
    return chosen
