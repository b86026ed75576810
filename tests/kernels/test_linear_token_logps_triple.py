"""linear_token_logps_triple: three log-probs against float64, one gradient, the same bits."""

import dataclasses

import pytest
import torch
from prefalign.kernels.linear_token_logps import linear_token_logps
from prefalign.kernels.linear_token_logps_triple import linear_token_logps_triple
from prefalign.kernels.plan import plan_head

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALED = {"logit_scale": 0.7, "softcap": 5.0, "temperature": 0.9}


@pytest.fixture(params=["chunked", "triton"])
def impl(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def make(device, N, V, D, dtype=torch.float32, *, bias=False, two_heads=False, seed=0):
    gen = torch.Generator().manual_seed(seed)
    heads = [(torch.randn(V, D, generator=gen) / D**0.5 * 2).to(dtype) for _ in range(2)]
    biases = [torch.randn(V, generator=gen).to(dtype) for _ in range(2)]
    targets = torch.randint(0, V, (N,), generator=gen)
    targets[torch.rand(N, generator=gen) < 0.2] = -100
    hidden = torch.randn(N, D, generator=gen)
    case = {
        "hidden": hidden.to(dtype),
        "ref_hidden": (hidden + 0.3 * torch.randn(N, D, generator=gen)).to(dtype),
        "weight": heads[0],
        "ref_weight": heads[1] if two_heads else None,
        "bias": biases[0] if bias else None,
        "ref_bias": biases[1] if bias and two_heads else None,
    }
    grad = torch.randn(N, generator=gen)
    moved = {k: v if v is None else v.to(device) for k, v in case.items()}
    return moved, targets.to(device), grad.to(device)


def run(impl, case, targets, grad, needs=("hidden",), dtype=None, **kw):
    case = {
        k: v if v is None else v.detach().to(dtype or v.dtype).requires_grad_(k in needs)
        for k, v in case.items()
    }
    out = linear_token_logps_triple(targets=targets, impl=impl, **case, **kw)
    assert not out.reference.requires_grad and not out.extrapolated.requires_grad
    wanted = [k for k in needs if case[k] is not None]
    values = {k: v.detach() for k, v in out._asdict().items()}
    if wanted:
        got = torch.autograd.grad((out.policy * grad).sum(), [case[k] for k in wanted])
        values |= dict(zip(wanted, got, strict=True))
    return values


def check(impl, made, **kw):
    ours = run(impl, *made, **kw)
    eager, exact = run("reference", *made, **kw), run("reference", *made, dtype=torch.float64, **kw)
    dead = made[1] == -100
    for name, want in exact.items():
        want = want.double()
        err, ref = (ours[name].double() - want).abs(), (eager[name].double() - want).abs()
        # A logit here is below 16, and carries eps of itself into everything.
        eps = torch.finfo(torch.float32).eps * 16
        assert err.max() <= 2 * ref.max() + eps, (name, err.max(), ref.max())
        assert err.mean() <= 2 * ref.mean() + eps / 4, (name, err.mean(), ref.mean())
        if name in ("policy", "reference", "extrapolated", "hidden"):
            assert (ours[name][dead] == 0).all()
    return ours


@pytest.mark.parametrize("shape", [(1, 1, 1), (15, 33, 17), (37, 131, 23)])
@pytest.mark.parametrize("two_heads", [False, True])
@pytest.mark.parametrize("options", [{}, SCALED], ids=["plain", "scaled"])
def test_shapes(impl, device, shape, two_heads, options):
    needs = ("hidden", "weight") if two_heads else ("hidden",)
    check(
        impl, make(device, *shape, two_heads=two_heads), needs=needs, extrapolation=0.5, **options
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two_heads", [False, True])
def test_dtypes_with_bias_and_chunks(impl, device, dtype, two_heads):
    made = make(device, 30, 100, 18, dtype, bias=True, two_heads=two_heads)
    for needs in (("hidden",), ("hidden", "weight", "bias")):
        plan = plan_head(30, 100, 18, dtype=dtype, weight_grad=len(needs) > 1)
        plan = dataclasses.replace(plan, row_chunk=16, vocab_tile=64)
        check(impl, made, needs=needs, extrapolation=0.3, plan=plan, **SCALED)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_as_the_single_op(impl, device, dtype):
    case, targets, _ = make(device, 20, 70, 20, dtype)
    hidden, weight = case["hidden"], case["weight"]
    for options in ({}, SCALED):
        kw = {"impl": impl, **options}
        single = linear_token_logps(hidden, weight, targets, **kw)
        for h in (hidden, hidden.clone().requires_grad_()):
            out = linear_token_logps_triple(h, hidden, weight, targets, extrapolation=0.5, **kw)
            assert torch.equal(out.policy, single) and torch.equal(out.reference, single)
        two = linear_token_logps_triple(
            hidden, case["ref_hidden"], weight, targets, ref_weight=weight.clone(), **kw
        )
        assert torch.equal(two.policy, single) and torch.equal(two.extrapolated, single)
        other = linear_token_logps(case["ref_hidden"], weight, targets, **kw)
        assert torch.equal(two.reference, other)


def test_gradients_are_those_of_the_single_op(impl, device):
    case, targets, grad = make(device, 30, 90, 20, bias=True)
    needs = ("hidden", "weight", "bias")
    triple = run(impl, case, targets, grad, needs, extrapolation=0.5)
    leaves = [case[k].clone().requires_grad_() for k in needs]
    out = linear_token_logps(leaves[0], leaves[1], targets, bias=leaves[2], impl=impl)
    for name, got in zip(needs, torch.autograd.grad(out, leaves, grad), strict=True):
        assert torch.equal(got, triple[name])


def test_padded_vocabulary_and_nan_in_ignored_rows(impl, device):
    case, targets, grad = make(device, 20, 70, 16)
    bias = torch.zeros(70, device=device)
    bias[:40] = -torch.inf
    targets = targets.where(targets == -100, 40 + targets % 30)
    dead = (targets == -100)[:, None]
    full = case | {"bias": bias}
    full |= {k: case[k].masked_fill(dead, torch.nan) for k in ("hidden", "ref_hidden")}
    got = run(impl, full, targets, grad, extrapolation=0.5)
    short = case | {"weight": case["weight"][40:]}
    want = run("reference", short, targets.where(dead[:, 0], targets - 40), grad, extrapolation=0.5)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)


def test_empty_and_all_ignored(impl, device):
    case, targets, grad = make(device, 6, 30, 8)
    out = run(impl, case, torch.full_like(targets, -100), grad, ("hidden", "weight"))
    assert all((v == 0).all() for v in out.values())
    none = {k: v if v is None or k == "weight" else v[:0] for k, v in case.items()}
    assert run(impl, none, targets[:0], grad[:0])["policy"].shape == (0,)


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")])
def test_compiles_whole_and_backward_repeats(impl, device, needs):
    case, targets, grad = make(device, 21, 70, 16)

    def step(hidden, ref_hidden, weight):
        return linear_token_logps_triple(
            hidden, ref_hidden, weight, targets, extrapolation=0.5, impl=impl
        )

    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = {k: case[k].clone().requires_grad_(k in needs) for k in ("hidden", "weight")}
        out = fn(leaves["hidden"], case["ref_hidden"], leaves["weight"])
        wanted = [leaves[k] for k in needs]
        first = torch.autograd.grad(out.policy, wanted, grad, retain_graph=True)
        if fn is step:
            second = torch.autograd.grad(out.policy, wanted, grad)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        results.append((*(x.detach() for x in out), *first))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"ref_hidden": torch.zeros(4, 4)}, ValueError, "ref_hidden"),
        ({"ref_hidden": torch.zeros(3, 4).double()}, TypeError, "ref_hidden"),
        ({"ref_weight": torch.zeros(8, 4)}, ValueError, "ref_weight"),
        ({"ref_bias": torch.zeros(8)}, ValueError, "ref_bias"),
        ({"extrapolation": "1"}, TypeError, "extrapolation"),
        ({"targets": torch.full((3,), 9)}, ValueError, "targets"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    given = {"hidden": torch.zeros(3, 4), "ref_hidden": torch.zeros(3, 4)}
    given |= {"weight": torch.zeros(9, 4), "targets": torch.zeros(3).long(), "impl": "chunked"}
    with pytest.raises(error, match=text):
        linear_token_logps_triple(**(given | change))
