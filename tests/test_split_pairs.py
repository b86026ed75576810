"""Responses of one group, or of a whole batch, through the model one after the other."""

import logging
import random
from dataclasses import replace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from tiny_models import CONFIGS, VOCAB, tiny_model
from tiny_models import float64_throughout as float64_throughout
from tiny_models import one_thread as one_thread
from training import (
    SETTINGS,
    dpo_losses,
    model_and_reference,
    noise_kwargs,
    random_groups,
    train,
    weights,
)

from prefalign import models, noise_aware, packed_trainer, trainer
from prefalign.attention import use_packed_attention
from prefalign.enhancement import EnhancementTrainer
from prefalign.models import response_token_logps, score, target_hidden
from prefalign.packed_trainer import Groups, training_arguments
from prefalign.packing import Group, pack
from prefalign.passes import PackingCollator, pack_parts
from prefalign.ple_config import EnhancementSettings
from prefalign.references import reference_of, snapshot_reference
from prefalign.trainer import PreferenceTrainer

FIELDS = ("input_ids", "position_ids", "target_rows", "targets", "cu_targets", "cu_groups")


def ids(length, seed):
    return [random.Random(seed * 100 + i).randrange(3, VOCAB) for i in range(length)]


def pairs():
    """Two pairs longer than 15 tokens and one shorter, with prompts beyond every window."""
    return [
        Group(ids(6, 1), [ids(9, 2), ids(4, 3)], 5),
        Group(ids(2, 4), [ids(1, 5), ids(7, 6)], 3),
        Group(ids(14, 10), [ids(1, 11), ids(10, 12)], 8),
    ]


def packed_model(name="llama", dtype=torch.float64, **changes):
    model = tiny_model(name, dtype, **changes)
    use_packed_attention(model)
    return model


# Parts


def equal(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 9, 17, 40, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_parts_end_to_end_are_the_batch(seed, max_tokens, share_prompts):
    draw = random.Random(seed)
    groups = [
        Group(
            ids(draw.randint(1, 8), 10 * i),
            [ids(draw.randint(1, 9), 10 * i + k + 1) for k in range(draw.randint(1, 5))],
            example_id=i,
        )
        for i in range(6)
    ]
    groups = [
        replace(g, extras={"of_each": [g.example_id + 0.5 * k for k in range(len(g.response_ids))]})
        for g in groups
    ]
    batch = pack_parts(groups, max_tokens, share_prompts=share_prompts)
    order = batch.example_ids.tolist()
    assert sorted(order) == list(range(6))
    laid = [groups[i] for i in order]
    plain = pack(laid, share_prompts=share_prompts)
    for name in ("targets", "cu_targets", "cu_groups"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))
    assert torch.equal(batch.extras["of_each"], plain.extras["of_each"])
    assert bool(batch.parts) == (plain.num_tokens > max_tokens)
    if not batch.parts:
        assert equal(batch, pack(groups, share_prompts=share_prompts))
        return
    responses, places = [], []
    tokens = segments = 0
    for part in batch.parts:
        one = part.cu_targets.numel() == 2
        assert (part.num_tokens <= max_tokens or one) and not part.parts
        responses += part.cu_targets.diff().tolist()
        places.append(part.target_rows + tokens)
        assert torch.equal(part.input_ids, batch.input_ids[tokens : tokens + part.num_tokens])
        parents = batch.parents[segments : segments + part.parents.numel()]
        assert torch.equal(torch.where(parents < 0, parents, parents - segments), part.parents)
        tokens += part.num_tokens
        segments += part.parents.numel()
    assert torch.equal(torch.cat([part.targets for part in batch.parts]), batch.targets)
    assert responses == batch.cu_targets.diff().tolist()
    assert torch.equal(torch.cat(places), batch.target_rows)
    assert tokens == batch.num_tokens and segments == batch.parents.numel()


@pytest.mark.parametrize(
    ("share_prompts", "lengths", "max_tokens", "expected"),
    [
        (True, [10, 10], 23, [1, 1]),
        (True, [10, 10, 10, 10], 35, [2, 2]),
        (False, [10, 10, 10, 10], 35, [2, 2]),
        (False, [10, 10, 10, 10], 34, [2, 2]),
        (False, [10, 10, 10, 10], 27, [1, 1, 1, 1]),
        (True, [10, 10, 10, 10, 10], 45, [3, 2]),
        (True, [30, 1, 1, 1], 20, [1, 3]),
        (True, [1, 1, 1, 30], 20, [3, 1]),
        (True, [6, 6, 1, 1, 1, 1], 17, [1, 5]),  # not 16 and 8 tokens, but 10 and 14
    ],
)
def test_a_group_is_divided_into_the_fewest_and_evenest_parts(
    share_prompts, lengths, max_tokens, expected
):
    group = Group(ids(4, 0), [ids(n, i + 1) for i, n in enumerate(lengths)])
    batch = pack_parts([group], max_tokens, share_prompts=share_prompts)
    assert [part.cu_targets.numel() - 1 for part in batch.parts] == expected


def test_the_collator_splits_what_is_longer_and_lays_it_first():
    groups = [Group(ids(5, 1), [ids(40, 2)]), *pairs()]
    passes = PackingCollator(15, share_prompts=True, split=True)(groups)["passes"]
    assert [batch.example_ids.tolist() for batch in passes] == [[8], [5], [0], [3]]
    assert [len(batch.parts) for batch in passes] == [2, 2, 0, 0]
    whole = PackingCollator(15, share_prompts=True)(groups)["passes"]
    assert [batch.example_ids.tolist() for batch in whole] == [[0], [8], [5], [3]]
    assert not any(batch.parts for batch in whole)
    (coupled,) = PackingCollator(15, split=True, couple=True)(groups)["passes"]
    assert coupled.num_groups == 4 and len(coupled.parts) == 6
    (coupled,) = PackingCollator(15, couple=True)(groups)["passes"]
    assert coupled.num_groups == 4 and not coupled.parts


def test_parts_move_with_the_batch():
    batch = pack_parts(pairs(), 15).to("meta")
    assert {part.input_ids.device.type for part in batch.parts} == {"meta"}


# Losses and gradients


def gradients(loss, model):
    model.zero_grad(set_to_none=True)
    loss.backward()  # reentrant checkpoints know no other way
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_same(ours, theirs, atol=1e-9):
    assert len(ours) == len(theirs) and sum(grad.abs().sum() for grad in theirs) > 0
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=atol)


@pytest.mark.parametrize("name", tuple(CONFIGS))
def test_losses_and_gradients_equal_those_of_separate_sequences(name, float64_throughout):
    model = packed_model(name)
    groups = pairs()
    reference = torch.linspace(-40, -20, 2 * len(groups), dtype=torch.float64)
    layouts = {
        "separate": [pack([Group(g.prompt_ids, [r])]) for g in groups for r in g.response_ids],
        "packed": [pack(groups)],
        "shared": [pack(groups, share_prompts=True)],
        "split": [pack_parts([g], 15, share_prompts=True) for g in groups],
        "split, repeated": [pack_parts([g], 15) for g in groups],
    }
    assert [len(batch.parts) for batch in layouts["split"]] == [2, 0, 2]
    results = {}
    for layout, batches in layouts.items():
        loss = dpo_losses(model, batches, reference).mean()
        results[layout] = loss.detach(), gradients(loss, model)
    loss, grads = results.pop("separate")
    for other, others in results.values():
        torch.testing.assert_close(other, loss, rtol=0, atol=1e-10)
        assert_same(others, grads)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "parts"),
    [((9, 3, 5, 8), 19, [2, 2]), ((9, 3, 5, 8, 2), 22, [2, 3]), ((2, 30, 5), 20, [1, 1, 1])],
)
def test_several_responses_in_a_part(lengths, max_tokens, parts, float64_throughout):
    model = packed_model("gemma2")
    group = Group(ids(6, 1), [ids(n, 2 + i) for i, n in enumerate(lengths)])
    factors = torch.linspace(-1, 2, sum(lengths), dtype=torch.float64)
    results = []
    for batch in (pack([group]), pack_parts([group], max_tokens, share_prompts=True)):
        loss = (response_token_logps(model, batch, through_wrapper=True) * factors).sum()
        results.append((loss.detach(), gradients(loss, model)))
    assert [part.cu_targets.numel() - 1 for part in batch.parts] == parts
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-9)
    assert_same(results[1][1], results[0][1], atol=1e-8)


@pytest.mark.parametrize("through_wrapper", [True, False])
@pytest.mark.parametrize("reentrant", [True, False, None])
def test_dropout_is_the_same_in_both_forward_passes(
    reentrant, through_wrapper, device, monkeypatch
):
    """Also with the layers' own checkpoints inside; in either mode."""
    dropout = {"attention_dropout": 0.2, "hidden_dropout": 0.3}
    model = packed_model("gpt_neox", **dropout).to(device)
    batch = pack_parts(pairs()[2:], 15).to(device)
    if reentrant is not None:
        options = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.train()

    def run():
        torch.manual_seed(0)
        hidden = target_hidden(model, batch, through_wrapper=through_wrapper)
        state = torch.get_rng_state()
        factors = torch.linspace(-1, 2, hidden.shape[0], device=device)[:, None]
        grads = gradients((hidden * factors).sum(), model)
        assert torch.equal(torch.get_rng_state(), state)
        return hidden, grads

    hidden, grads = run()
    model.gradient_checkpointing_disable()
    monkeypatch.setattr(models, "checkpoint", lambda work, *args, **_: work(*args))
    kept, expected = run()
    assert torch.equal(hidden, kept)
    assert_same(grads, expected, atol=1e-10)
    model.eval()
    assert not torch.allclose(run()[0], kept, atol=1e-3)  # there was dropout


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_layers_own_checkpoints_inside(reentrant, float64_throughout):
    model = packed_model("qwen3")
    batch = pack_parts(pairs(), 15, share_prompts=True)
    reference = torch.linspace(-40, -20, 6, dtype=torch.float64)
    expected = gradients(dpo_losses(model, [batch], reference).sum(), model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    assert_same(gradients(dpo_losses(model, [batch], reference).sum(), model), expected)


def test_autocast_is_the_same_in_both_forward_passes():
    model = packed_model("llama", torch.float32)
    batch = pack_parts(pairs(), 15)
    reference = torch.linspace(-40, -20, 6, dtype=torch.float64)
    results = []
    for each in (batch, replace(batch, parts=())):
        with torch.autocast("cpu", torch.bfloat16):
            loss = dpo_losses(model, [each], reference).sum()
        results.append(gradients(loss, model))  # outside of autocast, as in a training step
    for mine, right in zip(*results, strict=True):
        assert (mine - right).norm() <= 0.02 * right.norm()


def test_all_but_the_largest_part_go_forward_twice(monkeypatch):
    model = packed_model()
    group = Group(ids(4, 1), [ids(n, 2 + n) for n in (5, 20, 7)])
    batch = pack_parts([group], 15, share_prompts=True)
    passes = []
    real = models._target_hidden

    def watched(model, batch, *rest):
        passes.append(batch.num_tokens)
        return real(model, batch, *rest)

    monkeypatch.setattr(models, "_target_hidden", watched)
    loss = response_token_logps(model, batch).sum()
    assert passes == [9, 11, 24]
    loss.backward()
    assert passes[3:] == [11, 9]
    with torch.no_grad():
        response_token_logps(model, batch)
    assert passes[5:] == [9, 11, 24]


@pytest.mark.parametrize("name", ["bloom", "falcon_alibi"])
def test_padded_rows_are_split_too(name, float64_throughout):
    model = packed_model(name)
    assert models.uses_padded_rows(model)
    groups, reference = pairs(), torch.linspace(-40, -20, 6, dtype=torch.float64)
    batch = pack_parts(groups, 15)
    results = []
    for each in (batch, replace(batch, parts=())):
        loss = dpo_losses(model, [each], reference).sum()
        results.append((loss.detach(), gradients(loss, model)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-10)
    assert_same(results[0][1], results[1][1])


def test_ddp_sees_one_forward_pass_and_the_gradients_of_all_parts(process_group):
    batch = pack_parts(pairs()[2:], 15, share_prompts=True)
    reference = torch.linspace(-40, -20, 2, dtype=torch.float64)
    plain = packed_model()
    expected = gradients(dpo_losses(plain, [batch], reference).sum(), plain)
    wrapped = torch.nn.parallel.DistributedDataParallel(packed_model())
    calls = []
    wrapped.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = dpo_losses(wrapped, [batch], reference).sum()
    assert_same(gradients(loss, wrapped), expected, atol=1e-12)
    assert len(calls) == 1


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# Memory


def peak_allocation(work):
    """Run ``work`` and return the most bytes that it held at a time."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    changes, events = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak


def test_the_activations_of_one_part_are_kept_at_a_time():
    model = packed_model(dtype=torch.float32, num_hidden_layers=12, max_position_embeddings=1024)
    group = Group(ids(40, 1), [ids(600, 2), ids(580, 3), ids(590, 4)])
    peaks = []
    for budget in (10**4, 1300, 700):
        batch = pack_parts([group], budget, share_prompts=True)

        def step(batch=batch):
            response_token_logps(model, batch, through_wrapper=True).square().sum().backward()
            model.zero_grad(set_to_none=True)

        step()
        peaks.append(peak_allocation(step))
    whole, two, three = peaks
    assert two < 0.75 * whole
    assert three < 0.42 * whole


def test_a_pair_takes_little_more_than_half(tmp_path):
    """The whole step of a trainer, the reference and the head included."""
    model = packed_model(dtype=torch.float32, num_hidden_layers=12, max_position_embeddings=1024)
    groups = [Group(ids(40, 1), [ids(600, 2), ids(590, 3)])]
    reference = snapshot_reference(model)
    peaks = []
    for split in (False, True):
        arguments = training_arguments(SETTINGS, tmp_path, num_groups=1, epochs=1)
        arguments.save_strategy = "no"
        each = PreferenceTrainer(
            model, arguments, Groups(groups), max_tokens=700, split_pairs=split, reference=reference
        )
        (batch,) = each.data_collator(groups)["passes"]
        assert bool(batch.parts) == split

        def step(each=each, batch=batch):
            each.group_losses(model, batch)[0].sum().backward()
            model.zero_grad(set_to_none=True)

        step()
        peaks.append(peak_allocation(step))
    assert peaks[1] < 0.6 * peaks[0]


# Trainers


def moved(model):
    with torch.no_grad():  # away from the reference, so that no margin is 0
        for i, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:
                parameter.add_(0.01 * (1 + i % 3))
    return model


def results_of(trainer_class, folder, groups, model, max_tokens, **kwargs):
    """Return the losses and metrics of a step by example, its gradients, and its passes."""
    arguments = training_arguments(SETTINGS, folder, num_groups=len(groups), epochs=1, max_steps=1)
    arguments.save_strategy = "no"
    each = trainer_class(model, arguments, Groups(groups), max_tokens=max_tokens, **kwargs)
    passes = each.data_collator(groups)["passes"]
    model.zero_grad(set_to_none=True)
    found = {}
    for batch in passes:
        losses, metrics = each.group_losses(model, batch)
        losses.sum().backward()
        columns = [losses, *(metrics[name] for name in sorted(metrics))]
        rows = torch.stack([c.detach().double() for c in columns], dim=1).tolist()
        found |= dict(zip(batch.example_ids.tolist(), rows, strict=True))
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [x for i in sorted(found) for x in found[i]], grads, passes


def assert_equal_when_split(trainer_class, folder, groups, model, **kwargs):
    whole, expected, _ = results_of(trainer_class, folder, groups, model, 10**4, **kwargs)
    split, grads, passes = results_of(trainer_class, folder, groups, model, 10, **kwargs)
    assert any(batch.parts for batch in passes)
    assert not all(batch.parts for batch in passes) or trainer_class.couples_batch
    assert split == pytest.approx(whole, abs=1e-9)
    assert_same(grads, expected)


def test_dpo(tmp_path, float64_throughout):
    model, reference = model_and_reference(dtype=torch.float64)
    groups = random_groups(8, extras={"weights": [0.5]})
    assert_equal_when_split(PreferenceTrainer, tmp_path, groups, moved(model), reference=reference)


@pytest.mark.parametrize("threshold", ["rolling", "exact"])
def test_the_noise_aware_loss(tmp_path, threshold, float64_throughout):
    model, reference = model_and_reference(dtype=torch.float64)
    kwargs = noise_kwargs(alpha_warmup=0.0, threshold=threshold)
    trainer_class = kwargs.pop("trainer_class")
    kwargs["reference"] = reference
    assert_equal_when_split(trainer_class, tmp_path, random_groups(8), moved(model), **kwargs)


def test_the_enhancement_loss(tmp_path, float64_throughout):
    model, _ = model_and_reference(dtype=torch.float64)
    groups = [replace(g, extras={"rewards": [g.example_id / 4, 1.0]}) for g in random_groups(8)]
    kwargs = {"enhancement": EnhancementSettings(), "threshold": 0.25}
    assert_equal_when_split(EnhancementTrainer, tmp_path, groups, model, **kwargs)


@pytest.mark.parametrize("kind", ["adapter off", "second adapter"])
def test_lora_and_the_reference_in_the_same_weights(tmp_path, kind, float64_throughout):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=2)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = get_peft_model(packed_model(), config).double()
    reference = reference_of(model) if kind == "adapter off" else snapshot_reference(model)
    model = moved(model)
    assert_equal_when_split(
        PreferenceTrainer, tmp_path, random_groups(8), model, reference=reference
    )


@pytest.mark.parametrize("kind", ["dpo", "noise"])
def test_the_reference_comes_before_the_policys_activations(tmp_path, kind, monkeypatch):
    model, reference = model_and_reference()
    order = []

    def watched(module, *args, **kwargs):
        order.append("policy" if module is model else "reference")
        return target_hidden(module, *args, **kwargs)

    for module in (trainer, packed_trainer, noise_aware):
        monkeypatch.setattr(module, "target_hidden", watched)
    kwargs = noise_kwargs(alpha_warmup=0.0) if kind == "noise" else {}
    trainer_class = kwargs.pop("trainer_class", PreferenceTrainer)
    kwargs["reference"] = reference
    results_of(trainer_class, tmp_path, random_groups(2), model, 10**4, **kwargs)
    assert order == ["reference", "policy"]


class RobustTrainer(PreferenceTrainer):
    """Dr. DPO (arXiv 2407.07880): one loss of all pairs, -b' log mean exp(-l / b')."""

    couples_batch = True

    def group_losses(self, model, batch):
        losses, metrics = super().group_losses(model, batch)
        loss = -0.5 * ((-losses / 0.5).logsumexp(0) - losses.new_tensor(losses.numel()).log())
        return loss.expand(losses.shape), metrics


def test_a_loss_that_couples_the_batch_is_that_of_one_pass(tmp_path, float64_throughout):
    model, reference = model_and_reference(dtype=torch.float64)
    groups = random_groups(8)
    kwargs = {"reference": reference}
    assert_equal_when_split(RobustTrainer, tmp_path, groups, moved(model), **kwargs)
    _, _, passes = results_of(RobustTrainer, tmp_path, groups, model, 40, **kwargs)
    assert len(passes) == 1 and len(passes[0].parts) == 3


def test_training_with_a_coupled_loss_does_not_depend_on_the_budget(tmp_path):
    runs = [
        train(
            tmp_path / str(budget),
            random_groups(8),
            trainer_class=RobustTrainer,
            settings=replace(SETTINGS, max_tokens=budget),
            dtype=torch.float64,
            beta=20.0,
        )
        for budget in (10, 4096)
    ]
    (parts, logs), (whole, other_logs) = runs
    assert [x["loss"] for x in logs] == pytest.approx([x["loss"] for x in other_logs], abs=1e-6)
    assert torch.allclose(weights(parts), weights(whole), atol=1e-6)


def test_accumulation_and_weights_are_those_of_whole_pairs(tmp_path):
    groups = [replace(g, extras={"weights": [0.5 + i]}) for i, g in enumerate(random_groups(8))]
    accumulated = {"batch_size": 2, "arguments": {"gradient_accumulation_steps": 2}}
    runs = [
        train(
            tmp_path / str(budget),
            groups,
            settings=replace(SETTINGS, max_tokens=budget, **changes),
            dtype=torch.float64,
            weighted_mean=True,
        )
        for budget, changes in ((10, accumulated), (4096, {}))
    ]
    (split, logs), (whole, other_logs) = runs
    assert [x["loss"] for x in logs] == pytest.approx([x["loss"] for x in other_logs], abs=1e-6)
    assert torch.allclose(weights(split), weights(whole), atol=1e-6)


def test_an_outlier_of_8000_tokens_among_short_pairs_trains(tmp_path):
    outlier = Group(ids(500, 20), [ids(7400, 21), ids(100, 22)], 7)
    groups = [*random_groups(3), outlier]
    seen = []

    class Watching(PreferenceTrainer):
        def group_losses(self, model, batch):
            seen.append([part.num_tokens for part in batch.parts] or batch.num_tokens)
            return super().group_losses(model, batch)

    model = packed_model(dtype=torch.float32, max_position_embeddings=8000)
    arguments = training_arguments(SETTINGS, tmp_path, num_groups=4, epochs=1)
    arguments.save_strategy = "no"
    reference = snapshot_reference(model)
    each = Watching(model, arguments, Groups(groups), max_tokens=1024, reference=reference)
    each.train()
    assert seen[0] == [7900, 600] and len(seen) == 2
    log = each.state.log_history[0]
    assert log["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert log["num_tokens"] == 8500 + seen[1]
    assert 0 < log["grad_norm"] < float("inf")
    with torch.no_grad():
        assert (
            weights(each) - torch.cat([p.flatten() for p in reference.model.parameters()])
        ).any()


def test_an_evaluation_is_split_too(tmp_path):
    model, reference = model_and_reference()
    data = Groups(random_groups(8))
    losses = []
    for budget in (10, 10**4):
        arguments = training_arguments(SETTINGS, tmp_path, num_groups=8, epochs=1)
        each = PreferenceTrainer(
            moved(model) if budget == 10 else model, arguments, data, eval_dataset=data,
            max_tokens=budget, reference=reference,
        )  # fmt: skip
        losses.append(each.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0] != pytest.approx(0.693)


def test_sharded_engines_do_not_split_and_say_so_once(tmp_path, caplog):
    model, reference = model_and_reference()
    packed_trainer._warn_once.cache_clear()
    arguments = training_arguments(SETTINGS, tmp_path, num_groups=2, epochs=1)
    each = PreferenceTrainer(model, arguments, Groups(random_groups(2)), reference=reference)
    assert each.data_collator.split and each._can_split()
    kind, state = each.accelerator.distributed_type, each.accelerator.state
    try:
        state.distributed_type = DistributedType.FSDP
        with caplog.at_level(logging.WARNING, "prefalign"):
            assert not each._can_split() and not each._can_split()
    finally:
        state.distributed_type = kind
    assert [r.getMessage() for r in caplog.records] == [
        "training is sharded (FSDP): pairs are not split"
    ]


@pytest.mark.parametrize(
    ("processes", "reentrant", "splits"), [(1, True, True), (2, True, False), (2, False, True)]
)
def test_reentrant_checkpoints_under_ddp_are_not_split(
    tmp_path, processes, reentrant, splits, monkeypatch
):
    model, reference = model_and_reference()
    arguments = training_arguments(SETTINGS, tmp_path, num_groups=2, epochs=1)
    each = PreferenceTrainer(model, arguments, Groups(random_groups(2)), reference=reference)
    arguments.gradient_checkpointing = True
    arguments.gradient_checkpointing_kwargs = {"use_reentrant": reentrant}
    monkeypatch.setattr(type(each.accelerator), "num_processes", processes)
    assert each._can_split() == splits


# Scores


@pytest.mark.parametrize("share_prompts", [True, False])
def test_scoring_keeps_to_the_budget(share_prompts, monkeypatch):
    model = packed_model("qwen2")
    groups = [*pairs(), Group(ids(6, 30), [ids(8, 31 + i) for i in range(9)])]
    sizes = []
    real = models._target_hidden

    def watched(model, batch, *rest):
        sizes.append(batch.num_tokens)
        return real(model, batch, *rest)

    expected = list(score(model, groups, max_tokens=10**4, share_prompts=share_prompts))
    monkeypatch.setattr(models, "_target_hidden", watched)
    scores = list(score(model, groups, max_tokens=30, share_prompts=share_prompts))
    assert max(sizes) <= 30
    for mine, right in zip(scores, expected, strict=True):
        assert mine == pytest.approx(right, abs=1e-4)
