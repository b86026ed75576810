"""linear_preference_loss: hidden states to losses, with the head frozen, trained and in chunks."""

import dataclasses
import math

import pytest
import torch
from pair_losses import LOPSIDED
from prefalign.kernels import pair_plan
from prefalign.kernels.linear_preference_loss import linear_preference_loss
from prefalign.kernels.linear_token_logps import linear_token_logps
from prefalign.kernels.losses import LOSSES
from prefalign.kernels.pair_plan import plan_pairs
from prefalign.kernels.plan import plan_head
from prefalign.kernels.preference_loss import preference_loss
from prefalign.kernels.sequence_logps import sequence_logps
from tolerance import assert_as_exact_as_eager

IMPLS = ("chunked", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = [5, 1, 1, 9, 0, 3, 7, 2]
SCALED = {"logit_scale": 0.7, "softcap": 5.0, "temperature": 0.9}
CHUNKED_3F = {"reduction": "mean", "impl": "chunked"}


@pytest.fixture(autouse=True)
def chunks_of_few_rows(monkeypatch):
    """Take the 3F path at these sizes too, where it would not pay."""
    monkeypatch.setattr(pair_plan, "LEAST_ROWS", 0)


def example(device, dtype=torch.float32, lengths=LENGTHS, V=61, D=12, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    N, B = sum(lengths), len(lengths) // 2
    given = {
        "hidden": torch.randn(N, D, generator=generator).to(dtype),
        "weight": (2 * torch.randn(V, D, generator=generator) / D**0.5).to(dtype),
        "bias": torch.randn(V, generator=generator).to(dtype),
        "ref_hidden": torch.randn(N, D, generator=generator).to(dtype),
        "ref_weight": (2 * torch.randn(V, D, generator=generator) / D**0.5).to(dtype),
        "targets": torch.randint(V, (N,), generator=generator),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "ref_logps": (-4 * torch.tensor(lengths) + torch.randn(2 * B, generator=generator)),
        "weights": torch.rand(B, generator=generator),
        "upstream": torch.randn(B, generator=generator),
    }
    given["targets"][torch.rand(N, generator=generator) < ignored] = -100
    return {name: value.to(device) for name, value in given.items()}


def run(given, needs="hwb", dtype=None, ref="ref_logps", weighted=False, **options):
    """Return losses and rewards, and the gradients of what is in ``needs``."""
    cast = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in given.items()}
    leaves = {
        letter: cast[name].detach().clone().requires_grad_(letter in needs)
        for letter, name in zip("hwb", ("hidden", "weight", "bias"), strict=True)
    }
    for name in ref.split():
        options[name] = cast[name]
    if weighted:
        options["weights"] = cast["weights"]
    out = linear_preference_loss(
        leaves["h"], leaves["w"], cast["targets"], bias=leaves["b"],
        cu_seqlens=cast["cu_seqlens"], **options,
    )  # fmt: skip
    upstream = cast["upstream"] if out.losses.ndim else cast["upstream"].sum()
    found = {name: value.detach() for name, value in out._asdict().items()}
    wanted = [leaves[letter] for letter in needs]
    if wanted:
        grads = torch.autograd.grad((out.losses * upstream).sum(), wanted)
        found |= dict(zip(needs, grads, strict=True))
    return found


def check(given, impl, **options):
    ours = run(given, impl=impl, **options)
    eager = run(given, impl="reference", **options)
    exact = run(given, impl="reference", dtype=torch.float64, **options)
    for name, value in ours.items():
        if value.dtype == torch.bool:
            continue
        want = exact[name]
        inside = 0.0 if name in "hwb" else 20.0  # the sums that a margin is what is left of
        inside = max(inside, 20 * want.abs().max().item() if name in "hwb" else 0.0)
        assert_as_exact_as_eager(value, eager[name], want, name, inside=inside)
        assert name not in "hwb" or value.dtype == given["hidden"].dtype
    if "h" in ours:
        assert (ours["h"][given["targets"] == -100] == 0).all()
    return ours


VARIANTS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2, "weighted": True},
    "scaled": SCALED,
    "ref_hidden": {"ref": "ref_hidden"},
    "ref_head": {"ref": "ref_hidden ref_weight", **SCALED},
    "noisy": {
        "ref": "ref_hidden",
        "loss": "noise_aware",
        "threshold": 0.5,
        "extrapolation": 0.4,
    },
    "noisy_sums": {"loss": "noise_aware", "threshold": 0.5, "weighted": True},
}


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("impl", "dtype"), [("chunked", dtype) for dtype in DTYPES] + [("triton", torch.bfloat16)]
)
def test_values_and_gradients(impl, dtype, variant, reduction, device):
    given = example(device, dtype)
    for needs in ("h", "hwb"):
        check(given, impl, needs=needs, reduction=reduction, **VARIANTS[variant])


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("budget", [2**16, 3_000])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_loss_of_each_sequence_by_itself(impl, budget, reduction, device, monkeypatch):
    # Ignored rows must not count: its slopes depend on the lengths, and are not opposite.
    monkeypatch.setitem(LOSSES, "lopsided", LOPSIDED)
    given = example(device)
    plan = dataclasses.replace(plan_head(28, 61, 12, weight_grad=True), budget_bytes=budget)
    for needs in ("h", "hwb"):
        for ref in ("ref_logps", "ref_hidden"):
            check(
                given, impl, needs=needs, ref=ref, reduction=reduction, loss="lopsided",
                weighted=True, plan=plan,
            )  # fmt: skip


@pytest.mark.parametrize("needs", ["", "h", "w", "b", "hw", "wb"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_only_some_inputs_require_grad(needs, reduction, device):
    ours = check(example(device), "chunked", needs=needs, reduction=reduction)
    assert set(needs) == set(ours) & set("hwb")


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.1])
@pytest.mark.parametrize("variant", ["smoothed", "scaled", "ref_head"])
def test_several_chunks_of_whole_pairs_and_tiles(variant, ignored, device, monkeypatch):
    given = example(device, ignored=ignored)
    monkeypatch.setattr(pair_plan, "TILE", 16)
    options = VARIANTS[variant] | {"reduction": "mean"}
    sizes = []
    for budget in (2**16, 12_000, 3_000):
        plan = dataclasses.replace(plan_head(28, 61, 12, weight_grad=True), budget_bytes=budget)
        check(given, "chunked", plan=plan, **options)
        lengths = [6, 10, 3, 9]
        made = plan_pairs(lengths, 61, 12, workspace_bytes=budget)
        sizes.append((made.strategy, len(made.chunks)))
    assert sizes == [("whole_pairs", 1), ("whole_pairs", 2), ("recompute", 0)]


def test_the_plan(monkeypatch):
    monkeypatch.undo()
    assert plan_pairs([20, 30], 1000, 16).strategy == "recompute"
    fits = plan_pairs([100, 30, 200], 1000, 16)
    assert fits.strategy == "whole_pairs" and fits.flops == 3 and fits.chunks == ((0, 3),)
    assert fits.workspace_bytes <= fits.budget_bytes and "3F" in str(fits)
    wide = plan_pairs([10, 4000], 128256, 64)
    assert wide.strategy == "recompute" and wide.flops == 4 and "pair 1" in wide.reason
    assert plan_pairs([5], 100, 8, dtype=torch.bfloat16).strategy == "recompute"
    assert plan_pairs([5], 100, 8, device="cuda").strategy == "recompute"
    assert plan_pairs([], 100, 8).chunks == ()


BAD_PLANS = {
    "lengths: expected a sequence of ints, got int": {"lengths": 5},
    "lengths: expected a sequence of ints, got str": {"lengths": "12"},
    "lengths: expected a sequence of ints, got Tensor": {"lengths": torch.tensor([1, 2])},
    r"lengths\[1\]: expected an int of at least 0, got -2": {"lengths": [1, -2]},
    r"lengths\[0\]: expected an int, got bool": {"lengths": [True, 2]},
    r"lengths\[1\]: expected an int, got float": {"lengths": [1, 2.0]},
    r"lengths\[0\]: expected an int, got Tensor": {"lengths": [torch.tensor(2)]},
    "V: expected an int of at least 1, got 0": {"V": 0},
    "V: expected an int, got float": {"V": 8.0},
    "V: expected an int, got bool": {"V": True},
    "D: expected an int of at least 1, got -1": {"D": -1},
    "D: expected an int, got NoneType": {"D": None},
    "dtype: expected a torch.dtype, got str": {"dtype": "float32"},
    "dtype: expected one of float16, bfloat16, float32, float64, got int64": {"dtype": torch.int64},
    "workspace_bytes: expected a number of at least 1, got 0": {"workspace_bytes": 0},
    "workspace_bytes: expected a number, got bool": {"workspace_bytes": True},
    "workspace_bytes: expected a number, got str": {"workspace_bytes": "1"},
    "workspace_bytes: expected a finite number, got inf": {"workspace_bytes": math.inf},
    "workspace_bytes: expected a number of at least 1, got nan": {"workspace_bytes": math.nan},
    "device: expected a device's name, got 'gpu'": {"device": "gpu"},
    "device: expected a string or torch.device, got int": {"device": 0},
}


@pytest.mark.parametrize("message", BAD_PLANS)
def test_the_plan_names_every_wrong_argument(message):
    given = {"lengths": [3, 4], "V": 9, "D": 5} | BAD_PLANS[message]
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        plan_pairs(**given)


@pytest.mark.parametrize("variant", [{}, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("needs", ["", "h", "hwb"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("impl", IMPLS)
def test_ln_2_exactly_where_policy_is_reference(impl, reduction, needs, variant, device):
    given = example(device)
    given["ref_hidden"] = given["hidden"]
    for options in ({"loss": "sigmoid"}, {"loss": "noise_aware", "threshold": 0.6}):
        found = run(
            given, needs, ref="ref_hidden", impl=impl, reduction=reduction, **options, **variant
        )
        assert torch.equal(found["losses"], torch.full_like(found["losses"], math.log(2)))
        assert (found["chosen_rewards"] == 0).all() and (found["rejected_rewards"] == 0).all()
    if reduction == "none":
        with torch.no_grad():
            logps = linear_token_logps(
                given["hidden"], given["weight"], given["targets"], bias=given["bias"], impl=impl,
                **variant,
            )  # fmt: skip
            sums = sequence_logps(logps, cu_seqlens=given["cu_seqlens"], impl=impl).sums
        found = run(given | {"ref_logps": sums}, needs, impl=impl, **variant)
        assert torch.equal(found["losses"], torch.full_like(found["losses"], math.log(2)))


def test_gives_what_the_separate_ops_give(device):
    given = example(device)
    found = run(given, label_smoothing=0.1)
    leaves = [given[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")]
    logps = linear_token_logps(*leaves[:2], given["targets"], bias=leaves[2])
    sums, ref = sequence_logps(logps, cu_seqlens=given["cu_seqlens"]).sums, given["ref_logps"]
    out = preference_loss(sums[0::2], sums[1::2], ref[0::2], ref[1::2], label_smoothing=0.1)
    torch.testing.assert_close(found["losses"], out.losses)
    grads = torch.autograd.grad(out.losses, leaves, given["upstream"])
    for letter, grad in zip("hwb", grads, strict=True):
        torch.testing.assert_close(found[letter], grad)
    mean = run(given, label_smoothing=0.1, reduction="mean")
    torch.testing.assert_close(mean["losses"], out.losses.mean())
    for name in ("chosen_rewards", "rejected_rewards"):
        torch.testing.assert_close(mean[name], found[name])


@pytest.mark.parametrize("options", [CHUNKED_3F, {"impl": "chunked"}, {"impl": "triton"}])
def test_second_backward_determinism_and_purity(options, device):
    given = example(device)
    leaves = [given[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    grads, scaled = [], None
    for _ in range(2):
        out = linear_preference_loss(
            *leaves[:2], given["targets"], bias=leaves[2], cu_seqlens=given["cu_seqlens"],
            ref_logps=given["ref_logps"], **options,
        )  # fmt: skip
        assert [x.requires_grad for x in out] == [True, False, False]
        total = out.losses.sum()
        for _ in range(2):
            grads.append(torch.autograd.grad(total, leaves, retain_graph=True))
        scaled = torch.autograd.grad(3 * total, leaves, retain_graph=True)
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))
    for a, b in zip(grads[0], scaled, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("options", [CHUNKED_3F, {"impl": "chunked"}, {"impl": "triton"}])
def test_a_pair_does_not_depend_on_the_others(options, device):
    given, other = example(device), example(device)
    first = sum(LENGTHS[:4])
    other["hidden"][first:] *= -3
    a, b = (run(x, **options) for x in (given, other))
    for name in ("chosen_rewards", "rejected_rewards"):
        assert torch.equal(a[name][:2], b[name][:2])
        assert not torch.equal(a[name], b[name])
    assert torch.equal(a["h"][:first], b["h"][:first])


@pytest.mark.parametrize("options", [CHUNKED_3F, {"impl": "chunked"}, {"impl": "triton"}])
def test_ignored_rows_may_hold_nan(options, device):
    given = example(device)
    clean = run(given, **options)
    given["hidden"] = given["hidden"].masked_fill((given["targets"] == -100)[:, None], torch.nan)
    poisoned = run(given, **options)
    assert all(torch.equal(clean[name], poisoned[name]) for name in clean)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_empty(impl, reduction, device):
    given = example(device, lengths=[])
    given["cu_seqlens"] = torch.tensor([0], device=device)
    if reduction == "none":
        assert run(given, needs="", impl=impl)["losses"].shape == (0,)
        return
    found = run(given, impl=impl, reduction="mean")
    assert all((found[name] == 0).all() for name in ("losses", *"hwb"))


def test_minus_infinity_logits_and_autocast(device):
    given = example(device)
    given["bias"][:40] = -torch.inf
    given["targets"] = given["targets"].where(given["targets"] == -100, 40 + given["targets"] % 20)
    found = run(given, needs="hw", reduction="mean")
    want = run(given, needs="hw")
    want_mean = run(given | {"upstream": torch.full_like(given["upstream"], 0.25)}, needs="hw")
    scale = given["upstream"].sum()
    torch.testing.assert_close(found["losses"], want["losses"].mean())
    for letter in "hw":
        torch.testing.assert_close(found[letter], want_mean[letter] * scale)
    given = example(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = run(given, reduction="mean")
    half = {k: given[k].bfloat16() for k in ("hidden", "weight")}
    assert torch.equal(cast["losses"], run(given | half, reduction="mean")["losses"])
    assert cast["w"].dtype == torch.float32


@pytest.mark.parametrize("options", [CHUNKED_3F, {"impl": "chunked"}, {"impl": "triton"}])
@pytest.mark.parametrize("needs", ["h", "hw"])
def test_compiles_whole(options, needs, device):
    given = example(device)

    def step(hidden, weight):
        return linear_preference_loss(
            hidden, weight, given["targets"], cu_seqlens=given["cu_seqlens"],
            ref_logps=given["ref_logps"], **options,
        )  # fmt: skip

    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [
            given[name].clone().requires_grad_(name[0] in needs) for name in ("hidden", "weight")
        ]
        out = fn(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        results.append((*out, *torch.autograd.grad(out.losses.sum(), wanted)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck(device):
    given = example(device)
    hidden, weight = (given[k].requires_grad_() for k in ("hidden", "weight"))
    tail = (given["weights"], 1.0, None, 1.0, -100, "sigmoid", 0.1, 0.0)
    tail += (0.0, "reverse_kl", 0.0, "hw", 0, 0, 0)
    refs = (None, given["ref_hidden"], None, None)
    torch.library.opcheck(
        torch.ops.prefalign.linear_preference_loss.default,
        (hidden, weight, given["targets"], None, given["cu_seqlens"], *refs, *tail),
    )


def test_float64_is_float64(device):
    given = {k: v.double() if v.is_floating_point() else v for k, v in example(device).items()}
    for reduction in ("none", "mean"):
        a, b = (run(given, impl=i, reduction=reduction, **SCALED) for i in ("chunked", "reference"))
        for name, value in a.items():
            torch.testing.assert_close(value, b[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_float64_constants_do_not_change_the_dtype(reduction, impl, device):
    # Log-probs of a reference that come out of a table are easily float64; the head is not.
    given = example(device)
    found = run(given, impl=impl, reduction=reduction, weighted=True)
    wide = given | {name: given[name].double() for name in ("ref_logps", "weights")}
    for name, value in run(wide, impl=impl, reduction=reduction, weighted=True).items():
        assert torch.equal(value, found[name]) and value.dtype == torch.float32, name


BAD = {
    "ref_logps, ref_hidden: expected exactly one of them, got neither": {"ref_logps": None},
    "ref_logps, ref_hidden: expected exactly one of them, got both": {
        "ref_hidden": torch.zeros(6, 3)
    },
    r"ref_logps: expected shape \(4,\), got \(6,\)": {"ref_logps": torch.zeros(6)},
    "ref_logps: expected a constant": {"ref_logps": torch.zeros(4, requires_grad=True)},
    "ref_weight: expected None without ref_hidden": {"ref_weight": torch.zeros(5, 3)},
    r"ref_hidden: expected shape \(6, 3\)": {"ref_logps": None, "ref_hidden": torch.zeros(4, 3)},
    r"hidden: expected 2 dimension\(s\)": {"hidden": torch.zeros(2, 3, 3)},
    r"cu_seqlens: expected \[2B \+ 1\]": {"cu_seqlens": torch.tensor([0, 6])},
    "cu_seqlens: expected to rise": {"cu_seqlens": torch.tensor([0, 1, 2, 3, 5])},
    "targets: expected labels": {"targets": torch.tensor([0, 1, 2, 9, 1, 1])},
    "weight: expected shape": {"weight": torch.zeros(5, 4)},
    "loss: expected one of": {"loss": "hinges"},
    "reduction: expected one of 'none', 'mean', got 'sum'": {"reduction": "sum"},
    "beta: expected a number above 0": {"beta": -1.0},
    "softcap: expected a number above 0": {"softcap": 0.0},
    "label_smoothing: expected a number of at most": {"label_smoothing": 0.8},
    "extrapolation: expected 0, or": {"extrapolation": 0.5},
    "threshold: expected None": {"threshold": 0.5},
    r"weights: expected shape \(2,\)": {"weights": torch.ones(3)},
    "plan: expected one for weight": {"plan": plan_head(6, 9, 3)},
    "impl: expected one of": {"impl": "fast"},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_bad_arguments(reduction, message):
    given = {
        "hidden": torch.zeros(6, 3), "weight": torch.zeros(5, 3, requires_grad=True),
        "targets": torch.zeros(6).long(), "cu_seqlens": torch.tensor([0, 1, 3, 4, 6]),
        "ref_logps": torch.zeros(4), "reduction": reduction,
    } | BAD[message]  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        linear_preference_loss(**given)
