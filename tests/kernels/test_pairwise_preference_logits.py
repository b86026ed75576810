"""pairwise_preference_logits: every pair of ragged groups, against float64."""

from itertools import accumulate

import pytest
import torch
from prefalign.kernels import pairwise_preference_logits as page
from prefalign.kernels.pairwise_preference_logits import LAYOUTS, pairwise_preference_logits
from prefalign.kernels.preference_loss import preference_loss
from tolerance import assert_as_exact_as_eager

IMPLS = ("chunked", "triton")
EVERY = (*IMPLS, "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUPS = {
    "ragged": [3, 0, 1, 8, 2],
    "one": [1],
    "equal": [4, 4, 4],
    "wide": [17, 16, 5, 15],
    "first_empty": [0, 2],
}


def example(sizes, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logps = -60 + 20 * torch.randn(2, sum(sizes), generator=generator)
    upstream = torch.randn(len(sizes), max(sizes), max(sizes), generator=generator)
    return *logps.to(device, dtype), upstream.to(device)


def flatten(padded, sizes):
    """Return the blocks of a padded tensor, end to end."""
    return torch.cat([padded[g, :k, :k].flatten() for g, k in enumerate(sizes)])


def run(policy, reference, upstream, impl, **options):
    policy = policy.detach().requires_grad_()
    out = pairwise_preference_logits(policy, reference, impl=impl, **options)
    (grad,) = torch.autograd.grad(out, policy, upstream.to(out.dtype))
    return out, grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradient(impl, dtype, groups, layout, device):
    sizes = GROUPS[groups]
    policy, reference, upstream = example(sizes, device, dtype)
    upstream = flatten(upstream, sizes) if layout == "flat" else upstream
    options = {"group_sizes": sizes, "layout": layout}
    out, grad = run(policy, reference, upstream, impl, **options)
    eager, eager_grad = run(policy, reference, upstream, "reference", **options)
    wide = policy.double(), reference.double()
    exact, exact_grad = run(*wide, upstream, "reference", **options)
    assert out.dtype == torch.float32 and grad.dtype == dtype
    assert_as_exact_as_eager(out, eager, exact, "logits")
    assert_as_exact_as_eager(grad, eager_grad, exact_grad, "grad")


def test_reference_by_hand(device):
    policy = torch.tensor([1.0, 4.0, 9.0], device=device)
    reference = torch.tensor([0.0, 1.0, 2.0], device=device)
    options = {"group_sizes": [1, 2], "beta": 0.5, "impl": "reference"}
    padded = pairwise_preference_logits(policy, reference, **options)
    assert padded.tolist() == [[[0, 0], [0, 0]], [[0, -2], [2, 0]]]
    flat = pairwise_preference_logits(policy, reference, layout="flat", **options)
    assert flat.tolist() == [0, 0, -2, 2, 0]


@pytest.mark.parametrize("impl", EVERY)
def test_antisymmetric_bit_for_bit_with_a_zero_diagonal(impl, device):
    sizes = [5, 31, 2]
    policy, reference, _ = example(sizes, device)
    out = pairwise_preference_logits(policy, reference, group_sizes=sizes, beta=0.37, impl=impl)
    assert torch.equal(out, -out.transpose(1, 2))
    assert (out.diagonal(dim1=1, dim2=2) == 0).all()
    for g, k in enumerate(sizes):
        assert (out[g, k:] == 0).all() and (out[g, :, k:] == 0).all()
    flat = pairwise_preference_logits(
        policy, reference, group_sizes=sizes, beta=0.37, layout="flat", impl=impl
    )
    assert torch.equal(flat, flatten(out, sizes))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_pair_has_the_margin_that_its_loss_sees(impl, device):
    policy, reference, _ = example([2] * 9, device)
    out = pairwise_preference_logits(policy, reference, group_sizes=[2] * 9, impl=impl)
    losses = preference_loss(
        policy[::2], policy[1::2], reference[::2], reference[1::2], impl=impl
    ).losses
    torch.testing.assert_close(losses, -torch.nn.functional.logsigmoid(out[:, 0, 1]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", EVERY)
def test_four_ways_to_give_the_groups(impl, layout, device):
    sizes = GROUPS["ragged"]
    policy, reference, _ = example(sizes, device)
    cu = torch.tensor([0, *accumulate(sizes)])
    ways = (
        {"group_sizes": sizes},
        {"group_sizes": torch.tensor(sizes, device=device)},
        {"cu_groups": cu.to(device, torch.int32)},
        {"cu_groups": cu},
    )
    outs = [
        pairwise_preference_logits(policy, reference, layout=layout, impl=impl, **way)
        for way in ways
    ]
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_group_wider_than_a_block(impl, layout, device, monkeypatch):
    monkeypatch.setattr(page, "MAX_BLOCK_K", 16)
    sizes = [33, 1, 16, 17]
    policy, reference, upstream = example(sizes, device)
    upstream = flatten(upstream, sizes) if layout == "flat" else upstream
    options = {"group_sizes": sizes, "layout": layout}
    out, grad = run(policy, reference, upstream, impl, **options)
    exact, exact_grad = run(policy.double(), reference.double(), upstream, "reference", **options)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_and_upstreams(impl, device):
    sizes = [3, 5]
    policy, reference, upstream = example([6, 10], device)
    policy, reference, upstream = policy[::2], reference[::2], upstream[:, :5, :5]
    options = {"group_sizes": sizes}
    found = run(policy, reference, upstream.transpose(1, 2), impl, **options)
    whole = policy.contiguous(), reference.contiguous(), upstream.transpose(1, 2).contiguous()
    expected = run(*whole, impl, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    summed = run(policy, reference, torch.ones((), device=device).expand(2, 5, 5), impl, **options)
    assert (summed[1] == 0).all()  # antisymmetric: the sum does not depend on anything


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", EVERY)
def test_empty(impl, layout, device):
    none = torch.zeros(0, device=device)
    shapes = {"padded": [(0, 0, 0), (2, 0, 0)], "flat": [(0,), (0,)]}[layout]
    for sizes, shape in zip(([], [0, 0]), shapes, strict=True):
        out, grad = run(none, none, none.view(shape), impl, group_sizes=sizes, layout=layout)
        assert out.shape == shape and grad.shape == (0,)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", EVERY)
def test_one_int_is_the_size_of_every_group(impl, layout, device):
    policy, reference, upstream = example([3, 3], device)
    upstream = flatten(upstream, [3, 3]) if layout == "flat" else upstream
    found, wanted = (
        run(policy, reference, upstream, impl, group_sizes=sizes, layout=layout)
        for sizes in (3, [3, 3])
    )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    none = torch.zeros(0, device=device)
    found, wanted = (
        pairwise_preference_logits(none, none, group_sizes=sizes, layout=layout, impl=impl)
        for sizes in (3, [])
    )
    assert found.shape == wanted.shape


@pytest.mark.parametrize("impl", ("chunked", "reference"))
def test_float64_stays(impl, device):
    policy, reference, _ = example([3, 2], device, torch.float64)
    out = pairwise_preference_logits(policy, reference, group_sizes=[3, 2], impl=impl)
    assert out.dtype == torch.float64


LOGPS = torch.zeros(5)
BAD = {
    "group_sizes, cu_groups: expected exactly one of them, got neither": {},
    "group_sizes, cu_groups: expected exactly one of them, got both": {
        "group_sizes": [5],
        "cu_groups": torch.tensor([0, 5]),
    },
    "group_sizes: expected groups of 5 responses in all, got 4": {"group_sizes": [3, 1]},
    "group_sizes: expected an int that divides the 5 responses, got 2": {"group_sizes": 2},
    "group_sizes: expected an int that divides the 5 responses, got 0": {"group_sizes": 0},
    "group_sizes: expected integers, got bool": {"group_sizes": True},
    "group_sizes: expected groups of at least 0 responses, got -1": {"group_sizes": [6, -1]},
    "group_sizes: expected integers, got float": {"group_sizes": [5.0]},
    "group_sizes: expected dtype int32, int64, got float32": {"group_sizes": torch.tensor([5.0])},
    r"cu_groups: expected \[G \+ 1\] that begins with 0, got \[1, 5\]": {
        "cu_groups": torch.tensor([1, 5])
    },
    "cu_groups: expected groups of 5 responses in all, got 4": {"cu_groups": torch.tensor([0, 4])},
    "cu_groups: expected groups of at least 0": {"cu_groups": torch.tensor([0, 6, 5])},
    "layout: expected one of 'padded', 'flat', got 'ragged'": {
        "group_sizes": [5],
        "layout": "ragged",
    },
    "beta: expected a number above 0, got -0.1": {"group_sizes": [5], "beta": -0.1},
    r"reference_logps: expected shape \(5,\), got \(4,\)": {
        "group_sizes": [5],
        "reference_logps": torch.zeros(4),
    },
    "reference_logps: expected a constant": {
        "group_sizes": [5],
        "reference_logps": torch.zeros(5, requires_grad=True),
    },
    r"policy_logps: expected 1 dimension\(s\)": {
        "group_sizes": [5],
        "policy_logps": torch.zeros(5, 1),
    },
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("impl", ("chunked", "reference"))
def test_bad_arguments(impl, message):
    given = {"policy_logps": LOGPS, "reference_logps": LOGPS, "impl": impl, **BAD[message]}
    with pytest.raises((TypeError, ValueError), match=message):
        pairwise_preference_logits(**given)
