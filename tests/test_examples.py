"""What the README and examples/ show, run."""

import re
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("path", ["examples/spa_demo.yaml"])
def test_an_example_names_files_that_are_there(path):
    for name in re.findall(r"examples/[\w./]+", (ROOT / path).read_text("utf-8")):
        assert (ROOT / name.split(":")[0].rstrip(".")).exists(), name
