"""linear_token_kl: values and gradients against float64, exact zeros, bounded memory."""

import pytest
import torch
import torch.nn.functional as F
from memory import allocated
from prefalign.kernels import _linear_kl_chunked as chunks
from prefalign.kernels.linear_token_kl import DIRECTIONS, linear_token_kl
from prefalign.kernels.sequence_logps import sequence_logps
from tolerance import assert_as_exact_as_eager

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALED = {"logit_scale": 0.7, "softcap": 5.0, "temperature": 0.9}
TENSORS = ("hidden", "ref_hidden", "weight", "ref_weight", "bias", "ref_bias")
EVERY = ("hidden", "weight", "bias")
TINY = 2**15  # bytes of workspace


def make(device, N, V, D, dtype=torch.float32, *, bias=False, two_heads=False, apart=0.3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    heads = [(torch.randn(V, D, generator=gen) / D**0.5 * 2).to(dtype) for _ in range(2)]
    biases = [torch.randn(V, generator=gen).to(dtype) for _ in range(2)]
    hidden = torch.randn(N, D, generator=gen)
    case = {
        "hidden": hidden.to(dtype),
        "ref_hidden": (hidden + apart * torch.randn(N, D, generator=gen)).to(dtype),
        "weight": heads[0],
        "ref_weight": heads[1] if two_heads else None,
        "bias": biases[0] if bias else None,
        "ref_bias": biases[1] if bias and two_heads else None,
    }
    mask = torch.rand(N, generator=gen) > 0.2
    grad = torch.randn(N, generator=gen)
    moved = {k: v if v is None else v.to(device) for k, v in case.items()}
    return moved, mask.to(device), grad.to(device)


def by_definition(case, mask, options):
    """Return the KLs from torch's own softmax, every step in the dtype given."""
    options = {"logit_scale": 1, "softcap": None, "temperature": 1} | options
    logp = []
    for prefix in ("", "ref_"):
        weight = case[prefix + "weight"] if case[prefix + "weight"] is not None else case["weight"]
        bias = case[prefix + "bias"]
        if prefix and bias is None and case["ref_weight"] is None:
            bias = case["bias"]
        z = options["logit_scale"] * F.linear(case[prefix + "hidden"], weight, bias)
        cap = options["softcap"]
        z = (z if cap is None else cap * torch.tanh(z / cap)) / options["temperature"]
        logp.append(F.log_softmax(z, -1))
    p, q = logp[0], logp[1].detach()
    if options.get("direction") == "reverse":
        p, q = q, p
    out = F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    return torch.where(mask, out, 0)


def run(case, mask, grad, needs=("hidden",), dtype=None, oracle=False, **options):
    case = {
        k: v if v is None else v.detach().to(dtype or v.dtype).requires_grad_(k in needs)
        for k, v in case.items()
    }
    if oracle:
        out = by_definition(case, mask, options)
    else:
        out = linear_token_kl(mask=mask, **case, **options)
    wanted = [k for k in needs if case[k] is not None]
    got = torch.autograd.grad(out, [case[k] for k in wanted], grad.to(out.dtype))
    return {"kl": out.detach(), **dict(zip(wanted, got, strict=True))}


def check(made, **options):
    ours = run(*made, impl="chunked", **options)
    eager = run(
        *made, impl="reference", **{k: v for k, v in options.items() if k != "workspace_bytes"}
    )
    options.pop("workspace_bytes", None)
    exact = run(*made, dtype=torch.float64, oracle=True, **options)
    for name, want in exact.items():
        # A logit here is below 16, and carries eps of itself into everything.
        assert_as_exact_as_eager(ours[name], eager[name], want.double(), name, inside=16)
    dead = ~made[1]
    assert (ours["kl"][dead] == 0).all() and (ours["kl"] >= 0).all()
    if "hidden" in ours:
        assert (ours["hidden"][dead] == 0).all()
    return ours


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("two_heads", [False, True])
@pytest.mark.parametrize("options", [{}, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (15, 33, 17), (37, 131, 23)])
def test_shapes(device, shape, options, two_heads, direction):
    made = make(device, *shape, two_heads=two_heads)
    needs = ("hidden", "weight") if two_heads else ("hidden",)
    check(made, needs=needs, direction=direction, **options)


@pytest.mark.parametrize("spare", [0, 2**20])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("two_heads", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_with_bias_and_chunks(device, dtype, two_heads, direction, spare, monkeypatch):
    """Rows and vocabulary in parts, with room for a float32 gradient of hidden and without."""
    made = make(device, 40, 100, 18, dtype, bias=True, two_heads=two_heads)
    monkeypatch.setattr(chunks, "plan_tiles", lambda *_: (16, 32, spare))
    for needs in (("hidden",), ("weight",), ("bias",), EVERY):
        check(made, needs=needs, direction=direction, **SCALED)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("budget", [2**16, 2**20, 2**26])
@pytest.mark.parametrize("shape", [(1, 300, 16), (1000, 5000, 64), (8192, 128256, 8192)])
def test_tiles_fit_the_workspace_where_they_can(shape, budget, dtype):
    for kind in ("cpu", "meta"):  # the latter stands for a GPU
        like = torch.zeros(0, dtype=dtype, device=kind)
        rows, tile, spare = chunks.plan_tiles(*shape, like, budget)
        assert 1 <= rows <= shape[0] and 1 <= tile <= shape[1]
        assert spare >= 0 or (rows == 1 and tile == 16)
        if budget == 2**26:
            assert rows >= min(16, shape[0]) and tile >= min(128, shape[1])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_true_bfloat16_gemms_of_a_large_vocabulary(device, direction):
    made = make(device, 24, 5000, 16, torch.bfloat16, two_heads=True)
    check(made, needs=("hidden", "weight"), direction=direction, workspace_bytes=2**20)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_exactly_0_where_both_are_equal(device, dtype, direction):
    for bias in (False, True):
        case, mask, grad = make(device, 37, 131, 23, dtype, bias=bias, apart=0)
        for copy in (None, case["weight"].clone()):
            given = case | {"ref_weight": copy, "ref_bias": case["bias"]}
            for options in ({}, SCALED | {"workspace_bytes": TINY}):
                found = run(given, mask, grad, EVERY, direction=direction, **options)
                assert all((x == 0).all() for x in found.values())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_small_kls_and_large_logits(device, direction):
    """KLs of 1e-6 under logits of tens, and KLs of hundreds."""
    for apart, scale in ((1e-3, 1.0), (1e-2, 8.0), (3.0, 8.0)):
        case, mask, grad = make(device, 30, 200, 16, apart=apart)
        case = case | {"weight": case["weight"] * scale}
        ours, eager = (
            run(case, mask, grad, direction=direction, impl=i) for i in ("auto", "reference")
        )
        exact = run(case, mask, grad, dtype=torch.float64, oracle=True, direction=direction)
        for name, want in exact.items():
            assert_as_exact_as_eager(ours[name], eager[name], want, name, inside=8 * scale)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_never_below_0(device, direction):
    """Where rounding alone would leave a third of these KLs, of 1e-9, below it."""
    for seed in range(5):
        case, mask, _ = make(device, 40, 200, 16, apart=1e-5, seed=seed)
        assert (linear_token_kl(**case, mask=mask, direction=direction) >= 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_all_logits_share_costs_no_digits(device, direction):
    case, mask, grad = make(device, 60, 500, 16, apart=0.03)
    case = case | {"bias": torch.full((500,), 300.0, device=device)}
    ours, eager = (
        run(case, mask, grad, direction=direction, impl=i)["kl"] for i in ("auto", "reference")
    )
    exact = run(case, mask, grad, dtype=torch.float64, oracle=True, direction=direction)["kl"]
    assert_as_exact_as_eager(ours, eager, exact)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_by_differences(device, direction):
    case, mask, _ = make(device, 4, 7, 3, torch.float64, bias=True, two_heads=True)
    fixed = {k: case[k] for k in ("ref_weight", "ref_bias")}

    def kl(hidden, weight, bias):
        return linear_token_kl(
            hidden, case["ref_hidden"], weight, bias=bias, mask=mask, direction=direction,
            **fixed, **SCALED,
        )  # fmt: skip

    leaves = [case[k].requires_grad_() for k in EVERY]
    assert torch.autograd.gradcheck(kl, leaves)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_padded_vocabulary_and_nan_in_masked_rows(device, impl, direction):
    case, mask, grad = make(device, 20, 70, 16)
    bias = torch.zeros(70, device=device)
    bias[:40] = -torch.inf
    full = case | {"bias": bias}
    if impl == "chunked":
        full |= {
            k: case[k].masked_fill(~mask[:, None], torch.nan) for k in ("hidden", "ref_hidden")
        }
    got = run(full, mask, grad, direction=direction, impl=impl)
    short = case | {"weight": case["weight"][40:]}
    want = run(short, mask, grad, dtype=torch.float64, oracle=True, direction=direction)
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-4, atol=1e-6)


def test_infinite_where_the_policy_excludes_what_the_reference_has(device):
    case, mask, _ = make(device, 6, 20, 8)
    bias = torch.zeros(20, device=device)
    bias[3] = -torch.inf
    given = case | {"bias": bias, "ref_bias": torch.zeros_like(bias)}
    assert (linear_token_kl(**given) == torch.inf).all()
    assert linear_token_kl(**given, direction="reverse").isfinite().all()


def test_leading_dimensions_strides_and_an_integer_mask(device):
    case, mask, _ = make(device, 24, 50, 12)
    expected = linear_token_kl(**case, mask=mask)
    folded = {k: v.view(4, 6, 12).transpose(0, 1) if "hidden" in k else v for k, v in case.items()}
    found = linear_token_kl(**folded, mask=mask.view(4, 6).T.int())
    torch.testing.assert_close(found.T.flatten(), expected)
    assert linear_token_kl(**case | {k: case[k][0] for k in TENSORS[:2]}).shape == ()
    everything = linear_token_kl(**case)
    torch.testing.assert_close(torch.where(mask, everything, 0), expected)


def test_empty_and_all_masked(device):
    case, mask, grad = make(device, 6, 30, 8, bias=True)
    out = run(case, torch.zeros_like(mask), grad, EVERY)
    assert all((x == 0).all() for x in out.values())
    none = case | {k: case[k][:0] for k in TENSORS[:2]}
    out = run(none, mask[:0], grad[:0], EVERY)
    assert out["kl"].shape == (0,) and (out["weight"] == 0).all()


def test_the_reference_gets_no_gradient(device):
    case, mask, grad = make(device, 9, 20, 8, two_heads=True, bias=True)
    case = {k: v.requires_grad_() for k, v in case.items()}
    out = linear_token_kl(mask=mask, **case)
    out.backward(grad)
    assert all(case[k].grad is None for k in ("ref_hidden", "ref_weight", "ref_bias"))
    assert all(case[k].grad.any() for k in EVERY)


@pytest.mark.parametrize("needs", [("hidden",), EVERY])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compiles_whole_and_backward_repeats(device, direction, needs):
    case, mask, grad = make(device, 21, 70, 16, bias=True)

    def step(hidden, weight, bias):
        given = case | {"hidden": hidden, "weight": weight, "bias": bias}
        return linear_token_kl(**given, mask=mask, direction=direction)

    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = {k: case[k].clone().requires_grad_(k in needs) for k in EVERY}
        out = fn(*leaves.values())
        wanted = [leaves[k] for k in needs]
        first = torch.autograd.grad(out, wanted, grad, retain_graph=True)
        if fn is step:
            second = torch.autograd.grad(out, wanted, grad)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        results.append((out.detach(), *first))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_torch_func_and_what_is_refused(device, direction):
    case, mask, grad = make(device, 9, 30, 8, bias=True)
    leaves = [case[k] for k in EVERY]

    def kl(hidden, weight, bias, impl="auto"):
        given = case | {"hidden": hidden, "weight": weight, "bias": bias}
        return linear_token_kl(**given, mask=mask, direction=direction, impl=impl)

    expected = run(case, mask, grad, EVERY, direction=direction)
    out, pull = torch.func.vjp(kl, *leaves)
    for a, b in zip((out, *pull(grad)), expected.values(), strict=True):
        assert torch.equal(a, b)
    stacked = torch.stack([leaves[0], 2 * leaves[0]])
    mapped = torch.vmap(kl, (0, None, None))(stacked, *leaves[1:])
    assert torch.equal(mapped[0], expected["kl"])
    assert torch.equal(mapped[1], kl(2 * leaves[0], *leaves[1:]))
    with pytest.raises(NotImplementedError, match="linear_token_kl: expected reverse mode"):
        torch.func.jvp(kl, tuple(leaves), tuple(map(torch.ones_like, leaves)))
    hidden = leaves[0].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="linear_token_kl: expected one derivative"):
        torch.autograd.grad(kl(hidden, *leaves[1:]).sum(), hidden, create_graph=True)


def test_opcheck(device):
    case, mask, _ = make(device, 5, 12, 4, bias=True, two_heads=True)
    for k in EVERY:
        case[k].requires_grad_()
    scalars = (0.7, 9.0, 1.0, "reverse", 0)
    torch.library.opcheck(
        torch.ops.prefalign.linear_token_kl.default,
        (*(case[k] for k in TENSORS), mask, *scalars),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "D"), [(512, 32), (24, 512)])
def test_memory_is_the_workspace(device, N, D, dtype, needs):
    if device.type != "cpu":
        pytest.skip("counts what a CPU's allocator gives out")
    V, budget = 6000, 2**21
    case, mask, grad = make(device, N, V, D, dtype, two_heads=True)
    gradients = sum(case[k].nbytes for k in needs)
    found = allocated(lambda: run(case, mask, grad, needs, workspace_bytes=budget))
    # A few numbers a row: the KLs, four numbers each, indices, the upstream.
    assert found <= budget + gradients + 80 * N, (found, budget, gradients)
    # Next to the logits of one of the heads, or to a float32 copy of its weight.
    assert found - gradients < 4 * V * max(N, D) / 4


@pytest.mark.parametrize(
    ("dtype", "spare", "needs", "backward"),
    [
        (torch.float32, 0, ("hidden",), 3),
        (torch.float32, 0, ("weight",), 3),
        (torch.float32, 0, EVERY, 4),
        (torch.bfloat16, 2**20, EVERY, 4),
        (torch.bfloat16, 0, ("hidden",), 3),
        (torch.bfloat16, 0, EVERY, 6),  # hidden's gradient in a pass of its own
    ],
)
def test_the_work_is_what_is_said(device, dtype, spare, needs, backward, monkeypatch):
    N, V, D = 40, 100, 18
    case, mask, grad = make(device, N, V, D, dtype, two_heads=True, bias=True)
    monkeypatch.setattr(chunks, "plan_tiles", lambda *_: (16, 32, spare))
    done = []
    for name in ("logits", "gradient_dot"):
        own = getattr(chunks, name)

        def counted(x, w, *rest, own=own):
            done.append(2 * x.shape[0] * x.shape[1] * w.shape[0])
            return own(x, w, *rest)

        monkeypatch.setattr(chunks, name, counted)
    leaves = {k: v.requires_grad_(k in needs) for k, v in case.items()}
    out = linear_token_kl(mask=mask, **leaves)
    one = 2 * int(mask.sum()) * V * D if device.type == "cpu" else 2 * N * V * D
    assert sum(done) == 2 * one
    done.clear()
    torch.autograd.grad(out, [leaves[k] for k in needs], grad)
    assert sum(done) == backward * one


def test_summed_it_is_the_sequential_kl(device):
    case, mask, _ = make(device, 12, 40, 8)
    cu = torch.tensor([0, 5, 12], device=device)
    kl = linear_token_kl(**case, mask=mask)
    sums = sequence_logps(kl, cu_seqlens=cu, mask=mask).sums
    exact = by_definition({k: v if v is None else v.double() for k, v in case.items()}, mask, {})
    expected = torch.stack([exact[:5].sum(), exact[5:].sum()])
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"impl": "triton"}, ValueError, "impl: linear_token_kl has no Triton kernel yet"),
        ({"impl": "fast"}, ValueError, "impl: expected one of"),
        ({"direction": "both"}, ValueError, "direction: expected one of 'forward', 'reverse'"),
        ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor"),
        ({"ref_hidden": torch.zeros(4, 4)}, ValueError, "ref_hidden: expected shape"),
        ({"ref_hidden": torch.zeros(3, 4).double()}, TypeError, "ref_hidden: expected dtype"),
        ({"weight": torch.zeros(9, 5)}, ValueError, "weight: expected shape"),
        ({"ref_weight": torch.zeros(8, 4)}, ValueError, "ref_weight: expected shape"),
        ({"bias": torch.zeros(8)}, ValueError, "bias: expected shape"),
        ({"ref_bias": torch.zeros(8)}, ValueError, "ref_bias: expected shape"),
        ({"mask": torch.ones(4).bool()}, ValueError, "mask: expected shape"),
        ({"mask": torch.ones(3)}, TypeError, "mask: expected dtype"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"temperature": 0}, ValueError, "temperature"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes: expected an int of at least 1"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, text):
    given = {"hidden": torch.zeros(3, 4), "ref_hidden": torch.zeros(3, 4)}
    with pytest.raises(error, match=text):
        linear_token_kl(**(given | {"weight": torch.zeros(9, 4)} | change))
