import itertools

import pytest
import torch
import torch.nn.attention.varlen
from tiny_models import one_thread as one_thread
from tiny_models import tiny_model
from torch import nn

from prefalign import attention, attention_backends
from prefalign.attention import (
    PACKED_ATTENTION,
    generation_attention,
    packed_attention,
    use_packed_attention,
    uses_packed_attention,
)
from prefalign.errors import ModelError

LENGTHS = (1, 7, 4, 12)


def bounds(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def projections(heads_kv, size_v=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 8), (heads_kv, 8), (heads_kv, size_v))
    return [
        torch.randn(1, heads, sum(LENGTHS), size, dtype=dtype, generator=generator).requires_grad_()
        for heads, size in shapes
    ]


def brute_force(q, k, v, allowed, scale, softcap=None):
    """Attention with an explicit ``[T, T_k]`` table of what is seen, in ``[1, T, H, E_v]``."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def seen(lengths, window=None, causal=True):
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ahead = torch.arange(len(segment))[:, None] - torch.arange(len(segment))
    allowed = segment[:, None] == segment
    if causal:
        allowed &= ahead >= 0
    if window is not None:
        allowed &= ahead.abs() < window
    return allowed


class Layer(nn.Module):
    is_causal = True


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("heads_kv", [4, 2, 1])
def test_equals_attention_with_an_explicit_mask(heads_kv, window, softcap):
    q, k, v = projections(heads_kv, size_v=6)
    out, weights = packed_attention(
        Layer(),
        q,
        k,
        v,
        None,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        cu_seq_lens_q=bounds(LENGTHS),
    )
    expected = brute_force(q, k, v, seen(LENGTHS, window), 0.3, softcap)
    assert weights is None
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), upstream)
    theirs = torch.autograd.grad(expected, (q, k, v), upstream)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_without_causality(window):
    q, k, v = projections(2)
    out, _ = packed_attention(
        Layer(),
        q,
        k,
        v,
        None,
        sliding_window=window,
        is_causal=False,
        cu_seq_lens_q=bounds(LENGTHS),
    )
    expected = brute_force(q, k, v, seen(LENGTHS, window, causal=False), 8**-0.5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_segment_does_not_see_the_others(dtype, softcap):
    with torch.no_grad():
        q, k, v = (x.detach().to(dtype) for x in projections(2))
        arguments = {"cu_seq_lens_q": bounds(LENGTHS), "softcap": softcap}
        before, _ = packed_attention(Layer(), q, k, v, None, **arguments)
        for x in (q, k, v):
            x[:, :, 1:8] = torch.randn_like(x[:, :, 1:8]) * 9
        after, _ = packed_attention(Layer(), q, k, v, None, **arguments)
    assert torch.equal(before[:, :1], after[:, :1])
    assert torch.equal(before[:, 8:], after[:, 8:])
    assert not torch.equal(before[:, 1:8], after[:, 1:8])


def test_half_precision_error_is_that_of_the_dtype():
    q, k, v = projections(2, dtype=torch.float32)
    half = (x.to(torch.bfloat16) for x in (q, k, v))
    out, _ = packed_attention(Layer(), *half, None, cu_seq_lens_q=bounds(LENGTHS))
    expected = brute_force(q, k, v, seen(LENGTHS), 8**-0.5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=4 * 2**-7)


def test_queries_widened_by_the_rotary_factors_are_narrowed_again():
    q, k, v = projections(2, dtype=torch.float32)
    out, _ = packed_attention(Layer(), q, k, v.bfloat16(), None, cu_seq_lens_q=bounds(LENGTHS))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("argument", ["s_aux", "position_bias", "alibi", "head_mask"])
def test_refuses_what_it_would_leave_out(argument):
    q, k, v = projections(2)
    with pytest.raises(ModelError, match=argument):
        packed_attention(
            Layer(), q, k, v, None, cu_seq_lens_q=bounds(LENGTHS), **{argument: torch.ones(4)}
        )


def test_refuses_masks_dropout_outside_training_and_calls_without_segments():
    q, k, v = projections(2)
    with pytest.raises(ModelError, match="attention_mask"):
        packed_attention(Layer(), q, k, v, torch.zeros(1), cu_seq_lens_q=bounds(LENGTHS))
    with pytest.raises(ModelError, match="dropout"):
        packed_attention(Layer().eval(), q, k, v, None, dropout=0.1, cu_seq_lens_q=bounds(LENGTHS))
    with pytest.raises(ModelError, match="without packed sequences"):
        packed_attention(Layer(), q, k, v, None)


def test_an_ordinary_forward_pass_is_refused_while_packing_is_on():
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7]])
    own = model(ids).logits
    use_packed_attention(model)
    with pytest.raises(ModelError, match="generation_attention"):
        model(ids)
    with generation_attention(model):
        assert not uses_packed_attention(model)
        assert torch.equal(model(ids).logits, own)
    assert uses_packed_attention(model)


@pytest.mark.parametrize(("name", "expected"), [("llama", "sdpa"), ("gemma3", "eager")])
def test_generation_attention_is_one_that_knows_the_soft_cap(name, expected):
    model = tiny_model(name)
    use_packed_attention(model)
    with pytest.raises(KeyError), generation_attention(model):
        assert model.config._attn_implementation == expected
        raise KeyError
    assert model.config._attn_implementation == PACKED_ATTENTION


def test_refuses_architectures_that_cannot_be_packed():
    model = tiny_model("mamba")
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match="MambaForCausalLM has recurrent layers"):
        use_packed_attention(model)
    assert model.config._attn_implementation == before


def test_refuses_chunked_attention_and_modules_of_other_libraries():
    with pytest.raises(ModelError, match="chunked_attention"):
        use_packed_attention(tiny_model("llama", attention_chunk_size=8))
    with pytest.raises(ModelError, match="transformers model"):
        use_packed_attention(nn.Linear(2, 2))


# The GPU's kernels, emulated as their documentation describes them


def flash(q, k, v, cu_q, cu_k, window, scale, softcap):
    """Attention by flash-attn's convention: windows count from the end of queries and keys."""
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairs(cu_q), pairs(cu_k), strict=True):
        ahead = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        allowed = torch.ones_like(ahead, dtype=torch.bool)
        if window[0] >= 0:
            allowed &= ahead <= window[0]
        if window[1] >= 0:
            allowed &= -ahead <= window[1]
        segment = (x[None].transpose(1, 2) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        outputs.append(brute_force(*segment, allowed, scale, softcap or None)[0])
    return torch.cat(outputs)


def pairs(cu):
    return list(itertools.pairwise(cu.tolist()))


def fake_flash_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    assert (max_seqlen_q, max_seqlen_k) == (max(LENGTHS), max(LENGTHS))
    assert options["causal"] and not options["dropout_p"] and not options["deterministic"]
    scale, window = options["softmax_scale"], options["window_size"]
    return flash(q, k, v, cu_seqlens_q, cu_seqlens_k, window, scale, options["softcap"])


def fake_varlen_2_11(
    q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert q.shape[1] == k.shape[1]
    return flash(q, k, v, cu_q, cu_k, window_size, scale, None)


def fake_varlen_2_13(
    q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa or q.shape[1] == k.shape[1]
    return flash(q, k, v, cu_q, cu_k, window_size, scale, None)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("kernel", [fake_flash_attn, fake_varlen_2_11, fake_varlen_2_13])
def test_the_gpus_kernels_get_the_right_arguments(kernel, window, monkeypatch):
    softcap = 1.5 if kernel is fake_flash_attn else None
    if kernel is fake_flash_attn:
        monkeypatch.setattr(attention_backends, "_flash_attn", lambda: kernel)
        backend = attention_backends._attend_flash
    else:
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
        attention_backends._varlen_parameters.cache_clear()
        backend = attention_backends._attend_varlen
    monkeypatch.setattr(attention, "backend_for", lambda call: backend)
    q, k, v = projections(2)
    arguments = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    out, _ = packed_attention(Layer(), q, k, v, None, cu_seq_lens_q=bounds(LENGTHS), **arguments)
    attention_backends._varlen_parameters.cache_clear()
    expected = brute_force(q, k, v, seen(LENGTHS, window), 0.3, softcap)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads_kv", [4, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_backends(dtype, heads_kv, window):
    wide = projections(heads_kv, dtype=torch.float32)
    expected = brute_force(*wide, seen(LENGTHS, window), 0.3)
    narrow = [x.detach().to("cuda", dtype).requires_grad_() for x in wide]
    out, _ = packed_attention(
        Layer(),
        *narrow,
        None,
        scaling=0.3,
        sliding_window=window,
        cu_seq_lens_q=bounds(LENGTHS).cuda(),
        max_length_q=max(LENGTHS),
        max_length_k=max(LENGTHS),
    )
    tolerance = 8 * max(torch.finfo(dtype).eps, 2**-10)
    torch.testing.assert_close(out.float().cpu(), expected, rtol=0, atol=tolerance)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(out, narrow, upstream.to("cuda", dtype))
    theirs = torch.autograd.grad(expected, wide, upstream)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.float().cpu(), right, rtol=0, atol=4 * tolerance)
