"""A whole SPA run in seconds: a tiny model on disk, data files, and the command that runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny_models import tiny_model, tiny_tokenizer

WORDS = (
    "amber birch cedar delta ember flint grove haven inlet jetty knoll ledge marsh north".split()
)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def pairs(count, salt=""):
    return [
        {
            "prompt": f"{salt}{WORDS[i % 14]} {i}:",
            "chosen": f" {WORDS[(i + 3) % 14]}",
            "rejected": f" {WORDS[(i + 5) % 14]}{i}",
        }
        for i in range(count)
    ]


def write_model(folder, name="llama", **changes):
    model = tiny_model(name, **changes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prepare(folder, name="llama"):
    """Write a model and data under ``folder`` and return the command's options."""
    write_model(folder / "model", name)
    write_jsonl(folder / "seed.jsonl", pairs(12))
    write_jsonl(folder / "all.jsonl", pairs(8, "all "))
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"tell {w}:"} for w in WORDS[:12]])
    write_jsonl(folder / "eval.jsonl", [{"prompt": f"what is {w}?"} for w in WORDS[:4]])
    return {
        "model.path": folder / "model",
        "data.preferences": folder / "seed.jsonl",
        "data.prompts": folder / "prompts.jsonl",
        "data.max_length": 64,
        "data.max_prompt_length": 32,
        "iterations": 2,
        "training.learning_rate": 1e-3,
        "training.batch_size": 2,
        "training.seed_epochs": 1,
        "training.save_steps": 1,
        "training.logging_steps": 1,
        "generation.max_new_tokens": 6,
        "generation.batch_size": 4,
        "generation.chunk_size": 3,
        "gauge.holdout_minimum": 4,
        "noise.window": 2,
        "noise.lambdas": "[0.5,0.25]",
        "evaluation.reward": Path(__file__).with_name("rewards.py").as_posix() + ":letters",
        "evaluation.prompts": folder / "eval.jsonl",
        "evaluation.control": "true",
        "evaluation.all_labels": folder / "all.jsonl",
    }


def command(options, *flags):
    values = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "prefalign.cli", "spa", *values, *flags]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def run(options, *flags, **kwargs):
    """Run the command line in a process of its own."""
    return subprocess.run(
        command(options, *flags), env=ENVIRONMENT, capture_output=True, text=True, **kwargs
    )


def final_weights(output_dir, stage="iteration-2"):
    from safetensors.torch import load_file

    files = sorted((output_dir / stage / "model").glob("*.safetensors"))
    tensors = {name: t for file in files for name, t in load_file(file).items()}
    assert tensors
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])
