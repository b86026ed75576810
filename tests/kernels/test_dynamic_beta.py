"""DynamicBeta: the equations by hand, the released code's numbers, the draw, its state."""

import pytest
import torch
from prefalign.kernels.dynamic_beta import DynamicBeta
from prefalign.kernels.preference_loss import preference_loss


def batches(device, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    found = [5 * k + 4 * torch.randn(16, generator=generator, dtype=dtype) for k in range(4)]
    return [x.to(device) for x in found]


def test_the_equations_by_hand(device):
    dynamic = DynamicBeta(0.2, scale=0.5, momentum=0.75)
    beta = dynamic.update(torch.tensor([1.0, 3.0], device=device))
    # M is (0.2, 0.6): mean 0.4, M0 0.1, 0.2 * (1 + 0.5 * 0.3).
    torch.testing.assert_close(beta, torch.tensor(0.23, device=device))
    assert beta.shape == () and not beta.requires_grad
    beta = dynamic.update(torch.tensor([2.0], device=device))
    # M 0.4, M0 0.75 * 0.1 + 0.25 * 0.4 = 0.175.
    torch.testing.assert_close(beta, torch.tensor(0.2 * (1 + 0.5 * 0.225), device=device))


def test_a_policy_that_equals_its_reference_gets_beta(device):
    dynamic = DynamicBeta()
    for _ in range(3):
        assert dynamic.update(torch.zeros(4, device=device)) == torch.tensor(0.1)


def test_the_released_codes_numbers(device):
    """It leaves beta0 out of M, and takes the batch in before it compares."""
    beta0, a, gap_mean = 0.1, 0.6, 0.0
    dynamic = DynamicBeta(beta0, scale=a / beta0)
    for gap in batches(device):
        gap_mean = 0.9 * gap_mean + 0.1 * gap.mean().item()
        expected = max(1e-3, beta0 * (1 + a * (gap.mean().item() - gap_mean)))
        assert dynamic.update(gap).item() == pytest.approx(expected, rel=1e-12)


def test_never_below_the_floor(device):
    dynamic = DynamicBeta(floor=0.01)
    assert dynamic.update(torch.tensor([-1e6], device=device)) == torch.tensor(0.01)
    assert DynamicBeta().update(torch.tensor([-1e6], device=device)) == torch.tensor(0.001)


@pytest.mark.parametrize("impl", ["chunked", "triton", "reference"])
def test_a_loss_takes_it(impl, device):
    margins = batches(device, torch.float32)[2]
    zeros = torch.zeros_like(margins)
    beta = DynamicBeta().update(margins)
    losses = preference_loss(margins, zeros, zeros, zeros, beta=beta, impl=impl).losses
    torch.testing.assert_close(losses, -torch.nn.functional.logsigmoid(beta * margins))


def test_scale_0_is_a_constant_beta(device):
    dynamic = DynamicBeta(scale=0)
    assert all(dynamic.update(gap) == 0.1 for gap in batches(device))


def test_margins_may_require_grad_and_be_strided(device):
    gap = batches(device)[1]
    leaf = torch.stack([gap, gap], 1)[:, 0].requires_grad_()
    beta = DynamicBeta().update(leaf)
    assert beta == DynamicBeta().update(gap) and not beta.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype, device):
    gap = batches(device)[2]
    beta = DynamicBeta().update(gap.to(dtype))
    assert beta.dtype == torch.float32 and DynamicBeta().update(gap).dtype == torch.float64
    torch.testing.assert_close(beta.double(), DynamicBeta().update(gap.to(dtype).double()))


def test_filtered_keeps_a_fraction_and_averages_it(device):
    dynamic, other = DynamicBeta(), DynamicBeta()
    for gap in batches(device):
        beta, kept = dynamic.update_filtered(gap)
        other.update(gap)
        assert kept.dtype == torch.bool and kept.sum() == 12  # int(16 * 0.8)
        assert dynamic.mean == other.mean  # the averages are of all pairs
        mean = 0.1 * gap[kept].mean()
        expected = 0.1 * (1 + 0.6 * (mean - dynamic.mean))
        torch.testing.assert_close(beta, expected.clamp(min=1e-3))
    assert dynamic.update_filtered(gap, 1.0)[1].all()
    assert dynamic.update_filtered(gap, 0.01)[1].sum() == 1


def test_the_draw_is_one_without_replacement(device):
    """How often each pair is kept, against the probabilities of draws one after the other."""
    margins = torch.tensor([0.0, 4.0, 9.0, 20.0], device=device, dtype=torch.float64)
    state = {"mean": torch.tensor(0.5), "std": torch.tensor(0.7)}
    generator = torch.Generator(device).manual_seed(3)
    counts, rounds = torch.zeros(4, device=device), 3000
    for _ in range(rounds):
        dynamic = DynamicBeta()
        dynamic.load_state_dict(state)
        counts += dynamic.update_filtered(margins, 0.5, generator=generator)[1]
    p = torch.exp(-0.5 * ((0.1 * margins - dynamic.mean) / dynamic.std) ** 2)
    p = (p / p.sum()).tolist()
    first_or_second = [
        p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)
    ]
    found = (counts / rounds).tolist()
    assert found == pytest.approx(first_or_second, abs=4 * 0.5 / rounds**0.5)


def test_pairs_far_from_the_average_are_left_out(device):
    dynamic = DynamicBeta()
    dynamic.load_state_dict({"mean": torch.tensor(0.5), "std": torch.tensor(0.05)})
    margins = torch.full((20,), 5.0, device=device)
    # They widen the average spread themselves, and are still 9 and 30 of it away.
    margins[:4] = torch.tensor([1e4, -1e4, 3e3, -3e3])
    generator = torch.Generator(device).manual_seed(0)
    _, kept = dynamic.update_filtered(margins, generator=generator)
    assert kept[4:].all() and not kept[:4].any()
    # Nothing to tell them apart by, at the start: any 16 of 20.
    assert DynamicBeta().update_filtered(torch.zeros(20, device=device))[1].sum() == 16


def test_the_state_goes_on_elsewhere(device):
    first, second = DynamicBeta(), DynamicBeta()
    one, two, three, _ = batches(device)
    first.update(one)
    first.update(two)
    state = first.state_dict()
    assert sorted(state) == ["mean", "std"]
    second.load_state_dict(state)
    expected = first.update(three)
    assert second.update(three) == expected  # and not what the first has become
    assert second.state_dict() == first.state_dict()
    for held in (state, second.state_dict()):
        held["mean"].fill_(9)
    assert second.state_dict() == first.state_dict()
    with pytest.raises(ValueError, match="state: expected mean, std, got mean"):
        second.load_state_dict({"mean": state["mean"]})
    with pytest.raises(ValueError, match=r"state\['std'\]: expected 0 dimension"):
        second.load_state_dict(state | {"std": torch.zeros(2)})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": 0}, ValueError, "beta: expected a number above 0, got 0"),
        ({"scale": -0.1}, ValueError, "scale: expected a number of at least 0"),
        ({"momentum": 1}, ValueError, "momentum: expected a number below 1, got 1"),
        ({"momentum": "0.9"}, TypeError, "momentum: expected a number, got str"),
        ({"floor": 0.0}, ValueError, "floor: expected a number above 0"),
        ({"floor": 0.2}, ValueError, "floor: expected a number of at most 0.1, got 0.2"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        DynamicBeta(**options)


def test_bad_margins():
    dynamic = DynamicBeta()
    for margins, message in (
        (torch.zeros(0), "margins: expected at least one, got none"),
        (torch.zeros(2, 2), r"margins: expected 1 dimension\(s\)"),
        (torch.zeros(2).long(), "margins: expected dtype"),
        (0.5, "margins: expected a tensor, got float"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            dynamic.update(margins)
    assert dynamic.mean == 0 and dynamic.std == 0
    with pytest.raises(ValueError, match="keep: expected a number above 0, got 0"):
        dynamic.update_filtered(torch.zeros(2), 0)
