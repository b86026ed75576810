"""Training with any loss of the family: against plain torch, and whatever the token budget."""

import copy

import pytest
import torch
from prefalign.kernels.preference_loss import preference_loss
from tiny_models import tiny_model
from training import SETTINGS, eager_sum, random_groups, train, weights

from prefalign.config import TrainingSettings

LOSSES = {
    "ipo": {"loss_type": "ipo"},
    "exo": {"loss_type": "exo_pair", "label_smoothing": 0.1},
    "mpo": {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
    "aot": {"loss_type": "aot_unpaired", "beta": 0.4},
    "js": {"loss_type": "sigmoid", "f_divergence_type": "js_divergence", "beta": 1.0},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "loss_options": {"simpo_gamma": 0.3}},
    "orpo": {"loss_type": "orpo"},
}
FREE = ("simpo", "orpo")  # of a reference


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_equals_plain_torch(tmp_path, name):
    groups = random_groups(8)
    settings = TrainingSettings(
        learning_rate=1e-3, lr_scheduler="constant", warmup_ratio=0, batch_size=8,
        max_tokens=48, logging_steps=1, save_steps=100, max_grad_norm=0,
    )  # fmt: skip
    options = LOSSES[name] | ({"reference": None} if name in FREE else {})
    _, logs = train(tmp_path, groups, settings=settings, epochs=3, **options)
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0)
    counts = torch.tensor([[len(ids) for ids in group.response_ids] for group in groups]).T

    def sums(policy):
        rows = [[eager_sum(policy, g.prompt_ids, ids) for ids in g.response_ids] for g in groups]
        return (torch.stack(side) for side in zip(*rows, strict=True))

    for log in logs[:3]:
        with torch.no_grad():
            known = (None, None) if name in FREE else tuple(sums(reference))
        loss = preference_loss(
            *sums(model), *known, chosen_counts=counts[0], rejected_counts=counts[1],
            impl="reference", **LOSSES[name],
        ).losses.mean()  # fmt: skip
        assert log["loss"] == pytest.approx(loss.item(), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len({log["loss"] for log in logs[:3]}) == 3  # it has learned something


@pytest.mark.parametrize("name", ["mpo", "aot", "orpo"])
def test_a_loss_of_the_batch_does_not_depend_on_the_token_budget(tmp_path, name):
    groups, found = random_groups(8), []
    for budget in (4096, 30):
        settings = TrainingSettings(**{**vars(SETTINGS), "max_tokens": budget})
        trainer, logs = train(
            tmp_path / str(budget), groups, settings=settings, dtype=torch.float64, **LOSSES[name]
        )
        found.append((weights(trainer), [log["loss"] for log in logs if "loss" in log]))
    (many, many_logs), (few, few_logs) = found
    assert many_logs == pytest.approx(few_logs, abs=1e-9)
    assert (many - few).abs().max() < 1e-9


def test_compiled_it_is_the_same(tmp_path):
    groups, found = random_groups(8), []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        settings = TrainingSettings(**{**vars(SETTINGS), "arguments": compiled, "max_tokens": 4096})
        trainer, logs = train(tmp_path / str(len(found)), groups, settings=settings)
        found.append((weights(trainer), [log["loss"] for log in logs if "loss" in log]))
        assert trainer.args.torch_compile == bool(compiled)
        assert (type(trainer.model_wrapped).__name__ == "OptimizedModule") == bool(compiled)
    (plain, losses), (compiled, again) = found
    assert again == pytest.approx(losses, abs=1e-6)
    assert (plain - compiled).abs().max() < 1e-5
