"""SPA end to end, on a tiny model: what it leaves, and that a killed run ends the same."""

import json
import signal
import subprocess
import time

import pytest
import torch
from datasets import load_dataset
from spa_run import prepare
from whole_runs import (
    ENVIRONMENT,
    command,
    final_weights,
    losses,
    progress,
    run,
    run_killed,
    run_on_two_processes,
)

from prefalign.run_folder import read_rows


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """One run from beginning to end, and its options."""
    folder = tmp_path_factory.mktemp("spa")
    options = prepare(folder)
    done = run("spa", {**options, "output_dir": folder / "run"})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, options, done


def test_it_ends_with_the_table_and_the_reports_path(whole_run):
    folder, _, done = whole_run
    for name in ("SFT", "seed DPO", "seed DPO, as many steps", "SPA 1", "SPA 2", "DPO, all labels"):
        assert name in done.stdout
    assert done.stdout.rstrip().endswith(str(folder / "run" / "report.html"))
    assert (folder / "run" / "report.html").stat().st_size > 10_000


def test_the_folder_can_be_read(whole_run):
    folder = whole_run[0] / "run"
    rows = load_dataset("json", data_files=str(folder / "iteration-1" / "pairs.jsonl"))["train"]
    assert {"prompt", "chosen", "rejected", "chosen_reward", "rejected_reward", "noisy"} <= set(
        rows.column_names
    )
    assert all(r["chosen_reward"] > r["rejected_reward"] for r in rows)
    assert all(0.5 < r["preference"] <= 1 for r in rows)
    assert any(r["noisy"] is not None for r in rows)
    responses = read_rows(folder / "iteration-1" / "responses.jsonl")
    assert len(responses) == 6  # half of the prompts
    assert all(len(r["responses"]) == len(r["rewards"]) == len(r["cut"]) == 2 for r in responses)
    metrics = read_rows(folder / "metrics.jsonl")
    assert {m["stage"] for m in metrics} == {
        "seed", "iteration-1", "iteration-2", "control", "all-labels",
    }  # fmt: skip
    gauge = read_rows(folder / "gauge.jsonl")
    assert [g["stage"] for g in gauge] == ["iteration-1", "iteration-2"]
    assert all(g["held_out_pairs"] == 4 for g in gauge)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation[0]["key"] == "init" and evaluation[0]["win_rate"] == 0.5
    steps = {row["key"]: row["steps"] for row in evaluation}
    assert steps["control"] == steps["all-labels"] == steps["iteration-2"] > steps["seed"]
    assert not list(folder.rglob("checkpoint-*")) and not list(folder.rglob("*.partial"))


def test_the_iterations_prompts_are_disjoint(whole_run):
    folder = whole_run[0] / "run"
    one, two = (
        {r["prompt"] for r in read_rows(folder / f"iteration-{i}" / "responses.jsonl")}
        for i in (1, 2)
    )
    assert not one & two and len(one | two) == 12


def test_training_changes_the_weights_each_time(whole_run):
    folder = whole_run[0] / "run"
    stages = ["seed", "iteration-1", "iteration-2", "control", "all-labels"]
    found = [final_weights(folder, stage) for stage in stages]
    for i, a in enumerate(found):
        assert all(not torch.equal(a, b) for b in found[:i])


def test_a_run_killed_at_five_random_points_ends_in_the_same_weights(whole_run):
    folder, options, *_ = whole_run
    options = {**options, "output_dir": folder / "killed"}
    killed = run_killed("spa", options, progress(folder / "run"), kills=5)
    for stage in ("seed", "iteration-1", "iteration-2", "control", "all-labels"):
        ours, theirs = (final_weights(folder / n, stage) for n in ("killed", "run"))
        assert torch.equal(ours, theirs), (stage, *killed)
    for name in ("evaluation.json", "gauge.jsonl", "iteration-2/pairs.jsonl"):
        assert (folder / "killed" / name).read_text() == (folder / "run" / name).read_text()
    assert losses(folder / "killed") == losses(folder / "run")


def test_ctrl_c_leaves_a_run_that_goes_on(whole_run):
    folder, options, *_ = whole_run
    options = {**options, "output_dir": folder / "interrupted"}
    process = subprocess.Popen(
        command("spa", options),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (folder / "interrupted" / "metrics.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert error.rstrip().splitlines()[-1].endswith("--resume goes on from here")
    assert run("spa", options, "--resume").returncode == 0
    assert torch.equal(final_weights(folder / "interrupted"), final_weights(folder / "run"))


def test_a_finished_run_does_nothing_again(whole_run):
    folder, options, *_ = whole_run
    before = {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*.safetensors")}
    done = run("spa", {**options, "output_dir": folder / "run"}, "--resume")
    assert done.returncode == 0 and "SPA 2" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*.safetensors")}


def test_the_gauge_stops_a_run_before_it_trains(whole_run):
    folder, options, *_ = whole_run
    options = {
        **options,
        "output_dir": folder / "stopped",
        "gauge.on_collapse": "stop",
        "gauge.max_length_ratio": 0.01,
    }
    done = run("spa", options)
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("prefalign: error: iteration-1: stopped before training: ")
    assert "more than gauge.max_length_ratio 0.01" in line
    assert not (folder / "stopped" / "iteration-1" / "model").exists()
    assert (folder / "stopped" / "report.html").exists()
    again = run("spa", options, "--resume")
    assert again.returncode == 2  # resuming alone does not go past it
    done = run("spa", {**options, "gauge.on_collapse": "warn", "iterations": 2}, "--resume")
    assert done.returncode == 0
    assert "more than gauge.max_length_ratio" in done.stderr


def test_lora_keeps_one_copy_of_the_base(whole_run):
    folder, options, *_ = whole_run
    options = {**options, "output_dir": folder / "lora", "model.lora.r": 4}
    done = run("spa", options)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = sorted(p.name for p in (folder / "lora" / "iteration-2" / "model").iterdir())
    assert "adapter_model.safetensors" in saved and "reference" not in saved
    base = (folder / "model" / "model.safetensors").stat().st_size
    assert (
        folder / "lora" / "iteration-2" / "model" / "adapter_model.safetensors"
    ).stat().st_size < base


def test_two_processes_make_the_same_run(whole_run):
    folder, options, *_ = whole_run
    options = {**options, "output_dir": folder / "two"}
    done = run_on_two_processes("spa", options)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_rows(folder / n / "iteration-1" / "responses.jsonl") for n in ("run", "two"))
    assert [r["responses"] for r in one] == [r["responses"] for r in two]
    for stage in ("seed", "iteration-1"):
        ours, theirs = (final_weights(folder / name, stage) for name in ("two", "run"))
        assert torch.allclose(ours, theirs, atol=1e-3), stage
        assert not torch.equal(theirs, final_weights(folder / "run", "control"))
