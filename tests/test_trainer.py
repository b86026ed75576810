"""The trainer against plain torch, against itself packed otherwise, and against two processes."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training
from tiny_models import float64_throughout as float64_throughout
from tiny_models import tiny_model
from training import (
    SETTINGS,
    eager_sum,
    model_and_reference,
    noise_kwargs,
    random_groups,
    train,
    weights,
    with_reference_logps,
)

from prefalign.attention import use_packed_attention
from prefalign.config import TrainingSettings
from prefalign.noise_aware import NoiseAwareTrainer, NoiseThreshold
from prefalign.packed_trainer import (
    Groups,
    MetricsCallback,
    NoLastCheckpoint,
    sorted_checkpoints,
    training_arguments,
)
from prefalign.packing import Group
from prefalign.references import snapshot_reference
from prefalign.trainer import PreferenceTrainer

LN2 = torch.tensor(2.0).log()


class Eager:
    """DPO with plain torch: one sequence at a time, logits and all."""

    def __init__(self, model, beta=0.1):
        self.model, self.beta = model, beta
        self.model.set_attn_implementation("eager")
        self.reference = copy.deepcopy(model)

    def loss(self, group):
        chosen, rejected = (eager_sum(self.model, group.prompt_ids, r) for r in group.response_ids)
        with torch.no_grad():
            ref = [eager_sum(self.reference, group.prompt_ids, r) for r in group.response_ids]
        margin = self.beta * ((chosen - ref[0]) - (rejected - ref[1]))
        return -torch.nn.functional.logsigmoid(margin)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_first_loss_is_ln_2_for_every_pair_exactly(mixed_precision):
    model, reference = model_and_reference()
    settings = replace(SETTINGS, mixed_precision=mixed_precision)
    seen = []

    class Watching(PreferenceTrainer):
        def group_losses(self, model, batch):
            losses, metrics = super().group_losses(model, batch)
            seen.append((self.state.global_step, losses.detach(), metrics["rewards/margins"]))
            return losses, metrics

    groups = random_groups(12)
    arguments = training_arguments(settings, "unused", num_groups=12, epochs=1, max_steps=1)
    arguments.save_strategy = "no"
    Watching(model, arguments, Groups(groups), max_tokens=48, reference=reference).train()
    assert len(seen) > 1  # several passes
    for _, losses, margins in seen:
        assert torch.equal(losses, LN2.expand(losses.shape))
        assert torch.equal(margins, torch.zeros_like(margins))


def test_a_run_equals_plain_torch(tmp_path):
    groups = random_groups(8)
    settings = TrainingSettings(
        learning_rate=1e-3, lr_scheduler="constant", warmup_ratio=0, batch_size=8,
        max_tokens=48, logging_steps=1, save_steps=100, max_grad_norm=0,
    )  # fmt: skip
    trainer, logs = train(tmp_path, groups, settings=settings, epochs=3)
    eager = Eager(tiny_model("llama"))
    optimizer = torch.optim.AdamW(eager.model.parameters(), 1e-3, weight_decay=0)
    for log in logs[:3]:
        loss = torch.stack([eager.loss(group) for group in groups]).mean()
        assert log["loss"] == pytest.approx(loss.item(), abs=2e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plain = torch.cat([p.detach().flatten() for p in eager.model.parameters()])
    start = torch.cat([p.detach().flatten() for p in tiny_model("llama").parameters()])
    moved = (plain - start).norm()
    assert (weights(trainer) - plain).norm() < 1e-3 * moved


@pytest.mark.parametrize("changes", [{"max_tokens": 4096}, {"max_tokens": 1}])
def test_the_token_budget_does_not_change_the_result(tmp_path, changes):
    groups = random_groups(8)
    # Adam makes what it will of the rounding of a gradient near 0: in float32, up to a whole step.
    wide = {"dtype": torch.float64}
    base, base_logs = train(tmp_path / "base", groups, **wide)
    settings = TrainingSettings(**{**vars(SETTINGS), **changes})
    other, logs = train(tmp_path / "other", groups, settings=settings, **wide)
    assert [x["loss"] for x in logs] == pytest.approx([x["loss"] for x in base_logs], abs=1e-6)
    assert torch.allclose(weights(base), weights(other), atol=1e-5)


def test_accumulation_of_the_trainers_own_does_not_change_the_result(tmp_path):
    groups = random_groups(8)
    base, base_logs = train(tmp_path / "base", groups)
    settings = TrainingSettings(
        **{**vars(SETTINGS), "batch_size": 2, "arguments": {"gradient_accumulation_steps": 2}}
    )
    other, logs = train(tmp_path / "other", groups, settings=settings)
    assert [x["loss"] for x in logs] == pytest.approx([x["loss"] for x in base_logs], abs=1e-6)
    assert torch.allclose(weights(base), weights(other), atol=1e-5)


def test_log_probs_that_travel_with_the_pairs_replace_the_reference(tmp_path):
    groups = random_groups(8)
    base, base_logs = train(tmp_path / "base", groups)
    cached = with_reference_logps(groups)
    other, logs = train(tmp_path / "other", cached, reference=None)
    assert [x["loss"] for x in logs] == pytest.approx([x["loss"] for x in base_logs], abs=1e-5)


def test_weights_of_pairs_scale_their_losses(tmp_path):
    groups = [
        Group(g.prompt_ids, g.response_ids, g.example_id, {"weights": [float(i % 2)]})
        for i, g in enumerate(random_groups(4))
    ]
    _, logs = train(tmp_path, groups)
    assert logs[0]["loss"] == pytest.approx(0.5 * math.log(2), abs=1e-6)


def test_metrics_have_trls_names(tmp_path):
    trainer, logs = train(tmp_path, random_groups(8), eval_dataset=Groups(random_groups(4, 1)))
    wanted = {
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
        "logps/chosen", "logps/rejected", "num_tokens", "loss", "learning_rate", "grad_norm",
    }  # fmt: skip
    assert wanted <= logs[0].keys()
    tokens = sum(g.tokens_laid(share_prompts=True) for g in trainer.train_dataset.groups)
    assert sum(log["num_tokens"] for log in logs) == tokens
    metrics = {}
    trainer.add_callback(MetricsCallback(lambda step, log: metrics.update(log)))
    trainer.evaluate()
    assert {f"eval_{n}" for n in wanted if "/" in n} | {"eval_loss"} <= metrics.keys()


def test_a_resumed_run_ends_in_the_same_weights(tmp_path):
    groups = random_groups(16)
    whole, _ = train(tmp_path / "whole", groups, epochs=2)
    assert [p.name for p in sorted_checkpoints(tmp_path / "whole")] == ["checkpoint-8"]
    stopped = TrainingSettings(**{**vars(SETTINGS), "arguments": {"save_total_limit": 10}})
    train(tmp_path / "parts", groups, epochs=2, settings=stopped)
    middle = tmp_path / "parts" / "checkpoint-4"
    resumed, _ = train(tmp_path / "resumed", groups, epochs=2, resume=str(middle))
    assert torch.equal(weights(whole), weights(resumed))
    assert not list(tmp_path.rglob("*.partial"))


def test_the_last_steps_checkpoint_is_left_out(tmp_path):
    # Resuming from it, transformers 5 took a seventh step.
    every = replace(SETTINGS, save_steps=1, arguments={"save_total_limit": 10})
    run = {"max_steps": 6, "settings": every, "callbacks": [NoLastCheckpoint()]}
    whole, _ = train(tmp_path / "whole", random_groups(16), **run)
    last = sorted_checkpoints(tmp_path / "whole")[-1]
    assert last.name == "checkpoint-5"
    run["callbacks"] = [NoLastCheckpoint()]
    resumed, _ = train(tmp_path / "resumed", random_groups(16), resume=str(last), **run)
    assert resumed.state.global_step == 6
    assert torch.equal(weights(whole), weights(resumed))


class StopsWhileSaving(Exception):
    pass


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    def fails(self, output_dir):
        raise StopsWhileSaving  # after the model is written, before the optimiser is

    monkeypatch.setattr(PreferenceTrainer, "_save_optimizer_and_scheduler", fails)
    with pytest.raises(StopsWhileSaving):
        train(tmp_path, random_groups(8))
    assert sorted_checkpoints(tmp_path) == []


# The noise-aware trainer


def test_alpha_rises_after_the_warm_up_and_the_threshold_is_the_windows_quantile(tmp_path):
    trainer, logs = train(tmp_path, random_groups(16), epochs=2, **noise_kwargs())
    assert [log["noise/alpha"] for log in logs] == pytest.approx([0, 0] + [0.3] * 6)
    assert logs[1]["noise/threshold"] == 0  # the window was not full
    assert all(log["noise/threshold"] > 0 for log in logs[2:])
    # Until step 2 policy and reference had only been apart for one step.
    assert logs[2]["noise/threshold"] == pytest.approx(0.5, abs=0.05)
    rows = trainer.threshold.rows()
    assert [row[0] for row in rows] == list(range(16))
    assert all(0 < confidence < 1 for _, confidence, _ in rows)
    assert all(flag in (0.0, 1.0) for _, _, flag in rows)
    recent = torch.as_tensor(trainer.threshold.recent)
    assert recent.numel() == 4
    assert trainer.threshold.value(torch.device("cpu")) == torch.quantile(recent.float(), 0.25)


def test_an_exact_threshold_is_taken_once_over_all_pairs(tmp_path):
    trainer, logs = train(tmp_path, random_groups(16), epochs=2, **noise_kwargs(threshold="exact"))
    thresholds = [log["noise/threshold"] for log in logs]
    assert thresholds[:2] == [0, 0]
    assert thresholds[2] > 0 and len(set(thresholds[2:])) == 1


def test_without_smoothing_the_noise_aware_run_is_dpo(tmp_path):
    groups = random_groups(8)
    base, _ = train(tmp_path / "base", groups)
    other, _ = train(tmp_path / "other", groups, **noise_kwargs(alpha=0.0))
    assert torch.allclose(weights(base), weights(other), atol=1e-6)


def test_the_judges_log_probs_are_used_while_no_threshold_depends_on_the_reference(tmp_path):
    groups = random_groups(16)
    cached = with_reference_logps(groups)
    calls = []

    class Counting(NoiseAwareTrainer):
        def three_logps(self, model, batch):
            calls.append(self.state.global_step)
            return super().three_logps(model, batch)

    kwargs = {**noise_kwargs(alpha_warmup=0.5), "trainer_class": Counting}
    _, logs = train(tmp_path / "cached", cached, epochs=2, **kwargs)
    assert min(calls) == 3  # warm-up ends at 4, and one step fills the window
    _, plain = train(
        tmp_path / "plain", groups, epochs=2, **{**kwargs, "trainer_class": NoiseAwareTrainer}
    )
    assert [x["loss"] for x in logs] == pytest.approx([x["loss"] for x in plain], abs=1e-5)


def test_the_thresholds_window_survives_a_resume(tmp_path):
    groups = random_groups(16)
    settings = TrainingSettings(**{**vars(SETTINGS), "arguments": {"save_total_limit": 10}})
    whole, _ = train(tmp_path / "run", groups, epochs=2, settings=settings, **noise_kwargs())
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert len(state["stateful_callbacks"]["NoiseThreshold"]["attributes"]["recent"]) == 4
    resumed, _ = train(
        tmp_path / "again", groups, epochs=2, settings=settings,
        resume=str(tmp_path / "run" / "checkpoint-4"), **noise_kwargs(),
    )  # fmt: skip
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.threshold.rows() == resumed.threshold.rows()


def test_the_last_look_at_a_pair_is_kept():
    threshold = NoiseThreshold(0.5, window=3)
    threshold.push(torch.tensor([[0.0, 0.9, 0.0], [1.0, 0.2, 1.0]]))
    threshold.push(torch.tensor([[0.0, 0.4, 1.0], [2.0, 0.8, 0.0]]))
    assert threshold.rows() == [
        [0.0, pytest.approx(0.4), 1.0],
        [1.0, pytest.approx(0.2), 1.0],
        [2.0, pytest.approx(0.8), 0.0],
    ]  # fmt: skip
    assert threshold.value(torch.device("cpu")) == pytest.approx(0.4)


# Two processes


@pytest.mark.parametrize("kind", ["dpo", "noise", "split"])
def test_two_processes_equal_one(tmp_path, kind):
    script = Path(training.__file__)
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={processes}", str(script), str(folder), kind,
        ]  # fmt: skip
        if processes == 1:
            command = [sys.executable, str(script), str(folder), kind]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(folder / "result.pt"))
    one, two = results
    for name in ("loss", "rewards/margins", "num_tokens", "grad_norm"):
        ours = [log[name] for log in two["logs"]]
        assert ours == pytest.approx([log[name] for log in one["logs"]], rel=1e-4, abs=1e-5), name
    if kind == "noise":
        ours = [log["noise/threshold"] for log in two["logs"]]
        assert ours == pytest.approx([log["noise/threshold"] for log in one["logs"]], abs=1e-5)
    start = torch.cat([p.detach().flatten() for p in tiny_model("llama").parameters()])
    assert (one["weights"] - two["weights"]).norm() < 1e-3 * (one["weights"] - start).norm()


def test_a_resumed_lora_run_ends_in_the_same_weights(tmp_path):
    from prefalign.config import LoraSettings
    from prefalign.loading import _lora_config

    groups = random_groups(16)

    def run(folder, resume=None):
        import peft

        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model("llama"), _lora_config(LoraSettings(r=4)))
        use_packed_attention(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(1))
        settings = replace(SETTINGS, arguments={"save_total_limit": 10})
        kwargs = noise_kwargs()
        trainer = kwargs.pop("trainer_class")(
            model,
            training_arguments(settings, folder, num_groups=16, epochs=2),
            Groups(groups),
            max_tokens=48,
            reference=snapshot_reference(model),
            **kwargs,
        )
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert any("reference" in name for name in whole)
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


@pytest.mark.parametrize("max_tokens", [40, 4096])
def test_packed_losses_and_gradients_equal_one_sequence_at_a_time_in_float64(
    tmp_path, max_tokens, float64_throughout
):
    groups = random_groups(6)
    model, reference = model_and_reference(dtype=torch.float64)
    arguments = training_arguments(SETTINGS, tmp_path, num_groups=6, epochs=1)
    trainer = PreferenceTrainer(
        model, arguments, Groups(groups), max_tokens=max_tokens, reference=reference
    )
    with torch.no_grad():  # away from the reference, so that no margin is 0
        for parameter in model.parameters():
            parameter.mul_(1.01)
    eager = Eager(copy.deepcopy(model))
    eager.reference = copy.deepcopy(reference.model)
    for each in (eager.model, eager.reference):
        each.set_attn_implementation("sdpa")  # transformers' eager softmax is float32
    packed = {}
    for batch in trainer.data_collator(groups)["passes"]:
        losses, _ = trainer.group_losses(model, batch)
        losses.sum().backward()
        packed |= dict(zip(batch.example_ids.tolist(), losses.tolist(), strict=True))
    for group in groups:
        loss = eager.loss(group)
        loss.backward()
        assert packed[group.example_id] == pytest.approx(loss.item(), abs=1e-12)
        assert abs(loss.item() - math.log(2)) > 1e-4
    for (name, ours), theirs in zip(
        model.named_parameters(), eager.model.parameters(), strict=True
    ):
        assert ours.grad.dtype == torch.float64
        error = (ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert error < 1e-9, name
