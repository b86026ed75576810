"""PLE end to end, on a tiny model: what it leaves, its variants, and that it goes on."""

import json

import pytest
import torch
from datasets import load_dataset
from ple_run import BASELINES, STAGES, listed, prepare
from rewards import lots
from whole_runs import final_weights, losses, progress, refused, run_here, run_killed

from prefalign.run_folder import read_rows


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """One run with every baseline from beginning to end, and its options."""
    folder = tmp_path_factory.mktemp("ple")
    options = prepare(folder)
    every = {"evaluation.baselines": listed(*BASELINES), "evaluation.guided": "true"}
    printed = run_here("ple", {**options, **every, "output_dir": folder / "run"})
    return folder, options, printed


def strictly(path):
    """Read JSON lines as a reader does that knows neither NaN nor infinity."""

    def fails(name):
        raise AssertionError(f"{path}: {name}")

    return [json.loads(line, parse_constant=fails) for line in path.read_text().splitlines()]


def gauge_of(folder):
    return {row["stage"]: row for row in strictly(folder / "gauge.jsonl")}


# What a run leaves


def test_it_ends_with_the_table_and_the_reports_path(whole_run):
    folder, _, printed = whole_run
    for name in (
        "base", "base, guided", "SFT", "PLE 1", "PLE 2", "RAFT-4", "context distillation",
        "DPO, guided over plain", "PLE, ranking only", "PLE, weighted SFT only",
        "PLE, fixed threshold", "PLE, released code",
    ):  # fmt: skip
        assert any(line.startswith(f"{name}  ") for line in printed.splitlines()), name
    assert printed.rstrip().endswith(str(folder / "run" / "report.html"))


def test_the_folder_can_be_read(whole_run):
    folder = whole_run[0] / "run"
    pairs = load_dataset("json", data_files=str(folder / "iteration-1" / "pairs.jsonl"))["train"]
    assert len(pairs) == 8  # half of the prompts
    for row in pairs:
        gap = row["chosen_reward"] - row["rejected_reward"]
        assert row["ranked"] == (gap > 0.1)
    for row in read_rows(folder / "iteration-2" / "responses.jsonl"):
        assert row["guided"] == [True, False]
        assert row["scores"] == row["rewards"]
        assert row["rewards"] == lots([row["prompt"]] * 2, row["responses"])
        assert row["tokens"] == [len(ids) for ids in row["ids"]]
        assert max(row["tokens"]) <= 5
    for row in read_rows(folder / "raft" / "iteration-2" / "responses.jsonl"):
        assert row["guided"] == [False] * 4
    for row in read_rows(folder / "distillation" / "iteration-2" / "responses.jsonl"):
        assert row["guided"] == [True]
    metrics = strictly(folder / "metrics.jsonl")
    arms = [f"{arm}/iteration-{i}" for arm in BASELINES for i in (1, 2)]
    assert {row["stage"] for row in metrics} == {*STAGES, *arms}
    ranked = {row["stage"]: row["ple/ranked"] for row in metrics if "ple/ranked" in row}
    assert ranked["ranking-only/iteration-2"] == 1 and ranked["sft-only/iteration-2"] == 0
    assert "loss" in metrics[0] and "ple/ranked" not in metrics[0]
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert [row["key"] for row in evaluation] == [
        "init", "init-guided", *STAGES, *BASELINES,
    ]  # fmt: skip
    assert evaluation[0]["win_rate"] == 0.5
    steps = {row["key"]: row["steps"] for row in evaluation}
    assert (steps["init-guided"], steps["sft"], steps["iteration-1"]) == (0, 2, 4)
    assert {steps[name] for name in ("iteration-2", *BASELINES)} == {6}
    assert not list(folder.rglob("checkpoint-*")) and not list(folder.rglob("*.partial"))


def test_the_gauge_has_a_line_for_every_iteration_of_every_arm(whole_run):
    gauge = gauge_of(whole_run[0] / "run")
    assert set(gauge) == {
        *STAGES[1:], *(f"{arm}/iteration-{i}" for arm in BASELINES for i in (1, 2)),
    }  # fmt: skip
    for stage, row in gauge.items():
        assert row["judge_accuracy"] is None and row["examples"] <= 8
        assert (row["guided_reward"] is None) == stage.startswith(("raft", "released")), stage
        assert (row["plain_reward"] is None) == stage.startswith("distillation"), stage
    # τ falls by iteration; of the arms that have one loss alone there is none to tell.
    assert gauge["iteration-1"]["threshold"] == 0.1
    assert gauge["iteration-2"]["threshold"] == pytest.approx(0.09)
    assert gauge["fixed-threshold/iteration-2"]["threshold"] == 0.1
    assert gauge["ranking-only/iteration-1"]["threshold"] is None
    assert gauge["ranking-only/iteration-1"]["ranked_share"] == 1
    assert gauge["sft-only/iteration-1"]["ranked_share"] == 0
    pairs = read_rows(whole_run[0] / "run" / "iteration-1" / "pairs.jsonl")
    assert gauge["iteration-1"]["ranked_share"] == sum(row["ranked"] for row in pairs) / 8


def test_arms_share_the_first_iterations_responses_and_no_later_ones(whole_run):
    folder = whole_run[0] / "run"

    def responses(arm, i):
        rows = read_rows(folder / arm / f"iteration-{i}" / "responses.jsonl")
        return [(row["prompt"], row["guided"], row["responses"], row["rewards"]) for row in rows]

    first = responses("", 1)
    for arm in ("dpo", "ranking-only", "sft-only", "fixed-threshold"):
        assert responses(arm, 1) == first
        assert not (folder / arm / "iteration-1" / "generated").exists()
        assert responses(arm, 2) != responses("", 2)
    guided = [row[2][0] for row in first]
    assert [row[2][0] for row in responses("distillation", 1)] == guided
    one, two = ({row[0] for row in responses("", i)} for i in (1, 2))
    assert not one & two and len(one | two) == 16


def test_the_guided_base_saw_the_principles(whole_run):
    folder = whole_run[0] / "run" / "evaluation"
    plain, guided = (
        read_rows(folder / key / "generated" / "000000.jsonl") for key in ("init", "init-guided")
    )
    for one, other in zip(plain, guided, strict=True):
        assert len(other["prompt_ids"]) > len(one["prompt_ids"])
        assert other["prompt_ids"][-len(one["prompt_ids"]) :] == one["prompt_ids"]


# Stopped and taken up again


def same(ours, theirs, stages):
    """Say that two runs made the same models, bit for bit."""
    return all(
        torch.equal(final_weights(ours, stage), final_weights(theirs, stage)) for stage in stages
    )


FEW = (*STAGES, "dpo/iteration-1", "dpo/iteration-2")


@pytest.fixture(scope="module")
def few_arms(whole_run):
    """Options of a run with one baseline: what an arm does does not depend on the others."""
    return {**whole_run[1], "evaluation.baselines": listed("dpo")}


def test_the_gauge_stops_a_run_before_it_trains(whole_run, few_arms, capsys):
    folder = whole_run[0] / "stopped"
    options = {**few_arms, "output_dir": folder, "gauge.on_collapse": "stop"}
    options["gauge.max_length_ratio"] = 0.01
    line = refused(capsys, "ple", options)
    assert line.startswith("iteration-1: stopped before training: ")
    assert "more than gauge.max_length_ratio 0.01" in line
    assert not (folder / "iteration-1" / "model").exists()
    assert (folder / "report.html").exists()
    assert refused(capsys, "ple", options, "--resume") == line
    run_here("ple", {**options, "gauge.on_collapse": "warn"}, "--resume")
    assert same(folder, whole_run[0] / "run", FEW)


def test_a_run_killed_at_three_random_points_ends_in_the_same_weights(whole_run, few_arms):
    run_dir, killed_dir = (whole_run[0] / name for name in ("run", "killed"))
    others = {*BASELINES, "init-guided", "plain-4", "plain-8"} - {"dpo"}
    until = progress(run_dir, without=others)
    killed = run_killed("ple", {**few_arms, "output_dir": killed_dir}, until, kills=3)

    def table(folder):
        rows = json.loads((folder / "evaluation.json").read_text())
        return {row["key"]: row for row in rows}

    assert same(killed_dir, run_dir, FEW), killed
    assert (killed_dir / "report.html").stat().st_size > 10_000
    for name in (
        "iteration-1/responses.jsonl", "iteration-2/responses.jsonl", "iteration-2/pairs.jsonl",
        "dpo/iteration-2/responses.jsonl", "evaluation/sft.jsonl", "evaluation/dpo.jsonl",
    ):  # fmt: skip
        assert (killed_dir / name).read_text() == (run_dir / name).read_text(), (name, *killed)
    for facts in (gauge_of, table):
        assert len(facts(killed_dir)) in (4, 5)
        assert facts(killed_dir).items() <= facts(run_dir).items(), killed
    assert losses(killed_dir) == [row for row in losses(run_dir) if row[0] in FEW], killed


# Variants


def test_the_released_code_weighs_pairs_against_the_start(whole_run):
    folder, options, *_ = whole_run
    options = {
        **options,
        "output_dir": folder / "released",
        "variant": "released",
        "released.samples": 4,
        "iterations": 1,
        "data.prompts_per_iteration": "[8]",
    }
    run_here("ple", options)
    rows = read_rows(folder / "released" / "iteration-1" / "responses.jsonl")
    assert all(row["guided"] == [False] * 4 for row in rows)
    (gauge,) = gauge_of(folder / "released").values()
    assert gauge["examples"] == 8 and gauge["guided_reward"] is None
    # Policy and reference are one at the first step, whatever the weights: ln 2.
    metrics = strictly(folder / "released" / "metrics.jsonl")
    first = next(row for row in metrics if row["stage"] == "iteration-1")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    table = json.loads((folder / "released" / "evaluation.json").read_text())
    assert [row["name"] for row in table] == ["base", "SFT", "PLE, released code 1"]


def test_the_threshold_may_fall_with_every_step(whole_run):
    folder, options, *_ = whole_run
    options = {
        **options,
        "output_dir": folder / "steps",
        "enhancement.decay_every": "step",
        "enhancement.decay": 0.5,
        "evaluation.reward": "null",
    }
    run_here("ple", options)
    metrics = strictly(folder / "steps" / "metrics.jsonl")
    found = [row["ple/threshold"] for row in metrics if row["stage"].startswith("iteration")]
    assert found == pytest.approx([0.1, 0.05, 0.025, 0.0125])
    gauge = gauge_of(folder / "steps")
    assert [gauge[f"iteration-{i}"]["threshold"] for i in (1, 2)] == [0.1, 0.025]
    assert not (folder / "steps" / "evaluation.json").exists()


def test_without_demonstrations_and_with_an_adapter(whole_run):
    folder, options, *_ = whole_run
    options = {
        **options,
        "output_dir": folder / "lora",
        "data.sft": "null",
        "model.lora.r": 4,
        "rewards.normalise": "standard",
        "evaluation.baselines": listed("dpo"),
    }
    run_here("ple", options)
    folder = folder / "lora"
    saved = {path.name for path in (folder / "iteration-2" / "model").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved
    assert not (folder / "sft").exists()
    table = json.loads((folder / "evaluation.json").read_text())
    assert [row["key"] for row in table] == ["init", "iteration-1", "iteration-2", "dpo"]
    assert [row["steps"] for row in table[:3]] == [0, 2, 4]
    for i in (1, 2):
        rows = read_rows(folder / f"iteration-{i}" / "responses.jsonl")
        scores = torch.tensor([row["scores"] for row in rows], dtype=torch.float64)
        rewards = torch.tensor([row["rewards"] for row in rows], dtype=torch.float64)
        expected = (rewards - rewards.mean()) / rewards.std(correction=0)
        assert torch.allclose(scores, expected)
    # The gauge measures against the first iteration's own responses.
    assert gauge_of(folder)["iteration-1"]["length_ratio"] == 1


def test_conversations_go_through_the_chat_template(tmp_path):
    options = {**prepare(tmp_path, chat=True), "output_dir": tmp_path / "run", "iterations": 1}
    options["rewards.functions"] = listed(
        options["evaluation.reward"].replace(":letters", ":turns")
    )
    options["evaluation.reward"] = options["rewards.functions"][1:-1]
    options["data.prompts_per_iteration"] = "[4]"
    run_here("ple", options)
    rows = read_rows(tmp_path / "run" / "iteration-1" / "responses.jsonl")
    assert len(rows) == 4
    for row in rows:
        # Plain prompts beside conversations are a user's message.
        ((role, content),) = [(m["role"], m["content"]) for m in row["prompt"]]
        assert role == "user" and content.startswith(("tell ", "show "))
    (guided,) = (tmp_path / "run" / "iteration-1" / "generated" / "guided").glob("000000.jsonl")
    from tiny_models import tiny_tokenizer

    tokenizer = tiny_tokenizer(chat_template=True)
    for row in read_rows(guided):
        text = tokenizer.decode(row["prompt_ids"])
        assert text.startswith("system: Answer by these principles:\n- Be brief.\n- Be kind.\nuser")
        assert text.endswith(":\nassistant: ")
