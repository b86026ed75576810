"""A LoRA adapter on the head: values and gradients against float64, with W + BA never formed."""

import dataclasses

import pytest
import torch
from prefalign.kernels._low_rank import Adapter, Factors, add_product
from prefalign.kernels.head_adapter import HeadAdapter
from prefalign.kernels.linear_token_logps import OUTPUTS, linear_token_logps
from prefalign.kernels.plan import plan_head
from tolerance import assert_as_exact_as_eager
from torch.utils._python_dispatch import TorchDispatchMode

PLAIN = {}
SCALED = {"logit_scale": 0.7, "softcap": 5.0, "temperature": 0.9}
LEAVES = "hwbAB"  # hidden, weight, bias, adapter.a, adapter.b


@pytest.fixture(params=["chunked", "triton"])
def impl(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def make(device, N, V, D, r, dtype=torch.float32, adapter_dtype=None, *, ignored=0.2, seed=0):
    """Return hidden, weight, bias, a, b, the targets and an upstream that differs by the row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, size=1.0):
        return torch.randn(*shape, generator=generator) * size

    hidden, weight = normal(N, D).to(dtype), normal(V, D, size=2 / D**0.5).to(dtype)
    bias = normal(V).to(dtype)
    a, b = (x.to(adapter_dtype or dtype) for x in (normal(r, D, size=1 / D**0.5), normal(V, r)))
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = -100
    return [x.to(device) for x in (hidden, weight, bias, a, b, targets, normal(N))]


def run(impl, case, needs="hAB", entropy=False, double=False, scaling=0.5, **options):
    """Return every output, and the gradients of the leaves in ``needs``."""
    *leaves, targets, upstream = case
    leaves = [
        x.detach().to(torch.float64 if double else x.dtype).requires_grad_(name in needs)
        for name, x in zip(LEAVES, leaves, strict=True)
    ]
    hidden, weight, bias, a, b = leaves
    out = linear_token_logps(
        hidden, weight, targets, bias=bias, adapter=HeadAdapter(a, b, scaling), outputs=OUTPUTS,
        impl=impl, **options,
    )  # fmt: skip
    found = {name: value.detach() for name, value in out._asdict().items()}
    if needs:
        loss = (out.logps * upstream).sum()
        if entropy:
            loss = loss + (out.entropy * upstream.flip(0)).sum()
        wanted = [x for x in leaves if x.requires_grad]
        names = [name for name in LEAVES if name in needs]
        found |= dict(zip(names, torch.autograd.grad(loss, wanted), strict=True))
    return found


def check(impl, case, **options):
    ours, eager = run(impl, case, **options), run("reference", case, **options)
    exact = run("reference", case, double=True, **options)
    for found in (ours, eager, exact):
        del found["is_top1"]
    logit = exact["lse"].abs().max().item() if exact["lse"].numel() else 0.0
    for name, value in exact.items():
        assert ours[name].dtype == eager[name].dtype
        assert_as_exact_as_eager(ours[name], eager[name], value, name, inside=1 + logit)
    dead = case[-2] == -100
    assert all((ours[name][dead] == 0).all() for name in ("logps", "entropy", *("h" & ours.keys())))
    return ours


SHAPES = [
    (1, 1, 1, 1),
    (15, 31, 17, 3),
    (16, 32, 16, 16),
    (17, 33, 15, 17),
    (37, 131, 23, 8),
    (33, 65, 5, 40),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [PLAIN, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("needs", ["", "h", "hAB"])
def test_shapes_and_ranks_that_straddle_blocks(impl, device, shape, options, needs):
    check(impl, make(device, *shape), needs=needs, **options)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", ["hA", "hAB", "hwbAB"])
def test_16_bit_heads(impl, device, dtype, adapter_dtype, needs):
    case = make(device, 37, 131, 23, 5, dtype, adapter_dtype)
    check(impl, case, needs=needs, **SCALED)


@pytest.mark.parametrize("needs", ["A", "B", "h", "hA", "hB", "AB", "wB", "hwbA", "hwbAB"])
@pytest.mark.parametrize("entropy", [False, True])
def test_only_some_inputs_require_grad(impl, device, needs, entropy):
    check(impl, make(device, 19, 70, 18, 3), needs=needs, entropy=entropy)


@pytest.mark.parametrize("budget", [20_000, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_row_chunks_and_slices(impl, device, dtype, budget):
    case = make(device, 30, 100, 20, 3, dtype, torch.float32)
    for needs, entropy in (("hA", False), ("hAB", True), ("hwbAB", False)):
        plan = plan_head(
            30, 100, 20, dtype=dtype, adapter_rank=3, adapter_grad="B" in needs,
            workspace_bytes=budget,
        )  # fmt: skip
        plan = dataclasses.replace(plan, row_chunk=16, vocab_tile=64)
        check(impl, case, needs=needs, entropy=entropy, plan=plan, **SCALED)


@pytest.mark.parametrize("needs", ["hA", "hAB"])
@pytest.mark.parametrize("sure", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabulary_and_confident_tokens(device, needs, sure, dtype):
    """From 4,096 entries on gradients come from 16-bit GEMMs; where p_y is near 1, J is small."""
    case = make(device, 50, 4500, 40, 6)
    hidden, weight, targets = case[0], case[1], case[-2]
    rows = weight[targets.clamp(min=0)]
    hidden += sure * rows / rows.square().sum(1, keepdim=True)
    case[:3] = [x.to(dtype) for x in case[:3]]
    check("chunked", case, needs=needs, **SCALED)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_logits_keep_float32s_precision(impl, device, adapter_dtype):
    """A large product of the factors that cancels: 8-bit operands would leave errors of 1e-1."""
    case = make(device, 40, 70, 16, 4, torch.bfloat16, adapter_dtype)
    hidden, weight, bias, a, b, targets, upstream = case
    a, b = torch.cat([a, a]), torch.cat([20 * b, -20 * b + b], 1)
    ours = run(impl, [hidden, weight, bias, a, b, targets, upstream], needs="")
    wide = [x.double() for x in (hidden, weight, bias, a, b)]
    exact = run("reference", [*wide, targets, upstream], needs="")
    assert (ours["logps"] - exact["logps"]).abs().max() < 2e-4


def test_factors_are_cut_into_what_bfloat16_gemms_take_as_it_is():
    """Whether a CPU's GEMM rounds its operands differs by machine: so nothing is left to round."""
    generator = torch.Generator().manual_seed(0)
    low, up = (torch.randn(9, 5, generator=generator) for _ in range(2))
    factors = Factors(Adapter(low, up), torch.zeros(9, 3, dtype=torch.bfloat16))
    for found, factor in ((factors.rows(slice(None)), low), (factors.entries(0, 9), up)):
        assert len(found) == 3
        assert all(torch.equal(part, part.bfloat16().float()) for part in found)
        assert torch.equal(sum(part.double() for part in found).float(), factor)
    out = torch.zeros(9, 9)
    add_product(out, factors.rows(slice(None)), factors.entries(0, 9))
    torch.testing.assert_close(out.double(), low.double() @ up.double().T, rtol=0, atol=2e-6)
    (whole,) = Factors(Adapter(low, up), torch.zeros(9, 3)).rows(slice(2, 4))
    assert torch.equal(whole, low[2:4])


def test_equals_the_merged_weight_and_its_gradients():
    *floats, targets, upstream = make("cpu", 21, 50, 12, 3)
    case = [*(x.double() for x in floats), targets, upstream]
    found = run("chunked", case, scaling=1.7)
    hidden, weight, bias, a, b = (x.requires_grad_() for x in case[:5])
    want = linear_token_logps(hidden, weight + 1.7 * b @ a, targets, bias=bias, impl="reference")
    torch.testing.assert_close(found["logps"], want.detach(), rtol=0, atol=1e-12)
    grads = torch.autograd.grad(want, (hidden, a, b), upstream)
    for name, grad in zip("hAB", grads, strict=True):
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-11)


def test_a_fresh_adapter_leaves_every_bit(impl, device):
    """LoRA's b starts at 0: policy equals reference, and DPO's first loss is ln 2 exactly."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, _, a, b, targets, _ = make(device, 40, 170, 24, 5, dtype, torch.float32)
        bare = linear_token_logps(hidden, weight, targets, impl=impl)
        leaves = hidden.clone().requires_grad_(), HeadAdapter(a, torch.zeros_like(b))
        for grad in (False, True):
            leaves[1].b.requires_grad_(grad)
            fresh = linear_token_logps(leaves[0], weight, targets, adapter=leaves[1], impl=impl)
            assert torch.equal(fresh, bare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logps_are_the_same_bits_with_and_without_a_gradient(impl, device, dtype):
    case = make(device, 30, 100, 20, 5, dtype, torch.float32)
    found = [run(impl, case, needs=needs)["logps"] for needs in ("", "h", "hA", "hAB", "hwbAB")]
    assert all(torch.equal(x, found[0]) for x in found[1:])


def test_batches_that_are_empty_or_ignored(impl, device):
    for N in (0, 5):
        case = make(device, N, 40, 8, 3, ignored=1.1)
        for needs in ("", "hA", "hwbAB"):
            found = run(impl, case, needs=needs, entropy=True)
            assert all((value == 0).all() for value in found.values())


def test_ignored_rows_may_hold_nan(impl, device):
    case = make(device, 40, 60, 20, 3)
    dead = case[-2] == -100
    assert dead.any()
    for needs in ("hA", "hwbAB"):
        clean = run(impl, case, needs=needs)
        poisoned = [case[0].masked_fill(dead[:, None], torch.nan), *case[1:]]
        found = run(impl, poisoned, needs=needs)
        assert all(torch.equal(found[name], clean[name]) for name in clean)


def test_strided_factors_and_leading_dimensions(impl, device):
    hidden, weight, _, a, b, targets, _ = make(device, 36, 50, 20, 4, ignored=0)
    wide_a, wide_b = a.repeat(2, 2)[::2, ::2], torch.stack([b, -b], 1).transpose(0, 2)[:, 0].T
    strided = HeadAdapter(wide_a, wide_b, 0.3)
    assert not (wide_a.is_contiguous() or wide_b.is_contiguous())
    dense = HeadAdapter(wide_a.contiguous(), wide_b.contiguous(), 0.3)
    x, y = hidden.view(4, 9, 20), targets.view(4, 9)
    grads = []
    for adapter in (strided, dense):
        leaves = [t.detach().requires_grad_() for t in (x, *adapter[:2])]
        out = linear_token_logps(
            leaves[0], weight, y, adapter=HeadAdapter(*leaves[1:], 0.3), impl=impl
        )
        assert out.shape == y.shape
        grads.append((out, *torch.autograd.grad(out.cos().sum(), leaves)))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("needs", ["hA", "hAB", "hwbAB"])
def test_second_backward_and_reruns_are_bit_identical(impl, device, needs):
    *leaves, targets, upstream = make(device, 40, 90, 20, 5)
    leaves = [x.requires_grad_(name in needs) for name, x in zip(LEAVES, leaves, strict=True)]
    hidden, weight, bias, a, b = leaves
    wanted = [x for x in leaves if x.requires_grad]
    before = [x.detach().clone() for x in (*leaves, upstream)]
    found = []
    for _ in range(2):
        out = linear_token_logps(
            hidden, weight, targets, bias=bias, adapter=HeadAdapter(a, b, 0.5), impl=impl
        )
        for _ in range(2):
            found.append((out, *torch.autograd.grad(out, wanted, upstream, retain_graph=True)))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(before, (*leaves, upstream), strict=True))


@pytest.mark.parametrize("needs", ["", "hA", "hAB"])
def test_compiles_whole(impl, device, needs):
    *leaves, targets, upstream = make(device, 21, 70, 16, 3)

    def step(hidden, weight, bias, a, b):
        return linear_token_logps(
            hidden, weight, targets, bias=bias, adapter=HeadAdapter(a, b, 0.5), impl=impl
        )

    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        given = [x.clone().requires_grad_(n in needs) for n, x in zip(LEAVES, leaves, strict=True)]
        out = fn(*given)
        if needs:
            out.backward(upstream)
        results.append((out.detach(), *(x.grad for x in given if x.requires_grad)))
    assert len(results[0]) == 1 + len(needs)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("strategy", ["row_jacobian", "recompute"])
def test_opcheck(device, impl, strategy):
    hidden, weight, bias, a, up, targets, grad = make(device, 5, 12, 4, 3)
    low = (hidden @ a.T).requires_grad_()
    hidden.requires_grad_()
    up.requires_grad_(strategy == "recompute")
    scalars = (1.0, None, 1.0, -100, "entropy,is_top1", strategy, impl, 0, 0, 0)
    op = torch.ops.prefalign.linear_token_logps.default
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op, (hidden, weight, targets, bias, *scalars, low, up), test_utils=tests)
    logps, _, entropy, _, _, _, norm, *_ = (
        x.detach() for x in op(hidden, weight, targets, bias, *scalars, low, up)
    )
    torch.library.opcheck(
        torch.ops.prefalign.linear_token_logps_adapter_backward.default,
        (grad, None, hidden.detach(), weight, targets, bias, norm, entropy, low.detach(),
         up.detach(), 1.0, 9.0, 1.0, -100, "hwblu", impl, 0, 0, 0),
        test_utils=tests,
    )  # fmt: skip


def test_a_second_derivative_is_refused_not_wrong(impl, device):
    *leaves, targets, _ = make(device, 9, 20, 8, 2)
    hidden, weight, bias, a, b = (x.requires_grad_() for x in leaves)
    out = linear_token_logps(hidden, weight, targets, adapter=HeadAdapter(a, b), impl=impl)
    with pytest.raises(RuntimeError, match="linear_token_logps: expected one derivative"):
        torch.autograd.grad(out.sum(), (hidden, a, b), create_graph=True)


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that an operation returned and that is not one of those given."""

    def __init__(self, given):
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(value, torch.Tensor):
                continue
            if value.untyped_storage().data_ptr() not in self.given:
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", ["hA", "hAB"])
def test_neither_the_logits_nor_the_merged_weight_is_allocated(device, dtype, needs):
    N, V, D, r, budget = 300, 3000, 64, 4, 2**17
    case = make(device, N, V, D, r, dtype, torch.float32)
    plan = plan_head(
        N, V, D, dtype=dtype, adapter_rank=r, adapter_grad="B" in needs, workspace_bytes=budget
    )
    assert plan.workspace_bytes <= budget
    with Allocations(case) as seen:
        run("chunked", case, needs=needs, plan=plan)
    # hidden in float32 is the largest that may be; the head and its gradient are V·D elements.
    assert seen.largest <= max(budget, N * D * 4) < V * D * dtype.itemsize


def test_autocast_casts_the_adapter_as_linear_layers_do(device):
    hidden, weight, _, a, b, targets, upstream = make(device, 20, 50, 16, 3)
    a.requires_grad_()
    b.requires_grad_()
    kind = torch.device(device).type
    with torch.autocast(kind, dtype=torch.bfloat16):
        got = linear_token_logps(hidden, weight, targets, adapter=HeadAdapter(a, b))
    half = [x.bfloat16() for x in (hidden, weight, a, b)]
    want = linear_token_logps(half[0], half[1], targets, adapter=HeadAdapter(*half[2:]))
    assert torch.equal(got, want)
    got.backward(upstream)
    assert a.grad.dtype == b.grad.dtype == torch.float32 and a.grad.any() and b.grad.any()


A, B = torch.zeros(2, 4), torch.zeros(9, 2)


@pytest.mark.parametrize(
    ("adapter", "error", "text"),
    [
        ((A, B, 1.0), TypeError, "adapter: expected a HeadAdapter"),
        (HeadAdapter(None, B), TypeError, "adapter.a: expected a tensor"),
        (HeadAdapter(A, [1]), TypeError, "adapter.b: expected a tensor"),
        (HeadAdapter(A[0], B), ValueError, "adapter.a: expected 2 dim"),
        (HeadAdapter(A.T, B), ValueError, r"adapter.a: expected shape \[r, 4\]"),
        (HeadAdapter(A[:0], B[:, :0]), ValueError, "adapter.a: expected shape.*r above 0"),
        (HeadAdapter(A, B.T), ValueError, r"adapter.b: expected shape \(9, 2\)"),
        (HeadAdapter(A, B[:, :1]), ValueError, r"adapter.b: expected shape \(9, 2\)"),
        (HeadAdapter(A.long(), B), TypeError, "adapter.a: expected dtype"),
        (HeadAdapter(A.double(), B.double()), TypeError, "adapter.a: expected dtype"),
        (HeadAdapter(A, B.half()), TypeError, "adapter.b: expected dtype float32"),
        (HeadAdapter(A.to("meta"), B), ValueError, "adapter.a: expected a tensor on cpu"),
        (HeadAdapter(A, B.to("meta")), ValueError, "adapter.b: expected a tensor on cpu"),
        (HeadAdapter(A, B, float("inf")), ValueError, "adapter.scaling: expected a finite"),
        (HeadAdapter(A, B, float("nan")), ValueError, "adapter.scaling: expected a finite"),
        (HeadAdapter(A, B, "1"), TypeError, "adapter.scaling: expected a number"),
    ],
)
@pytest.mark.parametrize("kind", ["chunked", "reference"])
def test_bad_adapters_are_named(adapter, error, text, kind):
    with pytest.raises(error, match=text):
        linear_token_logps(
            torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(3).long(), adapter=adapter, impl=kind
        )


def test_the_plan_must_cover_the_adapters_gradient():
    hidden, weight, _, a, b, targets, _ = make("cpu", 5, 9, 4, 2)
    b.requires_grad_()
    with pytest.raises(ValueError, match="plan.*recompute"):
        linear_token_logps(
            hidden, weight, targets, adapter=HeadAdapter(a, b), plan=plan_head(5, 9, 4)
        )
