"""Imports point one way: bench, tests, examples to prefalign, prefalign to kernels."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "kernels").glob("**/*.py"))
PACKAGE = sorted((ROOT / "prefalign").glob("**/*.py"))


def imports(source: str) -> set[str]:
    """Return the top-level name of every absolute import, and dots for those that climb out."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level > 1:
            found.add("." * node.level + (node.module or ""))
    return found


def test_the_reader_sees_every_form():
    source = "import a.b, c\nfrom d.e import f\nfrom . import g\nfrom .h import i\nfrom .. import j"
    assert imports(source + "\ndef k():\n    import l") == {"a", "c", "d", "..", "l"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_torch_triton_and_the_standard_library_only(path):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    assert imports(path.read_text()) <= allowed


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_imports_nothing_that_stands_on_it(path):
    # Nor "kernels", which on a user's machine is Hugging Face's package.
    found = imports(path.read_text())
    assert not found & {"bench", "tests", "examples", "kernels"}
    depth = len(path.relative_to(ROOT / "prefalign").parts)
    assert not any(name.startswith("." * (depth + 1)) for name in found)


def test_the_kernels_init_is_a_docstring_and_nothing_else():
    (only,) = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert isinstance(only, ast.Expr) and isinstance(only.value.value, str)


def siblings(source: str) -> set[str]:
    """Return the modules of the same folder that are imported, but for type checking alone."""
    found = set()
    tree = ast.parse(source)
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and id(node) not in skipped:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found.update(name.split(".")[0] for name in names)
    return found


def test_the_diagram_matches_the_imports():
    text = (ROOT / "docs" / "architecture.md").read_text()
    lines = text.split("```")[1].strip("\n").split("\n")
    assert len(lines) <= 40 and max(map(len, lines)) <= 100  # one screen
    rank = {}
    for number, line in enumerate(lines):
        names = re.split(r" {3,}", line)[0]
        rank.update(dict.fromkeys(names.split(), number))
    modules = {path.stem: path for path in (ROOT / "prefalign").glob("*.py") if path.stem[0] != "_"}
    assert rank.keys() == modules.keys() | {"kernels"}
    for name, path in modules.items():
        for other in siblings(path.read_text()) & rank.keys():
            assert rank[other] >= rank[name], f"{name} imports {other}, which is drawn above it"
