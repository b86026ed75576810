"""The microbenchmarks at tiny shapes: what they write, what their gate stops, whom they name."""

import argparse
import dataclasses
import json

import pytest
import torch

from prefalign import cli
from prefalign.benchmarks import gate, measure, runner, suites
from prefalign.benchmarks.cases import chunked_step, step
from prefalign.benchmarks.options import add_options
from prefalign.benchmarks.providers import BARE, EAGER, OURS, Provider
from prefalign.benchmarks.suites import SUITES

CPU = torch.device("cpu")


def options(*arguments):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(["--quick", "--rounds", "2", "--device", "cpu", *map(str, arguments)])


def shape_of(suite):
    return next(shape for shape in suite.shapes if "quick" in shape.sets)


def with_providers(monkeypatch, name, keep, *more):
    """Leave a suite the providers that ``keep`` names, and add more."""
    kept = tuple(p for p in SUITES[name].providers if p.name in keep)
    changed = dataclasses.replace(SUITES[name], providers=kept + more)
    monkeypatch.setitem(suites.SUITES, name, changed)


def missing(case):
    import a_peer_that_nobody_has  # noqa: F401


def half(case):
    """Eager torch, but for the gradient: right log-probs, wrong derivatives."""
    eager = next(p for p in SUITES["head-frozen"].providers if p.role == EAGER)
    forward = eager.build(case)
    return lambda: {"logps": forward()["logps"].mul(0.5) + forward()["logps"].detach().mul(0.5)}


def test_a_run_writes_json_a_table_and_a_plot_and_names_who_is_missing(tmp_path, monkeypatch):
    names = ("prefalign", "eager", "torch native", "bare GEMMs")
    peers = Provider("Absent", missing, package="absent"), Provider("Half", half)
    with_providers(monkeypatch, "head-frozen", names, *peers)
    assert runner.run(options("--out", tmp_path, "--suite", "head-frozen")) == 0
    results = json.loads((tmp_path / "head-frozen.json").read_text())
    assert [case["dtype"] for case in results["cases"]] == ["float32", "bfloat16"]
    for case in results["cases"]:
        rows = {row["provider"]: row for row in case["rows"]}
        assert rows["Absent"]["status"] == "missing" and "a_peer_that" in rows["Absent"]["reason"]
        assert rows["Half"]["status"] == "wrong" and "ms" not in rows["Half"]
        ours = rows["prefalign"]
        assert ours["status"] == "ok" and ours["rounds"] >= 2
        assert ours["ms"]["p10"] <= ours["ms"]["median"] <= ours["ms"]["p90"]
        assert ours["ratio"] > 0 and ours["share"] > 0
        assert set(ours["errors"]) == {"logps", "dhidden"}
        logits = 64 * 1000 * (4 if case["dtype"] == "float32" else 2)
        assert rows["eager"]["memory"]["peak"] >= logits
    assert results["versions"]["torch"] == torch.__version__ and results["revision"]
    page = (tmp_path / "README.md").read_text()
    assert "Absent" in page and "head-frozen.png" in page and "as accurate" in page
    assert (tmp_path / "head-frozen.png").read_bytes().startswith(b"\x89PNG")
    # Another dtype's case stays where one is measured again.
    again = options("--out", tmp_path, "--suite", "head-frozen", "--dtype", "float32")
    assert runner.run(again) == 0
    assert len(json.loads((tmp_path / "head-frozen.json").read_text())["cases"]) == 2


def test_the_run_fails_when_we_are_wrong(tmp_path, monkeypatch, caplog):
    with_providers(monkeypatch, "head-frozen", ("eager",), Provider("prefalign", half, OURS))
    arguments = ("--out", tmp_path, "--suite", "head-frozen", "--dtype", "float32", "--no-memory")
    assert runner.run(options(*arguments)) == 1
    assert "prefalign is wrong" in caplog.text
    assert "prefalign was not timed" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_gives_its_outputs_and_we_keep_the_contract(name):
    suite = SUITES[name]
    for dtype in suite.dtypes:
        case = suite.make(shape_of(suite), dtype, CPU)
        reference = next(p for p in suite.providers if p.role == EAGER)
        exact = chunked_step(reference.build, case.to(torch.float64), 10)
        eager = step(reference.build(case), case)
        for provider in (p for p in suite.providers if p.role == OURS):
            ours = step(provider.build(case), case)
            assert set(exact) == set(ours) >= {f"d{x}" for x in case.wrt}
            assert gate.verdict(gate.errors(ours, eager, exact)) == gate.OK
        assert suite.work(case) > 0
        for bare in (p for p in suite.providers if p.role == BARE):
            step(bare.build(case), case)


def test_the_exact_answer_is_the_same_in_chunks():
    suite = SUITES["head-trained"]
    case = suite.make(shape_of(suite), torch.float32, CPU).to(torch.float64)
    eager = next(p for p in suite.providers if p.role == EAGER)
    whole, parts = step(eager.build(case), case), chunked_step(eager.build, case, 7)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-12)


def test_the_gate_tells_coarse_from_wrong():
    exact = torch.linspace(-1, 1, 11, dtype=torch.float64)
    eager = (exact + 1e-4).float()
    verdicts = [
        gate.verdict(gate.errors({"x": (exact + e).float()}, {"x": eager}, {"x": exact}))
        for e in (0, 1.9e-4, 3e-4, 0.2, torch.nan)
    ]
    assert verdicts == ["ok", "ok", "coarse", "wrong", "wrong"]


def test_memory_is_what_is_held_beyond_outputs():
    x = torch.ones(1 << 18, requires_grad=True)  # 1 MiB

    def forward():
        return {"y": (x * 2).exp().sum()}

    def whole():
        outputs = forward()
        return {"y": outputs["y"].detach(), "dx": torch.autograd.grad(outputs["y"], x)[0]}

    found = measure.memory(whole, forward, 4, CPU)
    assert 1 << 20 <= found["saved"] <= 1.1 * (1 << 20)
    assert 2 << 20 <= found["peak"] <= 3.1 * (1 << 20)


def test_the_command_line_knows_it(capsys, tmp_path):
    assert cli.main(["bench", "--list"]) == 0
    assert "head-frozen" in capsys.readouterr().out
    assert cli.main(["bench", "--suite", "heads"]) == 2
    assert "suite: expected one of head-forward" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["bench", "--device", "cuda"]) == 2
        assert "torch sees no GPU" in capsys.readouterr().err
