"""TRL's trainers with ``fuse`` and without: the same metrics, and what the two cost.

    python bench/fuse_trl.py equality --out bench/results/<device>/fuse
    python bench/fuse_trl.py cost --out bench/results/<device>/fuse

Every run is a process of its own, of the same seed, model, data and settings. ``equality`` compares
every metric that TRL logs at every step, on a tiny model in float32: 50 steps of DPO under each of
TRL's losses, a few of the other trainers. A difference is taken as a part of the value where that
is above 1: float32 does not give a sum of log-probs near 100 to 1e-5. Where two runs differ by more
than half of ``AGREE``, TRL is also compared with itself from weights changed by one part in 10^7
(the control), for a run that magnifies rounding differs from itself.

``cost`` takes time and peak memory of steps of a Llama of 13 M parameters with 32k words, under
TRL's defaults (gradient checkpointing is one of them). Its times are worth something on a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from lengths import draw_pairs
from training_step import Watch, build_model, resident, step_time
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefalign.benchmarks.runner import describe_machine

AGREE = 1e-5
SEED, CONTROLS, PERTURBATION = 3, 3, 1e-7
LEARNING_RATE = 1e-4

DPO_LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero "
    "apo_down discopop sft sigmoid_norm"
).split()
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
OTHERS = ("KTO", "GRPO", "RLOO", "SFT")
CASES = (*(f"DPO {name}" for name in DPO_LOSSES), *OTHERS)
COSTLY = ("DPO sigmoid", *OTHERS)
SAMPLED = ("GRPO", "RLOO")

# What a clock or a machine says.
TIMES = ("runtime", "per_second", "step_time", "flops", "mfu")

TINY_WORDS, TINY_PAIRS = 512, 48
COST_PAIRS, COMPLETION = 4, 128


def tiny_model() -> LlamaForCausalLM:
    """Return a Llama of two layers whose predictions are far from uniform."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TINY_WORDS,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of that many words, ``w3`` being token 3."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def texts(pairs: int, words: int, shorter: int) -> list[dict[str, str]]:
    """Return pairs of words, of UltraFeedback's lengths divided by ``shorter``."""
    found = []
    for row in draw_pairs(pairs):
        parts = [row[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")]
        prompt, chosen, rejected = (
            " ".join(f"w{3 + i % (words - 3)}" for i in ids[: max(2, len(ids) // shorter)])
            for ids in parts
        )
        found.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    return found


def rows_of(kind: str, pairs: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return the pairs as a trainer's rows."""
    if kind == "DPO":
        return list(pairs)
    if kind == "KTO":
        return [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in pairs
            for name in ("chosen", "rejected")
        ]
    if kind == "SFT":
        return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    return [{"prompt": row["prompt"]} for row in pairs]


def odd_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return a toy reward: the share of odd tokens."""
    return [sum(token % 2 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def build(case: str, folder: str, args: argparse.Namespace, perturbed: int | None) -> Any:
    """Return TRL's trainer of a case, yet to be fused."""
    import trl
    from datasets import Dataset

    kind, *loss = case.split()
    tiny = args.part == "equality"
    model, words = (tiny_model(), TINY_WORDS) if tiny else (build_model(), 32_000)
    if perturbed is not None:
        generator = torch.Generator().manual_seed(perturbed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + PERTURBATION * torch.randn(weight.shape, generator=generator))
    pairs = texts(TINY_PAIRS, words, 16) if tiny else texts(COST_PAIRS * args.steps, words, 1)
    settings: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": args.steps,
        "per_device_train_batch_size": COST_PAIRS * (1 if kind == "DPO" else 2),
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "seed": SEED,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    more: dict[str, Any] = {}
    if loss:
        settings["loss_type"] = loss
        settings["label_smoothing"] = 0.1 if loss[0] in SMOOTHED else 0.0
    if kind in ("DPO", "KTO"):
        more["ref_model"] = copy.deepcopy(model)
    if kind in SAMPLED:
        settings |= {"num_generations": 4, "max_completion_length": 8 if tiny else COMPLETION}
        more["reward_funcs"] = odd_tokens
        # RLOO's reference is read from the policy's folder.
        model.save_pretrained(f"{folder}/model")
        model.config._name_or_path = f"{folder}/model"
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(**settings),
        train_dataset=Dataset.from_list(rows_of(kind, pairs)),
        processing_class=word_tokenizer(words),
        **more,
    )


def measure(case: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one side of a case in this process: ``fused``, ``trl`` or ``trl, perturbed <seed>``."""
    from prefalign.integrations.trl import fuse

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        perturbed = int(side.split()[-1]) if "perturbed" in side else None
        trainer = build(case, folder, args, perturbed)
        if side == "fused":
            fuse(trainer)
        watch = Watch()
        trainer.add_callback(watch)
        gc.collect()
        watch.base = resident()
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    logged = [
        {name: x for name, x in row.items() if not any(word in name for word in TIMES)}
        for row in trainer.state.log_history
    ]
    return {
        "logged": logged,
        "times": watch.times,
        "base_mib": watch.base,
        "peak_mib": peak - watch.base,
    }


def run(case: str, side: str, arguments: list[str]) -> dict[str, Any]:
    """Run one side of a case in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--only", case, side],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{case}, {side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, for each metric, the largest difference of two runs and where it is."""
    found: dict[str, dict[str, Any]] = {}
    if len(ours["logged"]) != len(theirs["logged"]):
        raise ValueError(f"{len(ours['logged'])} and {len(theirs['logged'])} rows were logged")
    for mine, yours in zip(ours["logged"], theirs["logged"], strict=True):
        if mine.keys() != yours.keys():
            raise ValueError(f"one of two runs alone logs {sorted(mine.keys() ^ yours.keys())}")
        for name, value in yours.items():
            absolute = abs(mine[name] - value)
            if math.isnan(absolute):  # of one run's NaN; both may have one
                absolute = 0.0 if math.isnan(mine[name]) and math.isnan(value) else math.inf
            difference = absolute / max(1.0, abs(value))
            if name not in found or difference > found[name]["difference"]:
                found[name] = {
                    "difference": difference,
                    "absolute": absolute,
                    "value": value,
                    "step": yours["step"],
                }
    return found


def worst(found: dict[str, dict[str, Any]], of_grad_norm: bool) -> str:
    """Return the metric that differs most: ``grad_norm``, or any other."""
    if of_grad_norm:
        return "grad_norm"
    return max(found.keys() - {"grad_norm"}, key=lambda name: found[name]["difference"])


def compare_case(case: str, arguments: list[str]) -> dict[str, Any]:
    """Run a case with and without ``fuse``, and the controls where they are needed."""
    theirs, ours = (run(case, side, arguments) for side in ("trl", "fused"))
    found = compare(ours, theirs)
    controls = []
    if any(metric["difference"] > AGREE / 2 for metric in found.values()):
        for seed in range(CONTROLS):
            other = run(case, f"trl, perturbed {seed}", arguments)
            controls.append(compare(other, theirs))
    return {
        "steps": len(ours["times"]),
        "metrics": found,
        "controls": controls,
        "losses": {
            side: [row["loss"] for row in one["logged"] if "loss" in row]
            for side, one in (("trl", theirs), ("fused", ours))
        },
    }


def verdict(found: dict[str, Any]) -> str:
    """Return whether two runs are the same, as near as TRL is to itself, or neither."""
    beyond = [name for name, m in found["metrics"].items() if m["difference"] > AGREE]
    if not beyond:
        return "yes"
    own = all(
        found["metrics"][name]["difference"]
        <= max(control[name]["difference"] for control in found["controls"])
        for name in beyond
    )
    return f"{', '.join(beyond)}: as TRL and itself" if own else "NO"


def equality_table(results: dict[str, dict[str, Any]]) -> str:
    """Return the comparison, a row for each case."""
    lines = [
        "| trainer | steps | loss | all but grad_norm | most in | grad_norm "
        f"| TRL and itself: all but grad_norm | grad_norm | within {AGREE:.0e} |",
        "|---|---:|---:|---:|---|---:|---:|---:|---|",
    ]
    for case, found in results.items():
        metrics, loss = found["metrics"], found["metrics"]["loss"]
        name = worst(metrics, False)
        place = f"{name}, step {metrics[name]['step']}" if metrics[name]["difference"] else ""
        own = [
            ", ".join(f"{c[worst(c, of_norm)]['difference']:.1e}" for c in found["controls"])
            for of_norm in (False, True)
        ]
        lines.append(
            f"| {case} | {found['steps']} | {loss['absolute']:.1e} of {loss['value']:.2g} "
            f"| {metrics[name]['difference']:.1e} | {place} "
            f"| {metrics['grad_norm']['difference']:.1e} | {own[0]} | {own[1]} "
            f"| {verdict(found)} |"
        )
    return "\n".join(lines)


def cost_case(case: str, arguments: list[str]) -> dict[str, Any]:
    """Run a case with and without ``fuse`` and return what each took."""
    sides = {side: run(case, side, arguments) for side in ("trl", "fused")}
    loss = compare(sides["fused"], sides["trl"])["loss"]["difference"]
    return {"loss_difference": loss, **sides}


def cost_table(results: dict[str, dict[str, Any]]) -> str:
    """Return time and memory, a row for each case."""
    lines = [
        "| trainer | s a step, TRL | fused | ratio | peak MiB above the models, TRL | fused "
        "| ratio | largest loss difference |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case, found in results.items():
        theirs, ours = found["trl"], found["fused"]
        times = step_time(theirs), step_time(ours)
        peaks = theirs["peak_mib"], ours["peak_mib"]
        lines.append(
            f"| {case} | {times[0]:.2f} | {times[1]:.2f} | {times[1] / times[0]:.2f} "
            f"| {peaks[0]:.0f} | {peaks[1]:.0f} | {peaks[1] / peaks[0]:.2f} "
            f"| {found['loss_difference']:.1e} |"
        )
    return "\n".join(lines)


PARTS: dict[str, tuple[Callable[..., dict], Callable[[dict], str], str]] = {
    "equality": (
        compare_case,
        equality_table,
        "The largest difference at any step, float32: `loss` absolute, the others as a part of the "
        "value where that is above 1. TRL and itself: from weights changed by one part in 10^7, "
        "three times, where a difference is above half the bound.",
    ),
    "cost": (
        cost_case,
        cost_table,
        "Float32, 13 M parameters, 32,000 words, 8 sequences a step, lengths like UltraFeedback's "
        "up to TRL's 1,024; the median step without the first. GRPO's and RLOO's steps generate "
        "128 tokens a sequence, in the same way on both sides.",
    ),
}


def write(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Write what was found: JSON, and the table as Markdown."""
    machine = describe_machine(torch.device("cpu"), args.revision)
    facts = {
        name: machine["versions"][name] for name in ("prefalign", "python", "torch", "trl")
    } | {
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "load": args.load,
        "revision": machine["revision"],
    }
    _, table, note = PARTS[args.part]
    name = f"fuse_{args.part}"
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"facts": facts, "results": results}, indent=1)
    (args.out / f"{name}.json").write_text(text + "\n")
    said = ", ".join(f"{key} {value}" for key, value in facts.items())
    (args.out / f"{name}.md").write_text(f"{table(results)}\n\n{note}\n\n{said}\n")


def main() -> None:
    """Run the cases, each side in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all of the part's")
    parser.add_argument("--steps", type=int, help="default: 50 of DPO, 6 of others; 4 of cost")
    parser.add_argument("--out", type=Path, help="folder of the JSON and the table")
    parser.add_argument("--revision", default=None, help="git revision to record")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        case, side = args.only
        args.steps = args.steps or (4 if args.part == "cost" else 50 if "DPO" in case else 6)
        print(json.dumps(measure(case, side, args)))
        return
    args.load = round(os.getloadavg()[0], 2)  # what else runs, before the first case
    one, table, _ = PARTS[args.part]
    results: dict[str, dict[str, Any]] = {}
    for case in args.cases or (COSTLY if args.part == "cost" else CASES):
        results[case] = one(case, sys.argv[1:])
        print(table({case: results[case]}).splitlines()[-1], flush=True)
        if args.out:
            write(args, results)
    print(table(results))
    if args.part == "equality" and (
        wrong := [case for case, found in results.items() if verdict(found) == "NO"]
    ):
        sys.exit(f"beyond {AGREE:.0e}, and beyond what TRL is from itself: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
