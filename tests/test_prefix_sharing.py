"""Prompts computed once: attention, log-probs, gradients, and who refuses."""

import itertools
import logging
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.attention.varlen
from peft import LoraConfig, get_peft_model
from tiny_models import CONFIGS, VOCAB, tiny_model
from tiny_models import float64_throughout as float64_throughout
from tiny_models import one_thread as one_thread
from training import SETTINGS, dpo_losses, model_and_reference, random_groups, train, weights

from prefalign import _merged_attention, attention, attention_backends, models
from prefalign.attention import (
    generation_attention,
    packed_attention,
    packed_inputs,
    sharing_obstacle,
    use_packed_attention,
)
from prefalign.errors import ModelError
from prefalign.models import can_share_prompts, response_token_logps, score, target_hidden
from prefalign.packed_trainer import Groups, training_arguments
from prefalign.packing import Group, pack
from prefalign.passes import split_by_tokens
from prefalign.trainer import PreferenceTrainer


def ids(length, seed):
    return [random.Random(seed * 100 + i).randrange(3, VOCAB) for i in range(length)]


def some_groups():
    """Prompts and responses shorter and longer than every window; one, two and three responses."""
    return [
        Group(ids(6, 1), [ids(9, 2), ids(4, 3)]),
        Group(ids(1, 4), [ids(2, 5), ids(12, 6), ids(1, 7)]),
        Group(ids(11, 8), [ids(5, 9)]),
        Group(ids(14, 10), [ids(1, 11), ids(10, 12)]),
    ]


def pairs():
    return [group for group in some_groups() if len(group.response_ids) == 2]


def packed_model(name, dtype=torch.float32, **changes):
    model = tiny_model(name, dtype, **changes)
    use_packed_attention(model)
    return model


# Attention


def projections(tokens, heads_kv, dtype=torch.float64, size_v=8):
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 8), (heads_kv, 8), (heads_kv, size_v))
    return [
        torch.randn(1, heads, tokens, size, dtype=dtype, generator=generator).requires_grad_()
        for heads, size in shapes
    ]


def brute_force(q, k, v, batch, window=None, softcap=None):
    """Attention by a ``[T, T]`` table: own segment and parent, up to the token's position."""
    lengths, positions = batch.cu_seqlens.diff(), batch.position_ids
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    parent = batch.parents[segment]
    ahead = positions[:, None] - positions
    allowed = (segment[:, None] == segment) | (parent[:, None] == segment)
    allowed &= (ahead >= 0) & (ahead < (window or 1000))
    k, v = (x.repeat_interleave(4 // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * 8**-0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v).transpose(1, 2)


class Layer(torch.nn.Module):
    is_causal = True


def arguments(batch, **options):
    return packed_inputs(batch) | options  # the ids among them are ignored


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 5, 7, 50])
@pytest.mark.parametrize("heads_kv", [4, 1])
@pytest.mark.parametrize("kernels", [True, False])
def test_equals_attention_with_an_explicit_mask(kernels, heads_kv, window, softcap, monkeypatch):
    monkeypatch.setattr(attention_backends, "has_kernels", lambda: kernels)
    batch = pack(some_groups(), share_prompts=True)
    inputs = projections(batch.num_tokens, heads_kv, size_v=8 if kernels else 6)
    options = arguments(batch, sliding_window=window, softcap=softcap)
    out, _ = packed_attention(Layer(), *inputs, None, **options)
    expected = brute_force(*inputs, batch, window, softcap)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    for mine, right in zip(ours, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)
    for mine, again in zip(ours, torch.autograd.grad(out, inputs, upstream), strict=True):
        assert torch.equal(mine, again)  # saved tensors are not written, orders are fixed


def test_no_mask_and_no_joined_keys_where_the_parts_are_merged(monkeypatch):
    batch = pack(some_groups(), share_prompts=True)
    calls = []
    real = _merged_attention._FORWARD

    def kernel(q, k, v, *rest, **options):
        calls.append((q.shape[2], k.shape[2], rest[1]))
        return real(q, k, v, *rest, **options)

    monkeypatch.setattr(_merged_attention, "_FORWARD", kernel)
    inputs = projections(batch.num_tokens, 2)
    packed_attention(Layer(), *inputs, None, **arguments(batch, sliding_window=50))
    own = [(n, n, True) for n in batch.cu_seqlens.diff().tolist()]
    assert calls == [*own, (13, 6, False), (15, 1, False), (11, 14, False)]


@pytest.mark.parametrize("scale", [1e-3, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_errs_no_more_than_the_dtype(dtype, scale):
    """Also with scores so large that the parts' log-sum-exps are hundreds apart."""
    batch = pack(some_groups(), share_prompts=True)
    q, k, v = (x.detach().to(dtype) for x in projections(batch.num_tokens, 2))
    q = q * scale
    out, _ = packed_attention(Layer(), q, k, v, None, **arguments(batch))
    exact = brute_force(q.double(), k.double(), v.double(), batch)
    masked, _ = packed_attention(Layer(), q, k, v, None, **arguments(batch, sliding_window=15))
    error, other = ((x.double() - exact).abs() for x in (out, masked))
    eps = torch.finfo(dtype).eps
    assert error.mean() <= 2 * other.mean() + eps and error.max() <= 2 * other.max() + 4 * eps


def test_refuses_to_share_where_prompts_would_see_responses():
    batch = pack(some_groups(), share_prompts=True)
    with pytest.raises(ModelError, match="Layer attends to later tokens"):
        packed_attention(
            Layer(), *projections(batch.num_tokens, 2), None, **arguments(batch, is_causal=False)
        )


def flash(q, k, v, cu_q, cu_k, max_q, max_k, *_, **options):
    """Attend as flash-attn documents it: causality and windows count from the end of the keys."""
    window = options["window_size"]
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max() and len(k) == cu_k[-1]
    outputs = []
    bounds = (itertools.pairwise(cu.tolist()) for cu in (cu_q, cu_k))
    for (q0, q1), (k0, k1) in zip(*bounds, strict=True):
        ahead = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        allowed = (ahead >= 0) & (ahead <= (window[0] if window[0] >= 0 else 1000))
        query, key, value = (x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        scores = (query @ key.transpose(1, 2) * 8**-0.5).masked_fill(~allowed, -torch.inf)
        outputs.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("backend", ["_attend_flash", "_attend_varlen"])
def test_the_gpus_kernels_get_the_parents_keys(backend, window, monkeypatch):
    monkeypatch.setattr(attention_backends, "_flash_attn", lambda: flash)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", flash)
    monkeypatch.setattr(attention, "backend_for", lambda _: getattr(attention_backends, backend))
    batch = pack(some_groups(), share_prompts=True)
    inputs = projections(batch.num_tokens, 4)
    out, _ = packed_attention(Layer(), *inputs, None, **arguments(batch, sliding_window=window))
    torch.testing.assert_close(out, brute_force(*inputs, batch, window), rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(dtype, window):
    batch = pack(some_groups(), share_prompts=True)
    wide = projections(batch.num_tokens, 2, dtype=torch.float32)
    expected = brute_force(*wide, batch, window)
    narrow = [x.detach().to("cuda", dtype).requires_grad_() for x in wide]
    options = arguments(batch.to("cuda"), sliding_window=window)
    out, _ = packed_attention(Layer(), *narrow, None, **options)
    tolerance = 8 * max(torch.finfo(dtype).eps, 2**-10)
    torch.testing.assert_close(out.float().cpu(), expected, rtol=0, atol=tolerance)
    upstream = torch.randn_like(expected)
    narrow_upstream = upstream.to("cuda", dtype)
    ours, again = (
        torch.autograd.grad(out, narrow, narrow_upstream, retain_graph=True) for _ in range(2)
    )
    for mine, right in zip(ours, torch.autograd.grad(expected, wide, upstream), strict=True):
        torch.testing.assert_close(mine.float().cpu(), right, rtol=0, atol=4 * tolerance)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, again, strict=True))


# Models


@pytest.mark.parametrize("name", tuple(CONFIGS))
def test_losses_and_gradients_equal_those_of_separate_sequences(name, float64_throughout):
    model = packed_model(name, torch.float64)
    groups = pairs()
    reference = torch.linspace(-40, -20, 2 * len(groups), dtype=torch.float64)
    layouts = {
        "shared": [pack(groups, share_prompts=True)],
        "packed": [pack(groups)],
        "separate": [pack([Group(g.prompt_ids, [r])]) for g in groups for r in g.response_ids],
    }
    results = {}
    for layout, batches in layouts.items():
        loss = dpo_losses(model, batches, reference).mean()
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        results[layout] = loss, [g for g in grads if g is not None]
    loss, grads = results.pop("shared")
    assert sum(grad.abs().sum() for grad in grads) > 0
    for other, others in results.values():
        torch.testing.assert_close(loss, other, rtol=0, atol=1e-10)
        for mine, right in zip(grads, others, strict=True):
            torch.testing.assert_close(mine, right, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", tuple(CONFIGS))
def test_changing_one_response_leaves_the_others_bit_identical(name):
    model = packed_model(name)
    groups = some_groups()
    responses = [list(r) for r in groups[1].response_ids]
    responses[1] = ids(12, 99)
    changed = [groups[0], replace(groups[1], response_ids=responses), *groups[2:]]
    with torch.no_grad():
        before, after = (
            response_token_logps(model, pack(g, share_prompts=True)) for g in (groups, changed)
        )
    start, end = pack(groups).cu_targets[[3, 4]].tolist()
    others = torch.ones(len(before), dtype=torch.bool)
    others[start:end] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[start:end], after[start:end])


def test_an_outlier_of_8000_tokens_beside_short_pairs():
    model = packed_model("llama", max_position_embeddings=9000)
    groups = [*pairs(), Group(ids(7000, 20), [ids(1000, 21), ids(3, 22)])]
    lengths = [group.tokens_laid(share_prompts=True) for group in groups]
    assert split_by_tokens(lengths, 4096) == [[2], [0, 1]]
    batches = [pack(groups, share_prompts=shared) for shared in (True, False)]
    with torch.no_grad():
        shared, plain = (response_token_logps(model, batch) for batch in batches)
    torch.testing.assert_close(shared, plain, rtol=0, atol=3e-5)


def test_gradient_checkpointing_and_the_wrappers_route_change_nothing():
    model = packed_model("qwen3", torch.float64)
    batch = pack(some_groups(), share_prompts=True)
    upstream = torch.linspace(-1, 2, batch.targets.numel(), dtype=torch.float64)[:, None]

    def gradients(**options):
        hidden = target_hidden(model, batch, **options)
        parameters = list(model.model.parameters())
        return torch.autograd.grad(hidden, parameters, upstream.expand_as(hidden))

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for other in (gradients(through_wrapper=True), gradients()):
        for mine, right in zip(other, plain, strict=True):
            torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)


# Who can share


@pytest.mark.parametrize("name", tuple(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_architecture_that_packs_can_share(name, dtype):
    assert can_share_prompts(packed_model(name, dtype).train()) is None


def test_peft_models_and_autocast_can_share():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2, lora_dropout=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert can_share_prompts(get_peft_model(packed_model("llama"), config).train()) is None


def test_what_the_architecture_says_of_itself():
    assert sharing_obstacle(tiny_model("bloom")) == "BloomForCausalLM uses ALiBi"
    assert "recurrent layers" in sharing_obstacle(tiny_model("mamba"))
    assert "no packed attention" in sharing_obstacle(tiny_model("llama"))
    model = packed_model("llama", num_kv_shared_layers=1)
    assert "keys and values of earlier" in can_share_prompts(model)
    with pytest.raises(ModelError, match="its prompts cannot be shared"):
        target_hidden(model, pack(some_groups(), share_prompts=True))


def token_shift(module, args):
    """Mix each token with the one laid before it, as RWKV does."""
    return (args[0] + 0.3 * args[0].roll(1, dims=1), *args[1:])


def test_a_model_that_only_a_trial_tells_is_refused_and_falls_back_once(caplog):
    model = packed_model("llama")
    model.model.layers[0].mlp.register_forward_pre_hook(token_shift)
    models._SAID.clear()
    with caplog.at_level(logging.WARNING, "prefalign"):
        scores = list(score(model, some_groups(), max_tokens=10**4))
        assert list(score(model, some_groups(), max_tokens=10**4)) == scores
    assert len(caplog.records) == 1
    assert "behind a shared prompt differ" in caplog.text
    assert scores == list(score(model, some_groups(), max_tokens=10**4, share_prompts=False))


@pytest.mark.parametrize("name", ["bloom", "falcon_alibi"])
def test_an_alibi_model_falls_back_to_padded_rows_and_says_so(name, caplog, tmp_path):
    models._SAID.clear()
    with caplog.at_level(logging.WARNING, "prefalign"):
        model = packed_model(name)
        use_packed_attention(model)
        scores = list(score(model, some_groups(), max_tokens=30))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "padded, one to a row" in said[0] and "not shared" in said[1]
    assert models.verify_head(model) < 1e-5
    for group, sums in zip(some_groups(), scores, strict=True):
        for response, total in zip(group.response_ids, sums, strict=True):
            tokens = torch.tensor([[*group.prompt_ids, *response]])
            with torch.no_grad(), generation_attention(model):
                logits = model(tokens).logits[0, len(group.prompt_ids) - 1 : -1]
            own = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
            assert total == pytest.approx(own.item(), abs=1e-4)
    settings = training_arguments(SETTINGS, tmp_path, num_groups=4, epochs=1)
    settings.save_strategy = "no"
    reference = models.snapshot_reference(model)
    trainer = PreferenceTrainer(model, settings, Groups(random_groups(4)), reference=reference)
    assert not trainer.data_collator.share_prompts
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


# Scores and training


def test_scores_are_the_same_and_shared_by_default(monkeypatch):
    model = packed_model("gemma2")
    laid = []
    real = models.pack_parts

    def watched(*args, **kwargs):
        laid.append(real(*args, **kwargs))
        return laid[-1]

    monkeypatch.setattr(models, "pack_parts", watched)
    plain = list(score(model, some_groups(), max_tokens=60, share_prompts=False))
    assert not any(batch.shares_prompts for batch in laid)
    laid.clear()
    shared = list(score(model, some_groups(), max_tokens=60))
    assert any(batch.shares_prompts for batch in laid)
    for mine, right in zip(shared, plain, strict=True):
        assert mine == pytest.approx(right, abs=3e-5)


def test_training_is_the_same_and_the_first_loss_exactly_ln_2(tmp_path):
    groups = random_groups(12)
    seen = []

    class Watching(PreferenceTrainer):
        def group_losses(self, model, batch):
            losses, metrics = super().group_losses(model, batch)
            if self.state.global_step == 0:
                seen.append((batch.shares_prompts, losses.detach()))
            return losses, metrics

    shared, logs = train(tmp_path / "a", groups, trainer_class=Watching)
    assert seen and all(batch_shares for batch_shares, _ in seen)
    for _, losses in seen:
        assert torch.equal(losses, torch.tensor(2.0).log().expand(losses.shape))
    plain, plain_logs = train(tmp_path / "b", groups, share_prompts=False)
    assert [x["loss"] for x in logs] == pytest.approx([x["loss"] for x in plain_logs], abs=1e-6)
    assert torch.allclose(weights(shared), weights(plain), atol=1e-5)
    tokens = [sum(x["num_tokens"] for x in log) for log in (logs, plain_logs)]
    repeated = sum(len(group.prompt_ids) for group in groups)
    assert tokens[1] - tokens[0] == repeated


def test_an_evaluation_shares_prompts_too(tmp_path):
    model, reference = model_and_reference()
    settings = training_arguments(SETTINGS, tmp_path, num_groups=4, epochs=1)
    data = Groups(random_groups(4))
    trainer = PreferenceTrainer(model, settings, data, eval_dataset=data, reference=reference)
    tokens = sum(group.tokens_laid(share_prompts=True) for group in data.groups)
    assert trainer.evaluate()["eval_num_tokens"] == tokens
