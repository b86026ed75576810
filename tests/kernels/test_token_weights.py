"""LD-DPO's and WPO's weights, against the formulas over padded rows that TRL's trainer uses."""

from itertools import accumulate

import pytest
import torch
from prefalign.kernels.linear_token_logps import linear_token_logps
from prefalign.kernels.preference_loss import preference_loss
from prefalign.kernels.sequence_logps import sequence_logps
from prefalign.kernels.token_weights import length_desensitized_weights, wpo_weights

LENGTHS = {
    "ragged": [5, 3, 2, 7, 4, 4],
    "empty": [0, 3, 2, 0, 0, 0, 1, 1],
    "one": [1, 9],
    "long": [130, 257],
}


def example(lengths, device, masked=True):
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    cu = torch.tensor([0, *accumulate(lengths)], device=device)
    mask = torch.rand(total, generator=generator) < 0.7 if masked else None
    logps = -3 * torch.rand(total, generator=generator, dtype=torch.float64)
    squares = -3 * torch.rand(total, generator=generator, dtype=torch.float64)
    move = (x if x is None else x.to(device) for x in (mask, logps, squares))
    return cu, *move


def padded(values, lengths, masked):
    """Return ``[chosen; rejected]`` rows [2B, T] of values and of the mask, zeros around."""
    rows = values.split(lengths)
    masks = masked.split(lengths)
    out = (
        torch.nn.utils.rnn.pad_sequence([*x[0::2], *x[1::2]], batch_first=True)
        for x in (rows, masks)
    )
    return tuple(out)


def trl_sums(logps, mask, ld_alpha):
    """Return [2B] sums: what is shared, and ld_alpha times the tail."""
    position = mask.cumsum(1)
    chosen, rejected = mask.sum(1).chunk(2)
    shared = torch.minimum(chosen, rejected).repeat(2)[:, None]
    inside = mask & (position <= shared)
    tail = mask & (position > shared)
    return (logps * inside).sum(1) + ld_alpha * (logps * tail).sum(1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ld_alpha", [0, 0.5, 1.0])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_length_desensitized_sums_are_those_of_padded_rows(lengths, ld_alpha, masked, device):
    lengths = LENGTHS[lengths]
    cu, mask, logps, _ = example(lengths, device, masked)
    live = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    weights = length_desensitized_weights(cu, ld_alpha, mask=mask, tokens=len(logps))
    assert weights.dtype == torch.float32 and not weights.requires_grad
    sums = sequence_logps(weights * logps, cu_seqlens=cu, mask=mask).sums
    rows, masks = padded(logps, lengths, live)
    expected = trl_sums(rows, masks, ld_alpha)
    torch.testing.assert_close(torch.cat([sums[0::2], sums[1::2]]), expected)
    assert set(weights.tolist()) <= {0.0, ld_alpha, 1.0} and (weights[~live] == 0).all()
    if ld_alpha == 1:
        assert torch.equal(weights, live.float())


def test_length_desensitized_weights_by_hand(device):
    cu = torch.tensor([0, 4, 6], device=device, dtype=torch.int32)
    assert length_desensitized_weights(cu, 0.25, tokens=6).tolist() == [1, 1, 0.25, 0.25, 1, 1]
    mask = torch.tensor([0, 1, 1, 1, 0, 7], device=device)  # three tokens against one
    weights = length_desensitized_weights(cu, 0.25, mask=mask)
    assert weights.tolist() == [0, 1, 0.25, 0.25, 0, 1]
    strided = torch.stack([cu, cu], 1)[:, 0]
    assert torch.equal(length_desensitized_weights(strided, 0.25, mask=mask), weights)


@pytest.mark.parametrize("impl", ["chunked", "triton", "reference"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_wpo_weights_are_those_of_padded_rows(lengths, masked, impl, device):
    lengths = LENGTHS[lengths]
    cu, mask, logps, squares = example(lengths, device, masked)
    live = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    rows, masks = padded(logps - squares, lengths, live)
    means = (rows * masks).sum(1) / masks.sum(1).clamp_min(1)
    chosen, rejected = means.exp().chunk(2)
    if mask is not None:
        logps = logps.masked_fill(~mask, torch.nan)
    logps, squares = (x.float() for x in (logps, squares))
    given = logps.requires_grad_(), torch.stack([squares, squares], 1)[:, 0]
    weights = wpo_weights(*given, cu_seqlens=cu, mask=mask, impl=impl)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    torch.testing.assert_close(weights.double(), chosen * rejected, rtol=1e-5, atol=0)


def test_float64_and_mixed_dtypes(device):
    cu, _, logps, squares = example([5, 3], device, masked=False)
    exact = wpo_weights(logps, squares, cu_seqlens=cu)
    assert exact.dtype == torch.float64
    a = (logps - squares)[:5].mean() + (logps - squares)[5:].mean()
    torch.testing.assert_close(exact, a.exp()[None])
    half = wpo_weights(logps.bfloat16(), squares.float(), cu_seqlens=cu)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), exact, rtol=0.02, atol=0)


def test_the_product_is_not_zero_times_infinity(device):
    cu = torch.tensor([0, 1, 2], device=device)
    logps = torch.tensor([0.0, -200.0], device=device)
    squares = torch.tensor([-150.0, -50.0], device=device)
    assert wpo_weights(logps, squares, cu_seqlens=cu).tolist() == [1.0]


def test_both_from_a_head_to_a_loss(device):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(12, 6, generator=generator).to(device).requires_grad_()
    weight, targets = torch.randn(20, 6, generator=generator).to(device), torch.arange(12)
    cu = torch.tensor([0, 4, 6, 9, 12], device=device)
    out = linear_token_logps(
        hidden, weight, targets.to(device), outputs=("log_sum_sq_probs",), impl="chunked"
    )
    logps = hidden.detach().double() @ weight.double().T
    squares = 2 * logps.log_softmax(-1)
    expected = wpo_weights(
        logps.log_softmax(-1).gather(1, targets.to(device)[:, None])[:, 0],
        squares.logsumexp(-1),
        cu_seqlens=cu,
    )
    weights = wpo_weights(out.logps, out.log_sum_sq_probs, cu_seqlens=cu)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)
    tokens = length_desensitized_weights(cu, 0.5, tokens=12)
    sums = sequence_logps(tokens * out.logps, cu_seqlens=cu).sums
    zeros = torch.zeros(2, device=device)
    losses = preference_loss(sums[0::2], sums[1::2], zeros, zeros, weights=weights).losses
    (grad,) = torch.autograd.grad(losses.sum(), out.logps)
    slope = 0.1 * (0.1 * (sums[0::2] - sums[1::2])).neg().sigmoid() * weights
    signs = torch.tensor([-1.0, 1.0], device=device)
    each = (slope[:, None] * signs).flatten().repeat_interleave(cu.diff())
    torch.testing.assert_close(grad, each * tokens)


def test_empty(device):
    none, cu = torch.zeros(0, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    assert length_desensitized_weights(cu, 0.5, tokens=0).shape == (0,)
    assert wpo_weights(none, none, cu_seqlens=cu).shape == (0,)
    two = torch.zeros(5, dtype=torch.int64, device=device)
    assert length_desensitized_weights(two, 0.5, mask=none.bool()).shape == (0,)
    assert wpo_weights(none, none, cu_seqlens=two).tolist() == [1, 1]


def test_compiled_as_one_graph(device):
    cu, mask, logps, squares = example(LENGTHS["ragged"], device)

    def weights(cu, mask, logps, squares):
        return (
            length_desensitized_weights(cu, 0.5, mask=mask),
            wpo_weights(logps, squares, cu_seqlens=cu, mask=mask),
        )

    compiled = torch.compile(weights, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        compiled(cu, mask, logps, squares), weights(cu, mask, logps, squares), strict=True
    ):
        assert torch.equal(a, b)


CU = torch.tensor([0, 2, 5])
BAD_LENGTHS = {
    "tokens: expected the number of tokens where there is no mask, got None": {"tokens": None},
    "tokens: expected an int, got float": {"tokens": 5.0},
    "tokens: expected an int of at least 0, got -1": {"tokens": -1},
    "ld_alpha: expected a number of at most 1, got 1.5": {"ld_alpha": 1.5},
    "ld_alpha: expected a number of at least 0, got -0.5": {"ld_alpha": -0.5},
    r"cu_seqlens: expected \[2B \+ 1\].* got 2 elements": {"cu_seqlens": CU[:2]},
    "cu_seqlens: expected sequences that hold 5 tokens, got none": {"cu_seqlens": CU[:1]},
    "cu_seqlens: expected to rise from 0 to the 6 tokens": {"tokens": 6},
    "cu_seqlens: expected dtype int32, int64, got float32": {"cu_seqlens": CU.float()},
    "cu_seqlens: expected a tensor, got list": {"cu_seqlens": [0, 2, 5]},
    r"mask: expected shape \(5,\), got \(4,\)": {"mask": torch.ones(4).bool()},
    "mask: expected dtype bool, int32, int64, got float32": {"mask": torch.ones(5)},
}


@pytest.mark.parametrize("message", BAD_LENGTHS)
def test_bad_arguments_of_length_desensitized_weights(message):
    given = {"cu_seqlens": CU, "ld_alpha": 0.5, "tokens": 5, **BAD_LENGTHS[message]}
    with pytest.raises((TypeError, ValueError), match=message):
        length_desensitized_weights(**given)


BAD_WPO = {
    r"log_sum_sq_probs: expected shape \(5,\)": {"log_sum_sq_probs": torch.zeros(4)},
    "log_sum_sq_probs: expected dtype": {"log_sum_sq_probs": torch.zeros(5).long()},
    r"token_logps: expected 1 dimension\(s\)": {"token_logps": torch.zeros(5, 1)},
    r"cu_seqlens: expected \[2B \+ 1\]": {"cu_seqlens": CU[:2]},
    "mask: expected shape": {"mask": torch.ones(1).bool()},
    "impl: expected one of": {"impl": "fast"},
}


@pytest.mark.parametrize("message", BAD_WPO)
def test_bad_arguments_of_wpo_weights(message):
    given = {"token_logps": torch.zeros(5), "log_sum_sq_probs": torch.zeros(5), "cu_seqlens": CU}
    with pytest.raises((TypeError, ValueError), match=message):
        wpo_weights(**(given | BAD_WPO[message]))
