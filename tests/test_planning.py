"""``prefalign plan``, ``--plan``, and the check before a run: what is said, done and kept."""

import json
import re

import pytest
import torch
from memory import CONFIGS
from ple_run import prepare as prepare_ple
from spa_run import prepare as prepare_spa
from whole_runs import arguments, final_weights, refused, run_here, write_jsonl, write_model

from prefalign import cli, planning
from prefalign.packed_trainer import PackedTrainer
from prefalign.packing import Group
from prefalign.tuning import DPO

RESERVE = 2**30


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    CONFIGS["llama"]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    rows = [
        {"prompt": "p" * 40 + str(i), "chosen": "a" * (30 + i), "rejected": "b" * (50 - i)}
        for i in range(16)
    ]
    return {
        "model.path": write_model(folder / "model"),
        "data.preferences": write_jsonl(folder / "pairs.jsonl", rows),
        "data.max_length": 128,
        "data.max_prompt_length": 64,
        "training.batch_size": 8,
        "training.learning_rate": 1e-3,
        "training.max_tokens": 2048,
        "training.save_steps": 1,
        "training.logging_steps": 1,
    }


def run_plan(capsys, options, command="plan", *flags):
    capsys.readouterr()
    status = cli.main([command, *arguments(options), *flags])
    return status, capsys.readouterr().out


# prefalign plan


PLAN = {"device": "cpu", "max_length": 512, "max_prompt_length": 128, "training.batch_size": 4}


@pytest.mark.parametrize("spelling", ["gpu-memory", "gpu_memory"])
def test_a_plan_that_fits(config, capsys, spelling):
    status, said = run_plan(capsys, {"model": config, **PLAN, spelling: "2GiB"})
    assert status == 0
    for text in (
        "2 M parameters, 2 M of them trained", "4 examples", "128 + 384 + 384",
        "dpo: first pass", "dpo: update", "gradients", "Fits:", "1.00 GiB of 2.00 GiB",
    ):  # fmt: skip
        assert text in said
    assert "What fits" not in said


def test_options_that_are_printed_work_in_the_same_command(config, capsys):
    options = {"model": config, **PLAN, "gpu_memory": f"{RESERVE + 75 * 2**20}"}
    status, said = run_plan(capsys, options)
    assert status == 1 and "Does not fit:" in said
    assert "learns the same" in said and "learns otherwise" in said
    lines = [line for line in said.splitlines() if "forward passes a token" in line]
    assert len(lines) >= 4
    assert any("--lora.r 16" in line for line in lines)
    for line in lines:
        given = line.split("a token")[1].split()
        assert given and given[0].startswith("--")
        status, said = run_plan(capsys, options, "plan", *given)
        assert status == 0, (line, said)


def test_nothing_fits(config, capsys):
    status, said = run_plan(capsys, {"model": config, **PLAN, "gpu_memory": "1GiB"})
    assert status == 1 and said.rstrip().endswith("Nothing that can be set makes it fit.")


def test_lengths_come_from_the_data(options, capsys):
    given = {"model": options["model.path"], "preferences": options["data.preferences"]}
    status, said = run_plan(capsys, {**given, "device": "cpu", "gpu_memory": "2GiB"})
    assert status == 0 and "16 examples; the longest has 41 + " in said


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model", "./nowhere", "./nowhere: there is no such folder"),
        ("model", "", "model: expected a model's folder or name, got ''"),
        ("gpu_memory", "lots", "gpu_memory: expected a size such as 24GiB, got 'lots'"),
        ("max_prompt_length", "512", "max_prompt_length: expected from 1 to less than max_length"),
        ("training.batch_size", "0", "training.batch_size: expected 1 or more, got 0"),
        ("training.max_tokens", "0", "training.max_tokens: expected 1 or more, got 0"),
        ("training.optimizer", "adafactor", "training.optimizer: can plan for"),
        ("training.arguments", '{"fsdp": "full_shard"}', "FSDP or DeepSpeed shards is not planned"),
        ("reference", "base", "reference: expected logps or copy"),
        ("load_in_4bit", "true", "lora.r: expected 1 or more"),
        ("device", "tpu", "device"),
    ],
)
def test_a_wrong_option_of_a_plan_is_one_line(config, capsys, option, value, message):
    options = {"model": config, **PLAN, "gpu_memory": "2GiB", option: value}
    assert message in refused(capsys, "plan", options)


def test_data_that_are_not_there_are_one_line(options, capsys):
    given = {"model": options["model.path"], "device": "cpu", "gpu_memory": "2GiB"}
    assert "./nowhere.jsonl" in refused(capsys, "plan", {**given, "preferences": "./nowhere.jsonl"})


def test_a_cpu_does_not_say_its_memory(config, capsys):
    message = refused(capsys, "plan", {"model": config, **PLAN})
    assert message == "gpu_memory: expected a size such as 24GiB, since no cpu device tells it"


# --plan


@pytest.mark.parametrize("command", ["dpo", "spa", "ple"])
def test_the_plan_of_a_run_writes_nothing(tmp_path, options, capsys, command):
    if command != "dpo":
        options = {"spa": prepare_spa, "ple": prepare_ple}[command](tmp_path / "in")
    given = {**options, "output_dir": tmp_path / "run", "memory.limit": "2GiB"}
    status, said = run_plan(capsys, given, command, "--plan", "cpu")
    assert status == 0 and "Fits:" in said
    assert not (tmp_path / "run").exists()
    assert ("iterations: " in said and "generate" in said) == (command != "dpo")
    given["memory.limit"] = f"{RESERVE + 1000}"
    assert run_plan(capsys, given, command, "--plan", "cpu")[0] == 1


def test_a_run_that_is_there_is_left_as_it_is(tmp_path, options, capsys):
    (tmp_path / "state.json").write_text('{"algorithm": "dpo", "settings": {}, "finished": {}}')
    given = {**options, "output_dir": tmp_path, "memory.limit": "2GiB"}
    assert run_plan(capsys, given, "dpo", "--plan", "cpu", "--overwrite")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


# Before a run


@pytest.fixture(scope="module")
def tight(options):
    """A limit under which the run does not fit, but would with fewer tokens a pass."""
    peaks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "show", lambda request, *_: peaks.append(request) or 0)
        cli.main(["dpo", *arguments(options), "--plan", "cpu"])
    plan = planning.make_plan(peaks[0], planning.fake_from_config(peaks[0].model))
    return f"{RESERVE + int(0.6 * plan.peak)}"


def test_a_run_that_would_not_fit_is_refused_before_anything_is_written(
    tmp_path, options, tight, capsys
):
    given = {**options, "output_dir": tmp_path / "run", "memory.limit": tight}
    message = refused(capsys, "dpo", given)
    assert "predicted for 'dpo: " in message
    found = re.search(r"what fits: --training.max_tokens (\d+) ", message)
    assert not (tmp_path / "run").exists()
    run_here("dpo", {**given, "training.max_tokens": found[1]})  # as it said
    message = refused(
        capsys, "dpo", {**given, "memory.limit": "1GiB", "output_dir": tmp_path / "x"}
    )
    assert "no budget of tokens" in message
    assert not (tmp_path / "x").exists()


def passes_of(monkeypatch):
    """Record the largest pass of training in tokens."""
    seen = []
    step = PackedTrainer.compute_loss

    def record(self, model, inputs, *args, **kwargs):
        seen.append(inputs["batch"].num_tokens)
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PackedTrainer, "compute_loss", record)
    return seen


class Stopped(Exception):
    pass


def test_a_run_is_adapted_and_goes_on_as_it_was(tmp_path, options, tight, monkeypatch, caplog):
    seen = passes_of(monkeypatch)
    given = {**options, "memory.limit": tight, "memory.on_excess": "adapt"}
    whole = tmp_path / "whole"
    run_here("dpo", {**given, "output_dir": whole})
    assert "adapted: --training.max_tokens " in caplog.text
    state = json.loads((whole / "state.json").read_text())
    budget = state["memory"]["changes"]["training.max_tokens"]
    assert max(seen) <= budget < 2048
    assert state["settings"]["training"]["max_tokens"] == 2048  # what was asked for

    def stops(self, *args):
        if self.state.global_step == 1:
            raise Stopped
        return step(self, *args)

    step = PackedTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(PackedTrainer, "training_step", stops)
        with pytest.raises(Stopped):
            run_here("dpo", {**given, "output_dir": tmp_path / "parts"})
    seen.clear()
    # With other memory, the run that was begun goes on.
    more = {"output_dir": tmp_path / "parts", "memory.limit": "8GiB", "memory.on_excess": "refuse"}
    run_here("dpo", {**options, **more}, "--resume")
    assert 0 < max(seen) <= budget
    weights = [final_weights(tmp_path / name, "dpo") for name in ("whole", "parts")]
    assert torch.equal(*weights)


@pytest.mark.parametrize("what", ["warn", "off"])
def test_a_run_goes_on_as_it_is_set(tmp_path, options, tight, monkeypatch, caplog, what):
    seen = passes_of(monkeypatch)
    calls = []
    make = planning.make_plan
    monkeypatch.setattr(planning, "make_plan", lambda *a: calls.append(a) or make(*a))
    given = {**options, "output_dir": tmp_path / "run", "memory.limit": tight}
    run_here("dpo", {**given, "memory.on_excess": what})
    assert len(calls) == (what == "warn")
    assert ("predicted for" in caplog.text) == (what == "warn")
    assert max(seen) > 512


def test_a_cpu_run_without_a_limit_predicts_nothing(tmp_path, options, monkeypatch):
    monkeypatch.setattr(planning, "make_plan", None)
    run_here("dpo", {**options, "output_dir": tmp_path / "run"})


@pytest.mark.parametrize("where", ["make_plan", "fake_from_config", "scoring_budget", "works"])
def test_a_planner_that_fails_does_not_end_a_run(tmp_path, options, monkeypatch, caplog, where):
    def fails(*args, **kwargs):
        raise ZeroDivisionError("no such thing\nas a plan")

    monkeypatch.setattr(*((DPO, where) if where == "works" else (planning, where)), fails)
    given = {**options, "output_dir": tmp_path / "run", "memory.limit": "2GiB"}
    run_here("dpo", given)
    said = "memory: cannot be planned, the run goes on: ZeroDivisionError: no such thing"
    assert said in [record.message for record in caplog.records]


def test_an_optimiser_that_is_not_known_does_not_end_a_run(tmp_path, options, caplog):
    given = {**options, "output_dir": tmp_path / "run", "memory.limit": "2GiB"}
    run_here("dpo", {**given, "training.optimizer": "adafactor"})
    assert "can plan for" in caplog.text


def test_a_bad_limit_is_one_line(tmp_path, options, capsys):
    given = {**options, "output_dir": tmp_path / "run", "memory.limit": "much"}
    assert refused(capsys, "dpo", given).startswith("memory.limit: expected a size such as 24GiB")
    assert not (tmp_path / "run").exists()


def test_groups_that_are_yet_to_come_are_as_long_as_they_may_be(tmp_path):
    from prefalign.spa import SPA
    from prefalign.spa_config import SPASettings

    class Known(SPA):
        def __init__(self):
            self.settings = SPASettings()

    found = Known().awaited([[1], [1, 2, 3]], 2)
    assert [(len(g.prompt_ids), [len(x) for x in g.response_ids]) for g in found] == [
        (3, [300, 300]), (1, [300, 300]),
    ]  # fmt: skip
    assert all(isinstance(group, Group) for group in found)
