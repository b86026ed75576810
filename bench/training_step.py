"""A whole DPO training step: this library against TRL's DPOTrainer and a padded eager loop.

Every provider runs in a process of its own, on the same model, data and order, and writes down each
step's loss and time and its peak memory above the model's own (resident memory after the models
were made). The losses must agree at every step.

    python bench/training_step.py --steps 50 --out results
    python bench/training_step.py --steps 5 --providers prefalign trl
    python bench/training_step.py --steps 50 --features --out results

``--features`` starts from the eager loop and adds one part of this library after the other
(``FEATURES``). From the cached reference on, its log-probs are computed beforehand, in a process of
their own, and the reference model is not held.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from lengths import VOCAB, draw_pairs
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

PAIRS, BETA, LEARNING_RATE, CLIP = 8, 0.1, 1e-4, 1.0
AGREE = 1e-4


@dataclass(frozen=True)
class Setup:
    """What of this library a run uses; by default what it does by default."""

    padded: bool = False  # a row for each response, as models with ALiBi are run
    passes: str = "max_tokens"  # the option that says how long one is, or "" for one pass
    share_prompts: bool = True
    split_pairs: bool = True
    cached_reference: bool = False


PROVIDERS: dict[str, Setup | None] = {"prefalign": Setup(), "eager": None, "trl": None}
FEATURES: dict[str, Setup | None] = {
    "eager": None,
    "+ fused head": Setup(padded=True, passes="", share_prompts=False, split_pairs=False),
    "+ packing": Setup(passes="", share_prompts=False, split_pairs=False),
    "+ passes": Setup(share_prompts=False, split_pairs=False),
    "+ shared prompts": Setup(split_pairs=False),
    "+ cached reference": Setup(split_pairs=False, cached_reference=True),
    "+ small passes": Setup(passes="small_tokens", split_pairs=False, cached_reference=True),
    "+ split pairs": Setup(passes="small_tokens", cached_reference=True),
}
"""Each adds one thing to the one before it."""


def build_model() -> LlamaForCausalLM:
    """Return a Llama of 13 M parameters: hidden 256, 6 layers, a tied vocabulary of 32k."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def resident() -> float:
    """Return this process's resident memory, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Watch(TrainerCallback):
    """Times of the optimiser steps, and the losses that a trainer says."""

    def __init__(self) -> None:
        self.base = 0.0  # resident memory once the models are there
        self.times: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        """Called before an optimiser step."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Called after it."""
        self.times.append(time.perf_counter() - self.started)


def run_eager(rows: list[dict], steps: int, args: argparse.Namespace) -> Watch:
    """Run a plain loop: pad, forward the policy and the reference, log-softmax, step."""
    model, reference = build_model(), build_model().requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    watch = Watch()
    watch.base = resident()

    def logps(model, ids, mask, scored):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        found = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (found * scored[:, 1:]).sum(-1)

    for step in range(steps):
        watch.on_step_begin(None, None, None)
        batch = rows[step * PAIRS : (step + 1) * PAIRS]
        texts = [
            (r["prompt_ids"], r[side]) for side in ("chosen_ids", "rejected_ids") for r in batch
        ]
        longest = max(len(p) + len(c) for p, c in texts)
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        mask, scored = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, (prompt, completion) in enumerate(texts):
            n = len(prompt) + len(completion)
            ids[i, :n] = torch.tensor(prompt + completion)
            mask[i, :n] = 1
            scored[i, len(prompt) : n] = 1
        with torch.no_grad():
            ref = logps(reference, ids, mask, scored)
        policy = logps(model, ids, mask, scored)
        margins = (policy - ref)[:PAIRS] - (policy - ref)[PAIRS:]
        loss = -torch.nn.functional.logsigmoid(BETA * margins).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        watch.on_step_end(None, None, None)
        watch.losses.append(loss.item())
    return watch


def run_trl(rows: list[dict], steps: int, args: argparse.Namespace) -> Watch:
    """Run TRL's DPOTrainer on the tokens as they are, in their order."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from trl import DPOConfig, DPOTrainer

    watch = Watch()

    class Ordered(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # already tokens

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            watch.losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
            return loss

    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Ordered(
            build_model(),
            ref_model=build_model(),
            args=DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=PAIRS,
                max_steps=steps,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                max_grad_norm=CLIP,
                beta=BETA,
                max_length=None,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                logging_steps=steps,
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        watch.base = resident()
        trainer.train()
    return watch


def build_packed(padded: bool = False) -> LlamaForCausalLM:
    """Return the model, prepared for this library's batches."""
    from prefalign.attention import use_packed_attention

    model = build_model()
    if padded:
        model._prefalign_padded = True
    else:
        use_packed_attention(model)
    return model


def as_groups(rows: list[dict]) -> list:
    """Return the rows as this library's groups."""
    from prefalign.packing import Group

    return [
        Group(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"]), i)
        for i, row in enumerate(rows)
    ]


def reference_logps(rows: list[dict], max_tokens: int) -> list[list[float]]:
    """Return the log-probs of all responses under the reference."""
    from prefalign.models import score

    return list(score(build_packed(), as_groups(rows), max_tokens=max_tokens))


def run_prefalign(rows: list[dict], steps: int, args: argparse.Namespace, setup: Setup) -> Watch:
    """Run PreferenceTrainer; the reference is run in the step, as the others do, or beforehand."""
    from prefalign.config import TrainingSettings
    from prefalign.packed_trainer import Groups, training_arguments
    from prefalign.references import reference_of
    from prefalign.trainer import PreferenceTrainer

    watch = Watch()

    class Ordered(PreferenceTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            watch.losses.append(loss.item())
            return loss

    groups = as_groups(rows)
    max_tokens = getattr(args, setup.passes) if setup.passes else 10**9
    model, reference = build_packed(setup.padded), None
    if setup.cached_reference:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
            cached = process.submit(reference_logps, rows, args.max_tokens).result()
        for group, logps in zip(groups, cached, strict=True):
            group.extras["reference_logps"] = logps
    else:
        reference = reference_of(model, frozen=build_packed(setup.padded))
    settings = TrainingSettings(
        learning_rate=LEARNING_RATE,
        lr_scheduler="constant",
        warmup_ratio=0.0,
        batch_size=PAIRS,
        max_tokens=max_tokens,
        max_grad_norm=CLIP,
        logging_steps=steps,
        save_steps=10**6,
        arguments={"save_strategy": "no", "disable_tqdm": True, **args.arguments},
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Ordered(
            model,
            training_arguments(settings, folder, num_groups=len(groups), epochs=1, max_steps=steps),
            Groups(groups),
            max_tokens=max_tokens,
            share_prompts=setup.share_prompts,
            split_pairs=setup.split_pairs,
            reference=reference,
            beta=BETA,
            callbacks=[watch],
        )
        watch.base = resident()
        trainer.train()
    return watch


def measure(provider: str, args: argparse.Namespace) -> dict:
    """Run one provider in this process and return its figures."""
    rows = draw_pairs(args.steps * PAIRS)
    setup = (PROVIDERS | FEATURES)[provider]
    if setup is None:
        watch = {"eager": run_eager, "trl": run_trl}[provider](rows, args.steps, args)
    else:
        watch = run_prefalign(rows, args.steps, args, setup)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "provider": provider,
        "times": watch.times,
        "losses": watch.losses,
        "base_mib": watch.base,
        "peak_mib": peak - watch.base,
    }


def step_time(found: dict) -> float:
    """Return the median time of a step, without the first."""
    return statistics.median(found["times"][1:] or found["times"])


def difference(found: dict, first: dict) -> float:
    """Return the largest difference between two runs' losses."""
    return max(abs(a - b) for a, b in zip(first["losses"], found["losses"], strict=True))


def table(results: dict[str, dict]) -> str:
    """Return the comparison, and whether the losses agree."""
    rows = [
        "| provider | s a step | pairs/s | of eager's time | peak MiB above the models "
        f"| largest loss difference | within {AGREE:.0e} |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    first = next(iter(results.values()))
    eager = results.get("eager")
    for name, found in results.items():
        step, worst = step_time(found), difference(found, first)
        share = f"{step / step_time(eager):.3f}" if eager else ""
        rows.append(
            f"| {name} | {step:.2f} | {PAIRS / step:.2f} | {share} | {found['peak_mib']:.0f} "
            f"| {worst:.1e} | {'yes' if worst <= AGREE else 'NO'} |"
        )
    return "\n".join(rows)


def write(args: argparse.Namespace, results: dict[str, dict]) -> None:
    """Write what was found into the folder: every step as JSON, the comparison as Markdown."""
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "revision": args.revision,
        "steps": args.steps,
        "pairs": PAIRS,
    }
    name = "training_features" if args.features else "training_step"
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"facts": facts, "results": results}, indent=1)
    (args.out / f"{name}.json").write_text(text + "\n")
    said = ", ".join(f"{key} {value}" for key, value in facts.items())
    (args.out / f"{name}.md").write_text(f"{table(results)}\n\n{said}\n")


def main() -> None:
    """Run the providers, one process each, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = list(PROVIDERS | FEATURES)
    parser.add_argument("--providers", nargs="+", choices=known, default=list(PROVIDERS))
    parser.add_argument("--features", action="store_true", help="what each feature contributes")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--max_tokens", type=int, default=4096, help="of one pass of prefalign's")
    parser.add_argument("--small_tokens", type=int, default=1024, help="of a small pass")
    parser.add_argument("--arguments", type=json.loads, default={}, help="transformers' (JSON)")
    parser.add_argument("--out", type=Path, help="folder of the JSON of every step and the table")
    parser.add_argument("--revision", default=None, help="git revision to record")
    parser.add_argument("--only", choices=known, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    results: dict[str, dict] = {}
    for provider in FEATURES if args.features else args.providers:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--only", provider],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{provider} failed:\n{done.stderr[-3000:]}")
        results[provider] = json.loads(done.stdout.strip().splitlines()[-1])
        print(table(results), flush=True)
    if args.out:
        write(args, results)
    first = next(iter(results.values()))
    worst = max(difference(found, first) for found in results.values())
    if worst > AGREE:
        sys.exit(f"the losses differ by up to {worst:.1e}, expected at most {AGREE:.0e}")


if __name__ == "__main__":
    main()
