"""No step waits for the device outside logging: nothing is read from it, op by op."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training import SETTINGS, noise_kwargs, random_groups, train

from prefalign.enhancement import EnhancementTrainer
from prefalign.noise_aware import NoiseAwareTrainer
from prefalign.ple_config import EnhancementSettings
from prefalign.sft_trainer import SFTTrainer
from prefalign.trainer import PreferenceTrainer

# What has a result whose value or size only the device knows.
READING = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::equal",
}
CASES = {
    "dpo": (PreferenceTrainer, {}),
    "dpo, split": (PreferenceTrainer, {"max_tokens": 12}),
    "noise-aware": (NoiseAwareTrainer, noise_kwargs()),
    "ple": (
        EnhancementTrainer,
        {"enhancement": EnhancementSettings(), "threshold": 0.5},
    ),
    "sft": (SFTTrainer, {}),
}


class Reads(TorchDispatchMode):
    """Lists the ops that read a tensor of floats or a result's size."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in READING or self._indexed_by_a_mask(func, args):
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _indexed_by_a_mask(func, args):
        if func._schema.name != "aten::index":
            return False
        return any(x is not None and x.dtype == torch.bool for x in args[1])


def steps(tmp_path, case, watch):
    """Train three steps without a log line, each ``training_step`` under ``watch(trainer)``."""
    kind, kwargs = CASES[case]
    kwargs = {name: value for name, value in kwargs.items() if name != "trainer_class"}
    settings = replace(
        SETTINGS, logging_steps=100, max_tokens=kwargs.pop("max_tokens", SETTINGS.max_tokens)
    )

    class Watched(kind):
        def training_step(self, *args, **kwargs):
            with watch():
                return super().training_step(*args, **kwargs)

    extras = {"rewards": [0.9, 0.1]} if case == "ple" else None
    train(tmp_path, random_groups(12, extras=extras), Watched, settings=settings, **kwargs)


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_nothing(tmp_path, case):
    reads = Reads()
    steps(tmp_path, case, lambda: reads)
    assert reads.found == []


def test_the_watch_sees_a_read():
    x = torch.ones(3)
    with Reads() as reads:
        x.sum().item()
        bool(x[0] > 0)
        x[x > 0]
        x.nonzero()
    assert len(reads.found) >= 4


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_step_does_not_wait_for_the_gpu(tmp_path, case):
    class Strict(warnings.catch_warnings):
        def __enter__(self):
            entered = super().__enter__()
            warnings.simplefilter("error")
            torch.cuda.set_sync_debug_mode("warn")
            return entered

        def __exit__(self, *error):
            torch.cuda.set_sync_debug_mode("default")
            return super().__exit__(*error)

    steps(tmp_path, case, Strict)
