"""Models big enough for their memory to be measured, what a call allocates, and plans of both."""

import dataclasses
import gc
import random

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, LlamaConfig

from prefalign.config import ModelSettings, RunSettings, TrainingSettings
from prefalign.fake_models import fake_from_config
from prefalign.loading import load_model
from prefalign.memory_model import Training
from prefalign.noise_aware import NoiseAwareTrainer
from prefalign.packed_trainer import training_arguments
from prefalign.packing import Group
from prefalign.passes import Groups
from prefalign.planner import Request, Work, make_plan
from prefalign.references import reference_of, snapshot_reference
from prefalign.sft_trainer import SFTTrainer
from prefalign.spa_config import NoiseSettings
from prefalign.trainer import PreferenceTrainer

VOCAB = 6000
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "grouped": lambda: LlamaConfig(**_SHAPE, num_key_value_heads=2, tie_word_embeddings=False),
    "gemma2": lambda: Gemma2Config(**_SHAPE, num_key_value_heads=2, head_dim=48),
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=192, n_layer=3, n_head=4),
}
PAIRS, STEPS = 6, 2
SETTINGS = TrainingSettings(
    batch_size=PAIRS,
    max_tokens=768,
    warmup_ratio=0.0,
    logging_steps=STEPS,
    arguments={"save_strategy": "no", "disable_tqdm": True},
)


def allocated(run):
    """Return the most bytes that torch's CPU allocator had given out at a time during a call."""
    gc.collect()  # what earlier tests left would be freed in between, and count as less
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    assert changes
    now = peak = 0
    for event in changes:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def weight_bytes(model):
    """Return the bytes of a model's parameters and buffers, tied ones once."""
    return sum({id(x): x.nbytes for x in (*model.parameters(), *model.buffers())}.values())


def write_big_model(folder, name="llama", dtype=torch.float32):
    """Save a model whose weights and activations are more than what surrounds them."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    model.save_pretrained(folder)
    return folder


def groups_of(lengths, **extras):
    """Return groups of random tokens, of (prompt, response, response, ...) lengths."""
    chosen = random.Random(0)
    return [
        Group(*(lambda x: (x[0], x[1:]))([chosen.choices(range(VOCAB), k=n) for n in sizes]), i,
              extras)
        for i, sizes in enumerate(lengths)
    ]  # fmt: skip


def lengths_of(count=PAIRS, low=20, high=120):
    """Return lengths of pairs."""
    chosen = random.Random(1)
    return [tuple(chosen.randint(low, high) for _ in range(3)) for _ in range(count)]


def request_for(path, groups, settings=SETTINGS, *, device="cpu", run=None, scored=False, **kwargs):
    """Return a request for one training; ``kwargs`` are the model's or ``Training``'s."""
    fields = {field.name for field in dataclasses.fields(Training)}
    training = {name: value for name, value in kwargs.items() if name in fields}
    model = ModelSettings(
        path=str(path), **{name: value for name, value in kwargs.items() if name not in fields}
    )
    run = dataclasses.replace(run or RunSettings(), model=model, training=settings)
    return Request(
        model, [Work("dpo", groups, Training(settings, **training), scored)], run, device
    )


def predicted(request):
    """Return a plan."""
    return make_plan(request, fake_from_config(request.model))


def measured_training(request, folder):
    """Return the most bytes that a training of two steps holds, weights included."""
    work = request.works[0]
    settings = request.settings.training
    model_settings = request.model
    model = load_model(
        model_settings.path,
        dtype=model_settings.dtype,
        lora=model_settings.lora,
        load_in_4bit=model_settings.load_in_4bit,
    )
    kind, options = PreferenceTrainer, {}
    if len(work.groups[0].response_ids) == 1:
        kind = SFTTrainer
    elif work.training.extrapolated:
        kind = NoiseAwareTrainer
        options = {"noise": NoiseSettings(), "extrapolation": 0.3}
    references = {
        "logps": lambda: None,
        "base": lambda: reference_of(model),
        "copy": lambda: snapshot_reference(model),
    }

    def train():
        reference = {"reference": references[work.training.reference]()}
        kind(
            model,
            training_arguments(settings, folder, num_groups=len(work.groups), epochs=STEPS),
            Groups(work.groups),
            max_tokens=settings.max_tokens,
            share_prompts=settings.share_prompts,
            split_pairs=settings.split_pairs,
            **options,
            **({} if kind is SFTTrainer else reference),
        ).train()

    return weight_bytes(model) + allocated(train)
