"""What a plan is drawn from, which settings it finds to fit, and what it cannot say."""

from dataclasses import replace

import pytest
import torch
from memory import CONFIGS, SETTINGS, VOCAB, groups_of, lengths_of, predicted, request_for

from prefalign.config import GenerationSettings, LoraSettings, ModelSettings, RunSettings
from prefalign.config import TrainingSettings as Settings
from prefalign.errors import ModelError, RunError
from prefalign.fake_models import fake_from_config
from prefalign.loading import load_model
from prefalign.memory_model import Training, optimizer_bytes
from prefalign.memory_trace import ACTIVATIONS, GRADIENTS, OPTIMIZER, REFERENCE, WEIGHTS
from prefalign.plan_search import other_result, parse_size, same_result, scoring_budget, usable
from prefalign.planner import Work, draw_passes, replaced, training_flops

GIB, MIB = 2**30, 2**20


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Folders of configurations: a plan reads no weights."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        config().save_pretrained(folder / name)
    return {name: folder / name for name in CONFIGS}


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GIB), ("80 GB", 80 * 10**9), ("80g", 80 * 10**9), ("512MiB", 512 * MIB),
        ("1.5 GiB", 3 * GIB // 2), (" 2tib ", 2 * 2**40), ("700 kB", 700_000), ("1024", 1024),
        ("12b", 12), ("16 Gib", 16 * GIB),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "24 GiB free", "1e9", "24XB", "5i", "5ib", "1,5GB", "0", "0 GiB"]
)
def test_what_is_no_size(text):
    with pytest.raises(RunError, match=r"^gpu_memory: expected .*, got '"):
        parse_size(text, "gpu_memory")


def test_what_tensors_can_have():
    assert usable(24 * GIB, "cuda") == int(24 * GIB * 0.96 - 0.75 * GIB)
    assert usable(24 * GIB, "cpu") == 23 * GIB
    assert usable(GIB // 2, "cpu") == usable(GIB // 2, "cuda") == 0


# What is drawn


def test_an_outlier_among_many_is_found(paths):
    lengths = [(5, 6, 7)] * 3000
    lengths[1234] = (50, 60, 70)
    work = Work("dpo", groups_of(lengths), Training(Settings(batch_size=2, max_tokens=100)))
    for seed in range(3):
        passes = draw_passes(work, fake_from_config(ModelSettings(str(paths["llama"]))), seed)
        assert passes.tokens(passes.first[0]) == 120  # in parts, as the longest
        assert len(passes.first[0].parts) == 2
        assert [passes.tokens(x) for x in passes.later] == [18]
        assert passes.tokens(passes.typical) == 36


def test_what_pads_counts_as_tokens(paths):
    # 40 short ones have more tokens than one long and one short, which take more in padded rows.
    lengths = [(4, 5, 5)] * 5 + [(1, 40, 1)]
    work = Work("dpo", groups_of(lengths), Training(Settings(batch_size=6, max_tokens=50)))
    bloom = fake_from_config(ModelSettings(str(paths["bloom"])))
    passes = draw_passes(work, bloom, 0)
    seen = [passes.tokens(batch) for batch in (*passes.first, *passes.later)]
    assert max(seen) == 82
    assert {segment.lengths for segment in (x.segments for x in passes.first)} == {(41, 2)}


def test_passes_share_prompts_where_the_model_can(paths):
    groups = groups_of([(30, 10, 10)] * 2)
    work = Work("dpo", groups, Training(Settings(batch_size=2)))
    for name, tokens in (("llama", 100), ("bloom", 160)):
        passes = draw_passes(work, fake_from_config(ModelSettings(str(paths[name]))), 0)
        assert passes.tokens(passes.first[0]) == tokens and not passes.later
        assert passes.typical is None
    alone = replace(work, groups=groups_of([(30, 10)] * 2))
    passes = draw_passes(alone, fake_from_config(ModelSettings(str(paths["llama"]))), 0)
    assert passes.first[0].key_rows is None


# What is predicted of the parts


def components(plan, phase):
    return next(x for x in plan.phases if x.name == f"dpo: {phase}").components


def test_weights_gradients_states_and_the_reference_are_counted_exactly(paths):
    groups = groups_of(lengths_of())
    fake = fake_from_config(ModelSettings(str(paths["llama"])))
    weights = sum(p.nbytes for p in fake.model.parameters())
    buffers = sum(b.nbytes for b in fake.model.buffers())
    plan = predicted(request_for(paths["llama"], groups, reference="copy"))
    later = components(plan, "later pass")
    assert later[WEIGHTS] == weights + buffers
    assert later[GRADIENTS] == later[REFERENCE] == weights
    assert later[OPTIMIZER] == 2 * weights
    assert plan.parameters == (weights // 4, weights // 4)
    first = components(plan, "first pass")
    assert first[GRADIENTS] < weights
    # Two processes exchange gradients in buckets of their size.
    both = replace(SETTINGS, batch_size=12)
    request = request_for(paths["llama"], groups * 2, both, processes=2)
    two = components(predicted(request), "later pass")
    assert two[GRADIENTS] == 2 * weights

    lora = {"lora": LoraSettings(r=8), "reference": "copy"}
    plan = predicted(request_for(paths["llama"], groups, **lora))
    total, trained = plan.parameters
    later = components(plan, "later pass")
    assert total == weights // 4 + trained
    assert later[REFERENCE] == later[GRADIENTS] == 4 * trained
    assert later[OPTIMIZER] == 8 * trained


@pytest.mark.parametrize(
    ("optimizer", "each"),
    [
        ("adamw_torch", 8), ("adamw_torch_fused", 8), ("sgd", 0), ("adamw_8bit", 2 + 1 / 32),
        ("adamw_bnb_8bit", 2 + 1 / 32), ("paged_adamw_8bit", 2 + 1 / 32),
    ],
)  # fmt: skip
def test_optimisers_states(paths, optimizer, each):
    fake = fake_from_config(ModelSettings(str(paths["llama"])))
    count = sum(p.numel() for p in fake.model.parameters())
    assert optimizer_bytes(fake.model, optimizer) == int(count * each)


def test_an_unknown_optimiser_is_named(paths):
    request = request_for(
        paths["llama"], groups_of([(3, 4, 5)]), replace(SETTINGS, optimizer="adafactor")
    )
    with pytest.raises(RunError, match="training.optimizer: can plan for .*; got 'adafactor'"):
        predicted(request)


def test_levers_do_what_they_say(paths):
    lengths = lengths_of(6, 100, 200)

    def worst(**changes):
        settings = replace(SETTINGS, **changes)
        plan = predicted(request_for(paths["llama"], groups_of(lengths), settings))
        return plan.worst.components[ACTIVATIONS], plan.flops

    usual = worst()
    assert worst(gradient_checkpointing=True)[0] < 0.6 * usual[0]
    assert worst(max_tokens=400)[0] < 0.75 * usual[0]
    assert worst(max_tokens=400, split_pairs=False)[0] > worst(max_tokens=400)[0]
    assert worst(share_prompts=False, max_tokens=10**5)[0] > worst(max_tokens=10**5)[0]
    assert worst(gradient_checkpointing=True)[1] == usual[1] + 1


def test_a_gpu_holds_more_in_attention_and_in_the_update(paths):
    groups = groups_of(lengths_of())
    phases = {}
    for device in ("cpu", "cuda"):
        plan = predicted(request_for(paths["llama"], groups, device=device))
        phases[device] = {phase.name: phase.peak for phase in plan.phases}
    assert phases["cuda"]["dpo: update"] > phases["cpu"]["dpo: update"]
    assert phases["cuda"]["dpo: later pass"] > phases["cpu"]["dpo: later pass"]


@pytest.mark.parametrize(
    ("changes", "kwargs", "adapter", "flops"),
    [
        ({}, {}, False, 3),
        ({"gradient_checkpointing": True}, {}, False, 4),
        ({}, {"reference": "copy"}, False, 4),
        ({}, {}, True, 2),
        ({"gradient_checkpointing": True}, {"reference": "base"}, True, 4),
        # A prompt of 10 and responses of 20 and 30, in two parts: laid twice, the shorter one
        # forward once more.
        ({"max_tokens": 50}, {}, False, (3 * 70 + 30) / 60),
        ({"max_tokens": 50, "split_pairs": False}, {}, False, 3),
    ],
)
def test_forward_passes_a_token(changes, kwargs, adapter, flops):
    training = Training(Settings(**changes), **kwargs)
    assert training_flops(Work("dpo", groups_of([(10, 20, 30)]), training), adapter) == flops


# What fits


@pytest.fixture(scope="module")
def long(paths):
    return request_for(paths["grouped"], groups_of(lengths_of(6, 150, 250)), scored=True)


@pytest.mark.parametrize("share", [0.75, 0.88, 0.96])
def test_settings_that_learn_the_same_do_fit(long, share):
    room = int(share * predicted(long).peak)
    found = same_result(long, room)
    assert found
    for fit in found:
        assert fit.changes.keys() <= {"training.max_tokens", "training.gradient_checkpointing"}
        again = predicted(long.with_settings(fit.changes))
        assert again.peak <= room
        # As much as fits: of tokens, no more than two steps are left.
        if tokens := fit.changes.get("training.max_tokens"):
            assert tokens < SETTINGS.max_tokens and tokens % 256 == 0
            assert again.peak == fit.plan.peak
    assert [fit.plan.flops for fit in found] == sorted(fit.plan.flops for fit in found)


def test_settings_as_they_are_come_first_where_they_fit(long):
    found = same_result(long, predicted(long).peak)
    assert [fit.changes for fit in found] == [{}]


def test_settings_that_learn_otherwise_do_fit(long):
    gpu = replace(long, device="cuda")
    room = int(0.7 * predicted(gpu).peak)
    found = other_result(gpu, room)
    names = [frozenset(fit.changes) - {"training.max_tokens"} for fit in found]
    lora = frozenset({"model.lora.r", "model.lora.alpha"})
    for wanted in (
        lora,
        {*lora, "model.dtype"},
        {*lora, "model.dtype", "model.load_in_4bit"},
        {"training.optimizer"},
    ):
        assert any(wanted <= each for each in names), (wanted, names)
    for fit in found:
        assert predicted(gpu.with_settings(fit.changes)).peak <= room, fit.changes
    # bitsandbytes' optimisers run on a GPU.
    assert not any("training.optimizer" in fit.changes for fit in other_result(long, room))


def test_an_adapter_is_not_put_on_another(long):
    request = replace(long, model=replace(long.model, lora=LoraSettings(r=4)))
    request = replace(request, settings=replace(request.settings, model=request.model))
    for fit in other_result(request, 10**12):
        assert "model.lora.r" not in fit.changes
        assert "training.optimizer" not in fit.changes


def test_where_nothing_fits_nothing_is_said_to(long):
    assert same_result(long, 5 * MIB) == other_result(long, 5 * MIB) == []


def test_generation_is_made_to_fit_by_smaller_batches(paths):
    run = RunSettings(generation=GenerationSettings(batch_size=64, max_new_tokens=100))
    request = request_for(paths["llama"], groups_of([(3, 4, 5)]), run=run)
    request = replace(request, prompt_tokens=200)
    plan = predicted(request)
    assert plan.worst.name == "generate"
    room = int(0.6 * plan.peak)
    (fit,) = same_result(request, room)
    assert fit.changes.keys() == {"generation.batch_size"}
    assert fit.changes["generation.batch_size"] in (8, 16, 32)
    assert predicted(request.with_settings(fit.changes)).peak <= room
    assert same_result(request, 12 * MIB) == []


def test_passes_without_gradients_may_be_longer(long):
    fake = fake_from_config(long.model)
    budgets = [scoring_budget(long, fake, room) for room in (0, 10**12)]
    assert budgets == [SETTINGS.max_tokens, 8 * SETTINGS.max_tokens]
    unscored = replace(long, works=[replace(long.works[0], scored=False)])
    assert scoring_budget(unscored, fake, 10**12) == SETTINGS.max_tokens


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_sharded_runs_are_known(long, name, monkeypatch):
    settings = replace(SETTINGS, arguments={name: "full_shard"})
    assert not long.sharded
    assert request_for("x", [], settings).sharded
    assert not request_for("x", [], replace(SETTINGS, arguments={name: None})).sharded
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    assert long.sharded


# Models


def test_a_saved_adapter_is_planned_as_it_is_loaded(paths, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(tmp_path / "base")
    load_model(tmp_path / "base", lora=LoraSettings(r=8)).save_pretrained(tmp_path / "adapter")
    real = load_model(tmp_path / "adapter")
    fake = fake_from_config(ModelSettings(str(tmp_path / "adapter"))).model
    shapes = [
        {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in m.named_parameters()}
        for m in (real, fake)
    ]
    assert shapes[0] == shapes[1]
    request = request_for(tmp_path / "adapter", groups_of([(30, 40, 50)] * 6))
    plan = predicted(request)
    assert 0 < plan.parameters[1] < plan.parameters[0] / 10
    assert plan.flops == 2
    assert not any("model.lora.r" in fit.changes for fit in other_result(request, 10**12))


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_weights_have_the_dtype_that_is_asked_for(tmp_path, dtype):
    config = CONFIGS["grouped"]()
    config.dtype = torch.float16
    config.save_pretrained(tmp_path)
    model = fake_from_config(ModelSettings(str(tmp_path), dtype=dtype)).model
    expected = torch.float16 if dtype == "auto" else getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.get_input_embeddings().weight.shape == (VOCAB, 192)


def test_a_model_that_cannot_be_planned_is_one_line(tmp_path):
    with pytest.raises(ModelError, match="there is no such folder"):
        fake_from_config(ModelSettings("./nowhere"))
    with pytest.raises(ModelError, match="cannot plan for this model"):
        fake_from_config(ModelSettings(str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load the adapter"):
        fake_from_config(ModelSettings(str(tmp_path)))


def test_settings_are_replaced_by_their_full_names():
    changed = replaced(RunSettings(), {"model.lora.r": 4, "seed": 7, "training.max_tokens": 9})
    assert (changed.model.lora.r, changed.seed, changed.training.max_tokens) == (4, 7, 9)
    assert changed.model.lora.alpha == RunSettings().model.lora.alpha
