"""The examples for Axolotl and LLaMA-Factory, on what these hand them."""

import importlib
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model
from trl_runs import EagerLogps, assert_same, build, logged

from prefalign.integrations import trl as integration

ROOT = Path(__file__).parent.parent


def modules(monkeypatch, *names):
    """Put empty modules of these names where imports find them; return the last."""
    found = [ModuleType(name) for name in names]
    for module in found:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found[-1]


# Axolotl


@pytest.fixture
def plugin(monkeypatch):
    """Return the plugin, loaded by Axolotl where it is installed."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.delitem(sys.modules, "axolotl_plugin", raising=False)
    try:
        from axolotl.integrations.base import load_plugin
    except ImportError:  # it pins most of what the tests pin, at other versions
        base = modules(monkeypatch, "axolotl", "axolotl.integrations", "axolotl.integrations.base")
        base.BasePlugin = type("BasePlugin", (), {})
        return importlib.import_module("axolotl_plugin").PrefalignPlugin()
    return load_plugin("axolotl_plugin.PrefalignPlugin")


@pytest.fixture
def trl(monkeypatch):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'prefalign[trl]'")
    if not trl.__version__.startswith(tuple(f"{version}." for version in integration.TESTED)):
        pytest.skip(f"TRL {trl.__version__} is not supported")
    if trl.__version__.startswith("1.15."):
        monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", EagerLogps)
    return trl


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_the_axolotl_plugin_fuses_the_trainer(plugin, trl, tmp_path, monkeypatch, kind):
    cfg = {"rl": kind.lower(), "plugins": ["axolotl_plugin.PrefalignPlugin"]}
    theirs = logged(build(kind, tmp_path / "theirs", max_steps=3))
    plugin.register(cfg)
    trainer = build(kind, tmp_path / "ours", max_steps=3)
    plugin.post_trainer_create(cfg, trainer)
    # Whatever calls TRL's own op now fails.
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", None)
    assert_same(logged(trainer), theirs)


def test_the_axolotl_plugin_refuses_axolotls_own_trl(plugin, trl, monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.9.0")
    with pytest.raises(ImportError, match=r"TRL 1\.9\.0, which Axolotl pins, .* 1\.15 or 1\.16"):
        plugin.register({})


def test_the_page_shows_the_lines_of_the_plugin():
    page = (ROOT / "docs/from_trl.md").read_text()
    lines = re.search(r"plugins:\n +- (\w+)\.(\w+)", page)
    assert f"class {lines[2]}(" in (ROOT / f"examples/{lines[1]}.py").read_text()


# LLaMA-Factory


class LogitsTrainer:
    """What the example needs of LLaMA-Factory's trainer, with log-probs taken from logits."""

    def __init__(self, loss_type="sigmoid", ld_alpha=None, is_fsdp_enabled=False):
        self.loss_type, self.ld_alpha = loss_type, ld_alpha
        self.is_fsdp_enabled = is_fsdp_enabled

    def concatenated_forward(self, model, batch, is_ref_model=False):
        inputs, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"][:, 1:]
        logits = model(**inputs).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        scored = labels != -100
        sums, lengths = (logps * scored).sum(1), scored.sum(1)
        averaged = self.loss_type in ("ipo", "orpo", "simpo")
        pairs = len(labels) // 2
        chosen, rejected = (sums / lengths if averaged else sums).split(pairs)
        return {
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            "chosen_logits": logits[:pairs][scored[:pairs]],
            "rejected_logits": logits[pairs:][scored[pairs:]],
            "chosen_logps_avg": (sums / lengths)[:pairs],
        }


@pytest.fixture
def without_logits():
    return runpy.run_path(str(ROOT / "examples/llamafactory_dpo.py"))["without_logits"]


def padded_pairs():
    """Return a batch of two pairs as LLaMA-Factory's collator makes it: chosen first."""
    tokens = torch.randint(3, 259, (4, 12), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(tokens), tokens.clone()
    for row, (prompt, end) in enumerate([(3, 12), (5, 9), (3, 7), (5, 12)]):
        mask[row, end:] = tokens[row, end:] = 0
        labels[row, :prompt] = labels[row, end:] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "gpt_neox"])
def test_llama_factorys_log_probs_are_the_same(without_logits, name, loss_type):
    found = []
    for trainer_class in (LogitsTrainer, without_logits(LogitsTrainer)):
        model, batch = tiny_model(name), padded_pairs()
        out = trainer_class(loss_type).concatenated_forward(model, batch)
        assert "labels" in batch  # the reference's pass reads it too
        upstream = torch.tensor([0.3, -1.7])
        loss = ((out["chosen_logps"] - 0.4 * out["rejected_logps"]) * upstream).sum()
        (loss + out["chosen_logps_avg"].sum()).backward()
        means = {key: value.mean() if "logits" in key else value for key, value in out.items()}
        gradients = {key: value.grad for key, value in model.named_parameters()}
        found.append(means | gradients)
    theirs, ours = found
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(
            ours[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: k + m
        )


def test_llama_factorys_forward_pass_makes_no_logits(without_logits):
    model, made = tiny_model("llama"), []
    model.lm_head.register_forward_hook(lambda module, args, out: made.append(out.shape))
    without_logits(LogitsTrainer)().concatenated_forward(model, padded_pairs())
    assert made == [(4, 1, 259)]  # of one position, where the model's own head is called


def test_llama_factorys_adapter_is_on_and_off(without_logits):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], init_lora_weights=False
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model("qwen2"), config).eval()
    trainers = LogitsTrainer(), without_logits(LogitsTrainer)()
    for switch in (model.disable_adapter, lambda: torch.enable_grad()):
        with switch():
            theirs, ours = (x.concatenated_forward(model, padded_pairs()) for x in trainers)
        for key in ("chosen_logps", "rejected_logps"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("setting", [{"ld_alpha": 0.5}, {"is_fsdp_enabled": True}])
def test_what_llama_factorys_example_does_not_do_is_refused(without_logits, setting):
    with pytest.raises(ValueError, match="ld_alpha and FSDP are not supported here"):
        without_logits(LogitsTrainer)(**setting)


def test_llama_factory_is_started_with_the_other_trainer(monkeypatch):
    trainer = modules(
        monkeypatch, "llamafactory", "llamafactory.train.dpo", "llamafactory.train.dpo.trainer"
    )
    trainer.CustomDPOTrainer = LogitsTrainer
    sys.modules["llamafactory.train.dpo"].trainer = trainer
    started = []
    tuner = SimpleNamespace(run_exp=lambda: started.append(trainer.CustomDPOTrainer))
    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", tuner)
    runpy.run_path(str(ROOT / "examples/llamafactory_dpo.py"), run_name="__main__")
    assert [x.__mro__[1] for x in started] == [LogitsTrainer]
