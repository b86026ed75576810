"""bench/fuse_trl.py: two runs of TRL's DPO compared, and what it says of runs that differ."""

import inspect
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from prefalign.integrations import trl as integration

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'prefalign[trl]'")
if not trl.__version__.startswith(tuple(f"{version}." for version in integration.TESTED)):
    pytest.skip(f"TRL {trl.__version__} is not supported", allow_module_level=True)
if trl.__version__.startswith("1.15."):
    pytest.skip("TRL 1.15's own op has no CPU path to compare with", allow_module_level=True)

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return runpy.run_path(str(BENCH / "fuse_trl.py"))


def test_two_runs_are_compared(tmp_path):
    options = ["equality", "--cases", "DPO sigmoid", "--steps", "2", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(BENCH / "fuse_trl.py"), *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "fuse_equality.json").read_text())
    assert saved["facts"]["trl"] == trl.__version__ and saved["facts"]["revision"]
    found = saved["results"]["DPO sigmoid"]
    assert found["steps"] == len(found["losses"]["trl"]) == 2
    assert {"loss", "grad_norm", "entropy", "rewards/margins"} <= set(found["metrics"])
    assert not any("runtime" in name for name in found["metrics"])
    row = (tmp_path / "fuse_equality.md").read_text().splitlines()[2]
    assert row.startswith("| DPO sigmoid | 2 |") and row.endswith("| yes |")
    assert done.stdout.startswith(row)


def test_every_loss_of_trls_is_among_the_cases(bench):
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(bench["DPO_LOSSES"])
    assert {case.split()[0] + "Trainer" for case in bench["CASES"]} == set(integration.TRAINERS)


def logged(**changes):
    steps = [
        {"step": 1, "loss": 0.5, "grad_norm": 1.0},
        {"step": 2, "loss": 40.0, "grad_norm": 2.0},
    ]
    for name, (step, difference) in changes.items():
        steps[step - 1][name] += difference
    return {"logged": steps}


def test_a_difference_is_found_where_it_is(bench):
    found = bench["compare"](logged(loss=(2, 8e-4), grad_norm=(1, 3e-6)), logged())
    assert found["loss"]["step"] == 2 and found["loss"]["value"] == 40
    assert found["loss"]["absolute"] == pytest.approx(8e-4)
    assert found["loss"]["difference"] == pytest.approx(2e-5)  # of a value above 1, a part
    assert found["grad_norm"]["difference"] == pytest.approx(3e-6)
    nan = bench["compare"](logged(loss=(1, float("nan"))), logged())
    assert nan["loss"]["step"] == 1 and nan["loss"]["difference"] == float("inf")
    with pytest.raises(ValueError, match="alone logs.*'kl'"):
        bench["compare"](
            {"logged": [{**logged()["logged"][0], "kl": 0}]}, {"logged": logged()["logged"][:1]}
        )
    with pytest.raises(ValueError, match="1 and 2 rows"):
        bench["compare"]({"logged": logged()["logged"][:1]}, logged())


@pytest.mark.parametrize(
    "difference, own, said",
    [
        (9e-6, [], "yes"),
        (2e-5, [1e-5, 3e-5], "grad_norm: as TRL and itself"),
        (2e-5, [1e-5, 1.5e-5], "NO"),
        (float("nan"), [1e-5], "NO"),
    ],
)
def test_what_is_beyond_the_bound_is_compared_with_trl_itself(bench, difference, own, said):
    compare = bench["compare"]
    found = {
        "metrics": compare(logged(grad_norm=(1, difference)), logged()),
        "controls": [compare(logged(grad_norm=(1, x)), logged()) for x in own],
        "steps": 2,
    }
    assert bench["verdict"](found) == said
    assert f"| {said} |" in bench["equality_table"]({"DPO sigmoid": found})
