"""Predicted peaks of memory against what training and sampling take on this machine's CPU."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from memory import (
    SETTINGS,
    VOCAB,
    allocated,
    groups_of,
    lengths_of,
    measured_training,
    predicted,
    request_for,
    weight_bytes,
    write_big_model,
)

from prefalign.config import GenerationSettings, LoraSettings
from prefalign.fake_models import fake_from_config
from prefalign.generation import TransformersGenerator
from prefalign.memory_model import generation_phase, score_phase
from prefalign.models import load_model, score
from prefalign.packing import pack

OVER, UNDER = 0.10, 0.05


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the folder of a model, which is written when it is first asked for."""
    written = {}

    def folder(name, dtype=torch.float32):
        if (name, dtype) not in written:
            place = tmp_path_factory.mktemp(name)
            written[name, dtype] = write_big_model(place, name, dtype)
        return written[name, dtype]

    return folder


LORA = {"lora": LoraSettings(r=8)}
PAIRS = lengths_of()
LONG = lengths_of(4, 150, 240)
CASES = {
    "full": ("llama", PAIRS, {}, {}),
    "one pass": ("grouped", PAIRS, {"max_tokens": 4096}, {}),
    "LoRA, base as the reference": ("llama", PAIRS, {}, {**LORA, "reference": "base"}),
    "LoRA, noise-aware": (
        "llama", PAIRS, {}, {**LORA, "reference": "copy", "extrapolated": True}
    ),
    "checkpointing": ("llama", LONG, {"gradient_checkpointing": True}, {}),
    "autocast": ("grouped", PAIRS, {"mixed_precision": "bf16"}, {}),
    "bf16 weights": ("grouped", PAIRS, {}, {"dtype": "bfloat16"}),
    "frozen copy": ("llama", PAIRS, {}, {"reference": "copy"}),
    "noise-aware": ("llama", PAIRS, {}, {"reference": "copy", "extrapolated": True}),
    "split pairs": ("llama", LONG, {"max_tokens": 320}, {}),
    "not split": ("llama", LONG, {"max_tokens": 320, "split_pairs": False}, {}),
    "repeated prompts": ("grouped", PAIRS, {"share_prompts": False}, {}),
    "ALiBi, padded": ("bloom", PAIRS, {}, {}),
    "soft cap, eager": ("gemma2", LONG, {}, {}),
    "SFT": ("llama", [sizes[:2] for sizes in LONG], {}, {}),
    "SGD": ("llama", PAIRS, {"optimizer": "sgd"}, {}),
    "fused AdamW": ("llama", PAIRS, {"optimizer": "adamw_torch_fused"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_training_takes_what_is_predicted(models, tmp_path, case):
    name, lengths, training, more = CASES[case]
    extras = {} if "reference" in more else {"reference_logps": [-1.0, -1.0]}
    settings = replace(SETTINGS, batch_size=len(lengths), **training)
    request = request_for(models(name), groups_of(lengths, **extras), settings, **more)
    compare(predicted(request).worst, measured_training(request, tmp_path))


def compare(phase, measured):
    ratio = phase.peak / measured
    assert 1 - UNDER <= ratio <= 1 + OVER, (ratio, phase, measured)


@pytest.mark.parametrize("name", ["llama", "grouped", "gemma2"])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampling_takes_what_is_predicted(models, name, top_p):
    settings = GenerationSettings(batch_size=24, max_new_tokens=100, top_p=top_p)
    model = load_model(models(name))
    tokenizer = SimpleNamespace(pad_token_id=0, bos_token_id=1, eos_token_id=VOCAB - 1)
    tokenizer.chat_template = None
    generator = TransformersGenerator(
        model, tokenizer, samples_per_prompt=1, batch_size=24, max_new_tokens=100, top_p=top_p
    )
    prompts = [[7] * 40] + [[8] * 20] * 23
    done = []
    run = partial(generator.generate, prompts, seed=0)
    measured = weight_bytes(model) + allocated(lambda: done.extend(run()))
    assert max(len(x.ids) for (x,) in done) == 100  # else less than full length was measured
    request = request_for(models(name), [])
    fake = fake_from_config(request.model)
    compare(generation_phase(fake, settings, 40, "cpu"), measured)


@pytest.mark.parametrize("case", ["llama", "LoRA", "autocast", "bloom"])
def test_scoring_takes_what_is_predicted(models, case):
    name = case if case in ("llama", "bloom") else "llama"
    more = LORA if case == "LoRA" else {}
    settings = replace(SETTINGS, mixed_precision="bf16" if case == "autocast" else "no")
    groups = groups_of(LONG)
    request = request_for(models(name), groups, settings, scored=True, **more)
    fake = fake_from_config(request.model)
    model = load_model(models(name), **more)
    batch = pack(groups, share_prompts=name != "bloom")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast")

    def run():
        with autocast:
            list(score(model, groups, max_tokens=10**6))

    list(score(model, groups, max_tokens=10**6))  # the trial of sharing is not a pass of scoring
    measured = weight_bytes(model) + allocated(run)
    compare(score_phase(fake, batch, settings, "cpu"), measured)
