"""What ``fuse`` refuses: versions, trainers, settings, heads, each with one error that names it."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from trl_runs import build

from prefalign.errors import ModelError
from prefalign.integrations import trl as integration
from prefalign.integrations.trl import fuse

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'prefalign[trl]'")
if not trl.__version__.startswith(tuple(f"{version}." for version in integration.TESTED)):
    pytest.skip(f"TRL {trl.__version__} is not supported", allow_module_level=True)


@pytest.mark.parametrize("version", ["1.14.2", "1.17.0", "2.0", "0.29.1", "1.160.0"])
def test_other_versions_are_refused(tmp_path, monkeypatch, version):
    trainer = build("DPO", tmp_path)
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=rf"TRL {re.escape(version)} .* expected 1\.15 or 1\.16"):
        fuse(trainer)


def test_without_trl_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install 'prefalign\[trl\]'"):
        fuse(object())


def test_another_trainer_is_refused(tmp_path):
    from transformers import Trainer

    trainer = object.__new__(Trainer)
    with pytest.raises(TypeError, match="expected one of TRL's DPOTrainer.*got transformers"):
        fuse(trainer)
    with pytest.raises(TypeError, match="got builtins.NoneType"):
        fuse(None)


def refused_settings():
    from transformers import ProcessorMixin

    zero = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    sharded = [SimpleNamespace(state=zero), SimpleNamespace(is_fsdp2=True, state=None)]
    yield "use_liger_kernel", lambda t: setattr(t.args, "use_liger_kernel", True)
    yield "FSDP1", lambda t: setattr(t, "is_fsdp_enabled", True)
    for accelerator in sharded:
        yield (
            "FSDP2 or DeepSpeed's ZeRO-3 with this trainer",
            lambda t, accelerator=accelerator: vars(t).update(
                accelerator=accelerator, _logps_op=None
            ),
        )
    yield (
        "processing_class",
        lambda t: setattr(
            t, "processing_class", object.__new__(type("Processor", (ProcessorMixin,), {}))
        ),
    )
    yield "compute_loss_func", lambda t: setattr(t, "compute_loss_func", len)
    yield "label_smoothing_factor", lambda t: setattr(t.args, "label_smoothing_factor", 0.1)


@pytest.mark.parametrize("name, change", refused_settings(), ids=lambda x: str(x)[:16])
def test_what_is_not_supported_is_refused_by_name(tmp_path, name, change):
    trainer = build("SFT", tmp_path)
    before = trainer.model.forward
    change(trainer)
    with pytest.raises(ValueError, match=f"fuse does not support .*{name}") as caught:
        fuse(trainer)
    assert "\n" not in str(caught.value)
    assert trainer.model.forward == before


def test_a_head_that_is_not_linear_is_refused(tmp_path):
    trainer = build("SFT", tmp_path)

    class Head(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * 2

    trainer.model.lm_head = Head(32, 259, bias=False)
    with pytest.raises(ModelError, match="Head, expected a plain torch.nn.Linear"):
        fuse(trainer)


def test_a_forward_pass_that_is_not_trls_is_refused(tmp_path):
    trainer = build("SFT", tmp_path)
    del trainer.model.forward
    with pytest.raises(ModelError, match="LlamaForCausalLM's forward pass is not the one that TRL"):
        fuse(trainer)


def test_a_config_that_trl_reads_otherwise_is_refused(tmp_path):
    trainer = build("SFT", tmp_path)
    fuse(trainer)
    trainer.model.config.logit_scale = 0.5  # after TRL has read it
    with pytest.raises(ModelError, match="a logit scale of 1.0 .* expected 0.5"):
        trainer.train()
