"""A whole PLE run in seconds; what it shares with others is in ``whole_runs``."""

from whole_runs import WORDS, pairs, reward, write_jsonl, write_model

BASELINES = (
    "raft", "distillation", "dpo", "ranking-only", "sft-only", "fixed-threshold", "released",
)  # fmt: skip
STAGES = ("sft", "iteration-1", "iteration-2")


def listed(*names):
    """Return a list of names as an option's value."""
    return f"[{','.join(names)}]"


def prepare(folder, *, chat=False):
    """Write a model and data under ``folder`` and return the command's options."""
    # A context that the principles fit into: the tokenizer has a token for every byte.
    write_model(folder / "model", chat_template=chat, max_position_embeddings=192)
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(6)]
    if chat:
        roles = {"prompt": "user", "completion": "assistant"}
        demonstrations = [
            {"messages": [{"role": roles[name], "content": row[name]} for name in roles]}
            for row in demonstrations
        ]
    write_jsonl(folder / "sft.jsonl", demonstrations)
    write_jsonl(
        folder / "prompts.jsonl",
        [{"prompt": f"{verb} {w}:"} for verb in ("tell", "show") for w in WORDS[:8]],
    )
    write_jsonl(folder / "eval.jsonl", [{"prompt": f"what is {w}?"} for w in WORDS[:3]])
    (folder / "principles.txt").write_text("Be brief.\nBe kind.\n")
    return {
        "model.path": folder / "model",
        "model.lora.r": 0,
        "data.sft": folder / "sft.jsonl",
        "data.prompts": folder / "prompts.jsonl",
        "data.max_length": 64,
        "data.max_prompt_length": 40,
        "iterations": 2,
        "principles": folder / "principles.txt",
        "rewards.functions": listed(reward("lots")),
        "enhancement.threshold": 0.1,
        "training.learning_rate": 1e-3,
        "training.batch_size": 8,
        "training.sft_epochs": 2,
        "training.epochs": 2,
        "training.save_steps": 1,
        "training.logging_steps": 1,
        "generation.max_new_tokens": 5,
        "generation.batch_size": 8,
        "generation.chunk_size": 5,
        "evaluation.reward": reward("letters"),
        "evaluation.prompts": folder / "eval.jsonl",
    }
