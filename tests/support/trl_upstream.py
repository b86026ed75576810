"""A pytest plugin that runs TRL's own tests without the hub, and with ``fuse``.

::

    PYTHONPATH=tests/support pytest -p trl_upstream [--fuse] TRL/tests/test_dpo_trainer.py

TRL's tests load tiny models and data sets by their names. Here each of those names stands for a
model made on the spot (``trl_standins``) that lies in a hub cache of this run's own; nothing is
fetched. A test that asks for anything else is skipped, and says for what.

With ``--fuse`` every ``DPOTrainer``, ``KTOTrainer``, ``GRPOTrainer``, ``RLOOTrainer`` and
``SFTTrainer`` that a test builds is fused, and where a test calls ``ChunkedLogProbFunction`` itself
it gets what ``fuse`` puts in its place. A trainer that ``fuse`` refuses makes its test an xfail
with the refusal as its reason. With ``--float64`` what those tests compare that function with is
computed in float64.
"""

import functools
import os
import sys
import tempfile
from pathlib import Path

# The hub's library reads these once, as it is imported.
_HOME = tempfile.TemporaryDirectory(prefix="trl-hub-")
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_HUB_OFFLINE"] = "1"
for _name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
KERNEL_TESTS = "TestChunkedLogProbFunction"


class Calls:
    """How many trainers were fused, and how often either op was called.

    ``early`` counts TRL's op while a trainer that will be fused is being built.
    """

    fused = ours = trls = early = 0
    building = False
    through_ours: list[str] = []


class PlugPoint:
    """What ``fuse`` puts in the place of ``ChunkedLogProbFunction``, for a head given by hand."""

    @staticmethod
    def apply(
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        softcap=None,
        logit_scale=1.0,
        outputs=OUTPUTS,
    ):
        """Return TRL's five outputs."""
        from prefalign.integrations.trl import _FusedLogps

        model = _model_of_head(weight, bias, softcap, logit_scale)
        return _FusedLogps(model).apply(
            hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
        )


def _model_of_head(weight, bias, softcap, logit_scale):
    """Return a model with nothing but a head, whose tensors are those given and not copies."""
    import torch
    from transformers import PretrainedConfig

    head = torch.nn.Linear(1, 1, bias=False, device="meta")
    del head.weight, head.bias
    head.weight, head.bias = weight, bias
    model = torch.nn.Module()
    model.config = PretrainedConfig(logit_scale=logit_scale, final_logit_softcapping=softcap)
    model.get_output_embeddings = lambda: head
    return model


def pytest_addoption(parser):
    """Add ``--fuse`` and ``--float64``."""
    parser.addoption("--fuse", action="store_true", help="fuse the trainers of TRL's tests")
    parser.addoption("--float64", action="store_true", help="TRL's reference op in float64")


def pytest_configure(config):
    """Stand in for the hub before a test file is imported, and fuse from here on."""
    for mark in ("slow", "low_priority", "invariant"):
        config.addinivalue_line("markers", f"{mark}: TRL's")
    import datasets

    datasets.load_dataset = _load_dataset
    _count_calls()
    if config.getoption("--fuse"):
        _fuse_trainers()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Make the models that the collected files name, and prepare the tests of TRL's function."""
    from huggingface_hub import constants
    from trl_standins import cache_folder, save_model, standin_ids

    modules = {item.module for item in items}
    texts = [Path(module.__file__).read_text() for module in modules]
    for name in sorted(set().union(*map(standin_ids, texts))):
        try:
            save_model(name, cache_folder(Path(constants.HF_HUB_CACHE), name))
        except Exception as error:  # its tests are skipped, and the others run
            print(f"no stand-in for {name}: {type(error).__name__}: {error}", file=sys.stderr)
    for item in items:
        if item.cls is not None and item.cls.__name__ == KERNEL_TESTS:
            _allow_cpu(item)
            if config.getoption("--fuse"):
                item.module.ChunkedLogProbFunction = PlugPoint
            if config.getoption("--float64"):
                item.cls._reference_logprobs_and_entropy = _reference_in_float64


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a test that asks the hub for what has no stand-in; note whether ours was called."""
    before = Calls.ours
    try:
        return (yield)
    except OSError as error:
        if "huggingface.co" in str(error):
            pytest.skip(f"no stand-in: {str(error).splitlines()[0]}")
        raise
    finally:
        if Calls.ours > before:
            Calls.through_ours.append(item.nodeid)


def pytest_terminal_summary(terminalreporter):
    """Say how much went through either op."""
    terminalreporter.write_line(
        f"fuse: {Calls.fused} trainers; linear_token_logps: {Calls.ours} calls, in "
        f"{len(Calls.through_ours)} tests; TRL's own: {Calls.trls} calls, and {Calls.early} before "
        "fuse"
    )


def _load_dataset(path, name=None, split=None, streaming=False, **_):
    from trl_standins import standin_data

    data = standin_data(path, name)
    if data is None:
        pytest.skip(f"no stand-in: the data set {path} {name or ''}")
    if streaming:
        from datasets import IterableDatasetDict

        data = IterableDatasetDict({key: part.to_iterable_dataset() for key, part in data.items()})
    return data if split is None else data[split]


def _count_calls():
    from trl.trainer import utils

    import prefalign.integrations.trl as ours

    op, function = ours.linear_token_logps, utils._ChunkedLogProbFunction

    @functools.wraps(op)
    def counted(*args, **kwargs):
        Calls.ours += 1
        return op(*args, **kwargs)

    class Counted:
        @staticmethod
        def apply(*args, **kwargs):
            Calls.trls += not Calls.building
            Calls.early += Calls.building
            return function.apply(*args, **kwargs)

    ours.linear_token_logps, utils._ChunkedLogProbFunction = counted, Counted


def _fuse_trainers():
    import trl

    from prefalign.errors import ModelError
    from prefalign.integrations.trl import TRAINERS, fuse

    for name in TRAINERS:
        trainer_class = getattr(trl, name)

        def fused_init(self, *args, init=trainer_class.__init__, **kwargs):
            Calls.building = True
            try:
                init(self, *args, **kwargs)
            finally:
                Calls.building = False
            try:
                fuse(self)
            except (ValueError, ModelError) as error:
                pytest.xfail(f"refused by fuse: {error}")
            Calls.fused += 1

        trainer_class.__init__ = functools.wraps(trainer_class.__init__)(fused_init)


def _reference_in_float64(
    self,
    hidden,
    weight,
    labels,
    temperature,
    bias=None,
    logit_scale=1.0,
    final_logit_softcapping=None,
):
    """Return log-probs and entropies of the inputs as they are, in place of TRL's reference."""
    import torch

    z = hidden.double() @ weight.double().t() * logit_scale
    if bias is not None:
        z = z + bias.double() * logit_scale
    if (cap := final_logit_softcapping) is not None:
        z = cap * torch.tanh(z / cap)
    logps = (z / temperature).log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, labels[:, None])[:, 0].float(), entropy.float()


def _allow_cpu(item):
    """Drop the mark that keeps a test from a CPU: from 1.16 on TRL's function has a path there."""
    for node in item.listchain():
        node.own_markers = [
            mark
            for mark in node.own_markers
            if not (mark.name == "skipif" and "accelerator" in mark.kwargs.get("reason", ""))
        ]
