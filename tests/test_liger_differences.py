"""The page on Liger: its snippets run, its table is what Liger, this library and float64 give."""

import math
import re
from pathlib import Path

import pytest
import torch
from liger_runs import NAMES, SHAPES, Eager, build, cast, example, run

from prefalign.integrations import liger

PAGE = Path(__file__).parents[1] / "docs/from_liger.md"


@pytest.fixture(scope="module")
def theirs():
    """Return Liger's module of the losses."""
    return pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is not installed")


def sure(margin):
    """Return two sequences whose tokens are nearly certain: ``margin`` above the other logits."""
    target = torch.tensor([[2, 7, 1, 4, 0], [6, 3, 3, 5, 1]])
    hidden = torch.nn.functional.one_hot(target, 8).float()
    hidden[1] *= torch.tensor([0.9, 0.95, 1.0, 0.85, 0.92])[:, None]
    return {"_input": hidden, "lin_weight": margin * torch.eye(8), "target": target, "bias": None}


def difference(kind):
    """Return a module's name, its options, a call, and the call that float64 is asked with."""
    if kind == "`DPO(label_smoothing=0.2)`":
        options, call = example("DPO", SHAPES[1], label_smoothing=0.2)
        return "DPO", options, call, call
    if kind == '`DPO(loss_type="discopop", beta=5.0)`, a margin of -34 nats':
        options = {"loss_type": "discopop", "use_ref_model": False, "beta": 5.0}
        options, call = example("DPO", SHAPES[1], seed=2, **options)
        call["lin_weight"] *= 4
        return "DPO", options, call, call
    if kind == "`KTO()`, a `kl` for each sequence":
        options, call = example("KTO", SHAPES[1])
        call["kl"] = torch.tensor([0.2, 1.4, 0.0, 2.2, 0.7, 3.1])
        return "KTO", options, call, call
    if kind == "`ORPO(compute_nll_loss=False)`, tokens of probability 0.999999":
        return "ORPO", {"compute_nll_loss": False}, sure(16.0), sure(16.0)
    if kind == "`CPO()`, NaN in a padded position":
        options, call = example("CPO", SHAPES[1])
        call["target"][0, -1] = -100
        hidden = call["_input"].clone()
        hidden[0, -1] = torch.nan
        return "CPO", options, {**call, "_input": hidden}, call
    if kind == "`DPO(use_ref_model=False)`, every chosen token ignored":
        options, call = example("DPO", SHAPES[1], use_ref_model=False)
        call["target"][:3] = -100
        return "DPO", options, call, call
    assert kind == "`SimPO(compute_nll_loss=False)`, a sequence without tokens"
    options, call = example("SimPO", SHAPES[1], compute_nll_loss=False)
    call["target"][1] = -100
    return "SimPO", options, call, call


DIFFERENCES = (
    "`DPO(label_smoothing=0.2)`",
    '`DPO(loss_type="discopop", beta=5.0)`, a margin of -34 nats',
    "`KTO()`, a `kl` for each sequence",
    "`ORPO(compute_nll_loss=False)`, tokens of probability 0.999999",
    "`CPO()`, NaN in a padded position",
    "`DPO(use_ref_model=False)`, every chosen token ignored",
    "`SimPO(compute_nll_loss=False)`, a sequence without tokens",
)


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_where_liger_is_wrong_ours_is_float64s(theirs, kind):
    name, options, call, clean = difference(kind)
    module = build(liger, name, **options)
    losses = [
        run(build(theirs, name, **options), call)[0].item(),
        (ours := run(module, call))[0].item(),
        (exact := run(Eager(module), cast(clean, torch.float64)))[0].item(),
    ]
    row = " | ".join((kind, *(f"{loss:.4g}".replace("nan", "NaN") for loss in losses)))
    assert f"| {row} |" in PAGE.read_text()
    assert not abs(losses[0] - losses[1]) < 1e-4
    if not math.isnan(losses[2]):  # else the mean of no tokens, which is 0 here
        assert abs(losses[1] - losses[2]) <= 1e-5 * max(1, losses[2])
    assert all(grad.isfinite().all() for grad in ours[2])
    for mine, answer in zip(ours[1], exact[1], strict=True):
        assert not (mine - answer).abs().max() > 1e-5 * max(1, answer.abs().max())
    for mine, answer in zip(ours[2], exact[2], strict=True):
        # Of 1 - p, where p is nearly 1, float32 leaves little: ORPO's gradients.
        allowed = (0.03 if name == "ORPO" else 1e-5) * answer.abs().max()
        assert not (mine - answer).abs().max() > allowed


def test_a_sequence_without_tokens_leaves_the_others_alone():
    # Its own score is 0, without a gradient; the float64 answer is a mean of nothing.
    options, call = example("SimPO", SHAPES[1], bias=False, compute_nll_loss=False)
    call["target"][1] = -100
    module = build(liger, "SimPO", **options)
    loss, stats, grads = run(module, call)
    others = {
        key: x if key == "lin_weight" or x is None else x[[0, 2, 3, 5]] for key, x in call.items()
    }
    wanted = run(module, others)
    pair = -torch.nn.functional.logsigmoid(-module.beta * stats[1][1] - module.gamma)
    torch.testing.assert_close(3 * loss, 2 * wanted[0] + pair)
    torch.testing.assert_close(3 * grads[0][[0, 2, 3, 5]], 2 * wanted[2][0])
    assert stats[0][1] == 0 and not grads[0][1].any()


def test_tokens_of_probability_1_in_float32(theirs):
    (name, options), call = ("ORPO", {"compute_nll_loss": False}), sure(20.0)
    others = run(build(theirs, name, **options), call)
    assert others[0] == 0 and not others[2][0].isfinite().all()
    ours = run(build(liger, name, **options), call)
    assert all(x.isfinite().all() for x in (ours[0], *ours[1], *ours[2]))


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_float64(theirs, name):
    options, call = example(name, SHAPES[1])
    call = cast(call, torch.float64)
    module = build(liger, name, **options)
    exact, ours = run(Eager(module), call), run(module, call)
    others = run(build(theirs, name, **options), call)
    assert ours[0].dtype == torch.float64 and others[0].dtype == torch.float32
    errors = [
        [(a - b).abs().max() for a, b in zip(x[2], exact[2], strict=True)] for x in (ours, others)
    ]
    assert max(errors[0]) < 1e-12 and min(errors[1]) > 1e-10


def test_the_pages_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    options, call = example("DPO", SHAPES[1])
    call["_input"].requires_grad_()
    names = {key.lstrip("_"): x for key, x in call.items()} | {"hidden": call["_input"]}
    for snippet in snippets:
        exec(snippet, names)
    assert len(snippets) == 3
