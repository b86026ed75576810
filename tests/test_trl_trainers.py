"""SPA's and PLE's losses in TRL's DPOTrainer: as prefalign's own trainers, and by eager logits."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from memory import allocated
from prefalign.kernels.enhancement_loss import enhancement_loss
from prefalign.kernels.noise_aware_loss import noise_aware_loss
from tiny_models import one_thread as one_thread
from tiny_models import tiny_model, tiny_tokenizer
from trl_runs import PAIRS, assert_same, logged, prompt_tuning

from prefalign.attention import use_packed_attention
from prefalign.enhancement import EnhancementTrainer
from prefalign.errors import ModelError
from prefalign.integrations import trl as integration
from prefalign.noise_aware import NoiseAwareTrainer
from prefalign.ple_config import EnhancementSettings
from prefalign.references import snapshot_reference
from prefalign.spa_config import NoiseSettings

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'prefalign[trl]'")
if not trl.__version__.startswith(tuple(f"{version}." for version in integration.TESTED)):
    pytest.skip(f"TRL {trl.__version__} is not supported", allow_module_level=True)

import trl_pairs  # noqa: E402
from trl_pairs import (  # noqa: E402
    ARGUMENTS,
    TRAINERS,
    assert_equal_runs,
    assert_same_gradients,
    build,
    eager_logits,
    eager_logps,
    lora,
    one_batch,
    own_run,
)
from trl_pairs import trls_op_runs_on_a_cpu as trls_op_runs_on_a_cpu  # noqa: E402

# SPA: a step


@pytest.mark.parametrize("extrapolation", [0.0, 0.5])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "cohere"])
def test_a_loss_is_noise_aware_loss_of_eager_logits(tmp_path, name, extrapolation):
    reference = tiny_model(name, seed=1)
    trainer = build("noise", tmp_path, name, ref_model=reference, noise_extrapolation=extrapolation)
    inputs = one_batch(trainer)
    check_a_loss(trainer, inputs, lambda: eager_logits(reference, inputs), extrapolation)


def check_a_loss(trainer, inputs, reference_logits, extrapolation):
    trainer.model.train()
    logits = eager_logits(trainer.model, inputs)
    with torch.no_grad():
        z_ref = reference_logits()
        z_ext = (1 + extrapolation) * logits - extrapolation * z_ref
    logps = [x for z in (logits, z_ref, z_ext) for x in eager_logps(z, inputs)]
    confidences = noise_aware_loss(*(x.detach() for x in logps), threshold=0.0).confidences
    threshold = confidences.sort().values[1:3].mean()  # two of the four are below
    out = noise_aware_loss(*logps, alpha=0.3, threshold=threshold)
    assert out.is_noisy.sum() == 2
    trainer.threshold.fixed = threshold.item()
    loss = trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(loss, out.losses.mean(), rtol=1e-5, atol=1e-5)
    assert_same_gradients(trainer.model, loss, out.losses.mean())
    (mine,) = trainer._step_confidences
    torch.testing.assert_close(mine, confidences, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("saved_head", [False, True])
def test_with_lora_the_reference_is_the_model_without_it(tmp_path, saved_head):
    config = lora("q_proj", "v_proj", modules_to_save=["lm_head"] if saved_head else None)
    trainer = build("noise", tmp_path, "qwen2", peft_config=config)
    model = trainer.model
    if saved_head:
        head = model.base_model.model.lm_head.modules_to_save["default"].weight
        head.data += 0.1 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    inputs = one_batch(trainer)

    def without():
        with model.disable_adapter():
            return eager_logits(model, inputs)

    check_a_loss(trainer, inputs, without, 0.5)


def test_of_an_adapter_that_was_trained_the_reference_is_a_copy(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model("llama"), lora("q_proj", "v_proj"))
    trainer = build("noise", tmp_path, model)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.data += 0.1
    inputs = one_batch(trainer)

    def copied():
        model.set_adapter("ref")
        logits = eager_logits(model, inputs)
        model.set_adapter("default")
        return logits

    check_a_loss(trainer, inputs, copied, 0.5)


def test_lora_on_the_head_is_refused_by_extrapolation_alone(tmp_path):
    config = lora("lm_head")
    with pytest.raises(ModelError, match="LoRA adapter, which the noise-aware loss cannot use"):
        build("noise", tmp_path, "qwen2", peft_config=config)
    trainer = build("noise", tmp_path, "qwen2", peft_config=config, noise_extrapolation=0.0)
    inputs = one_batch(trainer)

    def without():
        with trainer.model.disable_adapter():
            return eager_logits(trainer.model, inputs)

    check_a_loss(trainer, inputs, without, 0.0)


def test_a_confidence_at_the_threshold_is_not_noise(tmp_path):
    trainer = build("noise", tmp_path, noise_extrapolation=0.0)
    trainer.model.train()
    trainer.threshold.fixed = 0.5
    trainer.compute_loss(trainer.model, one_batch(trainer))
    trainer.log(logs := {})
    assert logs["noise/confidence"] == 0.5 and logs["noise/share"] == 0


def test_in_bf16_a_loss_is_near_the_exact_one(tmp_path):
    reference = tiny_model("llama", seed=1)
    losses = []
    for bf16 in (False, True):
        trainer = build("noise", tmp_path, bf16=bf16, ref_model=copy.deepcopy(reference))
        trainer.threshold.fixed = 1.0  # all pairs are noise
        trainer.model = trainer.accelerator.prepare_model(trainer.model)
        losses.append(trainer.compute_loss(trainer.model, one_batch(trainer)).item())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)


# SPA: runs


@pytest.mark.parametrize("extrapolation", [0.0, 0.5])
def test_a_run_is_that_of_prefaligns_own_trainer(tmp_path, extrapolation):
    reference = tiny_model("llama", seed=1)
    trainer = build(
        "noise", tmp_path, ref_model=copy.deepcopy(reference), noise_extrapolation=extrapolation
    )
    use_packed_attention(reference)
    theirs = own_run(
        NoiseAwareTrainer,
        trainer,
        tmp_path,
        tiny_model("llama"),
        reference=snapshot_reference(reference),
        noise=NoiseSettings(alpha=0.3, alpha_warmup=0.4, quantile=0.4, window=8),
        extrapolation=extrapolation,
    )
    ours = logged(trainer)
    assert_equal_runs(ours, theirs)
    names = ("noise/alpha", "noise/threshold", "noise/share")
    assert {*names, "logps/chosen", "rewards/accuracies"} < theirs[0].keys() & ours[0].keys()
    alpha, threshold, share = ([row[name] for row in ours[:-1]] for name in names)
    assert alpha == [0, 0, 0, 0.3, 0.3, 0.3]
    assert threshold[:3] == [0, 0, 0] and min(threshold[3:]) > 0
    assert share[:3] == [0, 0, 0] and 0 < sum(share) < 3
    # The window of 8 is filled by the two steps before alpha is used.
    assert ["noise/confidence" in row for row in ours] == [False] + 5 * [True] + [False]


def test_without_smoothing_a_run_is_dpos(tmp_path):
    from datasets import Dataset

    model, reference = tiny_model("llama"), tiny_model("llama", seed=1)
    ours = logged(
        build("noise", tmp_path, model, ref_model=copy.deepcopy(reference), noise_alpha=0.0)
    )
    theirs = logged(
        trl.DPOTrainer(
            tiny_model("llama"),
            reference,
            trl.DPOConfig(output_dir=str(tmp_path), **ARGUMENTS),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tiny_tokenizer(),
        )
    )
    assert_same([{n: x for n, x in row.items() if "noise" not in n} for row in ours], theirs)


def test_without_a_reference_the_model_is_loaded_again(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    given = logged(build("noise", tmp_path, tiny_model("llama")))
    loaded = build("noise", tmp_path, model.from_pretrained(tmp_path / "model"), ref_model=None)
    assert loaded.ref_model is not None
    assert_same(logged(loaded), given)


def test_precomputed_reference_log_probs_are_enough_without_extrapolation(tmp_path):
    settings = {"noise_extrapolation": 0.0, "peft_config": lora("q_proj", "v_proj")}
    run = logged(build("noise", tmp_path, **settings))
    trainer = build("noise", tmp_path, precompute_ref_log_probs=True, **settings)
    assert "ref_chosen_logps" in trainer.train_dataset.column_names
    assert_same(logged(trainer), run)
    assert sum(row.get("noise/share", 0) for row in run) > 0


def test_a_step_of_two_batches_has_one_threshold(tmp_path):
    whole = logged(build("noise", tmp_path))
    halves = build("noise", tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    names = ("loss", "grad_norm", "noise/threshold", "noise/share")
    found = logged(halves)
    assert len(halves.threshold.recent) == 8 and halves.threshold.judged == []
    for mine, yours in zip(found[:-1], whole[:-1], strict=True):
        for name in names:
            assert mine[name] == pytest.approx(yours[name], rel=1e-4, abs=1e-5), name


def test_virtual_tokens_are_left_out(tmp_path):
    pytest.importorskip("peft", reason="PEFT is not installed")
    trainer = build("noise", tmp_path, peft_config=prompt_tuning())
    model, inputs = trainer.model.eval(), one_batch(trainer)
    with torch.no_grad():
        z = eager_logits(model, inputs)[:, -inputs["input_ids"].shape[1] :]
        with model.disable_adapter():
            z_ref = eager_logits(model, inputs)
        ext = eager_logps(1.5 * z - 0.5 * z_ref, inputs)
        ref = eager_logps(z_ref, inputs)
        trainer.compute_loss(model, inputs)
    expected = torch.sigmoid(0.1 * ((ext[0] - ref[0]) - (ext[1] - ref[1])))
    trainer.log(logs := {})
    assert logs["eval_noise/confidence"] == pytest.approx(expected.mean().item(), rel=1e-5)
    rows = [{**row, "prompt": ""} for row in PAIRS[:4]]
    trainer = build("noise", tmp_path, peft_config=prompt_tuning(), rows=rows)
    with pytest.raises(ValueError, match="^prompt: with virtual tokens expected some text"):
        trainer.compute_loss(trainer.model, one_batch(trainer))


@pytest.mark.parametrize("kind", TRAINERS)
def test_compiled_it_is_the_same(tmp_path, kind):
    settings = {"max_steps": 2} | ({"noise_alpha_warmup": 0.0} if kind == "noise" else {})
    run = logged(build(kind, tmp_path, **settings))
    # Twice: what torch.compile keeps of the first trainer is not the second's.
    for _ in range(2 if kind == "enhancement" else 1):
        compiled = build(
            kind, tmp_path, torch_compile=True, torch_compile_backend="eager", **settings
        )
        assert_same(logged(compiled), run)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_resumed_run_is_the_whole_one(tmp_path, kind):
    settings = {"save_strategy": "steps", "save_steps": 4}
    if kind == "enhancement":
        settings["enhancement_step_decay"] = 0.5
    whole = logged(build(kind, tmp_path, **settings))
    checkpoint = tmp_path / "checkpoint-4"
    if kind == "noise":
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert len(state["stateful_callbacks"]["NoiseThreshold"]["attributes"]["recent"]) == 8
    resumed = build(kind, tmp_path / "again", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for mine, yours in zip(resumed.state.log_history[4:6], whole[4:6], strict=True):
        for name in yours.keys() - {"num_tokens"}:  # TRL counts them anew
            assert mine[name] == pytest.approx(yours[name], rel=1e-6), name
    threshold = {"noise": "noise/threshold", "enhancement": "ple/threshold"}[kind]
    assert whole[4][threshold] > 0


def test_two_processes_equal_one(tmp_path):
    one = logged(build("noise", tmp_path))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, trl_pairs.__file__, str(tmp_path), "noise"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_runs(json.loads((tmp_path / "logs.json").read_text()), one)


@pytest.mark.parametrize("kind", TRAINERS)
def test_it_evaluates(tmp_path, kind):
    from datasets import Dataset

    rows = Dataset.from_list(TRAINERS[kind][3][:5])
    trainer = build(kind, tmp_path, eval_dataset={"a": rows}, eval_strategy="steps", eval_steps=3)
    history = logged(trainer)
    assert sum("eval_a_loss" in row for row in history) == 2
    plain = logged(build(kind, tmp_path))
    assert [row["loss"] for row in plain[:-1]] == [row["loss"] for row in history if "loss" in row]
    share = {"noise": "noise/share", "enhancement": "ple/ranked"}[kind]
    seen = len(trainer.threshold.recent) if kind == "noise" else 0
    found = trainer.evaluate(rows)
    assert found["eval_loss"] > 0 and 0 < found[f"eval_{share}"] < 1
    if kind == "noise":
        assert len(trainer.threshold.recent) == seen == 8  # evaluation is not looked back on
        assert found["eval_noise/alpha"] == 0.3
    again = trainer.evaluate(rows)
    assert again["eval_loss"] == found["eval_loss"]


@pytest.mark.filterwarnings("ignore:`return_outputs=True`")
@pytest.mark.parametrize("kind", TRAINERS)
def test_compute_metrics_is_given_logits(tmp_path, kind):
    from datasets import Dataset

    shapes = []

    def metrics(given):
        shapes.append(given.predictions.shape)
        return {"seen": 1.0}

    rows = Dataset.from_list(TRAINERS[kind][3][:2])
    trainer = build(kind, tmp_path, compute_metrics=metrics)
    assert trainer.evaluate(rows)["eval_seen"] == 1
    assert shapes[0][-1] == 259


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_step_makes_no_logits(tmp_path, kind):
    wide = 16384
    model = tiny_model("llama", vocab_size=wide)
    trainer = build(kind, tmp_path, model, max_steps=1, per_device_train_batch_size=12)
    peak = allocated(trainer.train)
    batch = one_batch(trainer)
    rows = int(batch["completion_mask"][:, 1:].sum())
    assert peak < rows * wide * 2  # logits in half precision; the gradients and Adam's are in it


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path, kind):
    rows = {}
    for coefficient in (0.0, 0.5):
        trainer = build(kind, tmp_path, "gpt_oss", router_aux_loss_coef=coefficient, max_steps=1)
        rows[coefficient] = logged(trainer)[0]
    extra = 0.5 * rows[0.5]["aux_loss"]
    assert extra > 0.1
    assert rows[0.5]["loss"] == pytest.approx(rows[0.0]["loss"] + extra, rel=1e-5)


# PLE


def eager_enhancement(trainer, inputs, threshold, **forms):
    guided, plain = eager_logps(eager_logits(trainer.model, inputs), inputs)
    lengths = inputs["completion_mask"][:, 1:].sum(1).chunk(2)
    rewards = [inputs[name] for name in ("rejected_reward", "chosen_reward")]
    return enhancement_loss(
        plain, guided, *rewards, guided_lengths=lengths[0], plain_lengths=lengths[1],
        threshold=threshold, **forms,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name, settings, forms, threshold",
    [
        ("llama", {}, {}, 0.2),
        ("gemma2", {"enhancement_threshold": -0.02}, {}, -0.02),
        ("qwen2", {"enhancement_ranking": "logistic"}, {"ranking": "logistic"}, 0.2),
        ("llama", {"enhancement_sft": "sum"}, {"sft": "sum"}, 0.2),
        ("granite", {"enhancement_temperature": 0.3}, {"temperature": 0.3}, 0.2),
    ],
)
def test_a_loss_is_enhancement_loss_of_eager_logits(tmp_path, name, settings, forms, threshold):
    trainer = build("enhancement", tmp_path, name, **settings)
    trainer.model.train()
    inputs = one_batch(trainer)
    assert inputs["chosen_reward"].tolist() == [0, 0.25, 0.5, 0.75]
    out = eager_enhancement(trainer, inputs, threshold, **forms)
    assert 0 < out.is_ranked.sum() < 4
    loss = trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(loss, out.losses.mean(), rtol=1e-5, atol=1e-5)
    assert_same_gradients(trainer.model, loss, out.losses.mean())


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_a_run_is_that_of_prefaligns_own_enhancement_trainer(tmp_path, decay):
    trainer = build("enhancement", tmp_path, enhancement_step_decay=decay)
    theirs = own_run(
        EnhancementTrainer,
        trainer,
        tmp_path,
        tiny_model("llama"),
        enhancement=EnhancementSettings(),
        threshold=0.2,
        step_decay=decay,
    )
    ours = logged(trainer)
    assert_equal_runs(ours, theirs)
    assert {"ple/ranked", "ple/threshold", "ple/guided_weight"} < theirs[0].keys() & ours[0].keys()
    assert ours[5]["ple/threshold"] == pytest.approx(0.2 * decay**5)
    assert {"entropy", "mean_token_accuracy", "rewards/accuracies"} < ours[0].keys()


def test_an_infinite_threshold_is_not_logged(tmp_path):
    (row, _) = logged(
        build("enhancement", tmp_path, enhancement_threshold=float("inf"), max_steps=1)
    )
    assert row["ple/ranked"] == 0 and "ple/threshold" not in row


@pytest.mark.parametrize("peft", [False, True])
def test_no_reference_is_loaded_or_run(tmp_path, monkeypatch, peft):
    calls = []
    monkeypatch.setattr(
        "trl.trainer.dpo_trainer.create_model_from_path", lambda *_, **__: calls.append("loaded")
    )
    config = lora("q_proj", "lm_head", init_lora_weights=True) if peft else None
    trainer = build("enhancement", tmp_path, "qwen2", peft_config=config)
    assert trainer.ref_model is None and not trainer.args.precompute_ref_log_probs
    assert "ref_chosen_logps" not in trainer.train_dataset.column_names
    forward = trainer.model.forward
    monkeypatch.setattr(
        trainer.model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k)
    )
    trainer.train()
    trainer.evaluate(trainer.train_dataset)
    assert calls == [1] * (6 + 2)  # a pass for each batch, two of them evaluation's


def test_lora_on_the_head_is_trained(tmp_path):
    trainer = build("enhancement", tmp_path, "qwen2", peft_config=lora("lm_head"))
    trainer.model.train()
    inputs = one_batch(trainer)
    out = eager_enhancement(trainer, inputs, 0.2)
    loss = trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(loss, out.losses.mean(), rtol=1e-5, atol=1e-5)
    assert_same_gradients(trainer.model, loss, out.losses.mean())
