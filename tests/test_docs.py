"""The pages' snippets, run: a page's ```python blocks in their order, in one namespace.

A block is compiled under the page's own name and line numbers: errors point into the page, and
what reads a function's source, as Triton does, finds it there. ``docs/from_trl.md`` needs models
and data of a script's, and is run by ``test_trl_integration.py``.
"""

import re
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from prefalign.kernels.losses import LOSSES

ROOT = Path(__file__).parents[1]

PAGES = {
    "docs/plain_pytorch.md": ("peft",),
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
