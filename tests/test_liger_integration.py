"""The modules in the place of Liger's: against Liger, against float64, and what is refused."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from allocations import largest_allocation
from liger_runs import NAMES, SHAPES, Eager, assert_equal, build, cast, example, named, run
from tolerance import assert_as_exact_as_eager

from prefalign.integrations import _liger_scores, liger

SMOOTHED = {"exo_pair": 0.1, "robust": 0.2}
OPTIONS = [
    *(
        ("DPO", {"loss_type": loss, "label_smoothing": SMOOTHED.get(loss, 0.0), **options})
        for loss in liger.DPO_LOSSES
        for options in (
            {},
            {"beta": 0.3, "average_log_prob": True, "compute_nll_loss": True, "alpha": 0.4},
            {"beta": 0.05, "use_ref_model": False, "compute_nll_loss": True},
        )
    ),
    ("DPO", {"loss_type": "discopop", "discopop_tau": 0.2, "use_ref_model": False}),
    ("SimPO", {}),
    ("SimPO", {"beta": 2.0, "gamma": 1.1, "label_smoothing": 0.1, "compute_nll_loss": False}),
    ("SimPO", {"alpha": 0.2, "gamma": 0.0}),
    ("ORPO", {}),
    ("ORPO", {"beta": 0.7, "compute_nll_loss": False}),
    ("ORPO", {"nll_target": True}),
    ("CPO", {}),
    ("CPO", {"beta": 0.3, "alpha": 0.5, "label_smoothing": 0.2, "average_log_prob": True}),
    ("CPO", {"compute_nll_loss": False}),
    ("KTO", {}),
    ("KTO", {"kl": 0.7}),
    ("KTO", {"use_ref_model": True, "beta": 0.3, "kl": 1.3}),
    ("KTO", {"use_ref_model": True, "average_log_prob": True}),
]
IDS = [
    "-".join([name, *(f"{key}={value}" for key, value in options.items())])
    for name, options in OPTIONS
]


@pytest.fixture(scope="module")
def theirs():
    """Return Liger's module of the losses."""
    return pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is not installed")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", OPTIONS, ids=IDS)
def test_losses_statistics_and_gradients_are_ligers(theirs, case, shape, bias):
    name, options = case
    options, call = example(name, shape, bias, **options)
    ours = run(build(liger, name, **options), call)
    assert_equal(ours, run(build(theirs, name, **options), call), name, call)


@pytest.mark.parametrize("name", NAMES)
def test_ligers_chunks_change_nothing(theirs, name):
    options, call = example(name, SHAPES[2])
    ours = run(build(liger, name, chunk_size=3, **options), call)
    assert_equal(ours, run(build(theirs, name, chunk_size=3, **options), call), name, call)


@pytest.mark.parametrize("case", OPTIONS, ids=IDS)
def test_as_exact_as_eager(case):
    name, options = case
    options, call = example(name, SHAPES[1], seed=1, **options)
    module = build(liger, name, **options)
    found = [
        list(named(run(m, cast(call, dtype)), name, call))
        for m, dtype in (
            (module, torch.float32), (Eager(module), torch.float32), (Eager(module), torch.float64)
        )
    ]  # fmt: skip
    for (what, mine), (_, eager), (_, exact) in zip(*found, strict=True):
        assert_as_exact_as_eager(mine, eager, exact.double(), what, inside=exact.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_ignored(theirs, name):
    options, call = example(name, SHAPES[1], nll_target=name == "ORPO")
    for key in {"target", "nll_target"} & call.keys():
        call[key] = torch.where(call[key] == -100, 0, call[key])
    ours = run(build(liger, name, **options), call)
    assert_equal(ours, run(build(theirs, name, **options), call), name, call)


@pytest.mark.parametrize("name", NAMES)
def test_the_names_arguments_and_defaults_are_ligers(theirs, name):
    mine = getattr(liger, f"LigerFusedLinear{name}Loss")
    other = getattr(theirs, f"LigerFusedLinear{name}Loss")
    assert mine is getattr(liger, f"FusedLinear{name}Loss")
    for method in ("__init__", "forward"):
        ours, its = (inspect.signature(getattr(m, method)).parameters for m in (mine, other))
        positional = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
        assert [(p.name, p.default) for p in positional] == [
            (p.name, p.default) for p in its.values()
        ]
        assert ours.keys() - its.keys() <= {"ref_logps"}


def test_liger_need_not_be_installed():
    for module in (liger, _liger_scores):
        source = Path(module.__file__).read_text()
        assert not re.search(r"^\s*(import|from) liger_kernel", source, re.M)


# What Liger does not do


@pytest.mark.parametrize("average", [False, True], ids=["sums", "means"])
@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_kept_reference_log_probs_are_the_references(name, average):
    options = {"use_ref_model": True, "average_log_prob": average}
    options, call = example(name, (8, 40, 24, 101), **options)
    module = build(liger, name, **options)
    wanted = run(module, call)
    reference = {key: call.pop(key) for key in ("ref_input", "ref_weight", "ref_bias")}
    hidden, weight, bias = reference.values()
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logps = logits.log_softmax(-1).gather(-1, call["target"].clamp(min=0)[..., None])[..., 0]
    call["ref_logps"] = torch.where(call["target"] == -100, 0, logps).sum(-1)
    assert_equal(run(module, call), wanted, name, call)
    rounded = call["ref_logps"].bfloat16()  # as kept; not rounded again where it is divided
    losses = [module(**{**call, "ref_logps": x})[0] for x in (rounded, rounded.float())]
    assert losses[0] == losses[1]
    call["ref_logps"] = call["ref_logps"] * torch.linspace(0, 1, len(logps))  # and they count
    assert (run(module, call)[0] - wanted[0]).abs() > 1e-3


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_the_reference_may_share_the_head_and_gives_no_gradient(theirs, name):
    options, call = example(name, SHAPES[1], use_ref_model=True)
    head, outs = call["lin_weight"].requires_grad_(), []
    call |= {"ref_weight": head, "ref_bias": call["bias"].requires_grad_()}
    for library in (liger, theirs):
        loss, stats = build(library, name, **options)(**call)
        outs.append((loss.detach(), stats, torch.autograd.grad(loss, (head, call["bias"]))))
    assert_equal(*outs, name, call)


@pytest.mark.parametrize("name", NAMES)
def test_padding_costs_nothing_and_may_hold_anything(name, monkeypatch):
    options, call = example(name, SHAPES[2], nll_target=name == "ORPO")
    plain = run(build(liger, name, **options), call)
    rows = []

    def watched(hidden, *args, **kwargs):
        rows.append(len(hidden))
        return op(hidden, *args, **kwargs)

    op = _liger_scores.linear_token_logps
    monkeypatch.setattr(_liger_scores, "linear_token_logps", watched)
    live = call["target"] != -100
    tokens = live.sum().item()
    if name == "ORPO":  # and what the NLL alone asks for, once
        target, other = (call[key][: len(live) // 2] for key in ("target", "nll_target"))
        tokens += ((other != -100) & (other != target)).sum().item()
        live = live.clone()
        live[: len(live) // 2] |= other != -100
    call["_input"] = call["_input"].masked_fill(~live[..., None], torch.nan)
    if name == "DPO":
        call["ref_input"] = call["ref_input"].masked_fill(~live[..., None], torch.inf)
    loss, stats, grads = run(build(liger, name, **options), call)
    assert rows == [tokens] * (2 if name == "DPO" else 1)
    assert loss == plain[0]
    assert all(map(torch.equal, grads, plain[2]))
    assert not grads[0][~live].any() and grads[0][live].all()


@pytest.mark.parametrize("name", NAMES)
def test_a_longer_batch_of_the_same_tokens_is_the_same(name):
    options, call = example(name, SHAPES[1])
    wanted = run(build(liger, name, **options), call)
    for key, fill in (("_input", 1.0), ("ref_input", -1.0), ("target", -7)):
        if key in call:
            more = torch.full_like(call[key][:, :1], fill).repeat_interleave(4, 1)
            call[key] = torch.cat((more, call[key]), 1)
    call["target"][call["target"] == -100] = -7
    loss, stats, grads = run(build(liger, name, ignore_index=-7, **options), call)
    assert loss == wanted[0]
    assert torch.equal(grads[0][:, 4:], wanted[2][0]) and not grads[0][:, :4].any()
    assert all(map(torch.equal, grads[1:], wanted[2][1:]))


@pytest.mark.parametrize(
    "leaves", [["_input"], ["lin_weight"], ["bias"], ["_input", "bias"]], ids=str
)
@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_each_gradient_alone(name, leaves):
    options, call = example(name, SHAPES[1])
    module = build(liger, name, **options)
    found = dict(zip(leaves, run(module, call, leaves=leaves)[2], strict=True))
    every = dict(zip(("_input", "lin_weight", "bias"), run(module, call)[2], strict=True))
    for leaf, grad in found.items():
        torch.testing.assert_close(grad, every[leaf], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_backward_twice_gives_the_same_twice(name):
    options, call = example(name, SHAPES[1])
    hidden = call["_input"].requires_grad_()
    loss, _ = build(liger, name, **options)(**call)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], first)
    with torch.no_grad():
        assert build(liger, name, **options)(**call)[0] == loss


@pytest.mark.parametrize("name", NAMES)
def test_in_16_bits_less_than_half_of_ligers_error(theirs, name):
    options, call = example(name, (8, 16, 32, 301))
    call = cast(call, torch.bfloat16)
    module = build(liger, name, **options)
    exact = run(Eager(module), cast(call, torch.float64))
    ours, others = run(module, call), run(build(theirs, name, **options), call)
    assert all(x.dtype == torch.float32 for x in (ours[0], *ours[1]))
    for (what, mine), (_, answer) in zip(
        *(named(x, name, call) for x in (ours, exact)), strict=True
    ):
        if "gradient" not in what:
            assert (mine - answer).abs().max() <= 1e-5 * max(1, answer.abs().max()), what
    for mine, other, answer in zip(ours[2], others[2], exact[2], strict=True):
        assert mine.dtype == torch.bfloat16
        errors = [(x.double() - answer).norm() / answer.norm() for x in (mine, other)]
        assert errors[0] < errors[1] / 2


def test_under_autocast_as_in_16_bits():
    options, call = example("DPO", SHAPES[2])
    module = build(liger, "DPO", **options)
    with torch.autocast("cpu", torch.bfloat16):
        loss, stats, grads = run(module, call)
    heads = {key: call[key].bfloat16() for key in call if key.endswith(("_input", "_weight"))}
    wanted = run(module, {**call, **heads})
    assert loss == wanted[0] and grads[0].dtype == torch.float32
    assert torch.equal(grads[0], wanted[2][0].float())


def test_an_option_that_is_set_later_counts():
    options, call = example("DPO", SHAPES[1])
    module = build(liger, "DPO", **options)
    module.beta, module.loss_type, module.label_smoothing = 0.7, "robust", 0.3
    wanted = build(liger, "DPO", beta=0.7, loss_type="robust", label_smoothing=0.3)
    assert module(**call)[0] == wanted(**call)[0]
    assert "beta=0.7" in repr(module)


# What is refused

REFUSED_OPTIONS = [
    ("DPO", {"loss_type": "ipo"}, ValueError, "loss_type: expected one of 'sigmoid'"),
    (
        "DPO",
        {"loss_type": "hinge", "label_smoothing": 0.1},
        ValueError,
        "label_smoothing: expected 0",
    ),
    ("DPO", {"loss_type": "exo_pair"}, ValueError, "label_smoothing: expected above 0"),
    (
        "DPO",
        {"loss_type": "robust", "label_smoothing": 0.5},
        ValueError,
        "label_smoothing: .*below 0.5",
    ),
    ("DPO", {"label_smoothing": 0.6}, ValueError, "label_smoothing: .*at most 0.5"),
    (
        "DPO",
        {"discopop_tau": 0.1},
        ValueError,
        "discopop_tau: expected 0.05 with loss_type='sigmoid'",
    ),
    ("DPO", {"loss_type": "discopop", "discopop_tau": 0}, ValueError, "discopop_tau: .*above 0"),
    ("DPO", {"beta": 0.0}, ValueError, "beta: expected a number above 0"),
    ("DPO", {"beta": "0.1"}, TypeError, "beta: expected a number, got str"),
    ("DPO", {"alpha": None}, TypeError, "alpha: expected a number"),
    ("DPO", {"use_ref_model": 1}, TypeError, "use_ref_model: expected a bool, got int"),
    ("DPO", {"ignore_index": 0.5}, TypeError, "ignore_index: expected an int"),
    ("DPO", {"chunk_size": 0}, ValueError, "chunk_size: .*at least 1"),
    ("DPO", {"chunk_size": 1.5}, TypeError, "chunk_size: expected an int"),
    ("SimPO", {"gamma": -1}, ValueError, "gamma: .*at least 0"),
    ("CPO", {"label_smoothing": -0.1}, ValueError, "label_smoothing: .*at least 0"),
]
S, T, D, V = SHAPES[1]
KEPT = {"ref_logps": torch.zeros(S), "ref_input": None, "ref_weight": None, "ref_bias": None}
REFUSED_CALLS = [
    ("DPO", {}, {"ref_input": None}, "ref_input, ref_logps: .*got neither"),
    ("DPO", {}, {"ref_logps": torch.zeros(S)}, "ref_input, ref_logps: .*got both"),
    ("DPO", {}, {"ref_weight": None}, "ref_weight: expected a tensor, got NoneType"),
    (
        "DPO", {}, {"ref_logps": torch.zeros(S), "ref_input": None},
        "ref_weight: expected None with ref_logps",
    ),
    (
        "DPO", {}, {**KEPT, "ref_logps": torch.zeros(S - 1)},
        r"ref_logps: expected shape \(6,\)",
    ),
    (
        "DPO", {}, {**KEPT, "ref_logps": torch.zeros(S, requires_grad=True)},
        "ref_logps: expected a constant",
    ),
    ("CPO", {}, {"_input": torch.zeros(S * T, D)}, "_input: expected 3 dimension"),
    ("CPO", {}, {"_input": torch.zeros(S, T + 1, D)}, "_input: expected shape"),
    ("CPO", {}, {"target": torch.zeros(S, T)}, "target: expected dtype"),
    ("CPO", {}, {"target": torch.full((S, T), V)}, "targets: "),
    ("CPO", {"ignore_index": V}, {"target": torch.full((S, T), -100)}, "targets: "),
    ("CPO", {}, {"lin_weight": torch.zeros(V, D + 1)}, "lin_weight: expected shape"),
    ("CPO", {}, {"lin_weight": torch.zeros(V, D).bfloat16()}, "lin_weight: expected dtype"),
    ("CPO", {}, {"bias": torch.zeros(V + 1)}, "bias: expected shape"),
    (
        "SimPO", {}, {"_input": torch.zeros(5, T, D), "target": torch.zeros(5, T).long()},
        "target: expected .*got 5",
    ),
    (
        "ORPO", {"compute_nll_loss": False}, {"nll_target": torch.zeros(S, T).long()},
        "nll_target: expected None",
    ),
    ("ORPO", {}, {"nll_target": torch.zeros(S // 2, T).long()}, "nll_target: expected shape"),
    ("KTO", {}, {"preference_labels": None}, "preference_labels: expected a tensor"),
    ("KTO", {}, {"preference_labels": torch.ones(S)}, "preference_labels: expected dtype bool"),
    ("KTO", {}, {"ref_input": torch.zeros(S, T, D)}, "ref_input: expected None with use_ref_"),
    ("KTO", {}, {"ref_logps": torch.zeros(S)}, "ref_logps: expected None with use_ref_model=False"),
    ("KTO", {}, {"kl": torch.zeros(S - 1)}, "kl: expected shape"),
    ("KTO", {}, {"kl": torch.zeros((), requires_grad=True)}, "kl: expected a constant"),
    ("KTO", {}, {"kl": "0"}, "kl: expected a number"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "error", "message"), REFUSED_OPTIONS)
def test_options_that_are_refused(name, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        build(liger, name, **options)


@pytest.mark.parametrize(("name", "options", "changes", "message"), REFUSED_CALLS)
def test_calls_that_are_refused(name, options, changes, message):
    options, call = example(name, SHAPES[1], **options)
    module = build(liger, name, **options)
    call["target"][call["target"] == -100] = module.ignore_index
    module(**call)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        module(**{**call, **changes})


@pytest.mark.parametrize("name", NAMES)
def test_no_pairs_and_no_tokens(name):
    options, call = example(name, SHAPES[1])
    for key in call.keys() - {"lin_weight", "bias", "ref_weight", "ref_bias", "kl"}:
        call[key] = call[key][:0]
    loss, stats, grads = run(build(liger, name, **options), call)
    assert loss == 0 and not any(grad.any() for grad in grads)
    options, call = example(name, SHAPES[1])
    call["target"][:] = -100
    loss, stats, grads = run(build(liger, name, **options), call)
    assert loss.isfinite() and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("name", NAMES)
def test_no_logits_are_made(name):
    S, T, V = 4, 40, 8192
    options, call = example(name, (S, T, 8, V))
    rows = int((call["target"] != -100).sum())
    made = largest_allocation(lambda: run(build(liger, name, **options), call))
    logits = largest_allocation(lambda: call["_input"] @ call["lin_weight"].T)
    assert made < rows * V * 2 < logits  # of the rows that count, in half precision
