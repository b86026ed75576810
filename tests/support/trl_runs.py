"""Short runs of TRL's trainers on tiny models, to be compared with and without fuse."""

import copy

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

ARGUMENTS = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "learning_rate": 1e-3,
    "bf16": False,
    "disable_tqdm": True,
}
PAIRS = [
    {
        "prompt": f"Question {i}?",
        "chosen": " Good" + " and so" * (i % 4),
        "rejected": " Bad" + "!" * (i % 3),
    }
    for i in range(12)
]
UNPAIRED = [
    {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
    for row in PAIRS
    for name in ("chosen", "rejected")
]
COMPLETIONS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]
ROWS = {"DPO": PAIRS, "KTO": UNPAIRED, "SFT": COMPLETIONS, "GRPO": PROMPTS, "RLOO": PROMPTS}
SAMPLING = {"num_generations": 4, "max_completion_length": 8}
# What a clock or a machine says.
TIMES = ("runtime", "per_second", "step_time", "flops", "mfu")


class EagerLogps:
    """TRL's op in ordinary torch, for version 1.15, whose own has no CPU path."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, _, softcap, logit_scale, outputs):
        z = torch.nn.functional.linear(hidden, weight, bias).float() * logit_scale
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
        logps = z.log_softmax(-1)
        values = {
            "entropy": -(logps.exp() * logps).sum(-1),
            "log_sum_sq_probs": (2 * logps).logsumexp(-1).detach(),
            "mean_logits": z.mean(-1).detach(),
            "is_top1": z.argmax(-1) == targets,
        }
        chosen = logps.gather(-1, targets[:, None])[:, 0]
        return chosen, *(x if name in outputs else None for name, x in values.items())


def odd_bytes(completions, **_):
    """Return a toy reward: how many of a completion's characters are odd."""
    return [float(sum(ord(x) % 2 for x in text)) for text in completions]


def build(kind, folder, *, model="llama", changes=None, dtype=None, trainer_class=None, **settings):
    """Return a TRL trainer of a tiny model; ``settings`` are its config's.

    Those that the trainer's own arguments name (``peft_config`` and others) go there.
    """
    import trl
    from datasets import Dataset

    if isinstance(model, str):
        model = tiny_model(model, **({"dtype": dtype} if dtype else {}), **(changes or {}))
    tokenizer = tiny_tokenizer()
    torch.manual_seed(3)  # LoRA's factors are drawn
    names = ("peft_config", "ref_model", "callbacks", "compute_loss_func", "eval_dataset")
    given = {name: settings.pop(name) for name in names if name in settings}
    if kind in ("GRPO", "RLOO"):
        given["reward_funcs"] = odd_bytes
        settings = SAMPLING | settings
        if settings.get("beta"):  # its reference is read from the policy's folder
            model.save_pretrained(folder / "reference")
            model.config._name_or_path = str(folder / "reference")
    elif kind in ("DPO", "KTO") and not (
        "peft_config" in given or hasattr(model, "peft_config") or "ref_model" in given
    ):
        given["ref_model"] = copy.deepcopy(model)
    config = getattr(trl, f"{kind}Config")(
        **{
            "output_dir": str(folder),
            **ARGUMENTS,
            "seed": 3,
            **settings,
        }
    )
    return (trainer_class or getattr(trl, f"{kind}Trainer"))(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(ROWS[kind]),
        processing_class=tokenizer,
        **given,
    )


def prompt_tuning():
    """Return a PEFT config whose virtual tokens lengthen every sequence."""
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def logged(trainer):
    """Train, and return what was logged, but for times."""
    trainer.train()
    return [
        {name: x for name, x in row.items() if not any(word in name for word in TIMES)}
        for row in trainer.state.log_history
    ]


def assert_same(ours, theirs, tolerance=1e-5):
    """Compare what two runs logged, every metric at every step."""
    assert len(ours) == len(theirs) > 1
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.keys() == yours.keys()
        for name, value in yours.items():
            expected = pytest.approx(value, rel=tolerance, abs=tolerance)
            assert mine[name] == expected, f"step {yours['step']}: {name}"
