"""``prefalign verify``: the verdict, on models that pass and on a library broken on purpose."""

import math
import re
import sys
import types
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model
from transformers import AttentionInterface
from whole_runs import arguments, pairs, refused, write_jsonl, write_model

from prefalign import cli, verify, verify_eager, verify_sides
from prefalign.attention import PACKED_ATTENTION, packed_attention
from prefalign.references import Reference
from prefalign.trainer import PreferenceTrainer

CHECKPOINTING = {"gradient_checkpointing": "true"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("verify")


@pytest.fixture
def check(folder, capsys):
    """Run the command on a tiny model; return its status and what it printed."""

    def run(name="llama", **options):
        if not (folder / name).exists():
            write_model(folder / name, name)
        given = {"model": folder / name, "pairs": 3, "max_length": 48, "trl": "false"}
        capsys.readouterr()
        status = cli.main(["verify", *arguments({**given, **options})])
        return status, capsys.readouterr().out

    return run


def verdict(text):
    return text.strip().splitlines()[-1]


def row(text, name):
    """Return the columns of the first line of the table that begins with ``name``, by header."""
    lines = text.splitlines()
    header = next(line for line in lines if line.endswith("allowed")).split()
    found = next(line for line in lines if line.strip().startswith(name))
    return dict(zip(header, found.strip().removeprefix(name).split(), strict=False))


# Tied and untied heads, softcaps, a logit scale, sliding windows, learned positions, ALiBi.
@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma2", "mistral", "opt", "cohere", "granite", "falcon_alibi"]
)
def test_the_architectures_pass(check, name):
    status, text = check(name, dtype="float32")
    assert (status, verdict(text)) == (0, "PASS"), text
    before, after = row(text, "loss before the step"), row(text, "loss after it")
    # The reference is the policy itself at first; then the step has to have done something.
    for side in ("float64", "eager", "prefalign"):
        assert math.isclose(float(before[side]), math.log(2), abs_tol=1e-6)
        assert float(before[side]) - float(after[side]) > verify_eager.FALL / 2


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "exact": "none"},
        {"exact": "none"},
        {"dtype": "bfloat16", "exact": "float32"},
        {"lora.r": 4},
        {"lora.r": 4, "dtype": "bfloat16"},
        {"lora.r": 4, "exact": "none", "lora.dropout": 0.5},
        CHECKPOINTING,
        {"max_tokens": 40},
        {"max_tokens": 40, "split_pairs": "false", "share_prompts": "false"},
        {"label_smoothing": 0.2, "beta": 0.5},
    ],
    ids=str,
)
def test_the_settings_pass(check, options):
    status, text = check(**options)
    assert (status, verdict(text)) == (0, "PASS"), text
    assert ("float64" in row(text, "loss")) == ("exact" not in options)


def test_without_an_exact_answer_it_says_so(check, monkeypatch):
    own = verify.run_eager

    def run(*args, dtype=None, **kwargs):
        if dtype is not None:
            raise RuntimeError("no such kernel for Double\nand more")
        return own(*args, **kwargs)

    monkeypatch.setattr(verify, "run_eager", run)
    status, text = check()
    assert (status, verdict(text)) == (0, "PASS"), text
    assert "There is no float64 answer: no such kernel for Double.\n" in text
    assert "Errors are differences from eager PyTorch" in text


def test_dropout_is_off_on_every_side(check, folder):
    write_model(folder / "dropout", "opt", dropout=0.5, attention_dropout=0.5, layerdrop=0.3)
    status, text = check("dropout", exact="none")
    assert (status, verdict(text)) == (0, "PASS"), text


def test_pairs_are_split_where_that_is_set(check):
    def passes(**options):
        text = check(max_tokens=40, **options)[1]
        return [int(n) for n in re.search(r"is (\d+) passes of at most (\d+) ", text).groups()]

    (more, shorter), (fewer, longer) = passes(), passes(split_pairs="false")
    assert more > fewer and shorter < longer


def test_preferences_come_from_a_file(check, folder):
    source = write_jsonl(folder / "pairs.jsonl", pairs(5))
    status, text = check(preferences=source, pairs=4)
    assert (status, verdict(text)) == (0, "PASS"), text
    assert f"Pairs  4, the first of {source}: " in text and "random" not in text
    assert "Pairs  5, " in check(preferences=source, pairs=50)[1]


def test_random_tokens_are_said_to_be_random(check):
    assert "random tokens, with lengths like UltraFeedback's" in check()[1]


# Broken on purpose


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is too large."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.2 * grad


def broken(change):
    """Return what puts ``change(own, self, ...)`` in the place of the trainer's own log-probs."""

    def patch(monkeypatch):
        own = PreferenceTrainer.policy_logps
        monkeypatch.setattr(PreferenceTrainer, "policy_logps", lambda *args: change(own, *args))

    return patch


def shifted(own, trainer, model, batch):
    return own(trainer, model, replace(batch, targets=batch.targets.roll(1), parts=()))


def leaking(monkeypatch):
    def leak(module, query, key, value, mask, cu_seq_lens_q=None, **kwargs):
        whole = cu_seq_lens_q[[0, -1]]
        return packed_attention(
            module, query, key, value, mask, scaling=kwargs["scaling"], cu_seq_lens_q=whole
        )

    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED_ATTENTION, leak)


def one_gradient(monkeypatch):
    """Halve the gradient of one small parameter, which the whole gradient's norm hardly shows."""
    own = PreferenceTrainer.training_step

    def step(self, *args, **kwargs):
        loss = own(self, *args, **kwargs)
        self.model.get_parameter(SMALL).grad *= 0.5
        return loss

    monkeypatch.setattr(PreferenceTrainer, "training_step", step)


SMALL = "model.layers.0.post_attention_layernorm.weight"
GRADIENT = "relative error of the gradient"
LOGPS = "log-prob before the step"


BROKEN = {
    "shifted targets": (broken(shifted), [LOGPS, GRADIENT]),
    "scaled gradient": (broken(lambda own, *args: Scaled.apply(own(*args))), [GRADIENT]),
    "leaking attention": (leaking, [LOGPS, GRADIENT]),
    "one gradient": (one_gradient, [f"{GRADIENT}, worst in {SMALL}"]),
}
CASES = [
    (what, dtype, exact)
    for what in BROKEN
    for dtype in ("float32", "bfloat16")
    for exact in ("float64", "none")
    # Half a small gradient is within what bfloat16's roundings may add up to.
    if (what, dtype, exact) != ("one gradient", "bfloat16", "none")
]


@pytest.mark.parametrize(("what", "dtype", "exact"), CASES)
def test_a_broken_library_fails(check, monkeypatch, what, dtype, exact):
    patch, named = BROKEN[what]
    patch(monkeypatch)
    options = {"share_prompts": "false", "split_pairs": "false", "dtype": dtype, "exact": exact}
    status, text = check(**options)
    assert status == 1
    assert verdict(text).startswith("FAIL: ")
    for name in named:
        assert name in verdict(text)
    # The parameter is named in any case.
    assert f"{GRADIENT}, worst in model." in verdict(text)


def test_nan_fails(check, monkeypatch):
    broken(lambda own, *args: own(*args) * math.nan)(monkeypatch)
    status, text = check()
    assert status == 1 and "nan" in verdict(text)


def test_an_adapter_that_stays_on_in_the_reference_fails(check, monkeypatch):
    # A fresh adapter changes nothing: only after the step do the losses tell.
    monkeypatch.setattr(verify_sides, "reference_of", lambda model: Reference(model))
    status, text = check(**{"lora.r": 4, "exact": "none"})
    assert status == 1 and "a pair's loss after it" in verdict(text)


# TRL


def test_without_trl_it_says_so(check, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    status, text = check(trl="true")
    assert (status, verdict(text)) == (0, "PASS")
    assert "TRL is not compared: TRL is not installed: pip install 'prefalign[trl]'." in text
    assert "TRL" not in text[: text.index("loss before")]


def test_what_trl_refuses_is_no_verdict(check, monkeypatch):
    fake = types.ModuleType("trl")
    fake.DPOConfig = lambda **kwargs: None
    fake.DPOTrainer = type("DPOTrainer", (), {"__init__": refuse})
    monkeypatch.setitem(sys.modules, "trl", fake)
    status, text = check(trl="true")
    assert (status, verdict(text)) == (0, "PASS")
    assert "TRL is not compared: TRL refuses: no such thing." in text


def refuse(self, *args, **kwargs):
    raise TypeError("no such thing\nin detail")


def test_losses_that_trl_has_otherwise_are_not_compared(check):
    pytest.importorskip("trl")
    _, text = check(trl="true", label_smoothing=0.1)
    assert "TRL is not compared: only the plain sigmoid loss" in text


@pytest.mark.parametrize(
    "options", [{}, {"lora.r": 4}, {"gradient_checkpointing": "true"}], ids=str
)
def test_trl_agrees(check, options):
    pytest.importorskip("trl")
    status, text = check(trl="true", dtype="float32", **options)
    assert (status, verdict(text)) == (0, "PASS"), text
    eager, trl = (float(row(text, GRADIENT)[side]) for side in ("eager", "TRL"))
    assert 0 < trl < max(1e-5, 4 * eager)
    assert float(row(text, "loss after it")["TRL"]) == pytest.approx(
        float(row(text, "loss after it")["eager"]), abs=1e-4
    )


# What is wrong is one line


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model", "", "model: expected a model's folder or name, got ''"),
        ("model", "./nowhere", "./nowhere: there is no such folder"),
        ("pairs", 0, "pairs: expected 1 or more, got 0"),
        ("max_length", 1, "max_length: expected 2 or more, got 1"),
        ("max_tokens", 0, "max_tokens: expected 1 or more, got 0"),
        ("beta", 0, "beta: expected more than 0, got 0.0"),
        ("label_smoothing", 0.7, "label_smoothing: expected from 0 to 0.5, got 0.7"),
        ("lora.r", -1, "lora.r: expected 0 or more, got -1"),
        ("loss_type", "sigmoidal", "loss_type: expected one of 'sigmoid', "),
        ("preferences", "./nowhere.jsonl", "./nowhere.jsonl"),
        ("exact", "float128", "exact"),
    ],
)
def test_a_wrong_option_is_one_line(folder, check, capsys, option, value, message):
    if not (folder / "llama").exists():
        write_model(folder / "llama", "llama")
    options = {"model": folder / "llama", option: value}
    assert message in refused(capsys, "verify", options)


def test_models_that_cannot_be_packed_are_refused(folder, capsys):
    write_model(folder / "mamba", "mamba")
    assert "recurrent layers" in refused(capsys, "verify", {"model": folder / "mamba"})


def test_weights_that_are_not_finite_are_refused(folder, capsys):
    model = tiny_model("llama")
    model.model.norm.weight.data[3] = math.nan
    model.save_pretrained(folder / "nan")
    message = refused(capsys, "verify", {"model": folder / "nan"})
    assert "model.norm.weight holds a NaN" in message


def test_launchers_are_refused(folder, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused(capsys, "verify", {"model": folder})


def test_the_help_is_in_the_overview(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    assert "verify Compare a DPO step with an ordinary one" in (
        " ".join(capsys.readouterr().out.split())
    )
    with pytest.raises(SystemExit):
        cli.main(["verify", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--lora.r" in text and "default: sigmoid" in text and "``" not in text


def test_random_pairs_keep_to_the_limits():
    groups = verify.random_pairs(200, 50, 64, 16, seed=0)
    for group in groups:
        assert 1 <= len(group.prompt_ids) <= 16
        for ids in group.response_ids:
            assert 1 <= len(ids) <= 64 - len(group.prompt_ids) and max(ids) < 50
    assert len({len(group.prompt_ids) for group in groups}) > 1
    assert groups == verify.random_pairs(200, 50, 64, 16, seed=0)
