"""What TRL's ``DPOTrainer`` with another loss has, whatever the loss: checks and metrics."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from .trl import FusedHead, _check_version

try:
    from trl import DPOConfig, DPOTrainer
except ImportError as error:
    raise ImportError("these trainers need TRL: pip install 'prefalign[trl]'") from error

__all__ = ["DPO_ONLY", "DPOConfig", "PairTrainer", "check", "option"]

# TRL's settings of DPO's loss, which another loss would leave without effect.
DPO_ONLY = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "use_weighting": False,
}


def check(name: str, value: Any, holds: bool, expected: str) -> None:
    """Raise a ValueError that names a setting, unless what is expected of it holds."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def option(default: Any, text: str) -> Any:
    """Return a field of a config, with its help on the command line."""
    return field(default=default, metadata={"help": text})


class PairTrainer(FusedHead, DPOTrainer):
    """A ``DPOTrainer`` with another loss: what it refuses, and metrics beside TRL's.

    Args:
        model: As TRL takes it.
        ref_model: As TRL takes it.
        args: What ``checked`` returned.
        **kwargs: TRL's.
    """

    config_class: Any
    """Its config."""
    fixed: dict[str, Any]
    """Settings that must be left as they are."""

    def __init__(self, model: Any, ref_model: Any, args: Any, **kwargs: Any):
        # Sum and count of each metric since the last log line, on the device.
        self._sums: dict[str, dict[str, Any]] = {"": {}, "eval_": {}}
        super().__init__(model, ref_model, args, **kwargs)

    @classmethod
    def checked(cls, args: Any) -> Any:
        """Return the config, the default one for None, when all of it is supported.

        Raises:
            ImportError: TRL is of a version that is not tested.
            TypeError: It is of another class.
            ValueError: A setting that is not supported, named.
        """
        _check_version()
        args = cls.config_class() if args is None else args
        if not isinstance(args, cls.config_class):
            raise TypeError(
                f"args: expected a {cls.config_class.__name__}, got a {type(args).__name__}"
            )
        for name, value in cls.fixed.items():
            if (given := getattr(args, name)) != value:
                raise ValueError(
                    f"{name}: {cls.__name__} does not support {given!r}, expected {value!r}: leave "
                    "it out"
                )
        return args

    @property
    def _prefix(self) -> str:
        return "" if self.model.training else "eval_"

    def _store(self, metrics: dict[str, Tensor | float]) -> None:
        """Take in values whose mean, over all processes, is to be logged."""
        sums = self._sums[self._prefix]
        for name, given in metrics.items():
            values = torch.as_tensor(given, dtype=torch.float64, device=self.args.device).detach()
            found = torch.stack([values.sum(), values.new_full((), values.numel())])
            sums[name] = sums.get(name, 0) + found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over the pairs seen since the last log line."""
        sums = self._sums[self._prefix]
        if sums:
            names = sorted(sums)
            read = self.accelerator.reduce(torch.stack([sums[n] for n in names]), "sum")
            means = (read[:, 0] / read[:, 1]).tolist()
            logs.update({self._prefix + n: mean for n, mean in zip(names, means, strict=True)})
            sums.clear()
        super().log(logs, start_time)
