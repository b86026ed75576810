"""dr_dpo_mean: the formula in float64, its limits, and where the formula alone would fail."""

import math

import pytest
import torch
from prefalign.kernels.reductions import dr_dpo_mean
from tolerance import assert_as_exact_as_eager


def formula(losses, temperature):
    n = math.log(losses.numel())
    return -temperature * (torch.logsumexp(-losses.flatten() / temperature, 0) - n)


def example(count, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    return (3 * torch.rand(count, generator=generator)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 7.0, 100.0])
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_value_and_gradient(count, temperature, dtype, device):
    losses = example(count, device, dtype)
    found = {}
    for name, fn, leaf in (
        ("ours", dr_dpo_mean, losses),
        ("eager", formula, losses.float()),
        ("exact", formula, losses.double()),
    ):
        leaf = leaf.clone().requires_grad_()
        value = fn(leaf, temperature)
        found[name] = value.detach(), torch.autograd.grad(1.7 * value, leaf)[0]
    assert found["ours"][0].dtype == torch.float32 and found["ours"][1].dtype == dtype
    for i, what in enumerate(("mean", "gradient")):
        assert_as_exact_as_eager(*(found[name][i] for name in ("ours", "eager", "exact")), what)


def test_float64_gradient_by_differences(device):
    losses = example(6, device, torch.float64).requires_grad_()
    for temperature in (0.2, 1.0, 30.0):
        assert torch.autograd.gradcheck(lambda x, t=temperature: dr_dpo_mean(x, t), losses)


def test_the_limits(device):
    losses = example(50, device).requires_grad_()
    for temperature in (1e6, 1e20, 1e37):
        value = dr_dpo_mean(losses, temperature)
        torch.testing.assert_close(value, losses.mean(), rtol=2e-6, atol=0)
        (grad,) = torch.autograd.grad(value, losses)
        torch.testing.assert_close(grad, torch.full_like(grad, 1 / 50), rtol=1e-5, atol=0)
    # The formula itself, in the same dtype, has no correct digit left there.
    assert (formula(losses.detach(), 1e20) - losses.mean()).abs() > 1
    for temperature in (1e-4, 1e-20, 1e-37):
        value = dr_dpo_mean(losses, temperature)
        expected = losses.amin() + temperature * math.log(50)
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)
        (grad,) = torch.autograd.grad(value, losses)
        assert torch.equal(grad, (losses == losses.amin()).to(grad.dtype))
    assert value == losses.amin()


def test_between_the_smallest_and_the_mean_and_rising_with_the_temperature(device):
    losses = example(20, device, torch.float64)
    values = [dr_dpo_mean(losses, 2.0**k) for k in range(-8, 9)]
    assert losses.amin() < values[0] and values[-1] < losses.mean()
    assert all(a < b for a, b in zip(values, values[1:], strict=False))


def test_a_loss_far_above_the_others_has_no_part(device):
    losses = torch.tensor([0.5, torch.inf, 1e30, 0.5], device=device, requires_grad=True)
    value = dr_dpo_mean(losses)
    torch.testing.assert_close(value, torch.tensor(0.5 + math.log(2), device=device))
    (grad,) = torch.autograd.grad(value, losses)
    assert grad.tolist() == [0.5, 0, 0, 0.5]


def test_many_far_above_one(device):
    # 1 - (B - 1) / B rounds: log of it would be wrong in the fourth digit.
    losses = torch.full((30_000,), 100.0, device=device)
    losses[7] = 0
    value = dr_dpo_mean(losses)
    torch.testing.assert_close(value.item(), math.log(30_000), rtol=1e-6, atol=0)


def test_strides_shapes_and_equal_losses(device):
    losses = example(12, device).view(3, 4)
    assert torch.equal(dr_dpo_mean(losses), dr_dpo_mean(losses.flatten()))
    torch.testing.assert_close(dr_dpo_mean(losses.T[::2]), dr_dpo_mean(losses[:, ::2].clone()))
    equal = torch.full((5,), math.log(2), device=device)
    assert dr_dpo_mean(equal) == equal[0]


@pytest.mark.parametrize(
    ("losses", "temperature", "error", "message"),
    [
        (torch.zeros(0), 1.0, ValueError, "losses: expected at least one, got none"),
        (torch.zeros(2).long(), 1.0, TypeError, "losses: expected dtype"),
        ([0.0], 1.0, TypeError, "losses: expected a tensor, got list"),
        (torch.zeros(2), 0.0, ValueError, "temperature: expected a number above 0, got 0.0"),
        (torch.zeros(2), math.inf, ValueError, "temperature: expected a finite number"),
        (torch.zeros(2), "1", TypeError, "temperature: expected a number, got str"),
    ],
)
def test_bad_arguments(losses, temperature, error, message):
    with pytest.raises(error, match=message):
        dr_dpo_mean(losses, temperature)
