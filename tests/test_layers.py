"""Imports point one way: bench, tests, examples to prefalign, prefalign to kernels."""

import ast
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
