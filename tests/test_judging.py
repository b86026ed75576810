"""K-way judging: its values, what it holds at a time, and as a stage of a run."""

import itertools
import weakref
from unittest import mock

import pytest
import torch
from scoring import passes as passes
from spa_run import prepare
from tiny_models import float64_throughout as float64_throughout
from tiny_models import tiny_model
from training import eager_sum, random_groups

from prefalign import judging, logp_cache, loop, pipeline
from prefalign.attention import use_packed_attention
from prefalign.config import LoraSettings, ModelSettings
from prefalign.judging import judge
from prefalign.loading import add_adapter
from prefalign.logp_cache import LogpCache
from prefalign.models import score
from prefalign.packing import Group
from prefalign.references import Reference, reference_of
from prefalign.run_folder import read_rows
from prefalign.spa import SPA
from prefalign.spa_config import (
    JudgeSettings,
    NoiseSettings,
    SPADataSettings,
    SPAGaugeSettings,
    SPAGenerationSettings,
    SPASettings,
    SPATrainingSettings,
)

BETA = 0.3


def ragged(sizes=(3, 1, 2, 5, 2), seed=0):
    """Groups with these numbers of responses."""
    pool = itertools.cycle(ids for g in random_groups(20, seed) for ids in g.response_ids)
    return [
        Group([10 + i, 11, 12], list(itertools.islice(pool, size)), i)
        for i, size in enumerate(sizes)
    ]


def packed_model(name="llama", dtype=torch.float32, seed=0):
    model = tiny_model(name, dtype, seed)
    use_packed_attention(model)
    return model


def lora_model():
    model = add_adapter(packed_model(), LoraSettings(r=4), "tiny")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


# Values


@pytest.mark.parametrize(("max_tokens", "lookahead"), [(1000, 256), (25, 2)])
@pytest.mark.parametrize("share_prompts", [True, False])
def test_values_are_those_of_separate_forwards(
    float64_throughout,
    max_tokens,
    lookahead,
    share_prompts,
):
    policy, reference = (packed_model("cohere", torch.float64, seed) for seed in (0, 1))
    own = [tiny_model("cohere", torch.float64, seed) for seed in (0, 1)]
    groups = ragged()
    judged = judge(
        policy,
        Reference(reference),
        groups,
        beta=BETA,
        max_tokens=max_tokens,
        share_prompts=share_prompts,
        lookahead=lookahead,
    )
    for group, found in zip(groups, judged, strict=True):
        with torch.no_grad():
            p, r = (
                torch.stack([eager_sum(m, group.prompt_ids, ids) for ids in group.response_ids])
                for m in own
            )
        rewards = BETA * (p - r)
        expected = [p, r, rewards, rewards[:, None] - rewards[None, :]]
        for ours, theirs in zip(found, expected, strict=True):
            ours = torch.as_tensor(ours, dtype=torch.float64)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
        assert torch.equal(found.table, -found.table.T)
        assert not found.table.diagonal().any()


def test_a_policy_against_itself_says_nothing():
    policy = packed_model("qwen3")
    for found in judge(policy, Reference(policy), ragged(), beta=BETA, max_tokens=60):
        assert found.policy_logps == found.reference_logps and any(found.policy_logps)
        assert not any(found.rewards) and not found.table.any()


def test_one_response_has_a_reward_and_nothing_to_be_compared_with():
    policy, reference = packed_model(), packed_model(seed=1)
    (found,) = judge(policy, Reference(reference), ragged([1]), beta=BETA, max_tokens=60)
    assert found.table.tolist() == [[0.0]] and len(found.rewards) == 1 and found.rewards[0] != 0


def test_without_a_reference_rewards_are_the_policys_log_probs():
    policy, groups = packed_model(), ragged()
    expected = list(score(policy, groups, max_tokens=60))
    for found, logps in zip(
        judge(policy, None, groups, beta=BETA, max_tokens=60), expected, strict=True
    ):
        assert found.policy_logps == logps and not any(found.reference_logps)
        assert found.rewards == [BETA * x for x in logps]
        assert found.table.dtype == torch.float32 and found.table.any() == (len(logps) > 1)


def test_a_peft_policy_is_compared_with_its_own_base_model():
    policy, groups = lora_model(), ragged()
    found = list(judge(policy, reference_of(policy), groups, beta=BETA, max_tokens=10**4))
    assert [x.policy_logps for x in found] == list(score(policy, groups, max_tokens=10**4))
    base = list(score(packed_model(), groups, max_tokens=10**4))
    assert [x.reference_logps for x in found] == base
    assert all(any(x.rewards) for x in found)


# What is done at a time


def test_it_reads_no_further_than_it_judges(monkeypatch, passes):
    calls = []
    real = judging.pairwise_preference_logits
    monkeypatch.setattr(
        judging,
        "pairwise_preference_logits",
        lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs),
    )
    policy = lora_model().train()
    on = list(score(policy, ragged(), max_tokens=10**4))
    read = []
    source = (read.append(group) or group for group in ragged([2] * 10))
    judged = judge(policy, reference_of(policy), source, beta=BETA, max_tokens=10**4, lookahead=4)
    assert read == []
    passes.clear()
    counts = []
    for _ in judged:
        counts.append((len(read), len(passes), len(calls)))
        if len(counts) == 2:  # the policy is itself again while a consumer has its turn
            laid = list(passes)
            assert list(score(policy, ragged(), max_tokens=10**4)) == on and policy.training
            passes[:] = laid
    # In each window one pass of the policy, one of the reference and one call of the op.
    assert counts == [(4, 2, 1)] * 4 + [(8, 4, 2)] * 4 + [(10, 6, 3)] * 2


def test_nothing_of_a_window_outlasts_it(monkeypatch):
    tensors = []
    real = judging.pairwise_preference_logits

    def watched(*args, **kwargs):
        logits = real(*args, **kwargs)
        tensors.append(weakref.ref(logits.untyped_storage()))
        return logits

    monkeypatch.setattr(judging, "pairwise_preference_logits", watched)
    policy, kept = packed_model(), []
    for found in judge(policy, None, ragged([4] * 6), beta=1, max_tokens=100, lookahead=2):
        kept.append(found)
        assert found.table.untyped_storage().nbytes() == 4 * 16
    assert len(tensors) == 3


def test_what_is_known_is_not_computed(tmp_path, passes):
    policy, groups = lora_model(), ragged()
    plain = list(judge(policy, reference_of(policy), groups, beta=BETA, max_tokens=10**4))
    cache = LogpCache(tmp_path)
    kept = cache.of(policy), cache.of(reference_of(policy))
    first = list(judge(*kept, groups, beta=BETA, max_tokens=10**4))
    passes.clear()
    again = list(judge(*kept, groups, beta=BETA, max_tokens=60, lookahead=3))
    other = list(judge(*kept, groups, beta=2 * BETA, max_tokens=60))
    assert passes == []
    for a, b, c, d in zip(plain, first, again, other, strict=True):
        assert a[:3] == b[:3] == c[:3] and torch.equal(a.table, b.table)
        assert torch.equal(b.table, c.table)
        assert d.rewards == pytest.approx([2 * x for x in b.rewards])


# A stage of a run


def settings(folder, output, *, rank=0, **changes):
    return SPASettings(
        output_dir=str(folder / output),
        model=ModelSettings(path=str(folder / "model"), lora=LoraSettings(r=rank)),
        data=SPADataSettings(
            preferences=str(folder / "seed.jsonl"),
            prompts=str(folder / "prompts.jsonl"),
            max_length=64,
            max_prompt_length=32,
        ),
        iterations=1,
        training=SPATrainingSettings(learning_rate=1e-3, batch_size=4, seed_epochs=1),
        generation=SPAGenerationSettings(
            max_new_tokens=6, batch_size=4, chunk_size=3, samples_per_prompt=3
        ),
        gauge=SPAGaugeSettings(holdout_minimum=4),
        **changes,
    )


def spa(run_settings):
    """Run SPA, without the report, and return the run with its policy π_1."""
    with mock.patch.object(loop, "write_report", lambda folder: None):
        run = SPA(run_settings)
        run.run()
    return run


@pytest.fixture(scope="module", params=[0, 4], ids=["full", "lora"])
def finished(request, tmp_path_factory):
    """A run that has ended; its parts judge more."""
    folder = tmp_path_factory.mktemp("judging")
    prepare(folder)
    return spa(settings(folder, "run", rank=request.param))


@pytest.mark.parametrize("against", ["init", "seed", None])
def test_a_stage_is_judged_against_another(finished, monkeypatch, against):
    parts, groups = finished.parts, ragged([3] * 7)
    expected_policy = list(score(parts.read_model("iteration-1"), groups, max_tokens=10**4))
    expected = [[0.0] * 3] * 7
    if against:
        other = parts.read_model(against)  # a fresh adapter changes nothing
        expected = list(score(other, groups, max_tokens=10**4))
    policy = parts.load("iteration-1")
    names = [name for name, _ in policy.named_parameters()]
    flags = [parameter.requires_grad for parameter in policy.parameters()]
    loaded = []
    real = pipeline.load_model
    monkeypatch.setattr(pipeline, "load_model", lambda *a, **k: loaded.append(1) or real(*a, **k))
    found = list(parts.judge(f"extra/{against}", "iteration-1", against, groups, beta=BETA))
    # One more model at most, once for all chunks; with LoRA none, whatever it is compared with.
    assert len(loaded) == int(against is not None and not finished.settings.model.lora.r)
    for row, p, r in zip(found, expected_policy, expected, strict=True):
        assert row["policy_logps"] == pytest.approx(p, abs=1e-4)
        assert row["reference_logps"] == pytest.approx(r, abs=1e-4)
        assert row["rewards"] == [
            BETA * (a - b) for a, b in zip(row["policy_logps"], row["reference_logps"], strict=True)
        ]
        table = torch.tensor(row["table"])
        rewards = torch.tensor(row["rewards"])
        torch.testing.assert_close(table, rewards[:, None] - rewards[None], rtol=0, atol=1e-4)
    # The policy stays, as it was.
    assert parts.policy is policy and parts.holds == "iteration-1"
    assert [name for name, _ in policy.named_parameters()] == names
    assert [parameter.requires_grad for parameter in policy.parameters()] == flags
    alone = list(score(policy, groups, max_tokens=10**4))
    assert alone == expected_policy


@pytest.mark.parametrize(
    ("chosen", "stages"),
    [
        ("init", ["init", "init", "init"]),
        ("previous", ["init", "seed", "iteration-1"]),
        ("none", [None, None, None]),
    ],
)
def test_the_judges_reference_is_the_one_that_is_chosen(chosen, stages):
    run = SPA.__new__(SPA)
    run.settings = SPASettings(judge=JudgeSettings(reference=chosen))
    judges = ["seed", "iteration-1", "iteration-2"]
    assert [run.judge_reference(stage) for stage in judges] == stages


class Killed(Exception):
    pass


def test_a_chunk_is_kept_before_the_next_is_judged(finished, monkeypatch):
    parts, groups = finished.parts, ragged([2, 1, 3, 2, 4, 2, 3])
    folder = parts.folder("killed")
    left = []
    real = judging._compare

    def stops(*args):
        left.append(len(list(folder.glob("*.jsonl"))))
        if len(left) == 3:
            raise Killed
        return real(*args)

    def judged():
        return list(parts.judge("killed", "iteration-1", "init", groups, beta=BETA))

    with monkeypatch.context() as patch:
        patch.setattr(judging, "_compare", stops)
        with pytest.raises(Killed):
            judged()
    assert left == [0, 1, 2]
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")}
    rows = judged()
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())
    whole = list(parts.judge("whole", "iteration-1", "init", groups, beta=BETA))
    assert rows == whole and [len(row["table"]) for row in rows] == [2, 1, 3, 2, 4, 2, 3]


def test_a_run_with_another_folder_and_beta_finds_what_the_judge_kept(finished, tmp_path, passes):
    folder = finished.parts.run.path.parent
    rank = finished.settings.model.lora.r
    options = {"rank": rank, "reference_cache": str(tmp_path / "cache")}
    first = spa(settings(folder, f"first-{rank}", **options))
    # π_init's seed pairs, then the responses and held-out pairs under two models.
    responses = read_rows(first.parts.folder("iteration-1") / "responses.jsonl")
    assert len(list((tmp_path / "cache").glob("*.sqlite"))) == 2  # π_init and π_0
    passes.clear()
    noise = NoiseSettings(alpha=0.3)
    second = spa(settings(folder, f"second-{rank}", noise=noise, **options))
    assert passes == []
    again = read_rows(second.parts.folder("iteration-1") / "responses.jsonl")
    assert again == responses
    groups = [Group(row["prompt_ids"], row["ids"]) for row in responses]
    rows = list(second.parts.judge("other-beta", "seed", "init", groups, beta=7.0))
    assert passes == [] and len(rows) == len(responses)
    for row, response in zip(rows, responses, strict=True):
        assert row["policy_logps"] == response["policy_logps"]
        assert row["reference_logps"] == response["reference_logps"]


def test_the_budget_of_judging_is_the_pipelines(finished, monkeypatch):
    parts, budgets = finished.parts, []
    real = logp_cache.score

    def watched(*args, **kwargs):
        budgets.append(kwargs["max_tokens"])
        return real(*args, **kwargs)

    monkeypatch.setattr(logp_cache, "score", watched)
    monkeypatch.setattr(parts, "scoring_tokens", 33)
    list(parts.judge("budget", "iteration-1", "init", ragged(), beta=BETA))
    parts.score("budget-score", "iteration-1", ragged())
    assert set(budgets) == {33}
