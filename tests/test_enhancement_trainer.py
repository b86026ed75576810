"""PLE's trainer, SFT's and the weighted mean against plain torch, one sequence at a time."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import float64_throughout as float64_throughout
from tiny_models import tiny_model
from training import SETTINGS, eager_sum, model_and_reference, random_groups, train, weights

from prefalign.enhancement import EnhancementTrainer
from prefalign.packed_trainer import Groups, training_arguments
from prefalign.packing import pack
from prefalign.ple_baselines import ranked
from prefalign.ple_config import EnhancementSettings
from prefalign.sft_trainer import SFTTrainer
from prefalign.trainer import PreferenceTrainer

in_float64 = pytest.mark.usefixtures("float64_throughout")
RANKINGS = ("mean", "sum", "probability", "logistic")
# Plain gradient descent, so that a step is the gradient; batches that take several passes.
DESCENT = replace(
    SETTINGS, learning_rate=0.1, lr_scheduler="constant", warmup_ratio=0, max_grad_norm=0,
    optimizer="sgd", save_steps=100, max_tokens=24,
)  # fmt: skip
ACCUMULATION = {1: DESCENT, 2: replace(DESCENT, batch_size=2)}


def rewarded(rewards, seed=0):
    """Return groups of a guided and a plain response with these rewards."""
    groups = random_groups(len(rewards), seed)
    return [
        replace(group, extras={"rewards": list(pair)})
        for group, pair in zip(groups, rewards, strict=True)
    ]


def float64_model():
    model = tiny_model("llama", dtype=torch.float64)
    model.set_attn_implementation("sdpa")  # transformers' eager softmax is float32
    return model


def eager_loss(model, group, threshold, ranking="mean", sft="mean", temperature=1.0):
    """Return PLE's loss of one pair, by arXiv 2408.02599 and what it leaves open."""
    guided, plain = (eager_sum(model, group.prompt_ids, ids) for ids in group.response_ids)
    guided_mean, plain_mean = (
        total / len(ids) for total, ids in zip((guided, plain), group.response_ids, strict=True)
    )
    rewards = torch.tensor(group.extras["rewards"], dtype=torch.float64)
    if rewards[0] - rewards[1] > threshold:
        if ranking == "mean":
            return torch.relu(plain_mean - guided_mean)
        if ranking == "sum":
            return torch.relu(plain - guided)
        if ranking == "probability":
            return torch.relu(plain.exp() - guided.exp())
        return torch.log1p(torch.exp(plain_mean - guided_mean))
    share = torch.softmax(rewards / temperature, 0)
    tuned = (guided_mean, plain_mean) if sft == "mean" else (guided, plain)
    return -(share[0] * tuned[0] + share[1] * tuned[1])


def assert_same_gradients(ours, theirs):
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        error = (one.grad - two.grad).abs().max() / two.grad.abs().max()
        assert error < 1e-9, name


def enhancement_trainer(tmp_path, groups, model=None, max_tokens=4096, threshold=0.25, **settings):
    model = model_and_reference(dtype=torch.float64)[0] if model is None else model
    arguments = training_arguments(SETTINGS, tmp_path, num_groups=len(groups), epochs=1)
    return EnhancementTrainer(
        model, arguments, Groups(groups), max_tokens=max_tokens,
        enhancement=EnhancementSettings(**settings), threshold=threshold,
    )  # fmt: skip


# The loss


@pytest.mark.parametrize("sft", ["mean", "sum"])
@pytest.mark.parametrize("ranking", RANKINGS)
@in_float64
def test_losses_and_gradients_equal_plain_torch_in_float64(tmp_path, ranking, sft):
    gaps = (0.5, 0.25, -0.125, 0.375, 1.5, -2.0, 0.0, 0.625)
    groups = rewarded([(1.0 + gap, 1.0) for gap in gaps], seed=4)
    forms = {"ranking": ranking, "sft": sft, "temperature": 0.75}
    trainer = enhancement_trainer(tmp_path, groups, max_tokens=40, **forms)
    eager = float64_model()
    packed, flags = {}, {}
    passes = trainer.data_collator(groups)["passes"]
    assert len(passes) > 1
    for batch in passes:
        losses, metrics = trainer.group_losses(trainer.model, batch)
        losses.sum().backward()
        names = batch.example_ids.tolist()
        packed |= dict(zip(names, losses.tolist(), strict=True))
        flags |= dict(zip(names, metrics["ple/ranked"].tolist(), strict=True))
    assert [flags[i] for i in range(8)] == [float(gap > 0.25) for gap in gaps]
    for group in groups:
        loss = eager_loss(eager, group, 0.25, **forms)
        loss.backward()
        assert packed[group.example_id] == pytest.approx(loss.item(), rel=1e-11, abs=1e-15)
    # Both branches were there, and the ranking one not only where the hinge is flat.
    assert any(packed[i] > 0 for i in range(8) if flags[i])
    assert_same_gradients(trainer.model, eager)


@pytest.mark.parametrize(
    ("gap", "is_ranked"),
    [
        (math.nextafter(0.25, 0), False),
        (0.25, False),
        (torch.nextafter(torch.tensor(0.25), torch.tensor(1.0)).item(), True),
    ],
    ids=["just below", "at", "just above"],
)
def test_the_branch_at_the_threshold(tmp_path, gap, is_ranked):
    (group,) = groups = rewarded([(gap, 0.0)])
    trainer = enhancement_trainer(tmp_path, groups, ranking="logistic")
    losses, metrics = trainer.group_losses(trainer.model, pack(groups))
    assert bool(metrics["ple/ranked"]) == is_ranked == ranked([gap], 0.25)[0]
    other = -math.inf if is_ranked else math.inf
    expected = eager_loss(float64_model(), group, other, ranking="logistic")
    assert losses.item() == pytest.approx(expected.item(), rel=1e-7)


@pytest.mark.parametrize(("threshold", "is_ranked"), [(math.inf, False), (-math.inf, True)])
def test_an_infinite_threshold_makes_one_loss_of_the_two(tmp_path, threshold, is_ranked):
    groups = rewarded([(9e9, 0.0), (-9e9, 0.0), (0.5, 0.0), (0.0, 0.0)])
    _, (log,) = train(
        tmp_path, groups, EnhancementTrainer, DESCENT, threshold=threshold, step_decay=0.5,
        enhancement=EnhancementSettings(),
    )  # fmt: skip
    assert log["ple/ranked"] == float(is_ranked)
    json.dumps(log, allow_nan=False)  # a reader of metrics.jsonl need not know infinities
    assert "ple/threshold" not in log
    model = tiny_model("llama")
    expected = [eager_loss(model, group, threshold).item() for group in groups]
    assert log["loss"] == pytest.approx(sum(expected) / 4, rel=1e-5)


# The threshold's schedule


def test_the_threshold_falls_with_every_step_and_goes_on_after_a_resume(tmp_path):
    groups = rewarded([(0.1 * i, 0.0) for i in range(16)])
    settings = replace(SETTINGS, save_steps=1, arguments={"save_total_limit": 10})
    kwargs = {"threshold": 0.8, "step_decay": 0.5, "enhancement": EnhancementSettings()}
    whole, logs = train(tmp_path / "run", groups, EnhancementTrainer, settings, epochs=2, **kwargs)
    expected = [0.8 * 0.5**step for step in range(8)]
    assert [log["ple/threshold"] for log in logs] == pytest.approx(expected, rel=1e-6)
    resumed, rest = train(
        tmp_path / "again", groups, EnhancementTrainer, settings, epochs=2,
        resume=str(tmp_path / "run" / "checkpoint-5"), **kwargs,
    )  # fmt: skip
    assert [log["ple/threshold"] for log in rest] == pytest.approx(expected[5:], rel=1e-6)
    assert torch.equal(weights(whole), weights(resumed))
    # Some pairs change sides while tau falls: 16 gaps of tenths, seen in two epochs.
    shares = [log["ple/ranked"] for log in logs]
    assert sum(shares[4:]) > sum(shares[:4])


# A step of the optimiser, however it is cut


def descended(model, loss):
    """Return the weights after one step of plain gradient descent, and the loss."""
    loss.backward()
    parameters = list(model.parameters())
    moved = [p.detach() - DESCENT.learning_rate * p.grad for p in parameters]
    return torch.cat([p.flatten() for p in moved])


def one_step(tmp_path, groups, trainer_class, accumulation, **kwargs):
    """Train one step and return the weights and the loss that was logged."""
    settings = replace(
        ACCUMULATION[accumulation], arguments={"gradient_accumulation_steps": accumulation}
    )
    trainer, (log,) = train(
        tmp_path, groups, trainer_class, settings, dtype=torch.float64, max_steps=1, **kwargs
    )
    passes = trainer.data_collator(groups)["passes"]
    assert len(passes) > 1
    return weights(trainer), log["loss"]


def assert_same_step(ours, theirs, loss, logged):
    start = torch.cat([p.detach().flatten() for p in float64_model().parameters()])
    assert (ours - theirs).abs().max() < 1e-10 * (theirs - start).abs().max()
    assert logged == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@in_float64
def test_the_loss_of_a_step_is_the_mean_over_its_pairs(tmp_path, accumulation):
    groups = rewarded([(0.5, 0.0), (0.0, 0.0), (1.0, 0.0), (0.125, 0.5)])
    ours, logged = one_step(
        tmp_path, groups, EnhancementTrainer, accumulation,
        enhancement=EnhancementSettings(ranking="logistic"), threshold=0.25,
    )  # fmt: skip
    model = float64_model()
    loss = sum(eager_loss(model, group, 0.25, "logistic") for group in groups) / 4
    assert_same_step(ours, descended(model, loss), loss, logged)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mean_over", ["tokens", "responses"])
@in_float64
def test_sft_is_the_mean_over_a_steps_tokens_or_responses(tmp_path, mean_over, accumulation):
    # One response, two and three: every one of a group is learned.
    pairs = random_groups(4, seed=3)
    groups = [
        replace(group, response_ids=(*group.response_ids, [7, 8])[:count])
        for group, count in zip(pairs, (1, 2, 3, 1), strict=True)
    ]
    ours, logged = one_step(tmp_path, groups, SFTTrainer, accumulation, mean_over=mean_over)
    model = float64_model()
    sums = [
        (eager_sum(model, group.prompt_ids, ids), len(ids))
        for group in groups
        for ids in group.response_ids
    ]
    if mean_over == "tokens":
        loss = -sum(total for total, _ in sums) / sum(length for _, length in sums)
    else:
        loss = -sum(total / length for total, length in sums) / len(sums)
    assert_same_step(ours, descended(model, loss), loss, logged)


def test_sft_refuses_another_mean(tmp_path):
    arguments = training_arguments(SETTINGS, tmp_path, num_groups=2, epochs=1)
    with pytest.raises(ValueError, match="mean_over: expected 'tokens' or 'responses', got 'rows'"):
        SFTTrainer(tiny_model("llama"), arguments, Groups(random_groups(2)), mean_over="rows")


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("weighted_mean", [True, False])
@in_float64
def test_weights_divide_a_whole_steps_losses(tmp_path, weighted_mean, accumulation):
    share = (1.0, 0.0, 0.5, 0.75)
    reference = ((-9.0, -4.0), (-3.0, -8.0), (-20.0, -2.0), (-6.0, -6.5))
    groups = [
        replace(group, extras={"weights": [w], "reference_logps": list(r)})
        for group, w, r in zip(random_groups(4, seed=5), share, reference, strict=True)
    ]
    ours, logged = one_step(
        tmp_path, groups, PreferenceTrainer, accumulation, reference=None,
        weighted_mean=weighted_mean,
    )  # fmt: skip
    model = float64_model()
    losses = []
    for group, r in zip(groups, reference, strict=True):
        chosen, rejected = (eager_sum(model, group.prompt_ids, ids) for ids in group.response_ids)
        margin = 0.1 * ((chosen - r[0]) - (rejected - r[1]))
        losses.append(-torch.nn.functional.logsigmoid(margin))
    loss = sum(w * x for w, x in zip(share, losses, strict=True))
    loss = loss / (sum(share) if weighted_mean else 4)
    assert_same_step(ours, descended(model, loss), loss, logged)


def test_a_trained_model_prefers_what_it_was_shown(tmp_path):
    """Ranking lifts the guided response; weighted SFT lifts the one with the greater reward."""
    better = {}
    for name, threshold, rewards in (("ranked", -math.inf, (0, 0)), ("tuned", math.inf, (0, 5))):
        groups = rewarded([rewards] * 8, seed=1)
        _, logs = train(
            tmp_path / name, groups, EnhancementTrainer, epochs=6, threshold=threshold,
            enhancement=EnhancementSettings(ranking="logistic"),
        )  # fmt: skip
        first, last = (log["logps/guided"] - log["logps/plain"] for log in (logs[0], logs[-1]))
        better[name] = last - first
    assert better["ranked"] > 0.1
    assert better["tuned"] < -0.1
