"""Log-probs of fixed models, kept in a folder: each response is run through a model once.

A log-prob is found again by all that it depends on, and by nothing else: the model's weights and
configuration, the dtype it computes in, the options of its head, the prompt's tokens and the
response's. So runs with other learning rates, losses, batches, seeds or output folders share what
is kept, and a model that was trained further shares nothing.

A model has one SQLite file, named by a hash of the first three, readable by itself::

    metadata(name, value)            what the file is of
    logps(tokens, logps, crc)        SHA-256 of the tokens; float32 log-prob of each response token

Processes read and write it at once; a window of groups is one transaction, so that one killed loses
that window at most. What is returned is what the file holds, computed now or before, and
``models.sum_tokens`` is the only way to a response's sum: the same bits every time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import chain, islice
from pathlib import Path

from torch import Tensor, nn

from ._logp_file import LogpFile
from ._version import __version__
from ._weights_hash import computing_dtype, tokens_hash, weights_hash
from .attention import causal_lm
from .errors import RunError
from .models import device_of, read_head, score, sum_tokens, token_scores
from .packing import Group
from .references import Reference

LOOKAHEAD = 256


class LogpCache:
    """A folder of log-probs, for any number of models, runs and processes.

    Args:
        folder: The folder; made if it is not there.

    Raises:
        RunError: It cannot be made, or written to.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise RunError(
                f"reference_cache: the folder {self.folder} cannot be written to: {error.strerror}"
            ) from None

    def of(self, model: nn.Module | Reference, *, temperature: float = 1.0) -> CachedModel:
        """Return ``model`` with its part of the cache; hashes its weights, once.

        Args:
            model: A model as it stands, adapters included, or a reference; its weights must not
                change while the result is used. A PEFT model with its adapter off is its base.
            temperature: Divides the logits.

        Raises:
            ModelError: The weights cannot be read here.
        """
        reference = model if isinstance(model, Reference) else Reference(model)
        return CachedModel(self, reference, weights_hash(reference), temperature)

    def logps(
        self,
        model: nn.Module | Reference,
        groups: Iterable[Group],
        *,
        max_tokens: int,
        share_prompts: bool = True,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        """Return each response's log-prob, summed over tokens, in the order of the groups.

        What is missing is computed and kept, a window of groups at a time.

        Args:
            model: As for ``of``.
            groups: G prompts with K responses each, K free to differ.
            max_tokens: As for ``models.score``.
            share_prompts: As for ``models.score``.
            temperature: Divides the logits.
        """
        cached = self.of(model, temperature=temperature)
        return list(cached.logps(groups, max_tokens=max_tokens, share_prompts=share_prompts))

    def with_reference(
        self,
        model: nn.Module | Reference,
        groups: Sequence[Group],
        *,
        max_tokens: int,
        share_prompts: bool = True,
    ) -> list[Group]:
        """Return the groups with their log-probs as ``extras["reference_logps"]``.

        ``PreferenceTrainer`` and ``NoiseAwareTrainer`` take them from there, without a reference
        model. The arguments are those of ``logps``.
        """
        logps = self.logps(model, groups, max_tokens=max_tokens, share_prompts=share_prompts)
        return with_reference_logps(groups, logps)


def with_reference_logps(groups: Iterable[Group], logps: Iterable[Sequence[float]]) -> list[Group]:
    """Return the groups, each with its log-probs as ``extras["reference_logps"]``."""
    return [
        replace(group, extras={**group.extras, "reference_logps": x})
        for group, x in zip(groups, logps, strict=True)
    ]


@dataclass(frozen=True)
class CachedModel:
    """A model and the cache of its log-probs.

    Attributes:
        cache: The cache.
        reference: The model, and how it is reached.
        weights: Its ``weights_hash``.
        temperature: Divides the logits.
    """

    cache: LogpCache
    reference: Reference
    weights: str
    temperature: float = 1.0

    def token_logps(
        self,
        groups: Iterable[Group],
        *,
        max_tokens: int,
        share_prompts: bool = True,
        lookahead: int = LOOKAHEAD,
    ) -> Iterator[list[Tensor]]:
        """Yield each group's response log-probs, token by token, in the order of the groups.

        Streams as ``models.token_scores`` does; between two windows the model is as it was before.
        Under autocast, the log-probs are those of its dtype.

        Args:
            groups: As for ``models.score``; responses that are known are not computed.
            max_tokens: As for ``models.score``.
            share_prompts: As for ``models.score``.
            lookahead: As for ``models.score``; what one transaction keeps.

        Yields:
            K float32 tensors for each group, on the CPU.

        Raises:
            RunError: A file is damaged, of another format, or cannot be written.
        """
        groups = iter(groups)
        while window := list(islice(groups, lookahead)):
            yield from self._window(window, max_tokens, share_prompts)

    def logps(
        self,
        groups: Iterable[Group],
        *,
        max_tokens: int,
        share_prompts: bool = True,
        lookahead: int = LOOKAHEAD,
    ) -> Iterator[list[float]]:
        """Yield each group's response log-probs, summed over tokens, as ``token_logps`` does."""
        tokens = self.token_logps(
            groups, max_tokens=max_tokens, share_prompts=share_prompts, lookahead=lookahead
        )
        device = device_of(self.reference.model)
        while window := list(islice(tokens, lookahead)):
            yield from sum_tokens(window, device)

    def _window(
        self, window: list[Group], max_tokens: int, share_prompts: bool
    ) -> list[list[Tensor]]:
        keys = [[tokens_hash(g.prompt_ids, ids) for ids in g.response_ids] for g in window]
        with self.reference.use() as model:
            file = self._file(model)
            held = file.read(chain(*keys))
            missing: list[Group] = []
            asked: dict[bytes, None] = {}  # in order; a response that comes twice is asked for once
            for group, names in zip(window, keys, strict=True):
                lacking = {
                    name: ids
                    for name, ids in zip(names, group.response_ids, strict=True)
                    if name not in held and name not in asked
                }
                if lacking:
                    missing.append(replace(group, response_ids=[*lacking.values()], extras={}))
                    asked |= dict.fromkeys(lacking)
            if missing:
                scores = token_scores(
                    model,
                    missing,
                    max_tokens=max_tokens,
                    share_prompts=share_prompts,
                    temperature=self.temperature,
                    lookahead=len(missing),
                )
                held |= file.add(zip(asked, chain.from_iterable(scores), strict=True))
        return [[held[name] for name in names] for names in keys]

    def _file(self, model: nn.Module) -> LogpFile:
        head = read_head(model)
        depends = {
            "weights_sha256": self.weights,
            **computing_dtype(model),
            "logit_scale": head.logit_scale,
            "softcap": head.softcap,
            "temperature": float(self.temperature),
        }
        name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
        lm = causal_lm(model)
        metadata = {
            **depends,
            "model": lm.config.name_or_path,
            "architecture": type(lm).__name__,
            "dtype": str(lm.dtype),
            "prefalign": __version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        return LogpFile(self.cache.folder / f"{name}.sqlite", metadata)


def logps_of(
    model: nn.Module | Reference | CachedModel,
    groups: Iterable[Group],
    *,
    max_tokens: int,
    share_prompts: bool = True,
    lookahead: int = LOOKAHEAD,
) -> Iterator[list[float]]:
    """Yield each group's response log-probs under a model, from its cache where it has one.

    As ``models.score`` does. Between two windows the model is as it was before, so that another
    adapter of the same one can be asked for the same groups.

    Args:
        model: A model, a reference, or either with a cache (``LogpCache.of``).
        groups: As for ``models.score``.
        max_tokens: As for ``models.score``.
        share_prompts: As for ``models.score``.
        lookahead: As for ``models.score``.
    """
    if isinstance(model, CachedModel):
        yield from model.logps(
            groups, max_tokens=max_tokens, share_prompts=share_prompts, lookahead=lookahead
        )
        return
    reference = model if isinstance(model, Reference) else Reference(model)
    groups = iter(groups)
    while window := list(islice(groups, lookahead)):
        with reference.use() as used:
            found = list(
                score(
                    used,
                    window,
                    max_tokens=max_tokens,
                    share_prompts=share_prompts,
                    lookahead=lookahead,
                )
            )
        yield from found
