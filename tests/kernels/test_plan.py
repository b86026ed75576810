"""plan_head: the strategy follows from what needs a gradient, the tiles fit the budget."""

import itertools

import pytest
import torch
from prefalign.kernels.plan import head_tiles, plan_head, tile_bytes

MIB = 2**20


@pytest.mark.parametrize(
    ("needs", "strategy", "flops"),
    [
        ({"hidden_grad": False}, "forward", 1),
        ({"hidden_grad": True}, "row_jacobian", 2),
        ({"hidden_grad": True, "weight_grad": True}, "recompute", 4),
        ({"hidden_grad": False, "weight_grad": True}, "recompute", 3),
        ({"hidden_grad": True, "entropy_grad": True}, "recompute", 3),
        ({"hidden_grad": False, "entropy_grad": True}, "forward", 1),
    ],
)
def test_strategy_and_flops(needs, strategy, flops):
    plan = plan_head(1024, 64000, 896, **needs)
    assert (plan.strategy, plan.flops) == (strategy, flops)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("budget", [MIB, 64 * MIB])
def test_workspace_fits_the_budget_at_any_length(dtype, budget):
    for N, V, D in itertools.product((1, 1024, 10**6), (1, 64000, 262144), (1, 896, 8192)):
        plan = plan_head(N, V, D, dtype=dtype, weight_grad=True, workspace_bytes=budget)
        # At D = 8192 the smallest tiles, 16 x 16, already need more than 1 MiB.
        least = tile_bytes(min(N, 16), min(V, 16), D, dtype, "cpu")
        assert plan.workspace_bytes <= max(budget, least), (N, V, D)


def test_small_inputs_take_little():
    assert plan_head(8, 100, 16).workspace_bytes < 16_000


def test_a_gradient_that_does_not_fit_costs_a_pass():
    kw = {"dtype": torch.bfloat16, "weight_grad": True}
    assert plan_head(1024, 64000, 896, **kw).flops == 4
    assert plan_head(10**6, 64000, 896, **kw).flops == 5
    assert plan_head(10**6, 64000, 896, weight_grad=True).flops == 4  # summed in the output


def test_row_chunks_are_even():
    rows, _ = head_tiles(1025, 64000, 64, torch.float32, "cpu", 64 * MIB)
    assert rows == 513


def test_prints_as_a_table():
    text = str(plan_head(1024, 64000, 896, dtype=torch.bfloat16))
    assert "row_jacobian" in text and "2F" in text and "MiB" in text
    assert len(text.splitlines()) == 7


@pytest.mark.parametrize(
    ("needs", "strategy", "flops"),
    [
        ({"hidden_grad": False}, "forward", 1.25),
        ({}, "row_jacobian", 2.5),
        ({"adapter_grad": True}, "recompute", 1.25 + 2.5 + 0.25),
        ({"hidden_grad": False, "adapter_grad": True}, "recompute", 1.25 + 1.25 + 0.25),
        ({"adapter_grad": True, "weight_grad": True}, "recompute", 1.25 + 2.5 + 1.25),
    ],
)
def test_an_adapter_adds_its_share_of_each_product(needs, strategy, flops):
    plan = plan_head(1024, 64000, 64, adapter_rank=16, **needs)
    assert (plan.strategy, plan.flops) == (strategy, flops)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_workspace_of_an_adapter_fits_the_budget(dtype, device):
    for N, rank in itertools.product((1, 1024), (1, 16, 256)):
        tiles = head_tiles(N, 64000, 896, dtype, device, 16 * MIB, rank)
        assert tile_bytes(*tiles, 896, dtype, device, rank) <= 16 * MIB
        assert tile_bytes(*tiles, 896, dtype, device, rank) > tile_bytes(*tiles, 896, dtype, device)


WRONG = {
    "N": [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("4", TypeError)],
    "V": [(0, ValueError), (4.0, TypeError), (True, TypeError), (None, TypeError)],
    "D": [(0, ValueError), (1.5, TypeError), (False, TypeError)],
    "adapter_rank": [(-1, ValueError), (1.0, TypeError), (True, TypeError)],
    "adapter_grad": [(True, ValueError), (1, TypeError)],
    "hidden_grad": [(1, TypeError), (None, TypeError)],
    "weight_grad": [("yes", TypeError)],
    "entropy_grad": [(0, TypeError)],
    "workspace_bytes": [
        (0, ValueError), (-5, ValueError), (2.5, TypeError), (True, TypeError), ("1", TypeError)
    ],
    "dtype": [
        (torch.int64, ValueError), (torch.bool, ValueError), (torch.complex64, ValueError),
        ("float32", TypeError), (float, TypeError), (None, TypeError),
    ],
    "device": [("gpu", ValueError), ("cuda:x", ValueError), (None, TypeError), (0, TypeError)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [(name, value, error) for name, cases in WRONG.items() for value, error in cases],
)
def test_every_wrong_argument_is_named(name, value, error):
    with pytest.raises(error, match=f"^{name}: expected"):
        plan_head(**({"N": 4, "V": 4, "D": 4} | {name: value}))
