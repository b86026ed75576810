"""The command line: help, versions, and one clear line for everything that is wrong."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from spa_run import prepare
from whole_runs import arguments, pairs, refused, write_jsonl, write_model

import prefalign
from prefalign import cli


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return folder, prepare(folder)


def test_version_does_not_import_torch():
    code = (
        "import sys; from prefalign.cli import main; main(['--version']);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"prefalign {prefalign.__version__}\n"


def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-m", "prefalign.cli", "bench", "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == cli.BROKEN_PIPE
    assert said == b""


def test_help_is_grouped_and_gives_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["spa", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for group in ("The model:", "The data:", "Training:", "Generation:", "The noise-aware loss"):
        assert group in text
    assert "default: 5e-07" in text and "default: [0.5, 0.25, 0.125]" in text
    assert "``" not in text


def test_shell_completion_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--print_completion", "shtab-bash"])
    assert stopped.value.code == 0
    assert "--noise.alpha" in capsys.readouterr().out


def test_every_option_can_come_from_a_file(tmp_path, prepared, capsys):
    folder, options = prepared
    config = tmp_path / "run.yaml"
    config.write_text("beta: 0.3\nnoise:\n  alfa: 0.2\n")
    assert refused(capsys, "spa", {"config": config}).endswith(
        "does not accept option 'noise.alfa'"
    )
    config.write_text("noise: {alpha: 0.9}\n")
    message = refused(capsys, "spa", {**options, "config": config})
    assert message == "noise.alpha: expected from 0 to 0.5, got 0.9"
    # Options override it, before it or after.
    message = refused(capsys, "spa", {**options, "noise.alpha": 0.8, "config": config})
    assert message == "noise.alpha: expected from 0 to 0.5, got 0.8"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("betta", "1", "unrecognized arguments: --betta 1"),
        ("beta", "x", "Expected a <class 'float'>"),
        ("beta", "0", "beta: expected more than 0, got 0.0"),
        ("iterations", "-1", "iterations: expected 0 or more, got -1"),
        ("data.prompts_per_iteration", "[4]", "expected one number for each of the 2 iterations"),
        ("data.prompts_per_iteration", "[40,40]", "80 prompts are asked for, for 2 iterations"),
        ("data.max_prompt_length", "64", "expected from 1 to less than data.max_length (64)"),
        ("config", "nowhere.yaml", "File does not exist"),
        ("evaluation.reward", "nowhere.py:reward", "evaluation.reward: nowhere.py:reward: "),
        ("evaluation.reward", "math:nothing", "has no attribute 'nothing'"),
        ("model.path", "./nowhere", "./nowhere: there is no such folder"),
        ("data.preferences", "./nowhere.jsonl", "./nowhere.jsonl"),
        ("training.arguments", '{"learning_rat": 1}', "training: "),
        ("training.lr_scheduler", "zigzag", "training: zigzag is not a valid SchedulerType"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, prepared, capsys, option, value, message):
    options = {**prepared[1], "output_dir": tmp_path / "run", option: value}
    assert message in refused(capsys, "spa", options)
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


ROWS = pairs(12)


def changed(index, **values):
    rows = [dict(row) for row in ROWS]
    rows[index] = {n: v for n, v in {**rows[index], **values}.items() if v is not ...}
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("content", "place", "message"),
    [
        (changed(3, rejected=...), "row 4", "'rejected'"),
        (changed(0, prompt=""), "row 1, field 'prompt'", "empty"),
        (changed(5, chosen="  "), "row 6, field 'chosen'", "empty"),
        (changed(2, chosen=" x", rejected=" x"), "row 3", "equal"),
        (changed(7, prompt="long " * 40), "row 8, field 'prompt'", "64"),
        (changed(1, chosen=3), "row 2, field 'chosen'", "3"),
        (changed(0).replace(b"cedar", b"\xe9cedar", 1), "row 3", "UTF-8"),
        (changed(0) + b'{"prompt": "x", \n', "row 13", "JSON"),
        (b"", "seed.jsonl", "no"),
    ],
    ids=[
        "missing column", "empty prompt", "empty completion", "chosen is rejected",
        "prompt fills max_length", "wrong type", "not UTF-8", "broken JSON", "empty file",
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path, prepared, capsys, content, place, message):
    source = tmp_path / "seed.jsonl"
    source.write_bytes(content)
    options = {**prepared[1], "output_dir": tmp_path / "run", "data.preferences": source}
    line = refused(capsys, "spa", options)
    assert str(source) in line and place in line and message in line
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


def test_nan_in_the_weights_names_the_tensor(tmp_path, prepared, capsys):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(prepared[1]["model.path"], folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    options = {**prepared[1], "output_dir": tmp_path / "run", "model.path": folder}
    assert "model.layers.1.mlp.up_proj.weight" in refused(capsys, "spa", options)


def test_a_model_that_cannot_be_reproduced_is_refused(tmp_path, prepared, capsys):
    folder = write_model(tmp_path / "model", "mamba")
    options = {**prepared[1], "output_dir": tmp_path / "run", "model.path": folder}
    assert "Mamba" in refused(capsys, "spa", options)


def test_an_output_folder_with_another_run_is_refused(tmp_path, prepared, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text(
        json.dumps({"algorithm": "spa", "settings": {"beta": 0.1}, "finished": {}})
    )
    options = {**prepared[1], "output_dir": tmp_path / "run"}
    assert "already holds a run; continue it with --resume" in refused(capsys, "spa", options)
    assert "holds another run and cannot be resumed" in refused(capsys, "spa", options, "--resume")


def test_too_little_disk_space_is_said_before_training(tmp_path, prepared, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    options = {**prepared[1], "output_dir": tmp_path / "run"}
    assert "of disk space left" in refused(capsys, "spa", options)


def test_a_disk_that_fills_up_is_one_line_and_the_run_can_go_on(
    tmp_path, prepared, capsys, monkeypatch
):
    from prefalign import run_folder

    write = run_folder.write_json

    def full(path, value):
        if path.name == "state.json" and value["finished"]:
            raise OSError(28, "No space left on device", str(path))
        write(path, value)

    options = {**prepared[1], "output_dir": tmp_path / "run", "iterations": 0}
    options |= {"evaluation.control": "false", "data.prompts": ""}
    del options["evaluation.all_labels"]
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_json", full)
        assert "no disk space left" in refused(capsys, "spa", options)
    assert cli.main(["spa", *arguments(options), "--resume"]) == 0


def test_prompts_among_the_labelled_pairs_are_only_a_warning(tmp_path, prepared, capsys, caplog):
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    options = {**prepared[1], "output_dir": tmp_path / "run", "data.prompts": source}
    options["model.path"] = "./nowhere-else"
    assert "there is no such folder" in refused(capsys, "spa", options)
