"""What every test shares: Triton's interpreter without a GPU, poisoned memory, quiet threads."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker would start a thread a core; pools that wait for each other run ten times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Before anything imports triton, which reads the variable once.
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config):
    """Silence numpy where the interpreter computes, as a GPU does, what is then masked off."""
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items):
    """Skip tests marked ``gpu`` where there is none, and say so."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device, and there is none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """Fill fresh memory with NaN in kernel tests, so that an element left unwritten shows."""
    if request.path.parent.name != "kernels":
        yield
        return
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=HAS_GPU)  # cuBLAS would refuse outright
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def device():
    """Return where kernels are tested: the GPU where there is one."""
    return torch.device("cuda" if HAS_GPU else "cpu")
