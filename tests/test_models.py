import copy
import dataclasses
import itertools
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from prefalign.kernels.sequence_logps import sequence_logps
from tiny_models import CONFIGS, VOCAB, tiny_model, tiny_tokenizer
from tiny_models import float64_throughout as float64_throughout
from tiny_models import one_thread as one_thread
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from prefalign import _head, models
from prefalign.attention import generation_attention, use_packed_attention
from prefalign.config import LoraSettings
from prefalign.errors import ModelError
from prefalign.models import (
    check_finite,
    load_model,
    load_tokenizer,
    read_head,
    reference_of,
    refuse_head_adapter,
    response_token_logps,
    score,
    snapshot_reference,
    target_hidden,
    verify_head,
)
from prefalign.packing import Group, pack

ARCHITECTURES = tuple(CONFIGS)


def ids(length, seed):
    return [random.Random(seed * 100 + i).randrange(3, VOCAB) for i in range(length)]


def some_groups():
    """Three groups, with sequences longer than every sliding window."""
    return [
        Group(ids(6, 1), [ids(9, 2), ids(4, 3)], example_id=3),
        Group(ids(1, 4), [ids(2, 5), ids(12, 6), ids(1, 7)], example_id=1),
        Group(ids(11, 8), [ids(5, 9)], example_id=2),
    ]


def packed_model(name, dtype=torch.float32, **changes):
    model = tiny_model(name, dtype, **changes)
    use_packed_attention(model)
    return model


def own_logps(model, groups):
    """Log-probs from the model's own logits, one sequence at a time."""
    logps = []
    with generation_attention(model):
        for group in groups:
            for response in group.response_ids:
                tokens = torch.tensor([[*group.prompt_ids, *response]])
                logits = model(tokens, use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1]
                logps.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]))
    return torch.cat(logps)[:, 0]


def gradients(model, logps):
    # Upstream gradients that differ from token to token.
    upstream = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(logps, parameters, upstream, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


# The eleven architectures


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_packed_logps_equal_those_of_the_models_own_logits(name):
    model = packed_model(name)
    groups = some_groups()
    with torch.no_grad():
        fused, own = response_token_logps(model, pack(groups)), own_logps(model, groups)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, own, rtol=0, atol=4e-6)
    assert verify_head(model) < 4e-6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_separate_in_float64_with_gradients(name, float64_throughout):
    model = packed_model(name, torch.float64)
    groups = some_groups()
    packed = response_token_logps(model, pack(groups), through_wrapper=True)
    alone = torch.cat(
        [
            response_token_logps(model, pack([Group(group.prompt_ids, [response])]))
            for group in groups
            for response in group.response_ids
        ]
    )
    own = own_logps(model, groups)
    # transformers' eager attention, which a soft cap needs, has its softmax in float32.
    own_tolerance = 1e-5 if name.startswith("gemma") else 1e-10
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(packed, own, rtol=0, atol=own_tolerance)
    ours = gradients(model, packed)
    for other, tolerance in ((alone, 1e-10), (own, own_tolerance * 10)):
        for mine, right in zip(ours, gradients(model, other), strict=True):
            torch.testing.assert_close(mine, right, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_changing_one_sequence_leaves_the_others_bit_identical(name):
    model = packed_model(name)
    groups = some_groups()
    changed = copy.deepcopy(groups)
    changed[1].response_ids[1][:] = ids(12, 99)
    with torch.no_grad():
        before, after = (response_token_logps(model, pack(g)) for g in (groups, changed))
    others = torch.ones(len(before), dtype=torch.bool)
    start, end = pack(groups).cu_targets[[3, 4]].tolist()
    others[start:end] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[start:end], after[start:end])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_wrappers_route_and_the_backbones_give_the_same_bits(name):
    model = packed_model(name)
    batch = pack(some_groups())
    through, backbone = (target_hidden(model, batch, through_wrapper=way) for way in (True, False))
    assert through.shape == (len(batch.targets), read_head(model).weight.shape[1])
    assert torch.equal(through, backbone)
    with torch.no_grad():
        assert torch.equal(target_hidden(model, batch), backbone)


def test_no_logits_are_made(monkeypatch):
    model = packed_model("llama")
    shapes = []
    model.lm_head.register_forward_hook(lambda _, args, out: shapes.append(tuple(out.shape)))
    batch = pack(some_groups())
    target_hidden(model, batch, through_wrapper=True)
    target_hidden(model, batch)
    assert shapes == [(1, 0, VOCAB)]


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_gradient_checkpointing_changes_nothing(name):
    model = packed_model(name, torch.float64)
    batch = pack(some_groups())
    plain = gradients(model, response_token_logps(model, batch, through_wrapper=True))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    again = gradients(model, response_token_logps(model, batch, through_wrapper=True))
    for mine, right in zip(again, plain, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)


# The head


def test_what_stands_between_the_head_and_the_logits():
    assert read_head(tiny_model("granite")).logit_scale == pytest.approx(1 / 3)
    assert read_head(tiny_model("cohere")).logit_scale == pytest.approx(0.3)
    assert read_head(tiny_model("gemma2")).softcap == 4.0
    plain = read_head(tiny_model("llama"))
    assert (plain.logit_scale, plain.softcap, plain.bias) == (1.0, None, None)


def test_the_heads_bias_is_honoured():
    model = packed_model("llama")
    model.lm_head.bias = nn.Parameter(torch.randn(VOCAB))
    groups = some_groups()
    with torch.no_grad():
        fused, own = response_token_logps(model, pack(groups)), own_logps(model, groups)
    torch.testing.assert_close(fused, own, rtol=0, atol=4e-6)


def test_the_heads_weight_gets_its_gradient():
    model = packed_model("qwen2")
    response_token_logps(model, pack(some_groups()), through_wrapper=True).sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_refuses_heads_it_cannot_read():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = packed_model("qwen2")
    model.lm_head = Scaled(32, VOCAB, bias=False)
    with pytest.raises(ModelError, match="Scaled"):
        read_head(model)
    with pytest.raises(ModelError, match="no output head"):
        read_head(nn.Linear(2, 2))


def test_a_head_that_peft_trains_whole_is_followed():
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"], r=2
    )
    model = get_peft_model(packed_model("qwen2"), config)
    original = model.get_base_model().lm_head.original_module.weight
    assert read_head(model).weight is not original
    assert read_head(model).weight.requires_grad
    with reference_of(model).use() as reference:
        assert read_head(reference).weight is original


# LoRA on the head


def head_lora(name, dtype=torch.float32, *, r=3, **changes):
    """Return a model with trained LoRA on its head and on an inner layer."""
    torch.manual_seed(1)
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"], r=r, lora_alpha=2 * r,
        **changes,
    )  # fmt: skip
    model = get_peft_model(packed_model(name, dtype), config, autocast_adapter_dtype=False)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
def test_lora_on_the_head_equals_the_models_own_logits_and_gradients(name, float64_throughout):
    model = head_lora(name, torch.float64)
    head = read_head(model)
    assert head.adapter.a.shape == (3, 32) and head.adapter.scaling == 2.0
    groups = some_groups()
    fused = response_token_logps(model, pack(groups), through_wrapper=True)
    own = own_logps(model, groups)
    tolerance = 1e-5 if name.startswith("gemma") else 1e-10  # its eager softmax is in float32
    torch.testing.assert_close(fused, own, rtol=0, atol=tolerance)
    ours, theirs = gradients(model, fused), gradients(model, own)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    for which in ("lm_head.lora_A", "lm_head.lora_B", "q_proj.lora_A"):
        assert any(which in n and g.any() for n, g in zip(names, ours, strict=True))
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_head_accepts_lora_on_a_head_tied_to_the_embedding(dtype):
    model = head_lora("gemma2", dtype)
    base = model.get_base_model()
    assert read_head(model).weight is base.get_input_embeddings().weight
    assert verify_head(model.train()) < 0.2
    base.lm_head.lora_B.float()  # PEFT's own default on a 16-bit model
    base.lm_head.lora_A.float()
    assert verify_head(model) < 0.2


def test_references_follow_lora_on_the_head():
    model = head_lora("qwen2")
    groups, batch = some_groups(), pack(some_groups())
    with torch.no_grad():
        policy = response_token_logps(model, batch)
        snapshot = snapshot_reference(model)
        for parameter in (read_head(model).adapter.a, read_head(model).adapter.b):
            parameter += 0.5
        assert not torch.equal(response_token_logps(model, batch), policy)
        with snapshot.use() as reference:
            assert torch.equal(response_token_logps(reference, batch), policy)
        with reference_of(model).use() as reference:
            assert read_head(reference).adapter is None
            off, own = response_token_logps(reference, batch), own_logps(reference, groups)
            torch.testing.assert_close(off, own, rtol=0, atol=4e-6)
        moved = response_token_logps(model, batch)
        torch.testing.assert_close(moved, own_logps(model, groups), rtol=0, atol=4e-6)


def test_a_merged_head_is_read_as_it_is():
    model = head_lora("qwen2")
    batch = pack(some_groups())
    with torch.no_grad():
        before = response_token_logps(model, batch)
        model.merge_adapter()
        assert read_head(model).adapter is None
        merged = response_token_logps(model, batch)
        torch.testing.assert_close(merged, before, rtol=0, atol=1e-5)
        with reference_of(model).use() as reference:
            read_head(reference)
        assert not model.get_base_model().lm_head.merged


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"use_dora": True}, "variant of LoRA, such as DoRA"),
        ({"lora_bias": True}, "bias in its LoRA"),
        ({"lora_dropout": 0.1}, "dropout in its LoRA while training"),
    ],
)
def test_refuses_other_adapters_of_the_head(changes, text):
    model = head_lora("llama", **changes).train()
    with pytest.raises(ModelError, match=text):
        read_head(model)
    if "lora_dropout" in changes:
        assert read_head(model.eval()).adapter is not None


def test_refuses_two_active_adapters_of_the_head():
    model = head_lora("llama")
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ModelError, match=r"2 active adapters \(default, other\)"):
        read_head(model)


def test_refuses_a_head_adapter_for_what_cannot_use_it():
    model = head_lora("llama")
    with pytest.raises(ModelError, match="LoRA adapter, which the test cannot use"):
        refuse_head_adapter(model, "the test")
    with reference_of(model).use(), pytest.raises(ModelError):  # switched off, but there
        refuse_head_adapter(model, "the test")
    refuse_head_adapter(model.unload(), "the test")


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_head_accepts_the_model_as_it_is_and_refuses_a_misread_head(
    name, dtype, monkeypatch
):
    model = packed_model(name, dtype)
    model.train()
    assert verify_head(model) < 0.1
    assert all(module.training for module in model.modules())

    right = read_head(model)
    wrong = dataclasses.replace(right, logit_scale=right.logit_scale * 0.7)
    monkeypatch.setattr(_head, "read_head", lambda _: wrong)
    with pytest.raises(ModelError, match="differ from the model's own by up to"):
        verify_head(model)


def test_verify_head_accepts_log_probs_far_above_the_logits():
    # Nearly uniform over 8,192 tokens: log-probs of 9 from logits near 0, and their rounding.
    for seed in range(4):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=8192, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, initializer_range=0.002,
            )
        )  # fmt: skip
        use_packed_attention(model)
        assert verify_head(model) < 8e-6


def test_verify_head_refuses_attention_that_crosses_sequences(monkeypatch):
    model = packed_model("llama")
    real = models.packed_inputs

    def one_segment(batch):
        bounds = batch.cu_seqlens[[0, -1]]
        return {
            **real(batch), "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "segments": None,
        }  # fmt: skip

    monkeypatch.setattr(models, "packed_inputs", one_segment)
    with pytest.raises(ModelError, match="attention is not understood"):
        verify_head(model)


def test_verify_head_refuses_attention_sinks():
    model = packed_model("gpt_oss")
    with pytest.raises(ModelError, match="attention sinks"):
        verify_head(model)


def test_packed_attention_must_be_on():
    with pytest.raises(ModelError, match="use_packed_attention"):
        target_hidden(tiny_model("llama"), pack(some_groups()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    model = tiny_model("llama", torch.bfloat16)
    check_finite(model)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        check_finite(model)


# Scores


@pytest.mark.parametrize(("max_tokens", "lookahead"), [(1, 256), (40, 2), (10_000, 256)])
def test_score_sums_logps_in_the_groups_order(max_tokens, lookahead):
    model = packed_model("gemma2").train()
    groups = some_groups() * 2
    finished = []
    scores = score(
        model,
        iter(groups),
        max_tokens=max_tokens,
        lookahead=lookahead,
        progress=finished.append,
    )
    first = next(scores)
    assert model.training and torch.is_grad_enabled()
    scores = [first, *scores]
    assert sum(finished) == len(groups)
    model.eval()
    with torch.no_grad():
        sums = sequence_logps(own_logps(model, groups), cu_seqlens=pack(groups).cu_targets).sums
    flat = torch.tensor(list(itertools.chain(*scores)))
    assert [len(s) for s in scores] == [2, 3, 1] * 2
    torch.testing.assert_close(flat, sums, rtol=0, atol=3e-5)


# PEFT and references


def lora_model(name="llama", **changes):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, **changes)
    model = get_peft_model(packed_model(name), config)
    randomise_adapter(model, 0)
    return model


def randomise_adapter(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".default" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def state_of(model):
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    return flags, modes, model.active_adapter


@torch.no_grad()
def logps_of(model):
    return response_token_logps(model, pack(some_groups()))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox"])
def test_an_adapter_is_in_the_backbone_and_off_in_the_reference(name):
    model = lora_model(name, lora_dropout=0.1)
    base = logps_of(packed_model(name))
    model.train()
    model.base_model.model.base_model.eval()
    # Flags that PEFT would not have chosen.
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    before = state_of(model)
    policy = logps_of(model)
    torch.testing.assert_close(policy, own_logps(model, some_groups()), rtol=0, atol=1e-5)
    with reference_of(model).use() as reference:
        assert not any(module.training for module in reference.modules())
        assert torch.equal(logps_of(reference), base)
    assert state_of(model) == before
    assert torch.equal(logps_of(model), policy)
    assert not torch.allclose(policy, base, atol=1e-2)


def test_a_snapshot_of_an_adapter_is_a_frozen_copy_and_can_be_refreshed():
    model = lora_model()
    model.base_model.model.to(torch.bfloat16)
    before, policy = state_of(model), logps_of(model)
    random_state = torch.get_rng_state()
    reference = snapshot_reference(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    flags, modes, active = state_of(model)
    assert active == before[2]
    assert {n: f for n, f in flags.items() if ".reference" not in n} == before[0]
    assert not any(flag for name, flag in flags.items() if ".reference" in name)

    randomise_adapter(model, 1)
    model.base_model.model.to(torch.bfloat16)
    moved = logps_of(model)
    with reference.use() as module:
        assert torch.equal(logps_of(module), policy)
    assert state_of(model) == (flags, modes, active)
    assert torch.equal(logps_of(model), moved)

    tensors = len(dict(model.named_parameters()))
    again = snapshot_reference(model)
    assert len(dict(model.named_parameters())) == tensors
    with again.use() as module:
        assert torch.equal(logps_of(module), moved)


def test_the_references_state_is_restored_after_an_error():
    model = lora_model().train()
    snapshot = snapshot_reference(model)
    before = state_of(model)
    for reference in (snapshot, reference_of(model)):
        with pytest.raises(KeyError), reference.use():
            raise KeyError
        assert state_of(model) == before


def test_a_snapshot_of_a_full_model_is_a_frozen_copy():
    model = packed_model("llama").train()
    policy = logps_of(model)
    reference = snapshot_reference(model)
    model.lm_head.weight.data += 0.1
    with reference.use() as module:
        assert not any(p.requires_grad for p in module.parameters()) and not module.training
        assert torch.equal(logps_of(module), policy)
    assert all(p.requires_grad for p in model.parameters()) and model.training
    again = snapshot_reference(model, reference)
    assert again.model is reference.model
    with again.use() as module:
        assert torch.equal(logps_of(module), logps_of(model))


def test_references_that_there_are_not():
    with pytest.raises(ModelError, match="no adapter to switch off"):
        reference_of(tiny_model("llama"))
    with pytest.raises(ModelError, match="no adapter 'other'.*default"):
        reference_of(lora_model(), adapter="other")


# Loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("qwen2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_and_its_adapter_survive_the_disk(saved, tmp_path):
    model = load_model(saved)
    assert torch.equal(logps_of(model), logps_of(packed_model("qwen2")))
    model.save_pretrained(tmp_path / "again")
    assert "prefalign" not in (tmp_path / "again" / "config.json").read_text()
    assert load_model(saved, dtype="bfloat16").dtype == torch.bfloat16
    assert type(load_model(saved, lora=LoraSettings(r=0))) is type(model)

    adapted = load_model(saved, lora=LoraSettings(r=2))
    assert torch.equal(logps_of(adapted), logps_of(model))
    randomise_adapter(adapted, 0)
    adapted.save_pretrained(tmp_path)
    for again in (load_model(saved, adapter=tmp_path), load_model(tmp_path)):
        assert torch.equal(logps_of(again), logps_of(adapted))
        assert any(p.requires_grad for p in again.parameters())


def test_a_tokenizer_without_pad_pads_with_eos(saved, tmp_path):
    tokenizer = load_tokenizer(saved)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == 2
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no EOS token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_what_cannot_be_loaded_is_said_in_one_line(load, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for path in (tmp_path / "absent", "./absent", "", tmp_path / "file", tmp_path / "broken"):
        with pytest.raises(ModelError) as caught:
            load(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    for path in (tmp_path / "empty", "nobody/has-made-this"):
        with pytest.raises(ModelError) as caught:
            load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_and_incomplete_weights_are_refused(saved, tmp_path):
    model = tiny_model("qwen2")
    weights = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up" not in k}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


# Wrappers for parallel training


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_gradients_under_ddp_and_fsdp2(name, process_group):
    batch = pack(some_groups())
    plain = packed_model(name)
    response_token_logps(plain, batch, through_wrapper=True).sum().backward()
    expected = {n: p.grad for n, p in plain.named_parameters()}

    wrapped = nn.parallel.DistributedDataParallel(packed_model(name))
    response_token_logps(wrapped, batch, through_wrapper=True).sum().backward()
    for n, p in wrapped.module.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], rtol=0, atol=1e-6)

    sharded = packed_model(name)
    for layer in sharded.model.layers:
        torch.distributed.fsdp.fully_shard(layer)
    torch.distributed.fsdp.fully_shard(sharded)
    verify_head(sharded)
    with torch.no_grad():
        reference = response_token_logps(sharded, batch)
    torch.testing.assert_close(reference, logps_of(plain), rtol=0, atol=1e-6)
    response_token_logps(sharded, batch, through_wrapper=True).sum().backward()
    for n, p in sharded.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), expected[n], rtol=0, atol=1e-6)
