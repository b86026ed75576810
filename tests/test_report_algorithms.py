"""The reports of PLE, dpo and sft: each shows what its rows hold, and says who wins."""

import json
import re

import pytest
from reports import (
    HIGH,
    HOSTILE,
    LOW,
    MIDDLE,
    PLE_MODELS,
    Page,
    assert_self_contained,
    make_ple_run,
    make_run,
    make_tuning_run,
    write_evaluation,
    write_lines,
)

from prefalign.report import summary_table, write_report
from prefalign.report_layouts import LAYOUTS, layout_of
from prefalign.report_samples import SAMPLES
from prefalign.run_figures import read_run


def rewrite(path, change):
    """Apply ``change`` to each row of a file of lines; rows that become None go."""
    rows = [change(json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    write_lines(path, [row for row in rows if row is not None])


def titles(page):
    return [label.split(". ")[0] for label in page.plots]


def test_report_of_ple(tmp_path):
    run = make_ple_run(tmp_path / "run")
    page = Page(write_report(run))
    assert_self_contained(page)
    assert "Not in this report" not in page.text
    table = {row[0]: row[1:] for row in page.rows}
    assert table["model"][0] == "win rate against base"
    assert table["RAFT-4"] == ["1.000 ± 0.010", "1.000", "17.2", "0.0 %", "12"]
    assert table["iteration"] == [
        "threshold τ", "ranked", "guided ahead", "reward, plain", "reward, guided", "examples",
        "mean tokens", "length ratio", "cut at limit",
    ]  # fmt: skip
    assert table["2"] == [
        "0.350", "30.0 %", "60.0 %", "0.600", "0.700", "30", "19.0", "0.90", "6.2 %"
    ]  # fmt: skip
    # No baseline here has a finite threshold; RAFT has no guided responses and ranks nothing.
    assert table["raft/iteration-2"] == ["-", "0.600", "-", "30", "19.0", "6.2 %"]
    assert table["ranking-only/iteration-1"][0] == "100.0 %"
    assert titles(page) == [
        "Win rate against base",
        "Mean reward",
        "Reward of guided and plain responses",
        "Length of guided and plain responses",
        "Pairs ranked",
        "Response length",
        "Responses cut at the length limit",
        "Threshold τ",
        "Pairs ranked in training",
        "Guided over plain in training",
        "Loss of the iterations",
        "Loss of SFT",
        "Reward of plain responses, by method",
        "Reward of guided responses, by method",
    ]
    plots = dict(zip(titles(page), page.plots, strict=True))
    assert "PLE 2 1.000 at a mean of 17.2 tokens" in plots["Win rate against base"]
    assert "RAFT-4 1.000 at a mean of 17.2 tokens" in plots["Mean reward"]
    rewards = plots["Reward of guided and plain responses"]
    assert "guided responses, iteration 2 0.700" in rewards
    assert "plain responses, iteration 1 0.500" in rewards
    lengths = plots["Length of guided and plain responses"]
    assert "guided responses, iteration 1 21.000" in lengths
    assert "plain responses, iteration 2 12.000" in lengths
    assert "iteration 1 25.0 % ranked" in plots["Pairs ranked"]
    # The baselines' stages are in no curve of the algorithm's own.
    assert plots["Loss of the iterations"].count("iteration") == 1 + 2
    assert "SFT from 1.95 to 1.4." in plots["Loss of SFT"]
    assert "iteration 1 from -0.9 to 0.2" in plots["Guided over plain in training"]
    assert "RAFT-4, iteration 2 0.600" in plots["Reward of plain responses, by method"]
    assert "RAFT-4" not in plots["Reward of guided responses, by method"]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_verdict_of_ple(tmp_path):
    text = " ".join(summary_table(make_ple_run(tmp_path)).split())
    won = "it wins 1.000 ± 0.000 of the prompts."
    for sentence in (
        "PLE 2 beats base: it wins 1.000 ± 0.010 of the prompts.",
        f"PLE 2 beats base, guided: {won}",
        f"PLE 2 beats SFT: {won}",
        "PLE 2 loses to RAFT-4: it wins 0.000 ± 0.000 of the prompts.",
        "PLE 2 cannot be told apart from PLE, ranking only: it wins 0.500 ± 0.000 of the prompts.",
        f"PLE 2 beats DPO, guided over plain: {won}",
    ):
        assert sentence in text
    assert "PLE 1:" not in text
    assert "control" not in text


def test_ple_that_loses_says_so(tmp_path):
    models = [*PLE_MODELS[:3], ("PLE 1", "iteration-1", HIGH), ("PLE 2", "iteration-2", LOW)]
    models[0] = ("base", "init", MIDDLE)
    text = " ".join(summary_table(make_ple_run(tmp_path, models=models)).split())
    assert "PLE 2 loses to base: it wins 0.000 ± 0.010 of the prompts." in text
    assert "PLE 2 cannot be told apart from base, guided" in text
    assert "It got worse after PLE 1: from 1.000 against base to 0.000." in text


def test_summary_of_ple(tmp_path):
    table = summary_table(make_ple_run(tmp_path))
    assert max(map(len, table.splitlines())) <= 100
    models, iterations, baselines, _ = table.split("\n\n")
    assert "win rate against base" in models.splitlines()[0]
    assert re.split(r"  +", iterations.splitlines()[1]) == [
        "1", "0.700", "25.0 %", "50.0 %", "0.500", "0.600", "18.0", "3.1 %"
    ]  # fmt: skip
    assert re.split(r"  +", baselines.splitlines()[1]) == [
        "raft/iteration-1", "-", "0.500", "-", "18.0", "3.1 %"
    ]  # fmt: skip
    assert len(baselines.splitlines()) == 1 + 3 * 2


def test_released_variant_has_no_threshold_and_no_pairs(tmp_path):
    run = make_ple_run(tmp_path, variant="released")
    page = Page(write_report(run))
    assert "Not in this report" not in page.text
    header = next(row for row in page.rows if row[0] == "iteration")
    assert not {"threshold τ", "ranked", "guided ahead"} & {*header}
    assert {"Margins in training", "Accuracy in training"} <= {*titles(page)}
    assert not {"Threshold τ", "Pairs ranked", "Pairs ranked in training"} & {*titles(page)}


def test_samples_of_ple(tmp_path):
    run = make_ple_run(tmp_path)
    page = Page(write_report(run))
    assert page.text.count("init says") == page.text.count("sft says") == SAMPLES
    assert page.text.count("iteration-2 says") == SAMPLES
    assert "iteration-1 says" not in page.text and "raft says" not in page.text
    (run / "evaluation.json").unlink()
    page = Page(write_report(run))
    assert "guided and plain responses of iteration-2" in page.text
    assert "judge" not in page.text
    assert page.text.count("reward 0.600") == page.text.count("reward 0.500") == SAMPLES


def test_ple_in_the_middle_of_a_run(tmp_path):
    run = make_ple_run(tmp_path)
    (run / "evaluation.json").unlink()
    rewrite(run / "gauge.jsonl", lambda row: None if row["stage"].startswith("dpo") else row)
    (run / "raft" / "iteration-2" / "responses.jsonl").unlink()
    missing = Page(write_report(run)).text.split("Not in this report")[1]
    assert "gauge.jsonl has no line on dpo/iteration-1." in missing
    assert "raft/iteration-2/responses.jsonl is missing." in missing
    rewrite(run / "gauge.jsonl", lambda row: None if row["stage"] == "raft/iteration-2" else row)
    for path in (run / "raft" / "iteration-2", run / "dpo" / "iteration-1"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (run / "dpo" / "iteration-2" / "responses.jsonl").unlink()
    (run / "dpo" / "iteration-2").rmdir()
    missing = Page(write_report(run)).text.split("Not in this report")[1]
    assert "These baselines have not begun all iterations: raft, dpo." in missing
    assert "No verdict: there is no evaluation." in summary_table(run)


def test_warnings_of_a_baseline(tmp_path):
    run = make_ple_run(tmp_path)
    rewrite(
        run / "gauge.jsonl",
        lambda row: row | {"warnings": ["too long"] if row["stage"] == "raft/iteration-2" else []},
    )
    assert "warning: raft/iteration-2: too long" in summary_table(run)


def test_ple_without_iterations_is_judged_by_its_sft(tmp_path):
    run = make_ple_run(tmp_path, models=PLE_MODELS[:3])
    assert "SFT beats base: it wins 1.000 ± 0.010 of the prompts." in summary_table(run)


@pytest.mark.parametrize(
    ("algorithm", "name", "curves"),
    [
        ("dpo", "DPO", ["Margins in training", "Accuracy in training", "Loss"]),
        ("sft", "SFT", ["Loss per token"]),
    ],
)
def test_report_of_one_stage(tmp_path, algorithm, name, curves):
    run = make_tuning_run(tmp_path, algorithm)
    page = Page(write_report(run))
    assert_self_contained(page)
    assert "Not in this report" not in page.text
    assert titles(page) == ["Win rate against base", "Mean reward", *curves]
    assert {row[0] for row in page.rows} == {"model", "base", name}
    assert page.text.count(f"{algorithm} says") == page.text.count("init says") == SAMPLES
    table = summary_table(run)
    assert len(table.split("\n\n")) == 2
    assert table.endswith(f"\n\n{name} beats base: it wins 1.000 ± 0.010 of the prompts.")


@pytest.mark.parametrize(
    ("rewards", "outcome"), [(LOW, "loses to"), (MIDDLE, "cannot be told apart from")]
)
def test_one_stage_that_gains_nothing(tmp_path, rewards, outcome):
    run = make_tuning_run(tmp_path, "dpo", rewards=rewards)
    assert f"DPO {outcome} base: it wins" in summary_table(run)


def test_one_stage_that_was_not_evaluated(tmp_path):
    run = make_tuning_run(tmp_path, "sft")
    write_evaluation(run, [("base", "init", MIDDLE)])
    assert "No verdict: no trained model has been evaluated." in summary_table(run)
    (run / "evaluation.json").unlink()
    assert "evaluation.json is missing." in Page(write_report(run)).text
    assert "No verdict: there is no evaluation." in summary_table(run)


@pytest.mark.parametrize("algorithm", ["ple", "dpo", "sft"])
def test_nothing_of_the_data_is_markup(tmp_path, algorithm):
    if algorithm == "ple":
        run = make_ple_run(tmp_path, text=HOSTILE)
    else:
        run = make_tuning_run(tmp_path, algorithm, text=HOSTILE)
    html = write_report(run).read_text("utf-8")
    page = Page(run / "report.html")
    assert_self_contained(page)
    assert "<script" not in html.lower()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202d\u202e\ud800-\udfff]", html)
    assert any("win rate against <script>" in row[1] for row in page.rows)
    table = summary_table(run)
    assert "\x00" not in table and "\x1b" not in table
    assert max(map(len, table.split("\n\n")[0].splitlines())) <= 100


@pytest.mark.parametrize("algorithm", ["spa", "ple", "dpo", "sft", None, ["ple"], "other"])
def test_algorithm_that_the_state_does_not_say(tmp_path, algorithm):
    """Where the state is lost, the rows say what the run is."""
    run = make_ple_run(tmp_path / "ple")
    (run / "state.json").write_text(json.dumps({"algorithm": algorithm}))
    known = isinstance(algorithm, str) and algorithm in LAYOUTS
    assert layout_of(read_run(run)) is LAYOUTS[algorithm if known else "ple"]
    assert_self_contained(Page(write_report(run)))
    assert "PLE 2 beats base" in summary_table(run)
    spa = make_run(tmp_path / "spa", prompts=12)
    (spa / "state.json").unlink()
    assert layout_of(read_run(spa)) is LAYOUTS["spa"]
    (spa / "gauge.jsonl").unlink()
    assert layout_of(read_run(spa)) is LAYOUTS["spa"]
    dpo = make_tuning_run(tmp_path / "dpo", "dpo")
    (dpo / "state.json").unlink()
    assert layout_of(read_run(dpo)) is LAYOUTS["dpo"]


FILES = [
    "config.yaml",
    "state.json",
    "metrics.jsonl",
    "gauge.jsonl",
    "evaluation.json",
    "iteration-1/responses.jsonl",
    "iteration-2/pairs.jsonl",
    "raft/iteration-2/responses.jsonl",
    "evaluation/init.jsonl",
    "evaluation/raft.jsonl",
]


@pytest.mark.parametrize("name", FILES)
def test_any_file_may_be_missing(tmp_path, name):
    run = make_ple_run(tmp_path)
    (run / name).unlink()
    page = Page(write_report(run))
    assert_self_contained(page)
    assert summary_table(run)
    assert name in page.text.split("Not in this report")[1]


BROKEN = {
    "empty": b"",
    "cut short": b'[{"key": "init", "st',
    "not UTF-8": b'{"a": \xff\n',
    "of other types": b'[]\nnull\n{"stage": [], "key": 3, "tokens": 3, "guided": {}}\n',
    "wrong places": b'{"stage": "a/b/iteration-1", "guided": [1], "tokens": ["x"]}\n'
    b'{"stage": "../iteration-1", "threshold": "high"}\n{"stage": "raft/iteration-x"}\n',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("make", [make_ple_run, lambda folder: make_tuning_run(folder, "dpo")])
def test_files_may_be_broken(tmp_path, make, content):
    run = make(tmp_path)
    for name in FILES:
        if (run / name).is_file():
            (run / name).write_bytes(content)
    assert_self_contained(Page(write_report(run)))
    assert summary_table(run)


def test_values_that_are_not_numbers(tmp_path):
    run = make_ple_run(tmp_path)
    rewrite(
        run / "gauge.jsonl",
        lambda row: row | {"threshold": "high", "plain_reward": float("nan"), "mean_tokens": None},
    )
    table = json.loads((run / "evaluation.json").read_text())
    table[4] |= {"win_rate": None, "mean_tokens": "many"}
    table.append({"name": "no key"})
    table.append({"name": "key of another type", "key": 3, "win_rate": 0.5})
    (run / "evaluation.json").write_text(json.dumps(table))
    page = Page(write_report(run))
    cells = {row[0]: row[1:] for row in page.rows}
    assert cells["PLE 2"] == ["-", "0.750", "-", "0.0 %", "12"]
    assert "threshold τ" not in cells["iteration"] and "ranked" in cells["iteration"]
    assert "no key" not in cells and cells["key of another type"][0] == "0.500"
    assert "PLE 2 was not compared with base." in page.text
