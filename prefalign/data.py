"""Preference data: read it, bring its layouts to one, and divide it.

Three layouts are understood, each with plain text or with conversations (lists of
``{"role": ..., "content": ...}`` messages):

- an explicit prompt: ``prompt``, ``chosen``, ``rejected``;
- an implicit one: ``chosen`` and ``rejected`` begin alike, and that beginning is the prompt;
- UltraFeedback's: ``prompt`` as text, ``chosen`` and ``rejected`` as whole conversations.

All become ``prompt``, ``chosen`` and ``rejected``, where the last two hold the completion alone.
The first row that cannot be used raises a :class:`~prefalign.errors.DataError` naming its place.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping, Sequence

from datasets import Dataset

from .encoding import Text
from .errors import DataError, UserError
from .layouts import Layout, as_messages, is_blank, stripped
from .sources import Row, collect

logger = logging.getLogger(__name__)


def load_preferences(
    source: str, *, split: str = "train", columns: Mapping[str, str] | None = None
) -> Dataset:
    """Read preference pairs and bring them to one layout.

    Args:
        source: A ``.jsonl``, ``.json`` (either may end in ``.gz``) or ``.parquet`` file; a folder
            of such files, or one that ``save_to_disk`` wrote; or a dataset's name on the hub, with
            a configuration after a colon if it has several (``name:config``).
        split: Which split, where the source has several.
        columns: The source's own names for ``prompt``, ``chosen`` and ``rejected``, where they
            differ.

    Returns:
        A dataset in memory with ``prompt``, ``chosen``, ``rejected`` (all text, or all lists of
        messages) and ``row``, the row's number in its file, from 1; where the source is a folder
        of files, also ``file``, the file's path.

    Raises:
        DataError: For the first row that cannot be used, or when the source cannot be read.
    """
    names = _names(("prompt", "chosen", "rejected"), columns)
    layout = Layout(names)

    def convert(row: Row) -> dict[str, Text]:
        chosen = layout.parse(row, "chosen")
        rejected = layout.parse(row, "rejected")
        for field, completion in (("chosen", chosen), ("rejected", rejected)):
            if is_blank(completion):
                raise row.error("is empty", names[field])
        if stripped(chosen) == stripped(rejected):
            raise row.error("equals the chosen completion", names["rejected"])
        prompt = layout.parse(row, "prompt") if layout.has_prompt(row) else None
        prompt, chosen, rejected = layout.split(row, prompt, chosen, rejected)
        layout.check_prompt(row, prompt)
        layout.check_completion(row, "chosen", chosen)
        layout.check_completion(row, "rejected", rejected)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    return collect(source, split, names, convert)


def load_prompts(
    source: str,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    conversational: bool = False,
    keep: Sequence[str] = (),
) -> Dataset:
    """Read prompts, from a source that has prompts alone or from preference pairs.

    Args:
        source: As in :func:`load_preferences`.
        split: Which split, where the source has several.
        columns: The source's own names for ``prompt`` (and ``chosen`` and ``rejected``, which are
            looked at only where the prompt is implicit or the conversation is in them).
        conversational: Make a user's message of a prompt that is plain text, for a model that is
            trained on conversations.
        keep: Further columns, of anything that JSON holds, for reward functions: every row has to
            have them.

    Returns:
        A dataset in memory with ``prompt`` and ``row``, as in :func:`load_preferences`; with
        ``keep`` also ``columns``, a JSON object for each row.

    Raises:
        DataError: For the first row that cannot be used, or when the source cannot be read.
    """
    names = _names(("prompt", "chosen", "rejected"), columns)
    layout = Layout(names)

    def convert(row: Row) -> dict[str, Text]:
        pair = names["chosen"] in row.values and names["rejected"] in row.values
        prompt = layout.parse(row, "prompt") if layout.has_prompt(row) or not pair else None
        if pair and (prompt is None or isinstance(row.values[names["chosen"]], (list, dict))):
            chosen, rejected = layout.parse(row, "chosen"), layout.parse(row, "rejected")
            prompt, _, _ = layout.split(row, prompt, chosen, rejected)
        assert prompt is not None
        if conversational:
            prompt = as_messages(prompt, "user")
        layout.check_prompt(row, prompt)
        if not keep:
            return {"prompt": prompt}
        for name in keep:
            if name not in row.values:
                raise row.error("is missing, and rewards.columns names it", name)
        kept = {name: row.values[name] for name in keep}
        return {"prompt": prompt, "columns": json.dumps(kept, default=str)}

    return collect(source, split, {**names, **{name: name for name in keep}}, convert)


def load_sft(
    source: str, *, split: str = "train", columns: Mapping[str, str] | None = None
) -> Dataset:
    """Read demonstrations: ``prompt`` and ``completion``, or conversations in ``messages``.

    A row's completion may be called ``response`` instead. Of a conversation, the assistant's last
    turn is the completion and all before it the prompt; it has to end with that turn.

    Args:
        source: As in :func:`load_preferences`.
        split: Which split, where the source has several.
        columns: The source's own names for ``prompt``, ``completion`` (or ``response``) and
            ``messages``.

    Returns:
        A dataset in memory with ``prompt``, ``completion`` (both text, or both lists of messages)
        and ``row``, as in :func:`load_preferences`.

    Raises:
        DataError: For the first row that cannot be used, or when the source cannot be read.
    """
    names = _names(("prompt", "completion", "response", "messages"), columns)
    layout = Layout(names)

    def convert(row: Row) -> dict[str, Text]:
        def here(*fields: str) -> bool:
            return all(names[field] in row.values for field in fields)

        # A completion's name that was asked for has to be there.
        other = here("response") and not here("completion") and names["completion"] == "completion"
        if here("messages") and not here("completion") and not (other and here("prompt")):
            fields = ("messages", "messages")
            prompt, completion = layout.split_last_turn(row, "messages")
        else:
            fields = ("prompt", "response" if other else "completion")
            prompt, completion = (layout.parse(row, field) for field in fields)
            if not (isinstance(prompt, str) and isinstance(completion, str)):
                prompt = as_messages(prompt, "user")
                completion = as_messages(completion, "assistant")
        layout.check_prompt(row, prompt, field=fields[0])
        layout.check_completion(row, fields[1], completion)
        return {"prompt": prompt, "completion": completion}

    return collect(source, split, names, convert)


def as_text(value: Text) -> str:
    """Write a prompt or completion for people to read: conversations as ``role: content``."""
    if isinstance(value, str):
        return value
    return "\n".join(f"{message['role']}: {message['content']}" for message in value)


def hold_out(
    dataset: Dataset,
    *,
    fraction: float = 0.1,
    minimum: int = 16,
    seed: int,
    source: str | None = None,
) -> tuple[Dataset, Dataset]:
    """Set a part of the pairs aside, such that no prompt is in both parts.

    Args:
        dataset: Rows with a ``prompt``.
        fraction: The share of the rows to set aside, 0 or more and below 1.
        minimum: The least number of rows to set aside. Rows of one prompt stay together, so there
            may be more.
        seed: Of the choice.
        source: The dataset's name, for messages.

    Returns:
        The rows to train on and the rows held out, both in their old order.

    Raises:
        DataError: Too few rows to leave any to train on.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"hold_out: expected a fraction in [0, 1), got {fraction}")
    if minimum < 0:
        raise UserError(f"hold_out: expected a minimum of 0 or more, got {minimum}")
    wanted = max(minimum, round(fraction * len(dataset)))
    groups = list(_rows_by_prompt(dataset).values())
    random.Random(seed).shuffle(groups)
    held: list[int] = []
    spare: list[list[int]] = []
    for group in groups:
        if len(held) + len(group) <= wanted:
            held += group
        else:
            spare.append(group)
    spare.sort(key=len)
    while spare and len(held) < wanted:
        held += spare.pop(0)
    if not spare:
        raise DataError(
            f"{len(dataset)} rows with {len(groups)} different prompts are too few to hold out "
            f"{wanted} and leave any to train on",
            source=source,
        )
    train = sorted(index for group in spare for index in group)
    return dataset.select(train), dataset.select(sorted(held))


def split_prompts(
    dataset: Dataset,
    sizes: Sequence[int] | None = None,
    *,
    iterations: int | None = None,
    seed: int,
    source: str | None = None,
) -> list[Dataset]:
    """Divide prompts into disjoint parts, one for each iteration: SPA's X_1 ... X_I.

    A prompt that occurs several times is used once, and a warning says how many were left out.

    Args:
        dataset: Rows with a ``prompt``.
        sizes: Prompts in each part. None gives ``iterations`` parts that differ by one at most
            and use every prompt.
        iterations: How many parts; needed when ``sizes`` is None.
        seed: Of the choice, and of each part's order.
        source: The dataset's name, for messages.

    Raises:
        DataError: Fewer prompts than asked for.
    """
    if sizes is None and iterations is None:
        raise ValueError("split_prompts: expected sizes or iterations, got neither")
    if sizes is not None and iterations is not None and len(sizes) != iterations:
        raise UserError(
            f"split_prompts: expected {iterations} sizes, one for each iteration, got {len(sizes)}"
        )
    if sizes is not None and any(size < 1 for size in sizes) or iterations == 0:
        raise UserError(f"split_prompts: expected parts of 1 prompt or more, got {sizes or 0}")
    order = [rows[0] for rows in _rows_by_prompt(dataset).values()]
    found = len(order)
    different = ""
    if repeats := len(dataset) - found:
        different = " different"
        logger.warning(
            "%s: %d of %d prompts repeat an earlier one and are left out",
            source or "dataset",
            repeats,
            len(dataset),
        )
    if sizes is None:
        assert iterations is not None
        sizes = [found // iterations + (i < found % iterations) for i in range(iterations)]
        asked = iterations
    else:
        asked = sum(sizes)
    if found < asked:
        raise DataError(
            f"{asked} prompts are asked for, for {len(sizes)} iterations, and {found}{different} "
            f"{'was' if found == 1 else 'were'} found",
            source=source,
        )
    random.Random(seed).shuffle(order)
    parts = []
    for size in sizes:
        parts.append(dataset.select(order[:size]))
        order = order[size:]
    return parts


def warn_shared_prompts(seed_data: Dataset, prompts: Dataset, *, source: str | None = None) -> int:
    """Count the prompts that are also among the labelled pairs, and warn if there are any."""
    seen = {_prompt_key(prompt) for prompt in seed_data["prompt"]}
    shared = sum(_prompt_key(prompt) in seen for prompt in prompts["prompt"])
    if shared:
        logger.warning(
            "%s: %d of %d prompts are also prompts of labelled pairs",
            source or "dataset",
            shared,
            len(prompts),
        )
    return shared


def _names(fields: Sequence[str], columns: Mapping[str, str] | None) -> dict[str, str]:
    columns = columns or {}
    for field, name in columns.items():
        if field not in fields:
            raise UserError(f"columns: expected names for {', '.join(fields)}, got {field!r}")
        if not isinstance(name, str) or not name:
            raise UserError(f"columns: expected a column's name for {field!r}, got {name!r}")
    return {field: columns.get(field, field) for field in fields}


def _prompt_key(prompt: Text) -> str | tuple:
    # A user's single message and the same text without a role ask the same.
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return tuple((message["role"], message["content"]) for message in prompt)


def _rows_by_prompt(dataset: Dataset) -> dict[str | tuple, list[int]]:
    rows: dict[str | tuple, list[int]] = {}
    for index, prompt in enumerate(dataset["prompt"]):
        rows.setdefault(_prompt_key(prompt), []).append(index)
    return rows
