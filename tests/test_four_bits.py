"""Bases of 4 bits: what is loaded, what is trained, and what is said where bitsandbytes is missing.

The tests that need it skip without it: it is an extra, and not among the test's.
"""

import importlib.util
from dataclasses import replace

import pytest
import torch
from memory import SETTINGS, groups_of, measured_training, predicted, request_for, weight_bytes
from tiny_models import tiny_model, tiny_tokenizer
from whole_runs import pairs, refused, write_jsonl

from prefalign.config import LoraSettings, ModelSettings
from prefalign.errors import ModelError
from prefalign.fake_models import fake_from_config
from prefalign.loading import load_model
from prefalign.models import score, target_hidden, verify_head
from prefalign.packing import Group, pack

LORA = LoraSettings(r=4)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes (the extra of that name) is not installed",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(place)
    return place


def test_without_bitsandbytes_the_extra_is_named(folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    with pytest.raises(ModelError, match=r"pip install 'prefalign\[bitsandbytes\]'"):
        load_model(folder, lora=LORA, load_in_4bit=True)


def test_the_head_and_the_embeddings_are_not_quantised(folder):
    settings = ModelSettings(path=str(folder), lora=LORA, load_in_4bit=True)
    sizes = {name: p for name, p in fake_from_config(settings).model.named_parameters()}
    packed = {name for name, p in sizes.items() if p.dtype == torch.uint8}
    assert len(packed) == 2 * 7 and all("_proj.base_layer.weight" in name for name in packed)
    # 4 bits and, for 64 weights, a constant of 8 bits, of which 256 have one of 32.
    down = sizes["base_model.model.model.layers.0.mlp.down_proj.base_layer.weight"]
    assert down.nbytes == int(64 * 128 * (0.5 + 1 / 64 + 4 / 64 / 256))
    assert {p.dtype for name, p in sizes.items() if p.requires_grad} == {torch.float32}


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_take_what_is_planned(folder, dtype):
    settings = ModelSettings(path=str(folder), dtype=dtype, lora=LORA, load_in_4bit=True)
    fake = fake_from_config(settings).model
    model = load_model(folder, dtype=dtype, lora=LORA, load_in_4bit=True)
    verify_head(model)
    real = weight_bytes(model)
    for p in model.parameters():
        if state := getattr(p, "quant_state", None):
            real += state.absmax.nbytes
            if getattr(state, "nested", False):
                real += state.state2.absmax.nbytes
    assert weight_bytes(fake) == pytest.approx(real, rel=0.01)
    trained, expected = (
        {n: tuple(p.shape) for n, p in m.named_parameters() if p.requires_grad}
        for m in (model, fake)
    )
    assert trained == expected and trained


@needs_bitsandbytes
def test_gradients_are_those_of_the_dequantised_weights(folder):
    import bitsandbytes

    torch.manual_seed(0)
    model = load_model(folder, dtype="float32", lora=LORA, load_in_4bit=True)
    plain = load_model(folder, dtype="float32", lora=LORA)
    with torch.no_grad():
        layers = dict(plain.named_modules())
        for name, layer in model.named_modules():
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(
                    layer.weight.data, layer.weight.quant_state
                )
                layers[name].weight.copy_(weight)
        theirs = dict(plain.named_parameters())
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
                theirs[name].copy_(p)
    groups = [Group([3, 4, 5], [[6, 7], [8, 9, 10]])]
    batch = pack(groups)
    # Weights that a pass in eval mode left in another layout would have no backward.
    assert list(score(model, groups, max_tokens=99)) == [
        pytest.approx(next(score(plain, groups, max_tokens=99)), abs=1e-4)
    ]
    upstream = torch.linspace(-1, 2, 5 * 64).view(5, 64)
    for each in (model, plain):
        target_hidden(each.train(), batch, through_wrapper=True).backward(upstream)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.abs().max() > 0, name
            error = (p.grad - theirs[name].grad).norm() / theirs[name].grad.norm()
            assert error < 1e-4, (name, error)


@needs_bitsandbytes
@pytest.mark.parametrize("reference", ["base", "copy"])
def test_training_takes_what_is_planned(tmp_path, reference):
    from memory import write_big_model

    path = write_big_model(tmp_path / "model")
    request = request_for(
        path,
        groups_of([(60, 80, 90)] * 6),
        replace(SETTINGS, learning_rate=1e-2),
        lora=LORA,
        load_in_4bit=True,
        reference=reference,
    )
    plan = predicted(request)
    measured = measured_training(request, tmp_path / "run")
    assert 0.95 <= plan.peak / measured <= 1.1, (plan.worst, measured)


def test_a_run_loads_its_base_in_4_bits(folder, tmp_path, capsys, monkeypatch):
    tiny_tokenizer().save_pretrained(folder)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    options = {
        "model.path": folder,
        "model.load_in_4bit": "true",
        "data.preferences": write_jsonl(tmp_path / "pairs.jsonl", pairs(4)),
        "output_dir": tmp_path / "run",
    }
    assert refused(capsys, "dpo", options).startswith("model.lora.r: expected 1 or more")
    message = refused(capsys, "dpo", {**options, "model.lora.r": 4})
    assert message.endswith("pip install 'prefalign[bitsandbytes]'")
    assert not (tmp_path / "run").exists()
