"""TRL's DPOTrainer with SPA's and PLE's losses, on a tiny model; a worker of several processes."""

import copy
import gc
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import trl
import trl_runs
from tiny_models import tiny_model, tiny_tokenizer
from trl_runs import PAIRS, EagerLogps, logged

from prefalign.attention import use_packed_attention
from prefalign.integrations.trl_trainers import (
    EnhancementDPOConfig,
    EnhancementDPOTrainer,
    NoiseAwareDPOConfig,
    NoiseAwareDPOTrainer,
)
from prefalign.packed_trainer import Groups
from prefalign.packing import Group

# A scored pair each: the gap is above 0.2 in some, below in others.
SCORED = [
    {**row, "chosen_reward": (i % 4) / 4, "rejected_reward": 0.3 * (i % 2)}
    for i, row in enumerate(PAIRS)
]
ARGUMENTS = trl_runs.ARGUMENTS | {"train_sampling_strategy": "sequential"}
NOISE = {"noise_alpha": 0.3, "noise_alpha_warmup": 0.4, "noise_quantile": 0.4, "noise_window": 8}
TRAINERS = {
    "noise": (NoiseAwareDPOTrainer, NoiseAwareDPOConfig, NOISE, PAIRS),
    "enhancement": (EnhancementDPOTrainer, EnhancementDPOConfig, {}, SCORED),
}


def build(kind, folder, model="llama", rows=None, **settings):
    """Return one of the trainers; ``settings`` are its config's, or its own arguments."""
    from datasets import Dataset

    trainer_class, config_class, changes, default = TRAINERS[kind]
    model = tiny_model(model) if isinstance(model, str) else model
    names = ("peft_config", "ref_model", "callbacks", "compute_metrics", "eval_dataset")
    given = {name: settings.pop(name) for name in names if name in settings}
    if kind == "noise" and not ("peft_config" in given or hasattr(model, "peft_config")):
        given.setdefault("ref_model", copy.deepcopy(model))
    config = config_class(output_dir=str(folder), **{**ARGUMENTS, **changes, **settings})
    torch.manual_seed(3)  # LoRA's factors are drawn
    return trainer_class(
        model,
        args=config,
        train_dataset=Dataset.from_list(default if rows is None else rows),
        processing_class=tiny_tokenizer(),
        **given,
    )


def lora(*targets, **kwargs):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    # Factors that are not zero: a policy that is its reference has margins of rounding.
    kwargs.setdefault("init_lora_weights", False)
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(targets), **kwargs
    )


def one_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


@pytest.fixture(autouse=True)
def trls_op_runs_on_a_cpu(monkeypatch):
    if trl.__version__.startswith("1.15."):
        monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", EagerLogps)


def groups_of(trainer):
    """Return the pairs of a trainer, as TRL tokenised them."""
    rows = trainer.train_dataset
    return Groups(
        [
            Group(
                row["prompt_ids"],
                [row["chosen_ids"], row["rejected_ids"]],
                i,
                {"rewards": [row["chosen_reward"], row["rejected_reward"]]}
                if "chosen_reward" in row
                else {},
            )
            for i, row in enumerate(rows)
        ]
    )


def own_run(trainer_class, trainer, folder, model, **kwargs):
    """Return what prefalign's own trainer logs on the pairs of a TRL trainer."""
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(folder), **ARGUMENTS)
    use_packed_attention(model)
    return logged(trainer_class(model, arguments, groups_of(trainer), **kwargs))


def assert_equal_runs(ours, theirs):
    """Compare every metric that both log, at every step but the summary's line."""
    assert len(ours) == len(theirs) == ARGUMENTS["max_steps"] + 1
    for mine, yours in zip(ours[:-1], theirs[:-1], strict=True):
        shared = mine.keys() & yours.keys() - {"num_tokens"}
        assert {"loss", "grad_norm", "rewards/margins"} < shared
        for name in shared:
            assert mine[name] == pytest.approx(yours[name], rel=1e-4, abs=2e-5), name


def eager_logps(logits, inputs):
    """Return the log-prob of each response from ``[2B, L, V]`` logits, chosen first."""
    logps = logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return (logps * inputs["completion_mask"][:, 1:]).sum(1).chunk(2)


def eager_logits(model, inputs):
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def assert_same_gradients(model, loss, other):
    """Compare the gradients of two losses of one model."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found, expected = (
        torch.autograd.grad(x, list(parameters.values()), allow_unused=True) for x in (loss, other)
    )
    largest = max(x.abs().max() for x in expected if x is not None)
    assert largest > 0.1
    for name, mine, yours in zip(parameters, found, expected, strict=True):
        assert (mine is None) == (yours is None), name
        if mine is not None:
            assert (mine - yours).abs().max() < 1e-5 * largest, name


def main(folder, kind):
    """Train as one of the processes of a launcher; the first writes ``logs.json``."""
    size = 4 // int(os.environ["WORLD_SIZE"])
    trainer = build(kind, folder, per_device_train_batch_size=size, ddp_backend="gloo")
    logs = logged(trainer)
    if trainer.is_world_process_zero():
        Path(folder, "logs.json").write_text(json.dumps(logs))
    # Gloo waits forever where DDP's reducer outlives its process group.
    del trainer
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
