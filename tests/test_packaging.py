"""The wheel in a clean environment, beside Hugging Face's package of the name ``kernels``."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def checked(command, **kwargs):
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    checked([sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT])
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_our_kernels_under_our_name_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "prefalign").glob("**/*.py")}
    ours |= {f"prefalign/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.py")}
    assert ours <= set(names)
    assert {f"prefalign/{name}" for name in ("report.html", "principles.txt", "py.typed")} <= set(
        names
    )
    tops = {name.split("/")[0] for name in names}
    assert tops == {"prefalign", next(t for t in tops if t.endswith(".dist-info"))}


def test_it_lives_beside_hugging_faces_kernels(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    constraints = ["--constraint", ROOT / "constraints.txt"]
    checked([python, "-m", "pip", "install", "--quiet", *constraints, wheel, "kernels"])
    code = """
import kernels, prefalign, transformers
from kernels import get_kernel  # Hugging Face's
from prefalign.kernels.token_logps import token_logps
import torch
assert "site-packages" in kernels.__file__, kernels.__file__
assert "prefalign/kernels" in token_logps.__code__.co_filename
from transformers import LlamaForCausalLM  # imports transformers' use of kernels
logits = torch.randn(2, 5)
assert prefalign.token_logps(logits, torch.tensor([1, 2])).shape == (2,)
print(prefalign.__version__)
"""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    # From a folder of the user's, and from the repository's root with -P, which keeps it off the
    # path.
    for flags, folder in (([], tmp_path), (["-P"], ROOT)):
        assert checked([python, *flags, "-c", code], cwd=folder, env=environment).strip()
    script = tmp_path / "env" / "bin" / "prefalign"
    assert checked([script, "--version"], cwd=ROOT).startswith("prefalign ")
