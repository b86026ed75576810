"""tdpo_loss: the paper's u - delta, which gradients flow, rewards without the KL."""

import pytest
import torch
import torch.nn.functional as F
from prefalign.kernels.preference_loss import preference_loss
from prefalign.kernels.tdpo_loss import VARIANTS, tdpo_loss
from tolerance import assert_as_exact_as_eager

IMPLS = ("chunked", "triton", "reference")


def example(device, dtype=torch.float32, pairs=37):
    generator = torch.Generator().manual_seed(0)
    logps = -40 + 15 * torch.randn(4, pairs, generator=generator)
    kls = 6 * torch.rand(2, pairs, generator=generator)
    return [x.to(device, dtype) for x in (*logps, *kls)]


def paper(pc, pr, rc, rr, dc, dr, beta, alpha, variant):
    """Return -log sigmoid of u - delta, with both as the paper writes them."""
    u = beta * (pc - rc) - beta * (pr - rr)
    if variant == "tdpo1":
        return -F.logsigmoid(u - (beta * dr - beta * dc))
    return -F.logsigmoid(u - alpha * (beta * dr - (beta * dc).detach()))


def run(fn, inputs, upstream):
    leaves = [x.clone().requires_grad_(i not in (2, 3)) for i, x in enumerate(inputs)]
    losses = fn(*leaves)
    wanted = [leaves[i] for i in (0, 1, 4, 5)]
    grads = torch.autograd.grad(losses, wanted, upstream.to(losses.dtype), allow_unused=True)
    return losses.detach(), *(torch.zeros_like(losses) if g is None else g for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("variant", "alpha"), [("tdpo1", None), ("tdpo2", None), ("tdpo2", 0), ("tdpo2", 1.3)]
)
@pytest.mark.parametrize("impl", IMPLS)
def test_value_and_gradients(impl, variant, alpha, dtype, device):
    inputs = example(device, dtype)
    upstream = torch.randn(37, generator=torch.Generator().manual_seed(1)).to(device)
    options = {"beta": 0.3, "variant": variant}
    given = (0.3, 0.5 if alpha is None else alpha, variant)
    ours = run(lambda *x: tdpo_loss(*x, **options, alpha=alpha, impl=impl).losses, inputs, upstream)
    eager = run(lambda *x: paper(*x, *given), [x.float() for x in inputs], upstream)
    exact = run(lambda *x: paper(*x, *given), [x.double() for x in inputs], upstream)
    names = ("losses", "chosen", "rejected", "chosen_kl", "rejected_kl")
    # Sums of some 100 nats and their rounding stand behind every margin.
    for name, *three in zip(names, ours, eager, exact, strict=True):
        assert_as_exact_as_eager(*three, name, inside=100 * 0.3)
    assert (ours[3] == 0).all() == (variant == "tdpo2")


def test_no_kl_or_alpha_0_is_dpo(device):
    *logps, chosen_kl, rejected_kl = example(device)
    expected = preference_loss(*logps, beta=0.2)
    found = tdpo_loss(*logps, chosen_kl, rejected_kl, beta=0.2, alpha=0)
    none = tdpo_loss(*logps, 0 * chosen_kl, 0 * rejected_kl, beta=0.2, variant="tdpo1")
    for out in (found, none):
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_beta_may_be_a_tensor(impl, device):
    inputs = example(device)
    expected = tdpo_loss(*inputs, beta=0.3, impl=impl)
    for beta in (torch.tensor(0.3, device=device), torch.full((37,), 0.3, device=device)):
        found = tdpo_loss(*inputs, beta=beta, impl=impl)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rewards_are_without_the_kl_and_detached(variant, device):
    inputs = [x.requires_grad_(i not in (2, 3)) for i, x in enumerate(example(device))]
    found = tdpo_loss(*inputs, variant=variant)
    pc, pr, rc, rr, *_ = inputs
    torch.testing.assert_close(found.chosen_rewards, 0.1 * (pc - rc).detach())
    torch.testing.assert_close(found.rejected_rewards, 0.1 * (pr - rr).detach())
    assert not found.chosen_rewards.requires_grad and not found.rejected_rewards.requires_grad


def test_log_2_where_policy_and_reference_are_equal(device):
    pc, pr, *_ = example(device)
    zeros = torch.zeros_like(pc)
    for variant in VARIANTS:
        losses = tdpo_loss(pc, pr, pc, pr, zeros, zeros, variant=variant).losses
        assert (losses == torch.tensor(2.0).log()).all()


def test_strides_mixed_dtypes_and_empty(device):
    inputs = example(device)
    expected = tdpo_loss(*inputs).losses
    strided = [torch.stack([x, x], 1)[:, 0] for x in inputs]
    assert torch.equal(tdpo_loss(*strided).losses, expected)
    assert tdpo_loss(*inputs[:5], inputs[5].double()).losses.dtype == torch.float64
    none = [x[:0] for x in inputs]
    assert all(x.shape == (0,) for x in tdpo_loss(*none))


NAMES = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps",
         "reference_rejected_logps", "chosen_kl", "rejected_kl")  # fmt: skip
BAD = {
    "variant: expected one of 'tdpo1', 'tdpo2', got 'tdpo'": {"variant": "tdpo"},
    "alpha: expected None with variant='tdpo1', got 0.5": {"variant": "tdpo1", "alpha": 0.5},
    "alpha: expected a number of at least 0, got -1": {"alpha": -1},
    "beta: expected a number above 0, got 0": {"beta": 0},
    r"chosen_kl: expected shape \(3,\), got \(2,\)": {"chosen_kl": torch.zeros(2)},
    "rejected_kl: expected dtype": {"rejected_kl": torch.zeros(3).long()},
    "reference_chosen_logps: expected a constant": {
        "reference_chosen_logps": torch.zeros(3, requires_grad=True)
    },
    "policy_chosen_logps: expected a tensor, got list": {"policy_chosen_logps": [0.0]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    given = dict.fromkeys(NAMES, torch.zeros(3)) | BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        tdpo_loss(**given)
