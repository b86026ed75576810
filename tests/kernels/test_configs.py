"""The table of launch configurations, and that how operands are read changes no bit."""

import pytest
import torch
from prefalign.kernels import _autotune, _linear_triton, configs
from prefalign.kernels._token_logps_triton import split_rows
from prefalign.kernels.linear_token_logps import linear_token_logps
from prefalign.kernels.linear_token_logps_triple import linear_token_logps_triple
from prefalign.kernels.token_logps import OUTPUTS, token_logps

pytest.importorskip("triton")


def head(device, dtype, D):
    generator = torch.Generator().manual_seed(0)
    x, ref = (torch.randn(37, D, generator=generator).to(device, dtype) for _ in range(2))
    w = torch.randn(331, D, generator=generator).to(device, dtype)
    y = torch.randint(331, (37,), generator=generator).to(device)
    y[3] = -100
    return x.requires_grad_(), ref, w, y


def everything(device, dtype, D, weight_grad):
    x, ref, w, y = head(device, dtype, D)
    leaves = (x, w.requires_grad_()) if weight_grad else (x,)
    out = linear_token_logps(x, w, y, softcap=9.0, outputs=("entropy",), impl="triton")
    triple = linear_token_logps_triple(x, ref, w, y, extrapolation=0.3, impl="triton")
    grads = torch.autograd.grad(
        (out.logps.cos().sum(), triple.policy.sin().sum()), leaves, retain_graph=True
    )
    return out.logps, out.entropy, *triple, *grads


@pytest.mark.parametrize("weight_grad", [False, True], ids=["frozen", "trained"])
def test_descriptors_and_pointers_give_the_same_bits(device, monkeypatch, weight_grad):
    if not configs.blocks_for(torch.empty(0, dtype=torch.bfloat16, device=device)).tma:
        pytest.skip("this card reads no descriptors")
    used = []
    described = _linear_triton.described
    monkeypatch.setattr(
        _linear_triton, "described", lambda *args: used.append(described(*args)) or used[-1]
    )
    with_descriptors = everything(device, torch.bfloat16, 48, weight_grad)
    assert any(used)
    monkeypatch.setattr(_linear_triton, "described", lambda *args: False)
    by_pointers = everything(device, torch.bfloat16, 48, weight_grad)
    assert all(torch.equal(a, b) for a, b in zip(with_descriptors, by_pointers, strict=True))


def test_only_aligned_rows_are_read_through_descriptors():
    blocks = configs.TABLE["sm_90"].half
    x = torch.zeros(64, 128, dtype=torch.bfloat16)
    assert _linear_triton.described((x, x[8:24]), blocks)
    for other in (x[:, 1:], x[:, :1].expand(64, 128), x.T, x.float(), x[:0], x.view(-1, 4)):
        assert not _linear_triton.described((x, other), blocks)
    assert not _linear_triton.described((x,), configs.TABLE["sm_80"].half)


@pytest.mark.parametrize("target", configs.TABLE)
@pytest.mark.parametrize("N", [1, 64, 1000, 8192])
@pytest.mark.parametrize(("V", "tile"), [(1, 1), (33, 33), (32000, 1000), (262144, 8192)])
def test_slices_are_whole_splits_and_splits_whole_blocks(target, N, V, tile):
    row = configs.TABLE[target]
    for blocks in (row.half, row.single):
        size, split = configs.split_sizes(N, V, tile, blocks, row)
        assert size % split == 0 and split % blocks.block_v == 0
        assert size <= max(tile, blocks.block_v)


@pytest.mark.parametrize("rows", [1, 3, 64, 5000])
@pytest.mark.parametrize("vocab", [1, 4096, 4097, 151936, 262144])
def test_splits_of_a_row_cover_the_vocabulary(rows, vocab):
    splits, size = split_rows(rows, vocab, 4096, 528)
    assert size % 4096 == 0 and (splits - 1) * size < vocab <= splits * size
    assert splits == 1 or rows < 528


def test_a_row_split_for_few_rows_equals_a_row_that_is_not(device):
    vocab = 5 * configs.row_for(device).token_block + 3
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(1)).to(device)
    logits[0, : vocab // 2] = -torch.inf
    targets = torch.arange(64, device=device) + vocab // 2 + 1
    every = token_logps(logits, targets, softcap=None, outputs=OUTPUTS, impl="triton")
    few = token_logps(logits[:1], targets[:1], outputs=OUTPUTS, impl="triton")
    again = token_logps(logits[:1], targets[:1], outputs=OUTPUTS, impl="triton")
    for a, b, c in zip(every, few, again, strict=True):
        torch.testing.assert_close(a[:1], b, rtol=1e-6, atol=1e-6)
        assert torch.equal(b, c)


def test_every_capability_has_a_row():
    known = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_86", (8, 9): "sm_89"}
    known |= {(9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100", (12, 1): "sm_120"}
    for capability, name in known.items():
        assert configs.nearest(*capability) == name
    assert configs.nearest(7, 5) in configs.TABLE


def test_autotune_measures_once_and_changes_no_bit(device, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x, _, w, y = head(device, torch.bfloat16, 48)
    plain = linear_token_logps(x.detach(), w, y, impl="triton")
    assert not _autotune.cache_path().exists()
    monkeypatch.setenv("PREFALIGN_AUTOTUNE", "1")
    times = iter((3.0, 1.0, 2.0, 4.0, 5.0, 6.0))

    def bench(run, return_mode):
        run()
        return next(times)

    monkeypatch.setattr(_linear_triton.triton.testing, "do_bench", bench)
    assert torch.equal(linear_token_logps(x.detach(), w, y, impl="triton"), plain)
    left = len(list(times))
    assert left < 6
    assert torch.equal(linear_token_logps(x.detach(), w, y, impl="triton"), plain)
    _autotune.cache_path().write_text("{cut")
    times = iter(range(9, 0, -1))
    assert torch.equal(linear_token_logps(x.detach(), w, y, impl="triton"), plain)


def test_a_candidate_too_large_for_the_card_loses(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    blocks = configs.TABLE["sm_90"].half
    OutOfResources = type("OutOfResources", (Exception,), {})

    def measure(choice):
        if choice.num_stages > 3:
            raise OutOfResources
        return 1.0 if choice == blocks else 2.0

    assert _autotune.best("key", blocks, measure) == blocks
    assert _autotune.best("key", blocks, lambda choice: 1 / 0) == blocks
