"""The loss table: every row against autograd, a formula of its own, and itself in each kernel."""

import math

import pytest
import torch
import torch.nn.functional as F
from pair_losses import LOPSIDED
from prefalign.kernels.divergences import DIVERGENCES, resolve_divergence
from prefalign.kernels.loss_heads import pair_loss_head
from prefalign.kernels.losses import LOSSES
from prefalign.kernels.objectives import COUPLED, RECIPES, impl_of, loss_names, resolve
from prefalign.kernels.preference_loss import preference_loss
from tolerance import assert_as_exact_as_eager

IMPLS = ("chunked", "triton")
POSITIVE = ("cdpo", "exo_pair")


def smoothing_of(name, value=0.2):
    return value if LOSSES[name].smoothing else 0.0


def example(pairs=37, device="cpu", dtype=torch.float64, seed=0, scale=3.0):
    """Return four log-probs, two counts and an upstream, ``[B]`` each."""
    gen = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 30, (2, pairs), generator=gen)
    logps = -2.0 * counts.repeat(2, 1) + scale * torch.randn(4, pairs, generator=gen)
    logps = logps.clamp(max=-0.3)
    upstream = torch.randn(pairs, generator=gen)
    return list(logps.to(device, dtype)), list(counts.to(device)), upstream.to(device)


def run(given, impl, dtype=None, reference=True, **options):
    logps, (nc, nr), upstream = given
    logps = [x if dtype is None else x.to(dtype) for x in logps]
    leaves = [x.detach().requires_grad_() for x in logps[:2]]
    refs = logps[2:] if reference else ()
    out = preference_loss(
        *leaves, *refs, chosen_counts=nc, rejected_counts=nr, impl=impl, **options
    )
    grads = torch.autograd.grad(
        out.losses, leaves, upstream.to(out.losses.dtype), materialize_grads=True
    )
    return {**out._asdict(), "grad_chosen": grads[0], "grad_rejected": grads[1]}


# The rows themselves


@pytest.mark.parametrize("smoothing", [1e-3, 0.3])
@pytest.mark.parametrize("name", LOSSES)
def test_slopes_are_the_derivatives_of_the_value(name, smoothing):
    row = LOSSES[name]
    gen = torch.Generator().manual_seed(1)
    low, high = (-60, 60) if row.reference else (-8, -0.01)
    a, b = (torch.empty(400).uniform_(low, high, generator=gen).double() for _ in range(2))
    a, b = a.requires_grad_(), b.requires_grad_()
    extra = row.extra[1] if row.extra else 0.0
    beta = torch.empty(400).uniform_(0.05, 0.4, generator=gen).double()
    given = smoothing if row.smoothing else 0.0
    for share in (given, torch.full_like(beta, given)):
        for scale in (0.13, beta):
            value = row.value(a, b, scale, share, extra)
            wanted = torch.autograd.grad(value.sum(), (a, b), materialize_grads=True)
            found = row.slopes(a.detach(), b.detach(), scale, share, extra)
            for x, y in zip(found, wanted, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)
    assert row.source


def log_odds(x):
    return x - (1 - x.exp()).log()


FORMULAS = {
    "cdpo": lambda a, b: -0.8 * F.logsigmoid(0.1 * (a - b)) - 0.2 * F.logsigmoid(0.1 * (b - a)),
    "policy_sigmoid": lambda a, b: (
        -0.8 * F.logsigmoid(0.1 * (a - b)) - 0.2 * F.logsigmoid(0.1 * (b - a))
    ),
    "policy_hinge": lambda a, b: (1 - 0.1 * a + 0.1 * b).clamp(min=0),
    "simpo": lambda a, b: (
        -0.8 * F.logsigmoid(0.1 * (a - b) - 0.5) - 0.2 * F.logsigmoid(0.5 - 0.1 * (a - b))
    ),
    "odds_ratio": lambda a, b: -0.1 * F.logsigmoid(log_odds(a) - log_odds(b)),
    "rank": lambda a, b: (b - a).clamp(min=0),
    "nll": lambda a, b: -a,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_values_that_trl_does_not_have(name):
    # All others are compared with TRL's in test_trl_losses.py.
    logps, counts, _ = given = example()
    row = LOSSES[name]
    found = run(given, "chunked", loss_type=name, label_smoothing=smoothing_of(name))
    a, b = (x - r if row.reference else x for x, r in zip(logps[:2], logps[2:], strict=True))
    if row.per_token:
        a, b = a / counts[0], b / counts[1]
    torch.testing.assert_close(found["losses"], FORMULAS[name](a, b), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_their_sums(name):
    parts, source = RECIPES[name]
    assert source
    given = example()
    found = run(given, "chunked", loss_type=name)
    names, weights = zip(*parts, strict=True)
    wanted = run(given, "chunked", loss_type=names, loss_weights=weights)
    halved = run(given, "chunked", loss_type=(name, "sigmoid"), loss_weights=(0.5, 2.0))
    plain = run(given, "chunked")
    for key, value in found.items():
        assert torch.equal(value, wanted[key])
        if key == "losses" or key.startswith("grad"):
            total = 0.5 * value + 2 * plain[key]
            torch.testing.assert_close(halved[key], total, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_scores_of_divergences(name):
    kind, p = resolve_divergence(name, 0.3 if name == "alpha_divergence" else 1.0)
    table = DIVERGENCES[kind]
    r = torch.linspace(-300, 300, 241, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(table.value(r, p).sum(), r)
    torch.testing.assert_close(table.slope(r.detach(), p), slope, rtol=1e-12, atol=1e-15)
    assert table.value(r.float(), p).isfinite().all()
    near = torch.tensor([0.0, 1e-9, -1e-9], dtype=torch.float64)
    # To first order every divergence's score is the log-ratio, at half the rate for JS.
    rate = 0.5 if name == "js_divergence" else 1.0
    torch.testing.assert_close(table.value(near, p), rate * near, rtol=1e-6, atol=0.0)


# The op


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_row_in_every_kernel(impl, name, dtype, device):
    given = example(130, device, dtype)
    options = {"loss_type": name, "label_smoothing": smoothing_of(name)}
    options |= {"reference": LOSSES[name].reference}
    found, eager = (run(given, x, **options) for x in (impl, "reference"))
    exact = run(given, "reference", torch.float64, **options)
    for key, value in found.items():
        want = dtype if key.startswith("grad") else torch.float32
        assert value.dtype == want, key
        size = 1 + exact[key].abs().max().item()
        assert_as_exact_as_eager(value, eager[key], exact[key], key, inside=size)


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
@pytest.mark.parametrize("impl", IMPLS)
def test_divergences_in_every_kernel(impl, name, kind, device):
    given = example(130, device, torch.float32)
    options = {"loss_type": name, "f_divergence_type": kind}
    options |= {"f_alpha_divergence_coef": 0.6} if kind == "alpha_divergence" else {}
    found, eager = (run(given, x, **options) for x in (impl, "reference"))
    exact = run(given, "reference", torch.float64, **options)
    for key, value in found.items():
        # exp of a log-ratio of 20 magnifies its rounding twenty times.
        size = 40 * (1 + exact[key].abs().max().item())
        assert_as_exact_as_eager(value, eager[key], exact[key], key, inside=size)


@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
def test_odds_of_nearly_sure_sequences(impl, device):
    # As near to probability 1 as linear_token_logps tells apart, and past it.
    sure = torch.tensor([-1e-4, -1.44e-8, -1e-10, -1e-30, 0.0], device=device)
    other = torch.full_like(sure, -1e-3)
    counts = [torch.ones(5, dtype=torch.int64, device=device)] * 2
    for logps in ([sure, other], [other, sure], [sure, sure]):
        given = (logps, counts, torch.ones_like(sure))
        found = run(given, impl, loss_type="odds_ratio", reference=False)
        exact = run(given, "reference", torch.float64, loss_type="odds_ratio", reference=False)
        for key, value in found.items():
            assert value.isfinite().all(), key
            torch.testing.assert_close(value[:4].double(), exact[key][:4], rtol=1e-4, atol=1e-12)


# Rows whose value grows without end with the margin, by their nature.
UNBOUNDED = ("ipo", "sppo_hard", "discopop")


@pytest.mark.parametrize("name", [x for x in LOSSES if x not in UNBOUNDED])
@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
def test_no_overflow_at_any_margin(impl, name, device):
    far = torch.tensor([3e4, -3e4, 0.0, 3e4, -3e4], device=device)
    zero = torch.zeros_like(far)
    logps = [far - 3e4, -far - 3e4, zero - 3e4, zero - 3e4]
    counts = [torch.ones(5, dtype=torch.int64, device=device)] * 2
    options = {"loss_type": name, "label_smoothing": smoothing_of(name), "beta": 1.0}
    found = run((logps, counts, torch.ones_like(far)), impl, **options)
    for key, value in found.items():
        assert value.isfinite().all(), (key, value)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sum_is_its_parts(impl, device):
    given = example(40, device, torch.float32)
    names, weights = ("sigmoid", "bco_pair", "sft", "aot"), (0.8, 0.2, 1.0, -0.3)
    found = run(given, impl, loss_type=names, loss_weights=weights, beta=0.3)
    parts = [run(given, impl, loss_type=name, beta=0.3) for name in names]
    for key in ("losses", "grad_chosen", "grad_rejected"):
        total = sum(w * part[key] for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(found[key], total, rtol=1e-5, atol=1e-6)
    assert torch.equal(found["chosen_rewards"], parts[3]["chosen_rewards"])


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_aot_gradients(kind):
    given = example(9)
    logps, _, upstream = given
    found = run(given, "chunked", loss_type=kind, beta=0.4)
    c, r = (x.clone().requires_grad_() for x in logps[:2])
    if kind == "aot":
        order = (c - r).argsort()
        z = 0.4 * ((c - r)[order] - (logps[2] - logps[3]).sort().values)
    else:
        order = (c - logps[2]).argsort()
        z = 0.4 * ((c - logps[2])[order] - (r - logps[3]).sort().values)
    # In sorted order, as the paper; ours are in the order of the chosen responses.
    losses = torch.zeros_like(z).scatter(0, order, -F.logsigmoid(z))
    torch.testing.assert_close(found["losses"], losses, rtol=1e-12, atol=1e-14)
    grads = torch.autograd.grad(losses, (c, r), upstream.double())
    for name, grad in zip(("grad_chosen", "grad_rejected"), grads, strict=True):
        torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
def test_beta_may_be_a_tensor(impl, device):
    given = example(40, device, torch.float32)
    betas = torch.linspace(0.05, 0.9, 40, device=device)
    found = run(given, impl, beta=betas, loss_type="ipo")
    for i in (0, 17, 39):
        one = run(given, impl, beta=betas[i].item(), loss_type="ipo")
        for key, value in found.items():
            torch.testing.assert_close(value[i], one[key][i], rtol=1e-5, atol=1e-6)
    scalar = run(given, impl, beta=betas[7])
    number = run(given, impl, beta=betas[7].item())
    for key, value in scalar.items():
        torch.testing.assert_close(value, number[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
def test_without_a_reference(impl, device):
    given = example(20, device, torch.float32)
    for name in ("simpo", "orpo", "cpo", "slic", "rrhf"):
        alone = run(given, impl, reference=False, loss_type=name, beta=0.3)
        beside = run(given, impl, loss_type=name, beta=0.3)
        assert torch.equal(alone["losses"], beside["losses"])
        assert torch.equal(alone["chosen_rewards"], 0.3 * given[0][0])
        wanted = 0.3 * (given[0][0] - given[0][2])
        assert torch.equal(beside["chosen_rewards"], wanted)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.25])
@pytest.mark.parametrize("refs", ["tokens", "sums"])
@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
def test_length_desensitized_head(impl, refs, ld_alpha, device):
    gen = torch.Generator().manual_seed(0)
    lengths = [3, 7, 5, 2, 4, 4]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device)
    policy, ref = -torch.rand(2, 25, generator=gen).to(device)
    mask = (torch.rand(25, generator=gen) > 0.2).to(device)
    leaf, again = (policy.clone().requires_grad_() for _ in range(2))
    weights = torch.ones(25, device=device)
    for pair in range(3):
        parts = [slice(int(cu[s]), int(cu[s + 1])) for s in (2 * pair, 2 * pair + 1)]
        shared = min(int(mask[part].sum()) for part in parts)
        for part in parts:
            weights[part][mask[part].cumsum(0) > shared] = ld_alpha
    spans = {"cu_seqlens": cu, "mask": mask, "impl": impl}
    sums = torch.stack([x.sum() for x in (ref * weights * mask).split(lengths)])
    given = {"ref_token_logps": ref} if refs == "tokens" else {"ref_logps": sums}
    heavy = {"ref_token_logps": ref * weights} if refs == "tokens" else {"ref_logps": sums}
    found = pair_loss_head(leaf, ld_alpha=ld_alpha, **given, **spans)
    wanted = pair_loss_head(again * weights, **heavy, **spans)
    torch.testing.assert_close(found.losses, wanted.losses, rtol=1e-6, atol=1e-7)
    found.losses.sum().backward()
    wanted.losses.sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-6, atol=1e-7)


def test_a_row_without_a_device_function_is_refused_by_triton_alone(monkeypatch, device):
    monkeypatch.setitem(LOSSES, "mine", LOPSIDED._replace(device=None))
    given = example(5, device, torch.float32)
    assert run(given, "chunked", loss_type="mine")["losses"].isfinite().all()
    with pytest.raises(ValueError, match="impl: 'triton' needs a device function, 'mine' has none"):
        run(given, "triton", loss_type="mine")
    # What "auto" means on a GPU, where Triton would be taken.
    mine, known = resolve("mine"), resolve(("sigmoid", "hinge"))
    assert impl_of(mine, "auto", "triton") == "chunked"
    assert impl_of(known, "auto", "triton") == impl_of(known, "triton", "triton") == "triton"
    assert impl_of(mine, "auto", "chunked") == "chunked"


ONES = torch.ones(3)
BAD = {
    "loss_type: expected one of .*, got 'dpo'": {"loss_type": "dpo"},
    "loss_type: expected one of .*, got 'dpo'.*": {"loss_type": ("sigmoid", "dpo")},
    "loss_type: expected at least one name": {"loss_type": ()},
    "loss_type: expected a name or several, got int": {"loss_type": 3},
    "loss_weights: expected a number for each of 2 losses, got 1": {
        "loss_type": ("sigmoid", "hinge"),
        "loss_weights": (1.0,),
    },
    r"loss_weights\[1\]: expected a number, got str": {
        "loss_type": ("sigmoid", "hinge"),
        "loss_weights": (1.0, "2"),
    },
    "loss_weights: expected numbers, got float": {"loss_weights": 1.0},
    "label_smoothing: expected 0 with loss_type 'hinge', got 0.1": {
        "loss_type": "hinge",
        "label_smoothing": 0.1,
    },
    "label_smoothing: expected above 0 with loss_type 'exo_pair'": {"loss_type": "exo_pair"},
    "label_smoothing: expected above 0 with loss_type 'cdpo'": {"loss_type": "cdpo"},
    "label_smoothing: expected below 0.5 with loss_type 'robust'": {
        "loss_type": "robust",
        "label_smoothing": 0.5,
    },
    "f_divergence_type: expected one of 'reverse_kl'.* got 'kl'": {"f_divergence_type": "kl"},
    "f_divergence_type: expected 'reverse_kl' with loss_type 'nca_pair', got 'forward_kl'": {
        "loss_type": "nca_pair",
        "f_divergence_type": "forward_kl",
    },
    "f_divergence_type: expected 'reverse_kl' with loss_type 'aot'": {
        "loss_type": ("sigmoid", "aot"),
        "f_divergence_type": "js_divergence",
    },
    "f_alpha_divergence_coef: expected 1 unless": {"f_alpha_divergence_coef": 0.5},
    "loss_options: loss_type 'sigmoid' takes none, got 'discopop_tau'": {
        "loss_options": {"discopop_tau": 0.1}
    },
    r"loss_options\['discopop_tau'\]: expected a number above 0": {
        "loss_type": "discopop",
        "loss_options": {"discopop_tau": 0},
    },
    r"loss_options\['simpo_gamma'\]: expected a number of at least 0": {
        "loss_type": "simpo",
        "loss_options": {"simpo_gamma": -1},
    },
    "loss_options: expected a mapping, got list": {"loss_options": [1]},
    "reference_chosen_logps: expected a tensor with loss 'sigmoid', got None": {
        "reference_chosen_logps": None,
        "reference_rejected_logps": None,
    },
    "reference_rejected_logps: expected a tensor beside": {
        "loss_type": "simpo",
        "chosen_counts": ONES,
        "rejected_counts": ONES,
        "reference_rejected_logps": None,
    },
    "chosen_counts: expected a tensor with loss 'ipo', got None": {"loss_type": "ipo"},
    "rejected_counts: expected a tensor with loss 'nll'": {
        "loss_type": "sft",
        "chosen_counts": ONES,
    },
    r"chosen_counts: expected shape \(3,\)": {"loss_type": "ipo", "chosen_counts": torch.ones(2)},
    "beta: expected a number above 0, got -1": {"beta": -1},
    r"beta: expected shape \(3,\), got \(2,\)": {"beta": torch.ones(2)},
    "beta: expected a constant": {"beta": torch.ones(3, requires_grad=True)},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_bad_arguments(impl, message):
    given = {
        f"{name}_logps": torch.zeros(3)
        for name in (
            "policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected",
        )
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        preference_loss(**given | {"impl": impl} | BAD[message])


def test_names_are_one_of_a_kind():
    names = loss_names()
    assert len(set(names)) == len(names)
    assert all(row in LOSSES and source for row, source in COUPLED.values())
    assert all(part in (*LOSSES, *COUPLED) for parts, _ in RECIPES.values() for part, _ in parts)


def test_the_first_step_of_every_margin_loss_is_that_of_dpo():
    # Policy and reference equal: log 2 for all that are a log-sigmoid of the margin.
    zero = torch.zeros(4)
    counts = {"chosen_counts": torch.ones(4), "rejected_counts": torch.ones(4)}
    for name in ("sigmoid", "cdpo", "robust", "sigmoid_norm", "aot", "aot_unpaired"):
        for kind in ("reverse_kl", "js_divergence"):
            if kind != "reverse_kl" and name.startswith("aot"):
                continue
            smoothing = 0.1 if name in POSITIVE else 0.0
            out = preference_loss(
                *[zero - 50] * 4, loss_type=name, f_divergence_type=kind,
                label_smoothing=smoothing, **counts,
            )  # fmt: skip
            assert torch.equal(out.losses, torch.full((4,), math.log(2))), name
