"""sequence_logps: sums and gradients against float64, and sequences that must not leak."""

import math

import pytest
import torch
from prefalign.kernels.sequence_logps import BLOCK_T, sequence_logps
from tolerance import assert_as_exact_as_eager

IMPLS = ("chunked", "triton")
EVERY = (*IMPLS, "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = (1, 0, 7, BLOCK_T - 1, BLOCK_T, BLOCK_T + 1, 0, 2111)


def packed(device, lengths=LENGTHS, dtype=torch.float32, seed=0, index=torch.int32):
    """Return log-probs, cu_seqlens, a mask that empties one sequence, and an upstream."""
    generator = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    logps = -5 * torch.rand(int(cu[-1]), generator=generator)
    mask = torch.rand(int(cu[-1]), generator=generator) < 0.7
    if len(lengths) > 2:
        mask[cu[2] : cu[3]] = False
    upstream = torch.randn(len(lengths), generator=generator)
    return logps.to(device, dtype), cu.to(device, index), mask.to(device), upstream.to(device)


def run(logps, upstream, impl, **options):
    logps = logps.detach().requires_grad_()
    sums, counts = sequence_logps(logps, impl=impl, **options)
    (grad,) = torch.autograd.grad(sums, logps, upstream.to(sums.dtype))
    return sums, counts, grad


def check(logps, upstream, impl, **options):
    sums, counts, grad = run(logps, upstream, impl, **options)
    eager, _, _ = run(logps, upstream, "reference", **options)
    exact, exact_counts, exact_grad = run(logps.double(), upstream, "reference", **options)
    assert sums.dtype == torch.float32 and counts.dtype == torch.int64
    assert_as_exact_as_eager(sums, eager, exact, "sums")
    assert torch.equal(counts, exact_counts)
    assert torch.equal(grad, exact_grad.to(logps.dtype))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_packed(impl, dtype, masked, device):
    logps, cu, mask, upstream = packed(device, dtype=dtype)
    check(logps, upstream, impl, cu_seqlens=cu, mask=mask if masked else None)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("length", [1, 37, BLOCK_T + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_one_sequence_to_a_row(impl, dtype, length, masked, device):
    logps, _, mask, _ = packed(device, (3 * length,), dtype)
    mask = mask.view(3, length) if masked else None
    upstream = torch.tensor([1.5, -2.0, 0.25], device=device)
    check(logps.view(3, length), upstream, impl, mask=mask)


@pytest.mark.parametrize("impl", IMPLS)
def test_changing_one_sequence_leaves_the_others_bit_identical(impl, device):
    # open-instruct #1900: boundaries of packed sequences that leak. A difference of prefix sums
    # does too, in the last bits.
    logps, cu, mask, upstream = packed(device)
    before = run(logps, upstream, impl, cu_seqlens=cu, mask=mask)
    for seq in range(len(LENGTHS)):
        changed, there = logps.clone(), slice(int(cu[seq]), int(cu[seq + 1]))
        changed[there] = 1e6
        others = torch.arange(len(LENGTHS), device=device) != seq
        upstream_changed = torch.where(others, upstream, 7.0)
        after = run(changed, upstream_changed, impl, cu_seqlens=cu, mask=mask)
        assert torch.equal(before[0][others], after[0][others])
        differs = (after[2] != before[2]).nonzero()
        assert ((differs >= there.start) & (differs < there.stop)).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_sum_does_not_depend_on_where_a_sequence_lies(impl, device):
    logps, _, _, _ = packed(device, (BLOCK_T + 77,))
    alone = sequence_logps(
        logps, cu_seqlens=torch.tensor([0, logps.numel()], device=device), impl=impl
    ).sums
    for offset in (1, 3, 64):
        ends = torch.tensor([0, offset, offset + logps.numel()], device=device)
        padded = torch.cat([logps.new_ones(offset), logps])
        assert torch.equal(sequence_logps(padded, cu_seqlens=ends, impl=impl).sums[1:], alone)


@pytest.mark.parametrize("impl", EVERY)
def test_masked_tokens_may_hold_anything(impl, device):
    logps, cu, mask, upstream = packed(device, (5, 9, 2, 30))
    spoiled = logps.masked_fill(~mask, math.nan)
    found = run(spoiled, upstream, impl, cu_seqlens=cu, mask=mask)
    expected = run(logps, upstream, impl, cu_seqlens=cu, mask=mask)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)
    assert found[0][2] == 0 and found[1][2] == 0  # a fully masked one: no 0/0


@pytest.mark.parametrize("impl", EVERY)
def test_integer_masks_and_both_index_types(impl, device):
    logps, cu, mask, upstream = packed(device, (5, 9, 2, 30), index=torch.int64)
    expected = run(logps, upstream, impl, cu_seqlens=cu, mask=mask)
    found = run(logps, upstream, impl, cu_seqlens=cu.int(), mask=3 * mask.long())
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl, device):
    logps, cu, mask, upstream = packed(device, (5, 9, 2, 30))
    spread = torch.stack([logps, logps * 0 - 9], 1)
    masks, ends = torch.stack([mask, ~mask], 1), torch.stack([cu, cu * 0], 1)
    check(spread[:, 0], upstream, impl, cu_seqlens=ends[:, 0], mask=masks[:, 0])
    rows = logps.view(2, 23)
    check(rows.T, torch.randn(23, device=device), impl, mask=mask.view(2, 23).T)
    check(rows[:, 3:-2], upstream[:2], impl, mask=mask.view(2, 23)[:, 3:-2])
    check(rows[:1].expand(4, -1), upstream, impl, mask=mask.view(2, 23)[:1].expand(4, -1))


@pytest.mark.parametrize("impl", IMPLS)
def test_upstream_of_a_sum(impl, device):
    logps, cu, _, _ = packed(device, (5, 9, 2, 30))
    check(logps, torch.ones((), device=device).expand(4), impl, cu_seqlens=cu)


@pytest.mark.parametrize("impl", EVERY)
def test_empty(impl, device):
    none = torch.zeros(0, device=device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    sums, counts, grad = run(none, none, impl, cu_seqlens=zero)
    assert sums.shape == counts.shape == grad.shape == (0,)
    sums, counts, grad = run(none, zero[[0, 0]].float(), impl, cu_seqlens=zero[[0, 0, 0]])
    assert sums.tolist() == [0, 0] and counts.tolist() == [0, 0] and grad.shape == (0,)
    sums, counts, grad = run(none.view(3, 0), torch.ones(3, device=device), impl)
    assert sums.tolist() == [0, 0, 0] and counts.tolist() == [0, 0, 0] and grad.shape == (3, 0)
    sums, counts, grad = run(none.view(0, 3), none, impl)
    assert sums.shape == counts.shape == (0,) and grad.shape == (0, 3)


@pytest.mark.parametrize("impl", ("chunked", "reference"))
def test_float64_stays(impl, device):
    logps, cu, mask, upstream = packed(device, (5, 9, 2, 30), torch.float64)
    sums = run(logps, upstream, impl, cu_seqlens=cu, mask=mask)[0]
    assert sums.dtype == torch.float64
    whole = torch.stack([(logps * mask)[a:b].sum() for a, b in zip(cu, cu[1:], strict=False)])
    torch.testing.assert_close(sums, whole, rtol=1e-14, atol=0)


ONES = torch.ones(6)
BAD = {
    r"token_logps: expected 1 dimension\(s\), got shape \(2, 3\)": (
        ONES.view(2, 3),
        {"cu_seqlens": torch.tensor([0, 6])},
    ),
    r"token_logps: expected 2 dimension\(s\), got shape \(6,\)": (ONES, {}),
    "token_logps: expected dtype .*, got int64": (torch.ones(2, 3).long(), {}),
    "cu_seqlens: expected dtype int32, int64, got float32": (ONES, {"cu_seqlens": ONES}),
    "cu_seqlens: expected a tensor, got list": (ONES, {"cu_seqlens": [0, 6]}),
    "cu_seqlens: .* at least one element": (ONES, {"cu_seqlens": torch.zeros(0).long()}),
    r"cu_seqlens: expected to rise from 0 to the 6 tokens, got \[0, 5\]": (
        ONES,
        {"cu_seqlens": torch.tensor([0, 5])},
    ),
    r"cu_seqlens: expected to rise from 0 to the 6 tokens, got \[1, 6\]": (
        ONES,
        {"cu_seqlens": torch.tensor([1, 6])},
    ),
    r"cu_seqlens: expected to rise from 0 to the 6 tokens, got \[0, 4, 3, 6\]": (
        ONES,
        {"cu_seqlens": torch.tensor([0, 4, 3, 6])},
    ),
    r"mask: expected shape \(6,\), got \(5,\)": (
        ONES,
        {"cu_seqlens": torch.tensor([0, 6]), "mask": torch.ones(5).bool()},
    ),
    "mask: expected dtype bool, int32, int64, got float32": (
        ONES.view(2, 3),
        {"mask": ONES.view(2, 3)},
    ),
    "mask: expected a tensor on cpu, as token_logps, got meta": (
        ONES.view(2, 3),
        {"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")},
    ),
    "impl: expected one of": (ONES.view(2, 3), {"impl": "fast"}),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("impl", ("chunked", "reference"))
def test_bad_arguments(impl, message):
    logps, options = BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        sequence_logps(logps, **{"impl": impl, **options})


def test_tokens_of_no_sequence_have_no_gradient(device):
    # On a GPU nobody checks that cu_seqlens ends with N.
    logps, cu = torch.ones(6, device=device), torch.tensor([0, 1, 4], device=device)
    upstream = torch.ones(2, device=device)
    grad = torch.ops.prefalign.sequence_logps_backward(upstream, logps, cu, None, "triton")
    assert grad.tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.gpu
def test_on_a_gpu_wrong_boundaries_are_never_read_beyond():
    logps = torch.ones(6, device="cuda", requires_grad=True)
    cu = torch.tensor([0, 4, 1 << 30], device="cuda", dtype=torch.int32)
    sums, counts = sequence_logps(logps, cu_seqlens=cu)
    sums.sum().backward()
    assert sums.tolist() == [4, 2] and counts.tolist() == [4, 2]
    assert logps.grad.tolist() == [1] * 6
