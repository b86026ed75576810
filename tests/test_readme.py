"""The README's matrix: every number is a test, and every test is there."""

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
README = (TESTS.parent / "README.md").read_text("utf-8")
MATRIX, REST = README.split("## Where it goes in\n")[1].split("<details>")
LISTED = dict(re.findall(r"^- \((\d+)\) `(\S+)`$", REST.split("</details>")[0], re.MULTILINE))


@cache
def functions(path):
    """Return the names of a file's tests."""
    tree = ast.parse((TESTS / path).read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_cell_is_backed_by_a_test_that_is_there():
    head, _, *rows = (line for line in MATRIX.splitlines() if line.startswith("|"))
    assert len(rows) >= 6
    used = set()
    for row in rows:
        cells = row.strip("|").split("|")
        assert len(cells) == len(head.strip("|").split("|")), row
        for cell in (cell.strip() for cell in cells[1:]):
            numbers = re.findall(r"\((\d+)\)$", cell)
            assert bool(cell) == bool(numbers), cell
            used.update(numbers)
    assert used == set(LISTED)
    for test in LISTED.values():
        path, name = test.split("::")
        assert name in functions(path), test


def test_every_link_of_the_readme_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README):
        if not target.startswith("http"):
            assert (TESTS.parent / target).exists(), target
