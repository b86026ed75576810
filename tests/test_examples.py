"""What the README and examples/ show, run."""

import gzip
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from whole_runs import run_here

from prefalign import cli
from prefalign.run_folder import read_rows

ROOT = Path(__file__).parent.parent


def snippets(path):
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text("utf-8"), re.DOTALL)


def test_the_readmes_op_runs():
    code = snippets("README.md")[0]
    # The shape is a model's; a test's is smaller.
    names = {}
    exec(code.replace("64000", "640").replace("1024", "64"), names)
    assert names["logps"].shape == (64,) and names["logps"].dtype == torch.float32
    assert names["hidden"].grad is not None


def test_the_readmes_spa_takes_what_it_says():
    code = snippets("README.md")[1].replace("SPA(\n", "settings = (\n").replace(").run()", ")")
    names = {}
    exec(code, names)
    names["settings"].validate()


def test_the_plan_is_printed(capsys):
    exec(snippets("docs/ops.md")[0], {})
    assert "row_jacobian" in capsys.readouterr().out


def test_the_demo_runs_on_a_few_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    prompts = tmp_path / "eval.jsonl"
    lines = (ROOT / "examples/demo/data/eval_prompts.jsonl").read_text().splitlines(True)
    prompts.write_text("".join(lines[:8]))
    options = {
        "output_dir": tmp_path / "run",
        "iterations": 1,
        "data.prompts_per_iteration": "[8]",
        "training.seed_epochs": 1,
        "generation.max_new_tokens": 12,
        "evaluation.prompts": prompts,
        "evaluation.control": "false",
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    status = cli.main(["spa", "--config", "examples/spa_demo.yaml", *arguments])
    assert status == 0
    assert "SPA 1" in capsys.readouterr().out
    (gauge,) = read_rows(tmp_path / "run" / "gauge.jsonl")
    assert gauge["held_out_pairs"] == 32
    # What the judge was given: definitions, half of them with an example, by the shipped model.
    texts = [
        t for r in read_rows(tmp_path / "run/iteration-1/responses.jsonl") for t in r["responses"]
    ]
    assert len(texts) == 16 and all(text.startswith(" ") for text in texts)


def test_the_ple_demo_runs_on_a_few_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    few = {}
    for name in ("eval_prompts.jsonl", "sft.jsonl.gz"):
        path = ROOT / "examples/demo/data" / name
        opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
        with opened as lines:
            few[name] = tmp_path / name.removesuffix(".gz")
            few[name].write_text("".join(itertools.islice(lines, 16)))
    options = {
        "output_dir": tmp_path / "run",
        "data.sft": few["sft.jsonl.gz"],
        "data.prompts_per_iteration": "[8]",
        "iterations": 1,
        "training.sft_epochs": 1,
        "generation.max_new_tokens": 12,
        "evaluation.prompts": few["eval_prompts.jsonl"],
        "evaluation.baselines": "[raft]",
    }
    printed = run_here("ple", {"config": "examples/ple_demo.yaml", **options})
    for name in ("base", "base, guided", "SFT", "PLE 1", "RAFT-4"):
        assert any(line.startswith(f"{name}  ") for line in printed.splitlines()), name
    rows = read_rows(tmp_path / "run/iteration-1/responses.jsonl")
    assert len(rows) == 8
    for row in rows:
        assert row["prompt"].startswith("define ") and row["guided"] == [True, False]
        assert all(0 <= reward <= 1 for reward in row["rewards"])
    evaluation = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert all(row["mean_reward"] in {i / 16 for i in range(17)} for row in evaluation)


def printed_losses(text):
    return [float(found) for found in re.findall(r"loss (\d\.\d+)", text)]


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop"])
def test_a_loop_learns(name, monkeypatch, capsys):
    options = {"model": "examples/demo/model", "pairs": "examples/demo/data/seed_pairs.jsonl"}
    options |= {"steps": 12} if name == "plain_loop" else {"epochs": 2}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    torch.manual_seed(0)
    runpy.run_path(f"examples/{name}.py", run_name="__main__")
    losses = printed_losses(capsys.readouterr().out)
    assert losses[0] == 0.6931  # ln 2: the policy is its own reference
    assert sum(losses[-4:]) / 4 < 0.69


def test_an_accelerate_loop_runs_in_two_processes():
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
        *("examples/accelerate_loop.py", "--model", "examples/demo/model"),
        *("--pairs", "examples/demo/data/seed_pairs.jsonl", "--batch_size", "4"),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    losses = printed_losses(done.stdout)
    assert len(losses) == 10 and losses[0] == 0.6931 and losses[-1] < 0.6931


def test_spas_training_runs_in_trl(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'prefalign[trl]'")
    data = tmp_path / "pairs"
    data.mkdir()
    lines = (ROOT / "examples/demo/data/seed_pairs.jsonl").read_text().splitlines(True)
    (data / "train.jsonl").write_text("".join(lines[:12]))
    options = {
        "model_name_or_path": ROOT / "examples/demo/model",
        "dataset_name": data,
        "output_dir": tmp_path / "out",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "noise_window": 8,
        "noise_quantile": 0.5,
        "noise_extrapolation": 0.25,
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    trainer = runpy.run_path(str(ROOT / "examples/trl_noise_aware.py"))["main"](arguments)
    first, _, last = trainer.state.log_history[:3]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-5)
    # The window was full after two steps of four pairs.
    assert first["noise/threshold"] == 0 < last["noise/threshold"] and last["noise/alpha"] == 0.1
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", ["examples/spa_demo.yaml", "examples/ple_demo.yaml"])
def test_an_example_names_files_that_are_there(path):
    for name in re.findall(r"examples/[\w./]+", (ROOT / path).read_text("utf-8")):
        assert (ROOT / name.split(":")[0].rstrip(".")).exists(), name
