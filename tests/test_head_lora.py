"""Training with PEFT's LoRA on the output head."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import one_thread as one_thread
from tiny_models import tiny_model
from training import NOISE, SETTINGS, Groups, random_groups, training_arguments

from prefalign.attention import use_packed_attention
from prefalign.errors import ModelError
from prefalign.models import reference_of, response_token_logps, snapshot_reference
from prefalign.noise_aware import NoiseAwareTrainer
from prefalign.packing import pack
from prefalign.trainer import PreferenceTrainer


@pytest.fixture
def model():
    base = tiny_model("llama")
    use_packed_attention(base)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"], r=2)
    return get_peft_model(base, config)


def trainer_of(kind, model, folder, reference, **options):
    groups = random_groups(8)
    arguments = training_arguments(SETTINGS, folder, num_groups=len(groups), epochs=1)
    return kind(
        model, arguments, Groups(groups), max_tokens=SETTINGS.max_tokens, reference=reference,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("snapshot", [False, True], ids=["adapter off", "adapter's copy"])
def test_dpo_starts_at_log_two_and_moves_the_heads_adapter(tmp_path, model, snapshot):
    reference = snapshot_reference(model) if snapshot else reference_of(model)
    trainer = trainer_of(PreferenceTrainer, model, tmp_path, reference)
    batch = pack(random_groups(4))
    with torch.no_grad(), reference.use() as used:
        before = response_token_logps(used, batch)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    head = model.get_base_model().lm_head
    assert head.lora_B["default"].weight.any()
    with torch.no_grad():
        assert not torch.equal(response_token_logps(model, batch), before)
        with reference.use() as used:
            assert torch.equal(response_token_logps(used, batch), before)


def test_the_noise_aware_loss_refuses_it(tmp_path, model):
    reference = reference_of(model)
    with pytest.raises(ModelError, match="LoRA adapter, which the noise-aware loss cannot use"):
        trainer_of(NoiseAwareTrainer, model, tmp_path, reference, noise=NOISE, extrapolation=0.5)
