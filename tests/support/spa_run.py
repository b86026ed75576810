"""A whole SPA run in seconds; what it shares with others is in ``whole_runs``."""

from whole_runs import WORDS, pairs, reward, write_jsonl, write_model


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
        "evaluation.reward": reward("letters"),
        "evaluation.prompts": folder / "eval.jsonl",
        "evaluation.control": "true",
        "evaluation.all_labels": folder / "all.jsonl",
    }
