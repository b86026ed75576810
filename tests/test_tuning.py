"""``prefalign sft`` and ``prefalign dpo``: whole runs, resumed; what each command's help says."""

import json

import pytest
import torch
from training import eager_sum
from whole_runs import (
    WORDS,
    final_weights,
    losses,
    pairs,
    progress,
    refused,
    reward,
    run_here,
    write_jsonl,
    write_model,
)

from prefalign import cli
from prefalign.config import LoraSettings
from prefalign.loading import load_model, load_tokenizer
from prefalign.packed_trainer import PackedTrainer
from prefalign.run_folder import read_rows


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Data for both commands, and the options that they share."""
    folder = tmp_path_factory.mktemp("tuning")
    write_model(folder / "model")
    write_jsonl(folder / "pairs.jsonl", pairs(8))
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(8)]
    write_jsonl(folder / "sft.jsonl", rows)
    write_jsonl(folder / "eval.jsonl", [{"prompt": f"what is {w}?"} for w in WORDS[:3]])
    shared = {
        "model.path": folder / "model",
        "data.max_length": 64,
        "data.max_prompt_length": 32,
        "training.learning_rate": 1e-3,
        "training.batch_size": 2,
        "training.epochs": 2,
        "training.save_steps": 1,
        "training.logging_steps": 1,
        "training.max_tokens": 40,
        "generation.max_new_tokens": 5,
        "generation.chunk_size": 2,
        "evaluation.reward": reward("letters"),
        "evaluation.prompts": folder / "eval.jsonl",
    }
    return folder, {
        "sft": {**shared, "data.sft": folder / "sft.jsonl"},
        "dpo": {
            **shared,
            "training.batch_size": 1,
            "training.epochs": 1,
            "data.preferences": folder / "pairs.jsonl",
            "loss.loss_type": "sigmoid",
            "loss.beta": 0.5,
            "loss.label_smoothing": 0.25,
        },
    }


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("command", "name"), [("sft", "SFT"), ("dpo", "DPO")])
def test_a_whole_run_and_one_that_is_resumed(prepared, monkeypatch, command, name):
    folder, options = prepared
    whole, parts = folder / command, folder / f"{command}-parts"
    printed = run_here(command, {**options[command], "output_dir": whole})
    lines = printed.splitlines()
    assert any(line.startswith("base  ") for line in lines)
    assert any(line.startswith(f"{name}  ") for line in lines)
    assert printed.rstrip().endswith(str(whole / "report.html"))
    table = json.loads((whole / "evaluation.json").read_text())
    assert [(row["key"], row["steps"]) for row in table] == [("init", 0), (command, 8)]
    assert not list(whole.rglob("checkpoint-*"))

    step = PackedTrainer.training_step
    calls = []

    def stops(self, *args):
        calls.append(self)
        if len(calls) == 6:
            raise Stopped  # in step 6, after the checkpoint of step 5
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PackedTrainer, "training_step", stops)
        with pytest.raises(Stopped):
            run_here(command, {**options[command], "output_dir": parts})
    assert [path.name for path in parts.rglob("checkpoint-*")] == ["checkpoint-5"]
    run_here(command, {**options[command], "output_dir": parts}, "--resume")
    assert torch.equal(final_weights(whole, command), final_weights(parts, command))
    assert losses(whole) == losses(parts) and len(losses(whole)) == 8
    assert (whole / "evaluation.json").read_text() == (parts / "evaluation.json").read_text()
    assert progress(whole) == progress(parts)


def test_dpo_is_smoothed_and_its_reference_is_scored_once(prepared):
    folder, options = prepared
    run_here("dpo", {**options["dpo"], "output_dir": folder / "smoothed"})
    scored = (folder / "smoothed" / "dpo" / "reference").glob("*.jsonl")
    found = [row["logps"] for path in sorted(scored) for row in read_rows(path)]
    model = load_model(str(folder / "model"), dtype="float32", device="cpu")
    model.set_attn_implementation("eager")
    tokenizer = load_tokenizer(str(folder / "model"))

    def ids(text, *end):
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], *end]

    def logps(model, row):
        return [
            eager_sum(model, ids(row["prompt"]), ids(row[side], tokenizer.eos_token_id)).item()
            for side in ("chosen", "rejected")
        ]

    with torch.no_grad():
        expected = [logps(model, row) for row in pairs(8)]
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-4)
    metrics = read_rows(folder / "smoothed" / "metrics.jsonl")
    assert metrics[0]["rewards/margins"] == 0
    assert max(abs(row["rewards/margins"]) for row in metrics) > 0.1
    for row in metrics:  # of one pair each
        z = torch.tensor(row["rewards/margins"], dtype=torch.float64)
        loss = -0.75 * torch.nn.functional.logsigmoid(z) - 0.25 * torch.nn.functional.logsigmoid(-z)
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_a_sum_of_losses_without_a_reference_is_trained_unscored(prepared):
    folder, options = prepared
    changes = {
        "output_dir": folder / "free",
        "loss.loss_type": '["simpo", "sft"]',
        "loss.loss_weights": "[1.0, 0.5]",
        "loss.label_smoothing": 0,
        "loss.loss_options": '{"simpo_gamma": 0.2}',
        "training.batch_size": 2,
        "training.learning_rate": 1e-2,
    }
    run_here("dpo", {**options["dpo"], **changes})
    assert not (folder / "free" / "dpo" / "reference").exists()
    rows = read_rows(folder / "free" / "metrics.jsonl")
    assert len(rows) == 4 and rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["rewards/chosen"] == pytest.approx(0.5 * rows[0]["logps/chosen"])


@pytest.mark.parametrize("cached", [False, True])
def test_a_model_that_is_given_as_an_adapter_is_its_own_reference(prepared, cached):
    folder, options = prepared
    path = folder / f"adapter-{cached}"
    model = load_model(str(folder / "model"), dtype="float32", lora=LoraSettings(r=2))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    load_tokenizer(str(folder / "model")).save_pretrained(path)
    changes = {"model.path": path, "output_dir": folder / f"run-{cached}"}
    if cached:
        changes["reference_cache"] = folder / "cache"
    run_here("dpo", {**options["dpo"], **changes})
    metrics = read_rows(folder / f"run-{cached}" / "metrics.jsonl")
    assert metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert metrics[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("command", "option", "value", "message"),
    [
        ("sft", "data.sft", "", "data.sft: expected a dataset of demonstrations, got ''"),
        ("sft", "training.batch_size", "0", "training.batch_size: expected 1 or more, got 0"),
        ("sft", "loss.beta", "1", "unrecognized arguments: --loss.beta 1"),
        ("dpo", "data.preferences", "", "data.preferences: expected a dataset, got ''"),
        ("dpo", "loss.loss_type", "zigzag", "loss.loss_type: expected one of 'sigmoid', "),
        ("dpo", "loss.loss_type", '["aot", "dpo"]', "loss.loss_type: expected one of 'sigmoid', "),
        ("dpo", "loss.loss_type", "hinge", "loss.label_smoothing: expected 0 with"),
        ("dpo", "loss.f_divergence_type", "kl", "loss.f_divergence_type"),
        ("dpo", "loss.loss_options", '{"tau": 1}', "loss.loss_options: loss_type 'sigmoid' takes"),
        ("dpo", "loss.beta", "0", "loss.beta: expected more than 0, got 0.0"),
        ("dpo", "loss.label_smoothing", "0.6", "loss.label_smoothing: expected from 0 to 0.5"),
        ("dpo", "evaluation.prompts", "null", "evaluation.prompts: expected a dataset of prompts"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, prepared, capsys, command, option, value, message):
    options = {**prepared[1][command], "output_dir": tmp_path / "run", option: value}
    assert message in refused(capsys, command, options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "groups", "defaults"),
    [
        (
            "ple",
            ("The model:", "The data:", "Training:", "Generation:", "What scores the responses:",
             "The threshold and the losses:", "The released code's algorithm:"),
            ("default: 0.2", "default: 0.9", "default: [0.1, 0.2, 0.3, 0.4,", "default: mean",
             "default: 8", "default: auto", "default: 16384"),
        ),
        ("dpo", ("The preference loss",), ("default: sigmoid", "default: 0.1", "default: 5e-07")),
        ("sft", ("The data:",), ("default: 1e-05", "default: runs/sft")),
        ("bench", (), ("default: ",)),
    ],
)  # fmt: skip
def test_help_has_groups_and_defaults(capsys, command, groups, defaults):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (*groups, *defaults):
        assert part in text, part
    assert "``" not in text


def test_the_overview_names_every_command(capsys):
    assert cli.main([]) == 2
    text = " ".join(capsys.readouterr().out.split())
    for name, part in (
        ("ple", "Progressively Label Enhancement"), ("dpo", "Preference optimisation"),
        ("sft", "Supervised fine-tuning on demonstrations"), ("spa", "Spread Preference Annot"),
    ):  # fmt: skip
        assert name in text and part in text
