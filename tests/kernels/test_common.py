"""What the ops share: the choice of implementation, and machines without Triton."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from prefalign.kernels import _common
from prefalign.kernels._common import jit, log1p, resolve_impl, store_rounded, tanh, tl

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_auto_is_triton_on_a_gpu_and_chunked_elsewhere(monkeypatch):
    assert resolve_impl("auto", CPU) == "chunked"
    assert resolve_impl("auto", GPU) == "triton"
    assert resolve_impl("auto", GPU, torch.float64) == "chunked"
    monkeypatch.setattr(_common, "triton", None)
    assert resolve_impl("auto", GPU) == "chunked"


def test_an_explicit_choice_never_falls_back(monkeypatch):
    for impl in ("triton", "chunked", "reference"):
        assert resolve_impl(impl, GPU) == impl
    with pytest.raises(ValueError, match="impl: 'triton' computes in float32, got float64"):
        resolve_impl("triton", GPU, torch.float64)
    with pytest.raises(ValueError, match="impl: expected one of 'auto', .*, got 'liger'"):
        resolve_impl("liger", CPU)
    monkeypatch.setattr(_common, "INTERPRETED", False)
    with pytest.raises(ValueError, match="impl: 'triton' needs a GPU tensor .*, got one on cpu"):
        resolve_impl("triton", CPU)
    monkeypatch.setattr(_common, "triton", None)
    with pytest.raises(ValueError, match="impl: 'triton' needs the package triton"):
        resolve_impl("triton", GPU)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from prefalign.kernels import modules
from prefalign.kernels.pairwise_preference_logits import pairwise_preference_logits
from prefalign.kernels.preference_loss import preference_loss
x = torch.zeros(2, 4, 8, requires_grad=True)
sums = modules.SequenceLogps()(modules.TokenLogps()(x, torch.zeros(2, 4, dtype=torch.long))).sums
preference_loss(sums[:1], sums[1:], *sums.detach().split(1)).losses.sum().backward()
pairwise_preference_logits(sums, sums.detach(), group_sizes=[2])
assert x.grad.abs().sum() > 0
try:
    preference_loss(*[torch.zeros(1)] * 4, impl="triton")
except ValueError as error:
    print(error)
"""


def test_every_page_imports_and_runs_without_triton():
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_TRITON], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "impl: 'triton' needs the package triton" in done.stdout


@jit
def functions_kernel(x_ptr, tanh_ptr, log1p_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0)
    tl.store(tanh_ptr + offs, tanh(x), mask=offs < N)
    tl.store(log1p_ptr + offs, log1p(tl.abs(x)), mask=offs < N)


def test_device_functions_have_a_small_relative_error(device):
    sizes = torch.logspace(-30, 1.3, 4001, dtype=torch.float32)
    x = torch.cat([sizes, -sizes, torch.linspace(-2, 2, 3001), torch.tensor([0.0])]).to(device)
    found = torch.empty(2, x.numel(), device=device)
    functions_kernel[(1,)](x, *found, x.numel(), BLOCK=16384)
    for got, exact in zip(found, (x.double().tanh(), x.double().abs().log1p()), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=5e-7, atol=0)
    edges = torch.tensor([float("inf"), -float("inf"), 1.0, float("nan")], device=device)
    found = torch.empty(2, 4, device=device)
    functions_kernel[(1,)](edges, *found, 4, BLOCK=16)
    assert found[0, :2].tolist() == [1, -1] and found[:, 3].isnan().all()
    assert found[1, 2].item() == np.float32(np.log(2))


@jit
def store_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    store_rounded(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < N, other=0.0), offs < N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_stores_round_to_nearest_even(dtype, device):
    bits = torch.randint(0x30000000, 0x47000000, (2000,), generator=torch.Generator())
    x = bits.to(torch.int32).view(torch.float32)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3FFF8000]).to(torch.int32).view(torch.float32)
    x = torch.cat([x, -x, ties, torch.tensor([0.0, float("inf"), float("nan")])]).to(device)
    out = torch.empty(x.numel(), dtype=dtype, device=device)
    store_kernel[(1,)](x, out, x.numel(), BLOCK=8192)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_fresh_memory_is_poisoned_here():
    assert torch.empty(7).isnan().all() and torch.zeros(3).new_empty(5).isnan().all()
    assert torch.empty_like(torch.zeros(4, dtype=torch.bfloat16)).isnan().all()
