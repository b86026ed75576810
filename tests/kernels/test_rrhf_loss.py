"""rrhf_loss: loops over pairs in float64, ties, ragged groups."""

from itertools import accumulate, pairwise

import pytest
import torch
from prefalign.kernels.rrhf_loss import rrhf_loss
from tolerance import assert_as_exact_as_eager

IMPLS = ("chunked", "triton")
GROUPS = {
    "ragged": [3, 0, 1, 8, 2],
    "one": [1],
    "equal": [4, 4, 4],
    "wide": [33, 16, 5],
    "first_empty": [0, 2],
    "last_empty": [2, 0, 0],
}


def example(sizes, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    R = sum(sizes)
    counts = torch.randint(1, 40, (R,), generator=generator)
    logps = -2 * counts * (0.2 + torch.rand(R, generator=generator))
    rewards = torch.randint(0, 6, (R,), generator=generator).float()  # some are equal
    upstream = torch.randn(len(sizes), generator=generator)
    return logps.to(device, dtype), counts.to(device), rewards.to(device), upstream.to(device)


def by_loops(logps, counts, rewards, sizes, sft_weight):
    """Return [G] losses, ranking and SFT terms, pair by pair."""
    rows = []
    for start, end in pairwise([0, *accumulate(sizes)]):
        ranking = sft = logps.sum() * 0
        p = [logps[i] / max(1, counts[i].item()) for i in range(start, end)]
        r = rewards[start:end].tolist()
        for i in range(end - start):
            for j in range(end - start):
                if r[i] < r[j] and p[i] > p[j]:
                    ranking = ranking + (p[i] - p[j])
        if r:
            sft = -logps[start + r.index(max(r))]
        rows.append(torch.stack([ranking + sft_weight * sft, ranking, sft]))
    return torch.stack(rows).unbind(1)


def run(fn, logps, upstream):
    leaf = logps.clone().requires_grad_()
    losses, ranking, sft, *_ = fn(leaf)
    (grad,) = torch.autograd.grad(losses, leaf, upstream.to(losses.dtype))
    return losses.detach(), ranking.detach(), sft.detach(), grad


@pytest.mark.parametrize("sft_weight", [1.0, 0, 0.01])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradient(impl, groups, sft_weight, device):
    sizes = GROUPS[groups]
    logps, counts, rewards, upstream = example(sizes, device)
    options = {"group_sizes": sizes, "sft_weight": sft_weight}
    ours = run(lambda x: rrhf_loss(x, counts, rewards, impl=impl, **options), logps, upstream)
    eager = run(
        lambda x: rrhf_loss(x, counts, rewards, impl="reference", **options), logps, upstream
    )
    exact = run(lambda x: by_loops(x, counts, rewards, sizes, sft_weight), logps.double(), upstream)
    for name, *three in zip(("losses", "ranking", "sft", "grad"), ours, eager, exact, strict=True):
        assert_as_exact_as_eager(*three, name)
    if groups in ("ragged", "wide", "equal"):
        assert exact[1].sum() > 0


@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
def test_by_hand(impl, device):
    logps = torch.tensor([-4.0, -9.0, -2.0, -8.0], device=device)
    counts = torch.tensor([4, 3, 1, 2], device=device)  # means -1, -3, -2, -4
    rewards = torch.tensor([0.0, 1.0, 1.0, 5.0], device=device)
    found = rrhf_loss(logps, counts, rewards, group_sizes=[3, 1], sft_weight=2.0, impl=impl)
    # Equal rewards are not ranked; the first of them is learned.
    assert found.ranking.tolist() == [3.0, 0.0] and found.sft.tolist() == [9.0, 8.0]
    assert found.losses.tolist() == [21.0, 16.0]
    assert found.is_best.tolist() == [False, True, False, True]


@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
def test_no_gradient_at_a_tie_or_in_the_right_order(impl, device):
    logps = torch.tensor([-6.0, -6.0, -9.0], device=device, requires_grad=True)
    counts = torch.tensor([3, 3, 3], device=device)
    rewards = torch.tensor([2.0, 3.0, 1.0], device=device)
    out = rrhf_loss(logps, counts, rewards, group_sizes=[3], sft_weight=0, impl=impl)
    (grad,) = torch.autograd.grad(out.losses.sum(), logps)
    assert out.losses.tolist() == [0.0] and (grad == 0).all()


@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
def test_groups_dtypes_and_strides(impl, device):
    sizes = GROUPS["ragged"]
    logps, counts, rewards, _ = example(sizes, device)
    expected = rrhf_loss(logps, counts, rewards, group_sizes=sizes, impl=impl)
    cu = torch.tensor([0, *accumulate(sizes)], device=device, dtype=torch.int32)
    strided = (torch.stack([x, x], 1)[:, 0] for x in (logps, counts.int(), rewards))
    found = rrhf_loss(*strided, cu_groups=cu, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert expected.is_best.sum() == 4  # of five groups, one is empty
    shifted = rrhf_loss(logps, counts, 3 * rewards.half() - 7, group_sizes=sizes, impl=impl)
    assert torch.equal(shifted.losses, expected.losses)  # only the order counts
    if impl != "triton":
        wide = rrhf_loss(logps.double(), counts, rewards, group_sizes=sizes, impl=impl)
        assert wide.losses.dtype == torch.float64


@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
def test_empty_and_tokenless(impl, device):
    none = torch.zeros(0, device=device, requires_grad=True)
    for sizes in ([], [0, 0]):
        out = rrhf_loss(none, none.long(), none.detach(), group_sizes=sizes, impl=impl)
        assert out.losses.tolist() == [0.0] * len(sizes) and out.is_best.shape == (0,)
    logps = torch.tensor([0.0, -6.0], device=device)
    counts = torch.tensor([0, 3], device=device)
    out = rrhf_loss(logps, counts, counts.float(), group_sizes=[2], impl=impl)
    assert out.ranking.tolist() == [2.0]


LOGPS, COUNTS = torch.zeros(3), torch.ones(3).long()
BAD = {
    "group_sizes, cu_groups: expected exactly one of them, got neither": {"group_sizes": None},
    "group_sizes: expected groups of 3 responses in all, got 2": {"group_sizes": [2]},
    "counts: expected dtype int32, int64, got float32": {"counts": LOGPS},
    r"counts: expected shape \(3,\), got \(2,\)": {"counts": COUNTS[:2]},
    r"rewards: expected shape \(3,\), got \(4,\)": {"rewards": torch.zeros(4)},
    "rewards: expected a constant": {"rewards": torch.zeros(3, requires_grad=True)},
    "sft_weight: expected a number of at least 0, got -1": {"sft_weight": -1},
    r"policy_logps: expected 1 dimension\(s\)": {"policy_logps": torch.zeros(3, 1)},
    "impl: expected one of": {"impl": "fast"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    given = {"policy_logps": LOGPS, "counts": COUNTS, "rewards": LOGPS, "group_sizes": [3]}
    with pytest.raises((TypeError, ValueError), match=message):
        rrhf_loss(**(given | BAD[message]))
