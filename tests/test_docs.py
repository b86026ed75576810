"""The pages' snippets, run: a page's ```python blocks in their order, in one namespace.

A block is compiled under the page's own name and line numbers: errors point into the page, and
what reads a function's source, as Triton does, finds it there. ``docs/from_trl.md`` needs models
and data of a script's, and is run by ``test_trl_integration.py``.
"""

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from prefalign.kernels.divergences import DIVERGENCES, resolve_divergence
from prefalign.kernels.losses import LOSSES
from prefalign.kernels.objectives import COUPLED, RECIPES
from prefalign.kernels.preference_loss import preference_loss
from prefalign.kernels.unpaired_losses import UNPAIRED_LOSSES

import prefalign

ROOT = Path(__file__).parents[1]

PAGES = {
    "docs/plain_pytorch.md": ("peft",),
    "docs/custom_losses.md": ("triton",),
    "docs/compile.md": (),
}
"""The pages, and what is not prefalign's own that their snippets import."""


def blocks(page):
    """Return the page's blocks of Python, each with the lines that stand before it."""
    text = (ROOT / page).read_text("utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def run(page, monkeypatch):
    """Run a page and return its names, as a module that is there while the test runs."""
    module = ModuleType(re.sub(r"\W", "_", page))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for lines, code in blocks(page):
        exec(compile("\n" * lines + code, str(ROOT / page), "exec"), vars(module))
    return module


@pytest.fixture
def one_process():
    """Give a page a process group of one process, as ``torchrun`` would."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_snippets_run(page, monkeypatch, tmp_path, one_process):
    for name in PAGES[page]:
        pytest.importorskip(name, reason=f"{name} is not installed")
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    with patch.dict(LOSSES):  # a page may add rows of its own
        run(page, monkeypatch)


def test_the_tests_that_the_pages_name_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/compile.md").read_text("utf-8")))
    files = (ROOT / "tests" / "kernels").glob("test_*.py")
    there = {name for f in files for name in re.findall(r"^def (test_\w+)", f.read_text(), re.M)}
    assert named and named <= there


# The tables of losses, against the code


def tables(page):
    """Return the page's tables by their headings, each row a list of its cells."""
    found, heading = {}, None
    for line in (ROOT / page).read_text("utf-8").splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        elif line.startswith("|") and not line.startswith("|---"):
            found.setdefault(heading, []).append([cell.strip() for cell in line[1:-1].split("|")])
    return {name: rows[1:] for name, rows in found.items()}


TABLES = tables("docs/custom_losses.md")
PAIRS = TABLES["Losses of a pair"]


def named(rows):
    """Return rows by their name, which is code and stands there once."""
    table = {row[0].strip("`"): row[1:] for row in rows}
    assert len(table) == len(rows) and all(re.fullmatch(r"`\w+`", row[0]) for row in rows)
    return table


def papers(text):
    return set(re.findall(r"\d{4}\.\d{5}", text))


def value_of(formula, **names):
    """Return what a formula of the page is."""
    code = formula.strip("`").replace("·", " * ").replace("²", " ** 2")
    code = re.sub(r"\blog (σ|odds)\(", r"log_\1(", code)
    known = {
        "σ": torch.sigmoid,
        "log_σ": F.logsigmoid,
        "log_odds": lambda x: (x.exp() / (1 - x.exp())).log(),
        "log": torch.log,
        "exp": torch.exp,
        "max": lambda low, x: x.clamp(min=low),
    }
    return eval(code, known | names)


def scores():
    """Return two scores, some of them equal, all of them below 0 as mean log-probs are."""
    a, b = -4 * torch.rand(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return a, torch.where(torch.arange(50) < 5, a, b)


def test_every_loss_has_its_line():
    lines = (
        (LOSSES, PAIRS),
        (COUPLED, TABLES["Losses of a batch"]),
        (RECIPES, TABLES["Published sums"]),
        (UNPAIRED_LOSSES, TABLES["Responses without pairs"]),
        (DIVERGENCES, TABLES["Other divergences"]),
    )
    for known, rows in lines:
        assert sorted(named(rows)) == sorted(known)


@pytest.mark.parametrize("name", LOSSES)
def test_a_losss_line_is_its_row(name):
    formula, takes, source, _ = named(PAIRS)[name]
    row, (a, b) = LOSSES[name], scores()
    symbol = re.search(r"(\w): `", takes)
    smoothings = {None: "", "any": "e", "positive": "e > 0", "below 1/2": "e < 1/2"}
    wanted = (
        "" if row.reference else "policy",
        "per token" if row.per_token else "",
        smoothings[row.smoothing],
        "f" if row.divergence else "",
        f"{symbol[1]}: `{row.extra[0]}` {row.extra[1]:g}" if symbol and row.extra else "",
    )
    assert takes == ", ".join(filter(None, wanted)) and bool(symbol) == bool(row.extra)
    assert papers(source) == papers(row.source)
    e, beta = (0.2 if row.smoothing else 0.0), 0.3
    for extra in (0.4, 1.7) if row.extra else (0.0,):
        names = {"a": a, "b": b, "e": e, "β": beta, "z": beta * (a - b)}
        names["ℓ"] = names["l"] = lambda z: -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)
        if symbol:
            names[symbol[1]] = extra
        value = value_of(formula, **names)
        torch.testing.assert_close(row.value(a, b, beta, e, extra), value, rtol=1e-9, atol=1e-12)


def test_the_lines_of_batches_and_sums_are_the_codes():
    for name, (row, _, source, _) in named(TABLES["Losses of a batch"]).items():
        assert row == f"`{COUPLED[name][0]}`" and papers(source) == papers(COUPLED[name][1])
    for name, (parts, source, _) in named(TABLES["Published sums"]).items():
        wanted = [f"`{part}`" if w == 1 else f"{w:g}·`{part}`" for part, w in RECIPES[name][0]]
        assert parts == " + ".join(wanted) and papers(source) == papers(RECIPES[name][1])


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_an_unpaired_losss_line_is_its_row(name):
    formula, baseline, source, _ = named(TABLES["Responses without pairs"])[name]
    row, (r, _) = UNPAIRED_LOSSES[name], scores()
    wanted = {
        "log-ratio": "of the log-ratio: `kl_baseline`",
        "reward": "of the reward: `RunningShift`",
        None: "none",
    }
    assert baseline == wanted[row.baseline] and papers(source) == papers(row.source)
    beta, b = 0.3, 0.7
    found = prefalign.unpaired_loss(
        r, torch.zeros_like(r), torch.ones_like(r, dtype=torch.bool), loss_type=name, beta=beta,
        baseline=b if row.baseline else None,
    ).losses  # fmt: skip
    torch.testing.assert_close(found, value_of(formula, r=r, b=b, β=beta), rtol=1e-9, atol=1e-12)


def test_the_divergences_lines_are_their_scores():
    r, alpha = torch.linspace(-5, 5, 21, dtype=torch.float64), 0.3
    for name, (formula,) in named(TABLES["Other divergences"]).items():
        key, power = resolve_divergence(name, alpha if name == "alpha_divergence" else 1.0)
        found = DIVERGENCES[key].value(r, power)
        torch.testing.assert_close(found, value_of(formula, r=r, α=alpha), rtol=1e-9, atol=1e-12)


def test_the_functions_are_there_and_from_those_papers():
    for name, (_, source) in named(TABLES["Functions of their own"]).items():
        function = getattr(prefalign, name)
        texts = inspect.getdoc(function), inspect.getmodule(function).__doc__
        code = inspect.getsource(inspect.getmodule(function))
        assert papers(source) and papers(source) <= papers("".join(texts) + code)


def test_every_loss_of_trls_has_a_line():
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'prefalign[trl]'")
    rows = PAIRS + TABLES["Losses of a batch"]
    listed = {match for row in rows for match in re.findall(r"^`(\w+)`", row[-1])}
    help_text = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    theirs = set(re.findall(r"`'(\w+)'`", help_text))
    assert len(theirs) > 10 and theirs <= listed - {"CPOTrainer"}


def test_the_pages_own_row_runs_in_triton(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    with patch.dict(LOSSES):
        page = run("docs/custom_losses.md", monkeypatch)
        found = [
            preference_loss(*page.logps, loss_type="dpop", impl=impl, **page.options).losses
            for impl in ("triton", "chunked")
        ]
        grads = [torch.autograd.grad(x.square().sum(), page.logps[:2]) for x in found]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*grads)
