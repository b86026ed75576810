"""The planner's predicted peak of memory against what two training steps take, on this machine.

Twelve ways to train small models on pairs of UltraFeedback's lengths. Predicted: from the model's
configuration and the lengths alone. Measured: what torch's CPU allocator gave out at the most, from
its profiler, and the weights. A prediction may be 10 % over, and 5 % under.

    python bench/memory_plan.py --out bench/results/memory_plan
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from lengths import VOCAB, draw_pairs
from torch.profiler import ProfilerActivity, profile

from prefalign.config import LoraSettings, ModelSettings, RunSettings, TrainingSettings
from prefalign.fake_models import fake_from_config
from prefalign.loading import add_adapter, load_model
from prefalign.memory_model import Training
from prefalign.noise_aware import NoiseAwareTrainer
from prefalign.packed_trainer import training_arguments
from prefalign.packing import Group
from prefalign.passes import Groups
from prefalign.planner import Request, Work, make_plan
from prefalign.references import reference_of, snapshot_reference
from prefalign.spa_config import NoiseSettings
from prefalign.trainer import PreferenceTrainer

PAIRS, STEPS = 8, 2  # the second step has the optimiser's states
OVER, UNDER = 0.10, 0.05

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
CONFIGS: Mapping[str, Callable[[], Any]] = {
    "Llama": lambda: transformers.LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "Qwen2": lambda: transformers.Qwen2Config(**_GROUPED, tie_word_embeddings=False),
    "Gemma2": lambda: transformers.Gemma2Config(**_GROUPED, head_dim=64),
    "Bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=256, n_layer=6, n_head=4
    ),
}
_LORA = LoraSettings(r=16)


@dataclass(frozen=True)
class Case:
    """One way to train.

    Args:
        what: What is particular about it.
        model: Its configuration, by name.
        training: Settings of training.
        lora: Low-rank adapter.
        dtype: Dtype of the weights.
        reference: As the planner knows it.
        extrapolated: Train with SPA's noise-aware loss.
    """

    what: str
    model: str = "Llama"
    training: Mapping[str, Any] = field(default_factory=dict)
    lora: LoraSettings = LoraSettings()
    dtype: Any = "float32"
    reference: Any = "logps"
    extrapolated: bool = False


CASES = (
    Case("as it comes"),
    Case("all pairs in one pass", training={"max_tokens": 16384}),
    Case("prompts repeated", "Qwen2", {"share_prompts": False}),
    Case("split pairs", training={"max_tokens": 512}),
    Case("gradient checkpointing", training={"gradient_checkpointing": True}),
    Case("reference in the step", reference="copy"),
    Case("bf16 autocast", training={"mixed_precision": "bf16"}),
    Case("bf16 weights, untied head", "Qwen2", dtype="bfloat16"),
    Case("LoRA, its base as the reference", lora=_LORA, reference="base"),
    Case("LoRA, noise-aware", lora=_LORA, reference="copy", extrapolated=True),
    Case("soft caps: eager attention", "Gemma2"),
    Case("ALiBi: padded rows", "Bloom"),
)


def allocated(run: Callable[[], None]) -> int:
    """Return the most bytes that torch's CPU allocator had given out at a time during a call."""
    gc.collect()  # what an earlier trainer held would be freed, and counted, in this call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = peak = 0
    for event in changes:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def compare(case: Case, rows: list[dict[str, list[int]]], folder: str) -> dict[str, Any]:
    """Predict and measure one case."""
    path = f"{folder}/{case.model}"
    if not Path(path).exists():
        torch.manual_seed(0)
        config = CONFIGS[case.model]()
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    groups = [
        Group(
            row["prompt_ids"],
            (row["chosen_ids"], row["rejected_ids"]),
            i,
            {"reference_logps": [0.0, 0.0]} if case.reference == "logps" else {},
        )
        for i, row in enumerate(rows)
    ]
    settings = TrainingSettings(
        **{"max_tokens": 4096, "batch_size": PAIRS, "warmup_ratio": 0.0, **case.training},
        logging_steps=STEPS,
        arguments={"save_strategy": "no", "disable_tqdm": True},
    )
    model_settings = ModelSettings(path=path, dtype=case.dtype, lora=case.lora)

    started = time.perf_counter()
    training = Training(settings, case.reference, case.extrapolated)
    request = Request(
        model_settings,
        [Work("dpo", groups, training)],
        RunSettings(model=model_settings, training=settings),
        "cpu",
    )
    plan = make_plan(request, fake_from_config(model_settings))
    seconds = time.perf_counter() - started

    model = add_adapter(load_model(path, dtype=case.dtype), case.lora, path)
    weights = {id(x): x.nbytes for x in (*model.parameters(), *model.buffers())}
    kind: Any = NoiseAwareTrainer if case.extrapolated else PreferenceTrainer
    options = {"noise": NoiseSettings(), "extrapolation": 0.3} if case.extrapolated else {}

    def train() -> None:
        reference = {
            "logps": lambda: None,
            "base": lambda: reference_of(model),
            "copy": lambda: snapshot_reference(model),
        }[case.reference]()
        kind(
            model,
            training_arguments(settings, folder, num_groups=PAIRS, epochs=STEPS),
            Groups(groups),
            max_tokens=settings.max_tokens,
            share_prompts=settings.share_prompts,
            split_pairs=settings.split_pairs,
            reference=reference,
            **options,
        ).train()

    measured = sum(weights.values()) + allocated(train)
    return {
        "model": case.model,
        "case": case.what,
        "predicted_mib": plan.peak / 2**20,
        "measured_mib": measured / 2**20,
        "ratio": plan.peak / measured,
        "phase": plan.worst.name.removeprefix("dpo: "),
        "components_mib": {k: v / 2**20 for k, v in plan.worst.components.items() if v},
        "planning_s": seconds,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the comparison as Markdown."""
    lines = ["| model | how | phase | predicted MiB | measured MiB | ratio |"]
    lines.append("|---|---|---|---:|---:|---:|")
    lines += [
        f"| {r['model']} | {r['case']} | {r['phase']} | {r['predicted_mib']:.0f} "
        f"| {r['measured_mib']:.0f} | {r['ratio']:.3f} |"
        for r in results
    ]
    return "\n".join(lines)


def main() -> None:
    """Run all cases and print the table; fail where one is outside the bounds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the JSON and the table")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    rows = draw_pairs(PAIRS)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            results.append(compare(case, rows, folder))
            print(results[-1]["case"], f"{results[-1]['ratio']:.3f}", file=sys.stderr)
    print(table(results))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        facts = {"python": platform.python_version(), "torch": torch.__version__}
        facts["transformers"] = transformers.__version__
        text = json.dumps({"versions": facts, "results": results}, indent=1)
        (args.out / "memory_plan.json").write_text(text + "\n")
        (args.out / "memory_plan.md").write_text(table(results) + "\n")
    wrong = [r for r in results if not 1 - UNDER <= r["ratio"] <= 1 + OVER]
    if wrong:
        sys.exit(f"outside the bounds: {', '.join(r['case'] for r in wrong)}")


if __name__ == "__main__":
    main()
