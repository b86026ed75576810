"""No [N, V] tensor in training, judging or evaluation: every allocation is watched."""

import pytest
import torch
from allocations import largest_allocation
from tiny_models import tiny_model, tiny_tokenizer
from training import SETTINGS, noise_kwargs, random_groups

from prefalign.attention import use_packed_attention
from prefalign.generation import TransformersGenerator
from prefalign.models import score
from prefalign.noise_aware import NoiseAwareTrainer
from prefalign.packed_trainer import Groups, training_arguments
from prefalign.packing import pack
from prefalign.references import snapshot_reference
from prefalign.trainer import PreferenceTrainer

VOCAB = 16384  # several vocabulary tiles, and N * V far above any activation or weight


@pytest.fixture(scope="module")
def wide():
    model = tiny_model("llama", vocab_size=VOCAB)
    use_packed_attention(model)
    groups = random_groups(24)
    rows = pack(groups).targets.numel()
    return model, groups, rows * VOCAB * 2  # bytes of [N, V] in half precision, the least there is


def test_the_watch_sees_logits(wide):
    model, groups, logits = wide
    head = model.get_output_embeddings()
    rows = torch.randn(logits // VOCAB // 2, head.in_features)
    assert largest_allocation(lambda: head(rows)) == 2 * logits  # in float32


@pytest.mark.parametrize("kind", ["dpo", "noise"])
def test_a_training_step_and_an_evaluation_make_no_logits(wide, tmp_path, kind):
    model, groups, logits = wide
    kwargs = noise_kwargs(alpha_warmup=0.0) if kind == "noise" else {}
    trainer_class = kwargs.pop("trainer_class", PreferenceTrainer)
    arguments = training_arguments(SETTINGS, tmp_path, num_groups=24, epochs=1, max_steps=1)
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = 24
    arguments.save_strategy = "no"
    trainer = trainer_class(
        model,
        arguments,
        Groups(groups),
        eval_dataset=Groups(groups),
        max_tokens=10**6,
        reference=snapshot_reference(model),
        **kwargs,
    )
    assert isinstance(trainer, NoiseAwareTrainer) == (kind == "noise")
    assert largest_allocation(trainer.train) < logits
    assert largest_allocation(trainer.evaluate) < logits


def test_judging_makes_no_logits(wide):
    model, groups, logits = wide
    assert largest_allocation(lambda: list(score(model, groups, max_tokens=10**6))) < logits


def test_generating_makes_logits_of_the_last_tokens_alone(wide):
    model, groups, _ = wide
    generator = TransformersGenerator(
        model, tiny_tokenizer(), samples_per_prompt=1, max_new_tokens=3, batch_size=4
    )
    prompts = [group.prompt_ids * 8 for group in groups[:4]]
    whole = sum(map(len, prompts)) * VOCAB * 4
    assert largest_allocation(lambda: generator.generate(prompts, seed=0)) < whole / 2
