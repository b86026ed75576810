"""Run folders made by hand, and their reports as a browser would see them."""

import json
import math
import random
import re
from html.parser import HTMLParser

import yaml

HOSTILE = (
    "<script>alert('x')</script> \"quoted\" & </pre></style><img src=http://evil.example/x.png "
    "onerror=alert(1)> {{ 7 * 7 }} {% raw %} $\\frac{1}$ --> 🙂 \u202eabc\x00\x1b[31m\x85 \ud83d é"
)
MODELS = [
    ("SFT", "init", 0.5, 0.0),
    ("seed DPO", "seed", 0.6234, 0.0131),
    ("seed DPO, as many steps", "control", 0.7345, 0.0122),
    ("SPA 1", "iteration-1", 0.6789, 0.0129),
    ("SPA 2", "iteration-2", 0.7123, 0.0125),
    ("DPO, all labels", "all-labels", 0.8012, 0.0111),
]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def make_run(folder, *, iterations=2, prompts=120, text=None, models=MODELS, seed=0):
    """Write the folder of a finished run, with ``text`` wherever data may put some."""
    draw = random.Random(seed)

    def words(count):
        some = "the harbor is a sheltered port where ships can take on or discharge cargo".split()
        return text if text is not None else " ".join(draw.choices(some, k=count))

    folder.mkdir(parents=True, exist_ok=True)
    name = text if text is not None else "examples/demo/model"
    settings = {
        "iterations": iterations,
        "model": {"path": name},
        "generation": {"max_new_tokens": 40},
        "noise": {"quantile": 0.1},
        "gauge": {"min_accuracy": 0.55, "max_length_ratio": 2.0, "max_cut": 0.5},
        "evaluation": {"reward": "gold.py:reward"},
    }
    # safe_dump escapes half a surrogate pair, which a file in UTF-8 cannot hold.
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    stages = ["seed", *(f"iteration-{i + 1}" for i in range(iterations)), "control", "all-labels"]
    state = {
        "algorithm": "spa",
        "finished": dict.fromkeys(stages, {}),
        "versions": {"torch": "2.13"},
    }
    (folder / "state.json").write_text(json.dumps(state), "utf-8")
    metrics = []
    for stage in stages:
        for step in range(1, 41):
            margin = 0.02 * step + draw.gauss(0, 0.03)
            row = {
                "stage": stage,
                "step": step,
                "loss": math.log1p(math.exp(-margin)),
                "rewards/margins": margin,
                "rewards/accuracies": min(1.0, 0.6 + 0.01 * step + draw.gauss(0, 0.02)),
            }
            if stage.startswith("iteration"):
                share = max(0.0, draw.gauss(0.1, 0.05)) if step > 8 else 0.0
                row |= {"noise/share": share, "noise/threshold": 0.45 + 0.001 * step}
            metrics.append(row)
    write_lines(folder / "metrics.jsonl", metrics)
    gauge = []
    for i in range(1, iterations + 1):
        responses, pairs = [], []
        for example in range(prompts):
            tokens = [min(40, max(1, round(draw.gauss(14 + 4 * i, 5)))) for _ in range(2)]
            margin = draw.expovariate(1 / (0.4 * i))
            responses.append(
                {
                    "prompt": words(6),
                    "responses": [words(n) for n in tokens],
                    "rewards": [margin, 0.0],
                    "tokens": tokens,
                    "cut": [n == 40 for n in tokens],
                }
            )
            pairs.append(
                {
                    "prompt": [
                        {"role": "system", "content": "Be brief."},
                        {"role": "user", "content": words(6)},
                    ],
                    "chosen": words(tokens[0]),
                    "rejected": words(tokens[1]),
                    "chosen_reward": margin,
                    "rejected_reward": 0.0,
                    "noisy": None if example % 5 == 0 else example % 10 == 1,
                    "example_id": example,
                }
            )
        write_lines(folder / f"iteration-{i}" / "responses.jsonl", responses)
        write_lines(folder / f"iteration-{i}" / "pairs.jsonl", pairs)
        gauge.append(
            {
                "stage": f"iteration-{i}",
                "judge_accuracy": 0.9375 - 0.125 * i,
                "held_out_pairs": 16,
                "mean_tokens": 14.04 + 4 * i,
                "length_ratio": 1.1 + 0.2 * i,
                "cut_share": 0.021 * i,
                "label_accuracy": 0.961 - 0.05 * i,
                "label_pairs": 411,
                "warnings": [words(9)] if text is not None else [],
            }
        )
    write_lines(folder / "gauge.jsonl", gauge)
    table = []
    for name, key, rate, error in models:
        mean = -1.0 + rate
        row = {"name": text or name, "key": key, "win_rate": rate, "win_rate_stderr": error}
        row |= {"mean_reward": mean, "mean_tokens": 15.26, "cut_share": 0.034, "steps": 123}
        table.append(row)
        rows = [
            {"prompt": str(i), "completion": words(12), "reward": draw.gauss(2 * rate, 0.5)}
            for i in range(prompts)
        ]
        rows = [row | {"tokens": 12, "cut": i % 9 == 0} for i, row in enumerate(rows)]
        write_lines(folder / "evaluation" / f"{key}.jsonl", rows)
    (folder / "evaluation.json").write_text(json.dumps(table), "utf-8")
    return folder


class Page(HTMLParser):
    """What a browser would make of a page: elements, attributes and the text between them."""

    void = {"meta", "br", "img", "link", "path", "use", "rect"}

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text, self.rows, self.open = [], [], "", [], []
        self.feed(path.read_text("utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag not in self.void:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attr) for attr in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def plots(self):
        return [v for tag, name, v in self.attributes if (tag, name) == ("svg", "aria-label")]


def assert_self_contained(page):
    assert not page.open
    assert not {"script", "iframe", "object", "embed", "link", "img", "base", "form"} & {*page.tags}
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert value.startswith("#"), (tag, name, value)
        if name == "style":
            assert "http" not in value
            assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", value))


def write_evaluation(folder, models, *, text=None):
    """Write an evaluation of (name, key, rewards), with the win rates that follow from them."""
    table, base = [], models[0][2]
    for name, key, rewards in models:
        rows = [
            {"prompt": str(i), "completion": text or f" {key} says {i}", "reward": value}
            | {"tokens": 7, "cut": False}
            for i, value in enumerate(rewards)
        ]
        write_lines(folder / "evaluation" / f"{key}.jsonl", rows)
        wins = [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(rewards, base, strict=True)]
        table.append(
            {"name": text or name, "key": key, "win_rate": sum(wins) / len(wins)}
            | {"win_rate_stderr": 0.01, "mean_reward": sum(rewards) / len(rewards)}
            | {"mean_tokens": 17.25, "cut_share": 0.0, "steps": 12}
        )
    (folder / "evaluation.json").write_text(json.dumps(table), "utf-8")


def begin_run(folder, algorithm, stages, settings, *, text=None):
    """Write the settings and the state of a run that has finished the stages."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model": {"path": text or "some/model"}, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    state = {"algorithm": algorithm, "finished": dict.fromkeys(stages, {}), "versions": {}}
    (folder / "state.json").write_text(json.dumps(state), "utf-8")


LOW, MIDDLE, HIGH = [0.0] * 50, [0.5] * 50, [1.0] * 50
PLE_MODELS = [
    ("base", "init", LOW),
    ("base, guided", "init-guided", LOW),
    ("SFT", "sft", MIDDLE),
    ("PLE 1", "iteration-1", MIDDLE),
    ("PLE 2", "iteration-2", [0.75] * 50),
    ("RAFT-4", "raft", HIGH),
    ("PLE, ranking only", "ranking-only", [0.75] * 50),
    ("DPO, guided over plain", "dpo", MIDDLE),
]


def make_ple_run(folder, *, variant="paper", models=PLE_MODELS, text=None):
    """Write the folder of a finished PLE run of two iterations, with three baselines."""
    arms = ("", "raft/", "ranking-only/", "dpo/")
    stages = ["sft", *(f"{arm}iteration-{i}" for arm in arms for i in (1, 2))]
    settings = {
        "iterations": 2,
        "variant": variant,
        "generation": {"max_new_tokens": 40},
        "evaluation": {"reward": "gold.py:reward", "baselines": ["raft", "ranking-only", "dpo"]},
        "gauge": {"max_length_ratio": 2.0, "max_cut": 0.5},
    }
    begin_run(folder, "ple", stages, settings, text=text)
    metrics, gauge = [], []
    for stage in stages:
        pairs = stage != "sft" and not stage.startswith("raft")
        for step in range(1, 13):
            row = {"stage": stage, "step": step, "loss": 2.0 - 0.05 * step}
            if not pairs:
                row |= {"logps_per_token": -2.0 + 0.05 * step}
            elif stage.startswith("dpo") or variant == "released":
                row |= {"rewards/margins": 0.01 * step, "rewards/accuracies": 0.5 + 0.02 * step}
            else:
                row |= {"ple/threshold": 0.5, "ple/ranked": 0.25, "rewards/margins": 0.125}
                row |= {"logps/guided": -3.0 + 0.1 * step, "logps/plain": -2.0}
            metrics.append(row)
        if stage == "sft":
            continue
        i, raft = int(stage[-1]), stage.startswith("raft")
        row = {"stage": stage, "step": 0, "judge_accuracy": None, "held_out_pairs": 0}
        row |= {"mean_tokens": 17.0 + i, "length_ratio": 0.9, "cut_share": 0.031 * i}
        row |= {"warnings": [text] if text else [], "examples": 30}
        row |= {"plain_reward": 0.4 + 0.1 * i, "guided_reward": None if raft else 0.5 + 0.1 * i}
        if pairs and not stage.startswith("dpo") and variant == "paper":
            tau, ranked = (None, 1.0) if "ranking" in stage else (1.4 * 0.5**i, 0.2 + 0.05 * i)
            row |= {"threshold": tau, "ranked_share": ranked, "guided_ahead": 0.4 + 0.1 * i}
        gauge.append(row)
        responses = [
            {"prompt": str(x), "guided": [True, False], "responses": [text or "g", text or "p"]}
            | {"tokens": [20 + i, 10 + i], "cut": [False, x == 0], "rewards": [0.6, 0.5]}
            for x in range(30)
        ]
        write_lines(folder / stage / "responses.jsonl", responses)
        if "ranked_share" in row:
            rows = [
                {"prompt": str(x), "chosen": text or "g", "rejected": text or "p"}
                | {"chosen_reward": 0.6, "rejected_reward": 0.5, "ranked": x % 4 == 0}
                for x in range(30)
            ]
            write_lines(folder / stage / "pairs.jsonl", rows)
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "gauge.jsonl", gauge)
    write_evaluation(folder, models, text=text)
    return folder


def make_tuning_run(folder, algorithm, *, rewards=HIGH, text=None):
    """Write the folder of a finished run of ``dpo`` or ``sft``."""
    begin_run(folder, algorithm, [algorithm], {"evaluation": {"reward": "a.py:b"}}, text=text)
    more = {
        "dpo": {"rewards/margins": 0.5, "rewards/accuracies": 0.75},
        "sft": {"logps_per_token": -1.5},
    }[algorithm]
    rows = [{"stage": algorithm, "step": i, "loss": 1.0 / i} | more for i in range(1, 13)]
    write_lines(folder / "metrics.jsonl", rows)
    models = [("base", "init", MIDDLE), (algorithm.upper(), algorithm, rewards)]
    write_evaluation(folder, models, text=text)
    return folder
