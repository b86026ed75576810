"""The report: right figures, no data taken for markup, and a page from any part of a run."""

import json
import re

import matplotlib
import pytest
import yaml
from reports import (
    HOSTILE,
    MODELS,
    Page,
    assert_self_contained,
    make_run,
    write_evaluation,
    write_lines,
)

from prefalign import plots
from prefalign.errors import RunError
from prefalign.report import summary_table, write_report
from prefalign.report_samples import SAMPLES
from prefalign.run_figures import number_of, read_run, text_of


def test_report_of_a_finished_run(tmp_path):
    run = make_run(tmp_path / "run")
    path = write_report(run)
    assert path == run / "report.html"
    assert not list(run.glob("*.partial"))
    page = Page(path)
    assert_self_contained(page)
    table = {row[0]: row[1:] for row in page.rows}
    for name, _, rate, error in MODELS:
        numbers = [f"{rate:.3f} ± {error:.3f}", f"{rate - 1:.3f}", "15.3", "3.4 %", "123"]
        assert table[name] == numbers
    # 120 pairs: a fifth was trained on before there was a threshold, 12 of the others are noisy
    assert table["1"] == ["0.911 of 411", "0.812 of 16", "120", "18.0", "1.30", "2.1 %", "12.5 %"]
    for title in (
        "Win rate against SFT",
        "Accuracy of the judge",
        "Response length",
        "Responses cut at the length limit",
        "The judge's margins",
        "Margins in training",
        "Accuracy in training",
        "Pairs flagged noisy",
        "Threshold of confidence",
    ):
        assert any(label.startswith(f"{title}. ") and len(label) > 30 for label in page.plots), (
            title
        )
    assert "SPA 2 0.712" in page.plots[0]
    assert "Not in this report" not in page.text
    assert page.text.count("reward ") >= 3 * SAMPLES
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert path.read_bytes() == write_report(run).read_bytes()


@pytest.mark.parametrize("evaluated", [True, False])
def test_nothing_of_the_data_is_markup(tmp_path, evaluated):
    run = make_run(tmp_path, text=HOSTILE)
    if not evaluated:
        (run / "evaluation.json").unlink()
    html = write_report(run).read_text("utf-8")
    page = Page(run / "report.html")
    assert_self_contained(page)
    assert "<script" not in html.lower()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202d\u202e\ud800-\udfff]", html)
    assert "{{ 7 * 7 }}" in page.text and "{% raw %}" in page.text
    assert "🙂" in page.text and "␀␛[31m" in page.text
    assert "<script>alert('x')</script>" in page.text
    table = summary_table(run)
    assert "\x00" not in table and "\x1b" not in table
    table.encode("utf-8")


def test_long_text_is_cut(tmp_path):
    run = make_run(tmp_path, text="x" * 200_000, prompts=10)
    page = Page(write_report(run))
    assert "[200,000 characters in all]" in page.text
    assert max(map(len, summary_table(run).splitlines())) <= 100


FILES = [
    "config.yaml",
    "state.json",
    "metrics.jsonl",
    "gauge.jsonl",
    "evaluation.json",
    "iteration-1/responses.jsonl",
    "iteration-2/pairs.jsonl",
    "evaluation/init.jsonl",
    "evaluation/iteration-2.jsonl",
]


@pytest.mark.parametrize("name", FILES)
def test_any_file_may_be_missing(tmp_path, name):
    run = make_run(tmp_path, prompts=12)
    (run / name).unlink()
    page = Page(write_report(run))
    assert_self_contained(page)
    assert summary_table(run)
    assert name in page.text.split("Not in this report")[1]


BROKEN = {
    "empty": b"",
    "cut short": b'[{"key": "init", "st',
    "not UTF-8": b'{"a": \xff\n',
    "of other types": b'[]\nnull\n{"stage": [], "key": 3, "tokens": 3, "rewards": {}}\n',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("names", [FILES[:5], FILES[5:]], ids=["run", "rows"])
def test_files_may_be_broken(tmp_path, names, content):
    run = make_run(tmp_path, prompts=12)
    for name in names:
        (run / name).write_bytes(content)
    assert_self_contained(Page(write_report(run)))
    assert summary_table(run)


def test_empty_folder_and_no_folder(tmp_path):
    page = Page(write_report(tmp_path))
    assert_self_contained(page)
    assert "No verdict: there is no evaluation." in page.text
    assert "metrics.jsonl holds no steps" in page.text
    assert "No verdict" in summary_table(tmp_path)
    with pytest.raises(RunError, match="no such run folder"):
        write_report(tmp_path / "absent")


def test_run_before_its_first_iteration(tmp_path):
    run = make_run(tmp_path, iterations=0, models=[])
    (run / "evaluation.json").unlink()
    config = {"iterations": 3, "model": {"path": "m"}, "evaluation": {"reward": None}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    page = Page(write_report(run))
    assert "The run has begun 0 of 3 iterations." in page.text
    assert "evaluation.reward is not set" in page.text


def test_pairs_are_shown_without_an_evaluation(tmp_path):
    run = make_run(tmp_path)
    (run / "evaluation.json").unlink()
    page = Page(write_report(run))
    assert "pairs of iteration-2, as the judge labelled them" in page.text
    assert page.text.count("judge's reward") == 2 * SAMPLES
    assert "[the last user message of 2 messages]" in page.text


def test_values_that_are_not_numbers(tmp_path):
    run = make_run(tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[10:13]:
        row["loss"] = float("nan")
        row["rewards/margins"] = None
    rows.append({"stage": "seed", "step": 10**400, "loss": 1.0, "noise/share": "many"})
    write_lines(run / "metrics.jsonl", rows)
    table = json.loads((run / "evaluation.json").read_text())
    table[1] |= {"win_rate": None, "mean_reward": float("nan"), "steps": None}
    del table[4]["win_rate"], table[5]["win_rate_stderr"]
    (run / "evaluation.json").write_text(json.dumps(table))
    (run / "gauge.jsonl").write_text('{"stage": "iteration-1", "judge_accuracy": NaN}\n')
    page = Page(write_report(run))
    assert "seed: the loss is not a number at 3 of 41 logged steps" in page.text
    cells = {row[0]: row[1:] for row in page.rows}
    assert cells["seed DPO"] == ["-", "-", "15.3", "3.4 %", "-"]
    assert cells["DPO, all labels"][0] == "0.801"
    assert "SPA 2 was not compared with SFT." in page.text
    assert re.search(r"^seed DPO +- +- ", summary_table(run), re.M)


def set_rewards(run, rewards):
    """Give each model one reward a prompt and the table the win rates that follow from them."""
    names = {key: name for name, key, _, _ in MODELS}
    write_evaluation(run, [(names[key], key, values) for key, values in rewards.items()])


def test_verdict_says_who_wins(tmp_path):
    run = make_run(tmp_path)
    low, high, tied = [0.0] * 100, [1.0] * 100, [0.5] * 50 + [1.0] * 25 + [0.0] * 25
    set_rewards(
        run,
        {
            "init": low,
            "seed": low,
            "control": high,
            "iteration-1": high,
            "iteration-2": [0.5] * 100,
        },
    )
    text = Page(write_report(run)).text
    assert "SPA 2 beats SFT: it wins 1.000 ± 0.010 of the prompts." in text
    assert "SPA 2 beats seed DPO: it wins 1.000 ± 0.000 of the prompts." in text
    assert "SPA 2 loses to seed DPO, as many steps: it wins 0.000 ± 0.000 of the prompts." in text
    assert "more steps on the human labels alone gain as much" in text
    set_rewards(
        run, {"init": [0.5] * 100, "seed": tied, "iteration-1": high, "iteration-2": [0.5] * 100}
    )
    text = " ".join(summary_table(run).split())
    assert "SPA 2 cannot be told apart from seed DPO: it wins 0.500 ± 0.035 of the prompts." in text
    assert "There is no control" in text
    assert "It got worse after SPA 1: from 1.000 against SFT to 0.500." in text


def test_warnings_of_the_gauge_come_first(tmp_path):
    run = make_run(tmp_path)
    rows = [json.loads(line) for line in (run / "gauge.jsonl").read_text().splitlines()]
    rows[1]["warnings"] = ["the judge orders 15% of 16 held-out human pairs rightly"]
    write_lines(run / "gauge.jsonl", rows)
    text = Page(write_report(run)).text
    assert text.index("iteration-2: the judge orders 15%") < text.index("win rate against SFT")
    assert "warning: iteration-2: the judge orders 15%" in summary_table(run)


def test_summary_table(tmp_path):
    table = summary_table(make_run(tmp_path))
    assert max(map(len, table.splitlines())) <= 100
    models, iterations, verdict = table.split("\n\n")
    lines = models.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert re.split(r"  +", lines[3]) == [
        "seed DPO, as many steps", "0.735 ± 0.012", "-0.265", "15.3", "3.4 %", "123"
    ]  # fmt: skip
    assert re.split(r"  +", iterations.splitlines()[2]) == [
        "2", "0.861 of 411", "0.688 of 16", "120", "12.5 %"
    ]  # fmt: skip
    assert "SPA 2 beats SFT" in verdict


def test_plots_leave_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    write_report(make_run(tmp_path, prompts=10))
    assert dict(matplotlib.rcParams) == before
    assert plots.win_rates([]) is None
    assert plots.over_steps("t", "y", {"seed": []}) is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("plain", "plain"),
        (None, ""),
        ([{"role": "user", "content": "only"}], "only"),
        (
            [
                {"role": "user", "content": "first"},
                {"role": "assistant", "content": "answer"},
                {"role": "user", "content": [{"type": "text", "text": "last"}]},
            ],
            "last\n[the last user message of 3 messages]",
        ),
        ([{"role": "assistant", "content": "said"}], "said"),
        ([], ""),
    ],
)
def test_text_of(content, expected):
    assert text_of(content) == expected


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), 10**400, [1]])
def test_number_of_refuses(value):
    assert number_of(value) is None


def test_responses_are_streamed(tmp_path):
    """A large iteration is read without its text being held."""
    import tracemalloc

    run = make_run(tmp_path, iterations=0, models=[])
    row = {
        "prompt": "p" * 500,
        "responses": ["r" * 2000] * 2,
        "tokens": [300, 40],
        "cut": [True, False],
    }
    write_lines(run / "iteration-1" / "responses.jsonl", [row] * 5000)
    tracemalloc.start()
    figures = read_run(run).iterations[0]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(figures.tokens) == 10_000 and figures.cut == 0.5
    assert peak < 3_000_000
