"""TRL's trainers, fused: the same losses and metrics, without logits, and what is refused."""

import inspect
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from allocations import largest_allocation
from tiny_models import tiny_model, tiny_tokenizer
from trl_runs import PAIRS, EagerLogps, assert_same, build, logged, prompt_tuning

from prefalign.errors import ModelError
from prefalign.integrations import trl as integration
from prefalign.integrations.trl import FusedHead, fuse, fused, unfuse

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'prefalign[trl]'")
if not trl.__version__.startswith(tuple(f"{version}." for version in integration.TESTED)):
    pytest.skip(f"TRL {trl.__version__} is not supported", allow_module_level=True)

ROOT = Path(__file__).parent.parent
DPO_LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero "
    "apo_down discopop sft sigmoid_norm"
).split()
GRPO_LOSSES = ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"]


class Trls:
    """Stands where TRL's own op was: any call is a mistake."""

    @staticmethod
    def apply(*_):
        raise AssertionError("TRL's own op was called")


@pytest.fixture(autouse=True)
def trls_op_runs_on_a_cpu(monkeypatch):
    if trl.__version__.startswith("1.15."):
        monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", EagerLogps)


def compare(kind, tmp_path, monkeypatch, tolerance=1e-5, **settings):
    """Train twice, with TRL's op and with ours alone, and compare all that was logged."""
    theirs = logged(build(kind, tmp_path / "theirs", **settings))
    trainer = build(kind, tmp_path / "ours", **settings)
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Trls)
        op = integration.linear_token_logps
        spy = lambda *args, **kwargs: calls.append(kwargs) or op(*args, **kwargs)  # noqa: E731
        patch.setattr(integration, "linear_token_logps", spy)
        fuse(trainer)
        ours = logged(trainer)
    assert calls
    assert_same(ours, theirs, tolerance)
    return ours


def test_every_loss_of_trls_is_here():
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(DPO_LOSSES)


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_dpo_is_the_same_under_every_loss(tmp_path, monkeypatch, loss_type):
    smoothing = 0.1 if loss_type in ("exo_pair", "robust", "aot", "aot_unpaired") else 0.0
    rows = compare("DPO", tmp_path, monkeypatch, loss_type=[loss_type], label_smoothing=smoothing)
    assert {"loss", "grad_norm", "entropy", "mean_token_accuracy", "logits/chosen"} <= set(rows[0])
    if loss_type == "sigmoid":
        assert rows[0]["loss"] == pytest.approx(0.6931472) and rows[-2]["loss"] < 0.6


@pytest.mark.parametrize(
    "settings",
    [
        {"ref_seed": 1, "precompute_ref_log_probs": True},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "forward_kl"},
        {"sync_ref_model": True, "ref_model_sync_steps": 2},
        {"gradient_checkpointing": False},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_dpo_is_the_same_under_its_settings(tmp_path, monkeypatch, settings):
    settings = dict(settings)
    if "ref_seed" in settings:  # of an equal reference, rewards are rounding, and accuracies chance
        settings["ref_model"] = tiny_model("llama", seed=settings.pop("ref_seed"))
    compare("DPO", tmp_path, monkeypatch, **settings)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "gpt_neox", "opt", "qwen3"])
def test_dpo_is_the_same_whatever_is_behind_the_head(tmp_path, monkeypatch, name):
    compare("DPO", tmp_path, monkeypatch, model=name)


def test_a_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path, monkeypatch):
    rows = compare("DPO", tmp_path, monkeypatch, model="gpt_oss", router_aux_loss_coef=0.1)
    assert "aux_loss" in rows[0]


def test_an_evaluation_is_the_same(tmp_path, monkeypatch):
    from datasets import Dataset

    rows = compare(
        "DPO",
        tmp_path,
        monkeypatch,
        eval_dataset=Dataset.from_list(PAIRS[:5]),
        eval_strategy="steps",
        eval_steps=3,
    )
    assert sum("eval_loss" in row for row in rows) == 2


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("precompute", [False, True])
def test_kto_is_the_same(tmp_path, monkeypatch, loss_type, precompute):
    compare(
        "KTO",
        tmp_path,
        monkeypatch,
        loss_type=loss_type,
        precompute_ref_log_probs=precompute,
    )


@pytest.mark.parametrize("loss_type", GRPO_LOSSES)
def test_grpo_is_the_same_under_every_loss(tmp_path, monkeypatch, loss_type):
    extra = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    compare("GRPO", tmp_path, monkeypatch, loss_type=loss_type, **extra)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.1},
        {"temperature": 0.7},
        {"entropy_coef": 0.01},
        {"top_entropy_quantile": 0.5},
        {"num_iterations": 2},
        {"cast_lm_head_to_fp32": True, "model": "qwen2"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_grpo_is_the_same_under_its_settings(tmp_path, monkeypatch, settings):
    rows = compare("GRPO", tmp_path, monkeypatch, **settings)
    assert any(row.get("grad_norm") for row in rows)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rloo_is_the_same(tmp_path, monkeypatch, beta):
    # Its gradients are a hundred times as large as the others'.
    compare("RLOO", tmp_path, monkeypatch, beta=beta, temperature=0.8, learning_rate=1e-4)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft_is_the_same(tmp_path, monkeypatch, loss_type):
    compare("SFT", tmp_path, monkeypatch, loss_type=loss_type)


def test_under_bf16_autocast_the_two_are_as_near_as_bf16(tmp_path, monkeypatch):
    # TRL rounds logits to bf16, the op does not.
    compare("DPO", tmp_path, monkeypatch, bf16=True, max_steps=2, tolerance=0.05)


def test_in_16_bits_log_probs_are_nearer_the_exact_ones_than_trls(tmp_path):
    model = tiny_model("qwen2", torch.bfloat16)
    trainer = build("SFT", tmp_path, model=model)
    tokens = torch.randint(3, 259, (4, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1].double()
        logps = (hidden @ model.lm_head.weight.double().T).log_softmax(-1)
        exact = logps.gather(-1, tokens[:, 1:, None])[..., 0]
        theirs = model(input_ids=tokens, labels=tokens, fused_lm_head=True).log_probs
        fuse(trainer)
        ours = model(input_ids=tokens, labels=tokens, fused_lm_head=True).log_probs
    assert (ours - exact).abs().mean() < (theirs - exact).abs().mean() / 10


# LoRA


def lora(*targets, **kwargs):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(targets), **kwargs
    )


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO", "RLOO", "SFT"])
def test_lora_is_the_same(tmp_path, monkeypatch, kind):
    compare(kind, tmp_path, monkeypatch, peft_config=lora("q_proj", "v_proj"))


def test_lora_with_precomputed_log_probs_is_the_same(tmp_path, monkeypatch):
    config = lora("q_proj", init_lora_weights=False)  # so that rewards are not rounding
    compare("DPO", tmp_path, monkeypatch, peft_config=config, precompute_ref_log_probs=True)


def test_virtual_tokens_are_the_same(tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="PEFT is not installed")
    compare("DPO", tmp_path, monkeypatch, peft_config=prompt_tuning(), learning_rate=1e-2)


def head_steps(kind, tmp_path, monkeypatch, model, **settings):
    """Train with LoRA on the head, fused from the start; return what was logged."""

    class Trainer(FusedHead, getattr(trl, f"{kind}Trainer")):
        pass

    with monkeypatch.context() as patch:
        patch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Trls)
        trainer = build(kind, tmp_path, model=model, trainer_class=Trainer, **settings)
        rows = logged(trainer)
    trained = {
        name: value
        for name, value in trainer.model.named_parameters()
        if "lm_head" in name and value.requires_grad
    }
    assert trained and all(value.abs().sum() > 0 for value in trained.values())
    return trainer, rows


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_lora_on_the_head_is_trained_as_a_merged_one_would_be(
    tmp_path, monkeypatch, wrapped, precompute
):
    settings = {"precompute_ref_log_probs": precompute, "learning_rate": 1e-2}
    config = lora("q_proj", "lm_head")
    model = tiny_model("qwen2")
    if wrapped:
        from peft import get_peft_model

        torch.manual_seed(3)
        model = get_peft_model(model, config)
    else:
        settings["peft_config"] = config
    trainer, rows = head_steps("DPO", tmp_path, monkeypatch, model, **settings)
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-5) and rows[-2]["loss"] < 0.5
    # The trained adapter's log-probs, by the model's own logits.
    tokens = torch.tensor([[5, 9, 30, 31, 7]])
    trainer.model.eval()
    with torch.no_grad():
        found = trainer.model(input_ids=tokens, labels=tokens, fused_lm_head=True).log_probs
        logits = trainer.model(input_ids=tokens).logits[:, :-1]
    expected = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="LoRA adapter, which TRL's own log-prob function"):
        unfuse(trainer)


@pytest.mark.parametrize("kind", ["KTO", "GRPO", "RLOO", "SFT"])
def test_lora_on_the_head_is_trained_by_every_trainer(tmp_path, monkeypatch, kind):
    _, rows = head_steps(
        kind, tmp_path, monkeypatch, tiny_model("qwen2"), peft_config=lora("lm_head")
    )
    assert any(row.get("grad_norm") for row in rows)


def test_trl_alone_refuses_lora_on_the_head(tmp_path):
    with pytest.raises(ValueError, match="lm_head"):
        build("DPO", tmp_path, model="qwen2", peft_config=lora("lm_head"))


def test_dropout_on_the_heads_lora_is_refused_before_the_first_step(tmp_path):
    class Trainer(FusedHead, trl.SFTTrainer):
        pass

    with pytest.raises(ModelError, match="dropout in its LoRA"):
        build(
            "SFT", tmp_path, model="qwen2", trainer_class=Trainer,
            peft_config=lora("lm_head", lora_dropout=0.1),
        )  # fmt: skip


# Memory

WIDE = 16384  # N * V is then far above any activation or weight


@pytest.mark.parametrize("kind", ["DPO", "KTO", "SFT"])
def test_a_step_makes_no_logits(tmp_path, kind):
    sizes = {}
    for name in ("ours", "theirs"):
        trainer = build(
            kind, tmp_path / name, changes={"vocab_size": WIDE}, max_steps=1,
            per_device_train_batch_size=12,
        )  # fmt: skip
        if name == "ours":
            fuse(trainer)
            batch = next(iter(trainer.get_train_dataloader()))
            mask = batch.get("completion_mask", batch.get("labels", -100) != -100)
            rows = int((mask != 0)[..., 1:].sum())
        sizes[name] = largest_allocation(trainer.train)
    assert sizes["ours"] < rows * WIDE * 2 < sizes["theirs"]  # of half precision, the least


# Undone


def test_unfuse_gives_trls_forward_pass_back(tmp_path, monkeypatch):
    trainer = build("DPO", tmp_path)
    models = (trainer.model, trainer.ref_model)
    before = [model.forward for model in models]
    unfuse(trainer)  # of a trainer that is not fused: nothing
    fuse(trainer)
    ours = [model.forward for model in models]
    fuse(trainer)  # twice is once
    assert [model.forward for model in models] == ours != before
    unfuse(trainer)
    assert [model.forward for model in models] == before
    with fused(trainer):
        assert [model.forward for model in models] != before
        with fused(trainer):
            pass
        assert [model.forward for model in models] != before
    assert [model.forward for model in models] == before
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Trls)
    with pytest.raises(AssertionError, match="TRL's own op"):
        trainer.train()


@pytest.mark.parametrize("bf16", [False, True])
def test_it_can_be_fused_and_unfused_after_training(tmp_path, bf16):
    trainer = build("DPO", tmp_path, max_steps=1, bf16=bf16)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}

    def log_probs():
        with torch.no_grad():
            return [
                model(**inputs, fused_lm_head=True).log_probs
                for model in (trainer.model, trainer.ref_model)
            ]

    theirs = log_probs()
    with fused(trainer):
        ours = log_probs()
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.dtype == yours.dtype == torch.float32
        assert not torch.equal(mine, yours)  # the sums are in another order
        torch.testing.assert_close(mine, yours, rtol=0, atol=0.2 if bf16 else 1e-5)
    for again, yours in zip(log_probs(), theirs, strict=True):
        assert torch.equal(again, yours)


def test_other_trainers_are_left_alone(tmp_path):
    first, second = (build("DPO", tmp_path / name) for name in "ab")
    before = second.model.forward
    fuse(first)
    assert second.model.forward == before


def test_a_batch_without_labels_is_a_zero_with_a_gradient(tmp_path):
    trainer = build("SFT", tmp_path)
    fuse(trainer)
    tokens = torch.tensor([[5, 9, 30]])
    out = trainer.model(input_ids=tokens, labels=torch.full_like(tokens, -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss == 0 and not out.log_probs.any()


def test_without_the_word_a_forward_pass_is_the_models_own(tmp_path):
    trainer = build("DPO", tmp_path)
    tokens = torch.tensor([[5, 9, 30]])
    before = trainer.model(input_ids=tokens, labels=tokens)
    fuse(trainer)
    after = trainer.model(input_ids=tokens, labels=tokens)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)


# What the page and the example show


def test_the_pages_snippets_run(tmp_path):
    pytest.importorskip("peft", reason="PEFT is not installed")
    from datasets import Dataset

    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs/from_trl.md").read_text(), re.S)
    config = build("DPO", tmp_path, model="qwen2", max_steps=2).args
    scored = [{**row, "chosen_reward": 1.0, "rejected_reward": 0.5} for row in PAIRS]
    names = {
        "config": config,
        "pairs": Dataset.from_list(PAIRS),
        "scored": Dataset.from_list(scored),
        "tokenizer": tiny_tokenizer(),
        "small": {"max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none"},
        "tmp_path": tmp_path,
    }
    for snippet in snippets:
        if "trainer = " in snippet:
            names["model"], names["ref_model"] = tiny_model("qwen2"), tiny_model("qwen2")
        exec(
            re.sub(r'output_dir="(.*?)"', r'**small, output_dir=str(tmp_path / "\1")', snippet),
            names,
        )
        assert names["trainer"].state.global_step == 2
    assert len(snippets) == 5


@pytest.mark.parametrize("word", [True, False])
def test_the_example_runs(tmp_path, monkeypatch, word):
    model, data = tmp_path / "model", tmp_path / "pairs"
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    options = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "fuse": word,
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    main = runpy.run_path(str(ROOT / "examples/trl_dpo.py"))["main"]
    if word:
        monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Trls)
    trainer = main(arguments)
    assert trainer.state.global_step == 1
    assert hasattr(trainer, "_forwards_before_fuse") == word
    assert (tmp_path / "out" / "model.safetensors").is_file()
