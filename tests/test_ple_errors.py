"""PLE's bad input through the command line: one line that names the place, and nothing is lost."""

import json

import pytest
import torch
from ple_run import listed, prepare
from whole_runs import final_weights, refused, reward, run_here, write_jsonl


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("inputs"))


def untouched(folder):
    """Say whether nothing was trained or generated."""
    return not list(folder.rglob("*.safetensors")) and not list(folder.rglob("generated"))


# Before anything is computed


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("variant", "palm", "variant"),
        ("rewards.functions", "[]", "rewards.functions: expected a reward function or model"),
        ("rewards.functions", "[nowhere.py:f]", "rewards.functions: nowhere.py:f: [Errno 2] No"),
        ("rewards.functions", "[math:nothing]", "module 'math' has no attribute 'nothing'"),
        ("rewards.functions", "[./nowhere]", "rewards.functions: ./nowhere: there is no such fol"),
        ("rewards.weights", "[1,2]", "expected one number for each of the 1 functions"),
        ("rewards.weights", "[.nan]", "rewards.functions: expected finite weights, got nan"),
        ("rewards.batch_size", "0", "rewards.batch_size: expected 1 or more, got 0"),
        ("rewards.max_tokens", "0", "rewards.max_tokens: expected 1 or more, got 0"),
        ("rewards.dtype", "float8", "rewards.dtype"),
        ("rewards.normalise", "minmax", "rewards.normalise"),
        ("principles", "./nowhere.txt", "nowhere.txt: cannot be read: No such file"),
        ("data.sft", "./nowhere.jsonl", "./nowhere.jsonl: no such file or folder"),
        ("data.prompts", "", "data.prompts: expected a dataset of prompts"),
        ("data.prompts", "./nowhere.jsonl", "./nowhere.jsonl: no such file or folder"),
        ("data.prompts_per_iteration", "[4]", "expected one number for each of the 2 iterations"),
        ("data.prompts_per_iteration", "[16,1]", "17 prompts are asked for, for 2 iterations, and"),
        ("iterations", "-1", "iterations: expected 0 or more, got -1"),
        ("enhancement.threshold", ".nan", "enhancement.threshold: expected a number, got nan"),
        ("enhancement.decay", "0", "enhancement.decay: expected more than 0 and at most 1"),
        ("enhancement.decay_every", "epoch", "enhancement.decay_every"),
        ("enhancement.ranking", "max", "enhancement.ranking"),
        ("enhancement.temperature", "0", "enhancement.temperature: expected more than 0, got 0.0"),
        (
            "evaluation.baselines",
            "[raft,raft]",
            "evaluation.baselines: expected each baseline",
        ),
        ("evaluation.baselines", "[ppo]", "evaluation.baselines"),
        ("evaluation.raft_samples", "1", "evaluation.raft_samples: expected 2 or more, got 1"),
        ("released.samples", "1", "released.samples: expected 2 or more, got 1"),
        ("released.fractions", "[1.5]", "released.fractions: expected values from 0 to 1"),
        ("training.sft_learning_rate", "-1", "training.sft_learning_rate: expected 0 or more"),
        ("generation.max_new_tokens", "150", "there is room for 42; use shorter principles"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, prepared, capsys, option, value, message):
    line = refused(capsys, "ple", {**prepared, "output_dir": tmp_path / "run", option: value})
    assert message in line
    assert untouched(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("", "holds no principles"), ("# Be brief.\n", "holds no principles")]
)
def test_principles_without_any(tmp_path, prepared, capsys, content, message):
    path = tmp_path / "mine.txt"
    path.write_text(content)
    options = {**prepared, "output_dir": tmp_path / "run", "principles": path}
    assert refused(capsys, "ple", options) == f"{path}: {message}"


def test_a_bad_row_is_named(tmp_path, prepared, capsys):
    options = {**prepared, "output_dir": tmp_path / "run"}
    rows = [{"prompt": "tell amber:"}, {"prompt": ""}, {"query": "tell cedar:"}]
    prompts = write_jsonl(tmp_path / "p.jsonl", rows)
    line = refused(capsys, "ple", {**options, "data.prompts": prompts})
    assert line == f"{prompts}, row 2, field 'prompt': is empty"
    write_jsonl(prompts, [rows[0], rows[2]])
    line = refused(capsys, "ple", {**options, "data.prompts": prompts})
    assert line.startswith(f"{prompts}, row 2, field 'prompt': the column is missing")
    demonstrations = write_jsonl(tmp_path / "s.jsonl", [{"prompt": "a"}])
    line = refused(capsys, "ple", {**options, "data.sft": demonstrations})
    assert line.startswith(f"{demonstrations}, row 1, field 'completion': the column is missing")
    # The eighth prompt is the one that does not fit beside the principles.
    long = [{"prompt": f"tell {i}:"} for i in range(7)]
    long += [{"prompt": "tell " + "all " * 8 + "!:"}]
    write_jsonl(prompts, long)
    (tmp_path / "long.txt").write_text("Be brief, and " * 8 + "kind.\n")
    options["principles"] = tmp_path / "long.txt"
    line = refused(capsys, "ple", {**options, "data.prompts": prompts})
    assert line.startswith(f"{prompts}, row 8, field 'prompt': ")
    assert "188 tokens with the principles, and there is room for 187" in line
    # Where nothing is asked under principles, they need no room.
    alone = {**options, "data.prompts": prompts, "variant": "released", "iterations": 1}
    alone |= {"model.path": "./nowhere", "evaluation.reward": "null"}
    assert "no such folder" in refused(capsys, "ple", alone)
    assert untouched(tmp_path)


# While it runs


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "raises raised ConnectionError: no answer (rows 0 to 3; prompt of row 0: '"),
        ("nan", "nan returned nan, expected finite numbers (row 1; prompt: '"),
        ("few", "few returned 3 values, expected 4, one for each completion (rows 0 to 3; "),
        ("strings", "strings returned 'good', expected finite numbers (rows 0 to 3; "),
    ],
)
def test_a_reward_that_fails_names_its_rows(tmp_path, prepared, capsys, name, message):
    options = {**prepared, "output_dir": tmp_path / "run", "data.sft": "null", "iterations": 1}
    options |= {"rewards.functions": listed(reward(name)), "data.prompts_per_iteration": "[4]"}
    line = refused(capsys, "ple", options)
    assert line.startswith(f"rewards.functions: {message}")
    assert not (tmp_path / "run" / "iteration-1" / "model").exists()
    # What was generated is there still.
    chunks = list((tmp_path / "run" / "iteration-1" / "generated" / "guided").iterdir())
    assert [chunk.name for chunk in chunks] == ["000000.jsonl"]


def test_a_mended_reward_goes_on_without_generating_again(tmp_path, prepared, capsys):
    mine = tmp_path / "mine.py"
    source = "def score(prompts, completions):\n    return [{} for text in completions]\n"
    mine.write_text(source.format("len(set(text)) / (len(text) - 5)"))  # a full answer fails
    options = {
        **prepared,
        "output_dir": tmp_path / "run",
        "rewards.functions": listed(f"{mine}:score"),
        "data.prompts_per_iteration": "[4,4]",
    }
    line = refused(capsys, "ple", options)
    assert line.startswith("rewards.functions: score raised ZeroDivisionError: ")
    done = sorted((tmp_path / "run").rglob("*.jsonl")) + sorted(
        (tmp_path / "run").rglob("*.safetensors")
    )
    assert any("generated" in path.parts for path in done)
    assert any(path.parts[-3:] == ("sft", "model", "model.safetensors") for path in done)
    before = {path: path.stat().st_mtime_ns for path in done if path.name != "metrics.jsonl"}
    assert refused(capsys, "ple", options, "--resume") == line
    mine.write_text(source.format("float(len(set(text)))"))
    run_here("ple", options, "--resume")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    whole = {**options, "output_dir": tmp_path / "whole"}
    run_here("ple", whole)
    for stage in ("iteration-1", "iteration-2"):
        ours, theirs = (final_weights(tmp_path / name, stage) for name in ("run", "whole"))
        assert torch.equal(ours, theirs)


def test_an_evaluation_that_fails_can_be_taken_up_again(tmp_path, prepared, capsys):
    options = {**prepared, "output_dir": tmp_path / "run", "iterations": 0, "data.prompts": ""}
    mine = tmp_path / "mine.py"
    mine.write_text("def score(prompts, completions):\n    return [None] * len(prompts)\n")
    options["evaluation.reward"] = f"{mine}:score"
    line = refused(capsys, "ple", options)
    assert line.startswith("evaluation.reward: score returned None, and nothing else did")
    assert not (tmp_path / "run" / "evaluation.json").exists()
    mine.write_text("def score(prompts, completions):\n    return [1] * len(prompts)\n")
    run_here("ple", options, "--resume")
    table = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [row["name"] for row in table] == ["base", "SFT"]


def test_columns_reach_the_reward_functions(prepared, tmp_path, capsys):
    rows = [{"prompt": f"tell me {i}:", "answer": "abc"[i % 3]} for i in range(8)]
    few = {
        **prepared,
        "output_dir": tmp_path / "run",
        "data.prompts": write_jsonl(tmp_path / "prompts.jsonl", rows),
        "rewards.functions": listed(reward("echoes")),
        "iterations": 1,
    }
    said = refused(capsys, "ple", few)
    assert "echoes asks for answer; the columns are prompts, completions" in said
    columns = {"rewards.columns": listed("answer")}
    run_here("ple", {**few, **columns, "output_dir": tmp_path / "other"})
    written = tmp_path / "other" / "iteration-1" / "responses.jsonl"
    for line in written.read_text().splitlines():
        found = json.loads(line)
        want = next(r["answer"] for r in rows if r["prompt"] == found["prompt"])
        assert found["rewards"] == [float(text[:1] == want) for text in found["responses"]]
    rows[5].pop("answer")
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    said = refused(capsys, "ple", {**few, **columns, "output_dir": tmp_path / "third"})
    assert "row 6" in said and "answer" in said
