"""linear_token_logps: values and gradients against float64, at every kind of shape and argument."""

import dataclasses

import pytest
import torch
from prefalign.kernels.linear_token_logps import OUTPUTS, linear_token_logps
from prefalign.kernels.plan import plan_head
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN = {}
SCALED = {"logit_scale": 0.7, "softcap": 5.0, "temperature": 0.9}


@pytest.fixture(params=["chunked", "triton"])
def impl(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def make(device, N, V, D, dtype=torch.float32, *, bias=False, ignored=0.2, seed=0):
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=gen).to(dtype)
    weight = (torch.randn(V, D, generator=gen) / D**0.5 * 2).to(dtype)
    b = torch.randn(V, generator=gen).to(dtype) if bias else None
    targets = torch.randint(0, V, (N,), generator=gen)
    targets[torch.rand(N, generator=gen) < ignored] = -100
    grad = torch.randn(N, generator=gen)
    return [x if x is None else x.to(device) for x in (hidden, weight, targets, b, grad)]


def run(impl, hidden, weight, targets, bias, grad, needs="hwb", entropy=False, dtype=None, **kw):
    """Return every output and the gradients of what is in ``needs``."""
    given = dict(zip("hwb", (hidden, weight, bias), strict=True))
    leaves = {
        k: v if v is None else v.detach().to(dtype or v.dtype).requires_grad_(k in needs)
        for k, v in given.items()
    }
    out = linear_token_logps(
        leaves["h"], leaves["w"], targets, bias=leaves["b"], outputs=OUTPUTS, impl=impl, **kw
    )
    values = {k: v.detach() for k, v in out._asdict().items()}
    wanted = [leaves[k] for k in needs if leaves[k] is not None]
    if wanted:
        loss = (out.logps * grad).sum()
        if entropy:
            loss = loss + (out.entropy * grad.flip(0)).sum()
        grads = torch.autograd.grad(loss, wanted)
        values |= dict(zip([k for k in needs if leaves[k] is not None], grads, strict=True))
    return values


def assert_as_good_as_eager(ours, eager, exact):
    """Each error at most twice the eager one, in mean and in max, above a floor of float32's eps.

    The floor counts eps of a logit, which is what p = exp(z - m) carries whatever its own size.
    """
    logit = min(100.0, exact["lse"].abs().max().item()) if exact["lse"].numel() else 0.0
    for name, want in exact.items():
        want = want.double()
        assert not torch.isnan(ours[name]).any(), name
        err, ref = (ours[name].double() - want).abs(), (eager[name].double() - want).abs()
        if not want.numel():
            continue
        eps = torch.finfo(torch.float32).eps * (1 + max(logit, want.abs().max().item()))
        assert err.max() <= 2 * ref.max() + 2 * eps, (name, err.max(), ref.max())
        assert err.mean() <= 2 * ref.mean() + eps / 4, (name, err.mean(), ref.mean())


def check(impl, case, **kw):
    eager, exact = run("reference", *case, **kw), run("reference", *case, dtype=torch.float64, **kw)
    ours = run(impl, *case, **kw)
    assert torch.equal(ours.pop("is_top1"), eager.pop("is_top1")) or case[0].dtype.itemsize == 2
    exact.pop("is_top1")
    assert_as_good_as_eager(ours, eager, exact)
    dead = case[2] == -100
    for name in ("logps", "lse", "entropy", "mean_logits", "log_sum_sq_probs"):
        assert (ours[name][dead] == 0).all()
    if "h" in ours:
        assert (ours["h"][dead] == 0).all()
    return ours


SHAPES = [
    (1, 1, 1),
    (15, 31, 17),
    (16, 32, 16),
    (17, 33, 15),
    (37, 131, 23),
    (40, 67, 1),
    (33, 1, 5),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [PLAIN, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("needs", ["h", "hw"])
def test_shapes_that_straddle_blocks(impl, device, shape, options, needs):
    check(impl, make(device, *shape), needs=needs, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("options", [PLAIN, SCALED], ids=["plain", "scaled"])
def test_dtypes_with_bias_and_entropy(impl, device, dtype, entropy, options):
    check(impl, make(device, 37, 131, 23, dtype, bias=True), entropy=entropy, **options)


@pytest.mark.parametrize("needs", ["", "h", "w", "b", "hw", "hb", "wb"])
@pytest.mark.parametrize("entropy", [False, True])
def test_only_some_inputs_require_grad(impl, device, needs, entropy):
    ours = check(impl, make(device, 19, 70, 18, bias=True), needs=needs, entropy=entropy)
    assert set(needs) == set(ours) & set("hwb")


@pytest.mark.parametrize(
    ("dtype", "budget"),
    [(torch.float32, 20_000), (torch.bfloat16, 20_000), (torch.bfloat16, 100_000)],
    ids=["float32", "bfloat16, dHidden in a pass of its own", "bfloat16"],
)
def test_several_row_chunks_and_slices(impl, device, dtype, budget):
    case = make(device, 30, 100, 20, dtype, bias=True)
    for needs, entropy in (("h", False), ("hwb", True)):
        plan = plan_head(30, 100, 20, dtype=dtype, weight_grad="w" in needs, workspace_bytes=budget)
        plan = dataclasses.replace(plan, row_chunk=16, vocab_tile=64)
        check(impl, case, needs=needs, entropy=entropy, plan=plan, **SCALED)


@pytest.mark.parametrize("needs", ["h", "hw"])
@pytest.mark.parametrize("sure", [0.0, 30.0])
@pytest.mark.parametrize("options", [PLAIN, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabulary_and_confident_tokens(device, needs, sure, options, dtype):
    """From 4,096 entries on gradients come from 16-bit GEMMs; where p_y is near 1, J is small."""
    hidden, weight, targets, _, grad = make(device, 50, 4500, 40)
    rows = weight[targets.clamp(min=0)]
    hidden += sure * rows / rows.square().sum(1, keepdim=True)
    case = [hidden.to(dtype), weight.to(dtype), targets, None, grad]
    check("chunked", case, needs=needs, **options)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_shifted_logits(impl, device, shift):
    hidden, weight, targets, _, grad = make(device, 20, 70, 16)
    bias = torch.full((70,), shift, device=device)
    for needs, entropy in (("h", False), ("hw", True)):
        check(impl, [hidden, weight, targets, bias, grad], needs=needs, entropy=entropy)


def test_minus_infinity_logits(impl, device):
    hidden, weight, targets, _, grad = make(device, 20, 70, 16)
    bias = torch.zeros(70, device=device)
    bias[:40] = -torch.inf  # whole tiles of the interpreter's blocks
    targets = targets.where(targets == -100, 40 + targets % 30)
    got = run(impl, hidden, weight, targets, bias, grad, needs="h", entropy=True)
    cut = [hidden, weight[40:], targets.where(targets == -100, targets - 40), None, grad]
    want = run("reference", *cut, needs="h", entropy=True)
    for name in ("logps", "lse", "entropy", "log_sum_sq_probs", "h"):
        torch.testing.assert_close(got[name], want[name])


def test_batches_that_are_empty_or_ignored(impl, device):
    for N in (0, 5):
        case = make(device, N, 40, 8, bias=True, ignored=1.1)
        for needs in ("", "h", "hwb"):
            out = run(impl, *case, needs=needs, entropy=True)
            assert all((value == 0).all() for value in out.values())
    shaped = linear_token_logps(
        case[0].view(5, 1, 8)[:0], case[1], case[2].view(5, 1)[:0], impl=impl
    )
    assert shaped.shape == (0, 1)


def test_strided_and_expanded_hidden(impl, device):
    hidden, weight, targets, _, _ = make(device, 36, 50, 20, ignored=0)
    y = targets.view(4, 9)
    wide = torch.randn(4, 10, 24, device=device)
    for x in (
        hidden.T.contiguous().T.view(36, 20)[:9].expand(4, 9, 20),
        wide[:, 1:, 2:22],
        wide[:, :-1, ::2],
    ):
        w = weight[:, : x.shape[-1]]
        got = linear_token_logps(x, w, y, impl=impl)
        want = linear_token_logps(x.double(), w.double(), y, impl="reference")
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
        assert got.shape == y.shape


def test_ignored_rows_may_hold_nan(impl, device):
    hidden, weight, targets, bias, grad = make(device, 40, 60, 20, bias=True)
    dead = targets == -100
    assert dead.any()
    clean = run(impl, hidden, weight, targets, bias, grad, entropy=True)
    for needs in ("h", "hwb"):
        poisoned = hidden.masked_fill(dead[:, None], torch.nan)
        bad_grad = grad.masked_fill(dead, torch.nan)
        leaf, w = poisoned.requires_grad_(), weight.clone().requires_grad_("w" in needs)
        out = linear_token_logps(leaf, w, targets, bias=bias, impl=impl)
        assert torch.equal(out.detach(), clean["logps"])
        out.backward(bad_grad)
        assert leaf.grad.isfinite().all() and (w.grad is None or w.grad.isfinite().all())


@pytest.mark.parametrize("needs", ["h", "hwb"])
def test_second_backward_and_reruns_are_bit_identical(impl, device, needs):
    hidden, weight, targets, bias, grad = make(device, 40, 90, 20, bias=True)
    leaves = [
        x.requires_grad_(k in needs) for k, x in zip("hwb", (hidden, weight, bias), strict=True)
    ]
    wanted = [x for x in leaves if x.requires_grad]
    grads = []
    for _ in range(2):
        out = linear_token_logps(hidden, weight, targets, bias=bias, impl=impl)
        for _ in range(2):
            grads.append(torch.autograd.grad(out, wanted, grad, retain_graph=True))
    assert all(
        torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_logps_are_the_same_bits_with_and_without_a_gradient(impl, device, dtype):
    hidden, weight, targets, _, _ = make(device, 30, 100, 20, dtype)
    plan = dataclasses.replace(plan_head(30, 100, 20, dtype=dtype), row_chunk=24, vocab_tile=64)
    for options, chosen in ((PLAIN, None), (SCALED, plan)):
        kw = {"impl": impl, "plan": chosen, **options}
        with torch.no_grad():
            bare = linear_token_logps(hidden, weight, targets, **kw)
        frozen = linear_token_logps(hidden.clone().requires_grad_(), weight, targets, **kw)
        kw["plan"] = None if chosen is None else dataclasses.replace(plan, strategy="recompute")
        trained = linear_token_logps(hidden, weight.clone().requires_grad_(), targets, **kw)
        assert torch.equal(bare, frozen) and torch.equal(bare, trained)


def test_float64_is_float64(device):
    case = make(device, 20, 70, 16, torch.float64, bias=True)
    ours, want = (run(i, *case, entropy=True, **SCALED) for i in ("chunked", "reference"))
    for name, value in want.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-12)
    with pytest.raises((TypeError, ValueError), match="float64"):
        linear_token_logps(*case[:3], impl="triton")


@pytest.mark.parametrize("needs", ["", "h", "hw"])
def test_compiles_whole(impl, device, needs):
    case = make(device, 21, 70, 16, bias=True)

    def step(hidden, weight, bias, targets):
        out = linear_token_logps(
            hidden, weight, targets, bias=bias, outputs=("entropy",), impl=impl
        )
        return out.logps, out.entropy.detach()

    hidden, weight, targets, bias, grad = case
    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        h, w = (x.clone().requires_grad_(k in needs) for k, x in (("h", hidden), ("w", weight)))
        logps, entropy = fn(h, w, bias, targets)
        if needs:
            logps.backward(grad)
        results.append((logps.detach(), entropy, h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert (results[1][0][targets == -100] == 0).all()


@pytest.mark.parametrize("strategy", ["row_jacobian", "recompute"])
def test_opcheck(device, strategy):
    hidden, weight, targets, bias, _ = make(device, 5, 12, 4, bias=True)
    hidden.requires_grad_()
    weight.requires_grad_(strategy == "recompute")
    scalars = (1.0, None, 1.0, -100, "entropy,is_top1", strategy, "chunked", 0, 0, 0)
    torch.library.opcheck(
        torch.ops.prefalign.linear_token_logps.default,
        (hidden, weight, targets, bias, *scalars),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


class Allocations(TorchDispatchMode):
    """Largest element count of any tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_the_logits_is_allocated(device, dtype, weight_grad):
    N, V, D, budget = 300, 900, 16, 2**18
    hidden, weight, targets, _, grad = make(device, N, V, D, dtype)
    hidden.requires_grad_()
    weight.requires_grad_(weight_grad)
    plan = plan_head(N, V, D, dtype=dtype, weight_grad=weight_grad, workspace_bytes=budget)
    assert N * V * 4 > 3 * budget >= 3 * plan.workspace_bytes
    with Allocations() as seen:
        out = linear_token_logps(
            hidden, weight, targets, plan=plan, outputs=OUTPUTS, impl="chunked"
        )
        out.logps.backward(grad)
    assert seen.largest <= budget


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"targets": torch.tensor([0, 9, 1])}, ValueError, "targets.*9"),
        ({"targets": torch.tensor([0, -1, 1])}, ValueError, "targets.*-1"),
        ({"targets": torch.zeros(3)}, TypeError, "targets"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, ValueError, "targets"),
        ({"weight": torch.zeros(9, 5)}, ValueError, "weight"),
        ({"weight": torch.zeros(9, 4, dtype=torch.bfloat16)}, TypeError, "weight"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.long)}, TypeError, "hidden"),
        ({"bias": torch.zeros(8)}, ValueError, "bias"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"outputs": ("logits",)}, ValueError, "outputs"),
        ({"impl": "fast"}, ValueError, "impl"),
        ({"plan": plan_head(3, 8, 4)}, ValueError, "plan"),
        ({"plan": 3}, TypeError, "plan"),
        ({"ignore_index": None}, TypeError, "ignore_index"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    given = {
        "hidden": torch.zeros(3, 4), "weight": torch.zeros(9, 4), "targets": torch.zeros(3).long()
    } | {"impl": "chunked"}  # fmt: skip
    with pytest.raises(error, match=text):
        linear_token_logps(**(given | change))


def test_plan_must_cover_what_requires_grad():
    hidden, weight, targets, _, _ = make("cpu", 5, 9, 4)
    plan = plan_head(5, 9, 4)
    weight.requires_grad_()
    with pytest.raises(ValueError, match="plan.*recompute"):
        linear_token_logps(hidden, weight, targets, plan=plan)


def test_autocast_casts_as_a_linear_layer_does():
    hidden, weight, targets, _, _ = make("cpu", 20, 50, 16)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_token_logps(hidden, weight, targets)
    want = linear_token_logps(hidden.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(got, want)
    got.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_global_matmul_precision_is_left_alone():
    before = torch.get_float32_matmul_precision()
    linear_token_logps(*make("cpu", 20, 50, 16, torch.bfloat16)[:3], impl="chunked")
    assert torch.get_float32_matmul_precision() == before


def test_policy_equal_to_reference_gives_log_two(impl, device):
    hidden, weight, targets, _, _ = make(device, 40, 70, 16)
    policy = linear_token_logps(hidden.clone().requires_grad_(), weight, targets, impl=impl)
    with torch.no_grad():
        reference = linear_token_logps(hidden, weight, targets, impl=impl)
    margin = (policy - reference).view(2, 20).sum(1)
    loss = -torch.nn.functional.logsigmoid(margin[0] - margin[1])
    assert loss.item() == torch.tensor(2.0).log().item()


@pytest.mark.parametrize("D", [15, 64, 300])
def test_of_equal_logits_each_is_top1(impl, device, D):
    # The target's logit has a sum of its own, which rounds otherwise than a matrix product's.
    hidden = torch.randn(17, D, device=device)
    weight = torch.randn(1, D, device=device).expand(5, D)
    targets = torch.arange(17, device=device) % 5
    found = linear_token_logps(hidden, weight, targets, outputs=["is_top1"], impl=impl)
    assert found.is_top1.all()
