"""The ops from packed pairs to losses against float64 at random, as ``test_fuzz.py`` has the rest.

``PREFALIGN_FUZZ_EXAMPLES`` and ``PREFALIGN_FUZZ_SEED`` mean what they mean there. A failure prints
a case; put it into ``FOUND`` and it is checked for ever.
"""

import dataclasses
import math
from unittest import mock

import hypothesis
import pytest
import torch
from fuzzing import (
    DEVICE,
    LONG,
    SEED,
    assert_same,
    contract,
    examples,
    largest,
    moved,
    same,
    spoil,
)
from hypothesis import given
from loss_strategies import SIGMOID, TokensCase, WholeCase, tokens_cases, whole_cases
from pair_losses import LOPSIDED
from prefalign.kernels import _loss_heads_triton, pair_plan
from prefalign.kernels.linear_preference_loss import linear_preference_loss
from prefalign.kernels.linear_token_logps import linear_token_logps
from prefalign.kernels.loss_heads import pair_loss_head
from prefalign.kernels.losses import LOSSES
from prefalign.kernels.pair_plan import plan_pairs
from prefalign.kernels.plan import plan_head
from prefalign.kernels.sequence_logps import sequence_logps
from strategies import HeadCase
from tolerance import EPS

FLAGS = ("is_noisy", "counts")


@pytest.fixture(scope="module", autouse=True)
def announce(request):
    if LONG:
        line = f"\nfuzzing losses: {LONG} cases, PREFALIGN_FUZZ_SEED={SEED}"
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(line)


@pytest.fixture(scope="module", autouse=True)
def lopsided():
    with mock.patch.dict(LOSSES, {"lopsided": LOPSIDED}):
        yield


def loss_terms(case, unit, total):
    """Return the sizes of a loss, of a slope, and of what the sums' rounding turns a slope by.

    ``unit`` is the size of a token's terms, ``total`` that of a margin's, both in eps.
    """
    beta = case.beta
    if case.loss == "lopsided":  # of means
        slope = (beta + 1) * (beta * unit + unit + 1)
        return (beta * unit + 1) ** 2 + beta * unit**2 + unit, slope, slope
    if case.loss == "ipo":  # of means too
        error = 2 * unit + 1 / beta
        return error**2, 2 * error, 2 * error
    return 1 + beta * total, beta, beta * beta * total


def unsure_pairs(case, confidences, total):
    """Return the pairs whose confidence is within rounding of the threshold."""
    if case.loss != "noise_aware":
        return torch.zeros(case.pairs, dtype=torch.bool, device=DEVICE)
    return (confidences - case.threshold).abs() <= 8 * EPS * (1 + case.beta * total)


def of_rows(pairs, cu, rows):
    """Spread a value of each pair over the rows of its two sequences."""
    return pairs.repeat_interleave(2).repeat_interleave(cu.diff().long(), output_size=rows)


# pair_loss_head


def run_tokens(case, tensors, impl, dtype=None):
    """Return every output by name, and the gradient under "grad"."""
    cast = {
        name: x.detach().to(dtype) if dtype and x is not None and x.is_floating_point() else x
        for name, x in tensors.items()
    }
    upstream = cast.pop("upstream")
    leaf = cast.pop("token_logps").detach().requires_grad_(case.needs)
    out = pair_loss_head(leaf, **cast, **case.options(DEVICE), impl=impl)
    found = {name: x.detach() for name, x in out._asdict().items() if x is not None}
    if not case.needs:
        assert not out.losses.requires_grad
        return found
    upstream = upstream.to(out.losses.dtype)
    (grad,) = torch.autograd.grad(out.losses, leaf, upstream, retain_graph=True)
    (again,) = torch.autograd.grad(out.losses, leaf, upstream)
    assert same(grad, again), "second backward"
    assert grad.dtype == leaf.dtype
    return found | {"grad": grad}


def check_tokens(case):
    """Check the op with blocks so small that a sequence has several."""
    with mock.patch.object(_loss_heads_triton, "BLOCK_T", case.block):
        check_tokens_in_blocks(case)


def check_tokens_in_blocks(case):
    clean = {name: moved(x) for name, x in case.build().items()}
    dirty, mask, cu = dict(clean), clean["mask"], clean["cu_seqlens"]
    names = ("token_logps", "ref_token_logps", "extrapolated_token_logps")
    if mask is not None:
        dead = mask == 0
        for name in names:
            if clean[name] is not None:
                if case.poison:
                    dirty[name] = moved(case.build()[name])
                    spoil(dirty[name], dead)
                clean[name] = clean[name].masked_fill(dead, 0)
    before = {name: None if x is None else x.clone() for name, x in dirty.items()}
    actual = run_tokens(case, dirty, case.impl)
    assert_same(before, dirty, "written to")
    assert_same(run_tokens(case, dirty, case.impl), actual, "a second run")
    bare = run_tokens(dataclasses.replace(case, needs=False), dirty, case.impl)
    assert_same({name: actual[name] for name in bare}, bare, "with and without a gradient")

    exact = run_tokens(case, clean, "reference", torch.float64)
    used = [x for name, x in clean.items() if x is not None and name != "upstream"]
    wide = torch.float64 if any(x.dtype == torch.float64 for x in used) else torch.float32
    eager = run_tokens(case, clean, "reference", wide)
    given = [clean[name] for name in (*names, "ref_logps") if clean[name] is not None]
    unit = 1 + 2 * max(map(largest, given), default=0.0)
    finite = [x.double().abs().nan_to_num(0, 0, 0) for x in given]
    sums = [] if case.tokens else [finite.pop()]
    sums += [sequence_logps(x, cu_seqlens=cu, impl="chunked").sums for x in finite]
    total = 1 + 2 * sum(map(largest, sums))
    heavy = 1.0 if case.weights is None else largest(clean["weights"])
    size, slope, turn = loss_terms(case, unit, total)
    terms = {"losses": size * heavy, "confidences": case.beta * total, "margins": total}
    terms |= {"sums": total, "grad": largest(clean["upstream"]) * (slope + turn) * heavy}
    unsure = unsure_pairs(case, exact.get("confidences"), total)
    for name, value in actual.items():
        wanted, ours = exact[name], eager[name]
        if name == "counts":
            assert torch.equal(value, wanted), name
            continue
        if name == "grad":
            keep = ~of_rows(unsure, cu, value.numel())
            assert mask is None or (value[mask == 0] == 0).all(), "a masked token has a gradient"
        else:
            assert name == "is_noisy" or value.dtype == wide, name
            keep = ~unsure if name in ("losses", "is_noisy") else ...
        value, ours, wanted = value[keep], ours[keep], wanted[keep]
        if name == "is_noisy":
            assert torch.equal(value, wanted), name
        else:
            inside = terms.get(name, case.beta * total)
            contract(value, ours, wanted.double(), name, inside)
    if case.same and case.tokens and case.hole is None and len({x.dtype for x in given}) == 1:
        laid = {x for x in case.layouts if x == "expanded"}
        if not laid and case.weights is None and case.loss in SIGMOID:
            assert (actual["losses"] == torch.tensor(2.0, dtype=wide).log()).all(), "not ln 2"


@examples(0.5)
@given(tokens_cases())
def test_pair_loss_head(case):
    check_tokens(case)


# linear_preference_loss


def plan_of(case, rows):
    head = case.head
    if head.workspace is None:
        return None
    plan = plan_head(
        rows, head.V, head.D, dtype=head.dtype, hidden_grad="h" in head.needs,
        weight_grad="w" in head.needs or ("b" in head.needs and head.bias is not None),
        workspace_bytes=head.workspace, device=DEVICE,
    )  # fmt: skip
    change = {"row_chunk": head.rows, "vocab_tile": head.tile}
    change = {name: value for name, value in change.items() if value is not None}
    if head.recompute and plan.strategy == "row_jacobian":
        change["strategy"] = "recompute"
    return dataclasses.replace(plan, **change)


def run_whole(case, tensors, impl, dtype=None):
    """Return every output by name, and the gradients under "h", "w" and "b"."""
    names = {"h": "hidden", "w": "weight", "b": "bias"}
    cast = {
        name: x.detach().to(dtype) if dtype and x is not None and x.is_floating_point() else x
        for name, x in tensors.items()
        if name != "live"
    }
    upstream = cast.pop("upstream")
    needs = [letter for letter in case.head.needs if cast[names[letter]] is not None]
    for letter in needs:
        cast[names[letter]] = cast[names[letter]].detach().requires_grad_()
    out = linear_preference_loss(
        **cast, **case.head.options, **case.options(DEVICE), extrapolation=case.head.extrapolation,
        reduction=case.reduction, impl=impl,
        plan=None if impl == "reference" else plan_of(case, sum(case.lengths)),
    )  # fmt: skip
    found = {name: x.detach() for name, x in out._asdict().items()}
    if not needs:
        assert not out.losses.requires_grad
        return found
    upstream = upstream.to(out.losses.dtype)
    upstream = upstream.sum() if case.reduction == "mean" else upstream
    leaves = [cast[names[letter]] for letter in needs]
    first = torch.autograd.grad(out.losses, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(out.losses, leaves, upstream)
    assert all(same(a, b) for a, b in zip(first, second, strict=True)), "second backward"
    assert all(a.dtype == leaf.dtype for a, leaf in zip(first, leaves, strict=True))
    return found | dict(zip(needs, first, strict=True))


def pair_strategy(case, tensors):
    """Return the plan of 3F's chunks where the op has to ask for one, else None."""
    trained = set(case.head.needs) & ({"w"} if tensors["bias"] is None else {"w", "b"})
    chunked = case.reduction == "mean" and case.head.impl == "chunked" and DEVICE == "cpu"
    half = case.head.dtype.itemsize == 2
    if not trained or not chunked or half or case.loss == "noise_aware":
        return None
    live, cu = tensors["live"], tensors["cu_seqlens"].tolist()
    rows = [int(live[a:b].sum()) for a, b in zip(cu[:-2:2], cu[2::2], strict=True)]
    plan = plan_of(case, sum(case.lengths))
    return plan_pairs(
        rows, case.head.V, case.head.D, dtype=case.head.dtype,
        workspace_bytes=None if plan is None else plan.budget_bytes,
    )  # fmt: skip


def whole_terms(case, tensors):
    """Return the size of the terms inside each output and gradient."""
    wide = {
        name: x if x is None or not x.is_floating_point() else x.double()
        for name, x in tensors.items()
    }
    head = case.head

    def logits(hidden, weight, bias):
        if hidden is None:
            return 0.0
        size = hidden.abs() @ (wide["weight"] if weight is None else weight).T.abs()
        if bias is not None:
            size = size + bias.abs().nan_to_num(0, 0, 0)
        return largest(size) * abs(head.logit_scale) / head.temperature

    capped = 0.0 if head.softcap is None else head.softcap / head.temperature
    own = wide["ref_bias"] if wide["ref_weight"] is not None else wide["bias"]
    own = own if wide["ref_bias"] is None else wide["ref_bias"]
    unit = 1 + capped + logits(wide["hidden"], wide["weight"], wide["bias"]) + math.log(head.V)
    other = logits(wide["ref_hidden"], wide["ref_weight"], own)
    unit_all = (1 + 2 * abs(head.extrapolation)) * (unit + other)
    sums = [wide["ref_logps"]] if not case.tokens else []
    for which in ("", "ref_")[: 1 + case.tokens]:
        hidden, weight, bias = (wide[which + name] for name in ("hidden", "weight", "bias"))
        shared = which and weight is None
        weight, bias = (wide["weight"] if shared else weight), (
            wide["bias"] if shared and bias is None else bias
        )  # fmt: skip
        logps = linear_token_logps(
            hidden, weight, wide["targets"], bias=bias, impl="reference", **head.options
        )
        sums.append(sequence_logps(logps, cu_seqlens=wide["cu_seqlens"], impl="chunked").sums)
    # Errors of a GEMM are independent from row to row; those of a sum grow with its size.
    total = 1 + 2 * (unit_all * max(case.lengths, default=0) ** 0.5 + sum(map(largest, sums)))
    heavy = 1.0 if case.weights is None else largest(wide["weights"])
    size, slope, turn = loss_terms(case, unit_all + total / max(1, *case.lengths, 0), total)
    upstream = largest(wide["upstream"]) if case.reduction == "none" else (
        abs(wide["upstream"].sum().item()) / max(1, case.pairs)
    )  # fmt: skip
    scale = abs(head.logit_scale) / head.temperature
    by_row = upstream * heavy * (slope * (1 + unit) + turn) * scale
    columns = wide["hidden"].abs().sum(0)
    kept = upstream * slope * heavy * 2**-25 / EPS if head.dtype == torch.float16 else 0.0
    terms = {
        "losses": size * heavy,
        "confidences": case.beta * total,
        "h": by_row * largest(wide["weight"]) * (1 + head.V**0.5 / 8) + kept,
        "w": by_row * largest(columns),
        "b": by_row * sum(case.lengths),
    }
    return terms, total


def check_whole(case):
    """Check the op; the tile of 3F is the case's, its least number of rows is the library's."""
    with mock.patch.object(pair_plan, "TILE", case.pair_tile):
        check_whole_in_tiles(case)


def check_whole_in_tiles(case):
    clean = {name: moved(x) for name, x in case.build().items()}
    dirty, live, cu = dict(clean), clean["live"], clean["cu_seqlens"]
    for name in ("hidden", "ref_hidden"):
        if clean[name] is not None:
            if case.head.poison:
                dirty[name] = moved(case.build()[name])
                spoil(dirty[name], ~live)
            clean[name] = clean[name].masked_fill(~live[:, None], 0)
    plan = pair_strategy(case, clean)
    before = {name: None if x is None else x.clone() for name, x in dirty.items()}
    actual = run_whole(case, dirty, case.head.impl)
    assert_same(before, dirty, "written to")
    assert_same(run_whole(case, dirty, case.head.impl), actual, "a second run")
    if plan is None or plan.strategy == "recompute":
        frozen = dataclasses.replace(case, head=dataclasses.replace(case.head, needs=""))
        bare = run_whole(frozen, dirty, case.head.impl)
        assert_same({name: actual[name] for name in bare}, bare, "with and without a gradient")

    exact = run_whole(case, clean, "reference", torch.float64)
    eager = run_whole(case, clean, "reference")
    if case.head.dtype.itemsize == 2:  # as exact as a float32 head, not as a 16-bit one
        single = run_whole(case, clean, "reference", torch.float32)
        eager |= {name: x for name, x in single.items() if name not in "hwb"}
    terms, total = whole_terms(case, clean)
    unsure = unsure_pairs(case, exact.get("confidences"), total)
    wide = torch.float64 if case.head.dtype == torch.float64 else torch.float32
    for name, value in actual.items():
        wanted, ours, keep = exact[name], eager[name], ...
        if name == "h":
            assert (value[~live] == 0).all(), "a row without a target has a gradient"
            keep = ~of_rows(unsure, cu, value.shape[0])
        elif name in ("losses", "is_noisy") and value.ndim:
            keep = ~unsure
        elif name in ("losses", "w", "b") and unsure.any():
            continue
        value, ours, wanted = value[keep], ours[keep], wanted[keep]
        if name == "is_noisy":
            assert torch.equal(value, wanted), name
            continue
        assert name in "hwb" or value.dtype == wide, name
        contract(value, ours, wanted.double(), name, terms.get(name, case.beta * total))
    one_head = not case.head.two_heads and not case.head.ref_bias
    if case.head.same and case.tokens and one_head and "expanded" not in case.head.layouts:
        assert (actual["chosen_rewards"] == 0).all() and (actual["rejected_rewards"] == 0).all()
        if case.weights is None and case.loss in SIGMOID and case.reduction == "none":
            assert (actual["losses"] == torch.tensor(2.0, dtype=wide).log()).all(), "not ln 2"


@examples(0.5)
@given(whole_cases())
def test_linear_preference_loss(case):
    plan = pair_strategy(case, case.build())
    hypothesis.event("no chunks" if plan is None else f"{plan.strategy}, {len(plan.chunks)} chunks")
    check_whole(case)


# What was found, minimised, and paths that must be among the cases.

FOUND = {
    "one pair of empty sequences": (check_tokens, TokensCase(lengths=(0, 0))),
}


@pytest.mark.parametrize("what", FOUND)
def test_found_before(what):
    check, case = FOUND[what]
    check(case)


@pytest.mark.parametrize(("workspace", "chunks"), [(None, 1), (110_000, 2)])
@pytest.mark.parametrize("loss", ["sigmoid", "lopsided"])
def test_chunks_of_whole_pairs(loss, workspace, chunks):
    head = HeadCase(
        lead=(880,), V=23, D=5, needs="hwb", bias="normal", ignored=0.1, softcap=5.0,
        extrapolation=0.0, workspace=workspace,
    )  # fmt: skip
    case = WholeCase(
        lengths=(110,) * 8, head=head, loss=loss, reduction="mean", weights="normal", pair_tile=16
    )
    plan = pair_strategy(case, case.build())
    assert DEVICE == "cuda" or (plan.strategy, len(plan.chunks)) == ("whole_pairs", chunks)
    check_whole(case)


# Invalid arguments: each is refused by name, whatever the rest.


def small_calls():
    """Return {call: (function, valid keyword arguments)}."""
    p, cu = torch.randn(6), torch.tensor([0, 1, 3, 4, 6])
    packed = {"token_logps": p, "cu_seqlens": cu, "mask": p > 0, "weights": torch.rand(2)}
    packed |= {"beta": 0.1}
    noisy = {"alpha": 0.1, "threshold": 0.5}
    beyond = {"extrapolated_token_logps": p - 1, "loss": "noise_aware", **noisy}
    hidden, weight, bias = torch.randn(6, 4), torch.randn(5, 4), torch.randn(5)
    head = {"hidden": hidden, "weight": weight, "targets": torch.zeros(6).long(), "bias": bias}
    head |= {"cu_seqlens": cu, "logit_scale": 1.0, "softcap": 3.0, "temperature": 1.0}
    head |= {"ignore_index": -100, "beta": 0.1, "weights": torch.rand(2), "reduction": "mean"}
    head |= {"plan": plan_head(6, 5, 4)}
    models = {"ref_hidden": hidden, "ref_weight": weight, "ref_bias": bias, "extrapolation": 0.5}
    smoothed = {"loss": "sigmoid", "label_smoothing": 0.1}
    return {
        "sums": (pair_loss_head, {**packed, "ref_logps": torch.randn(4), **smoothed}),
        "tokens": (pair_loss_head, {**packed, "ref_token_logps": p - 2, **beyond}),
        "linear": (linear_preference_loss, {**head, "ref_logps": torch.randn(4), **smoothed}),
        "models": (linear_preference_loss, {**head, **models, "loss": "noise_aware", **noisy}),
        "plan": (plan_pairs, {"lengths": [3, 3], "V": 5, "D": 4, "workspace_bytes": 100}),
    }


def bad_values(name, good):
    """Yield what must be refused where ``good`` is taken."""
    if isinstance(good, torch.Tensor):
        yield from (3, "x", [1.0], good.tolist(), torch.float32, good.to(torch.complex64))
        yield from (good.to("meta"), good.to_sparse(), good[None], torch.cat([good, good]))
        if good.is_floating_point():
            yield from (good.long(), good > 0, good.to(torch.float8_e4m3fn))
        elif good.dtype == torch.long:
            yield from (good.float(), good > 0, good.to(torch.uint8), good + 7, good - 1)
        return
    numbers = ("x", math.nan, math.inf, -math.inf, True, 10**400, 1j, [1.0])
    if isinstance(good, float):
        yield from numbers
        if name not in ("logit_scale", "extrapolation"):
            yield -1.0
        if name not in ("softcap", "alpha"):
            yield None
        return
    yield from {
        "ignore_index": (None, "x", 1.5, True, 2**70, torch.tensor(1)),
        "plan": (3, "x", plan_head(6, 6, 4), dataclasses.replace(plan_head(6, 5, 4), row_chunk=0)),
        "lengths": (3, None, "ab", [1.0], [-1], [True], ["x"], {1: 2}, torch.tensor([1])),
        "workspace_bytes": (0, -1, *numbers[:-4], *numbers[-3:]),
    }.get(name, (0, -1, "x", math.nan, True) if isinstance(good, int) else BAD_NAMES)


BAD_NAMES = ("", None, 3, [], {}, b"mean")
BLAMED = {
    "hidden": ("hidden", "weight", "targets", "ref_hidden"),
    "weight": ("weight", "bias", "plan"),
    "token_logps": ("token_logps", "cu_seqlens", "mask", "ref_token_logps"),
    "cu_seqlens": ("cu_seqlens", "ref_logps", "weights"),
    "ref_logps": ("ref_logps",),
}
BAD_CALLS = [
    (call, name, number)
    for call, (_, arguments) in small_calls().items()
    for name, good in arguments.items()
    for number, _ in enumerate(bad_values(name, good))
]


@pytest.mark.parametrize(
    ("call", "impl"),
    [("plan", None)]
    + [
        (call, impl)
        for call in small_calls()
        if call != "plan"
        for impl in ("chunked", "triton", "reference")
    ],
)
def test_every_bad_argument_is_refused_by_name(call, impl):
    for other, name, number in BAD_CALLS:
        if other != call:
            continue
        function, arguments = small_calls()[call]
        value = list(bad_values(name, arguments[name]))[number]
        arguments |= {"impl": impl} if impl else {}
        with pytest.raises((TypeError, ValueError)) as raised:
            function(**(arguments | {name: value}))
            pytest.fail(f"{call}({name}={value!r}) was taken")
        text = str(raised.value)
        assert text.startswith(BLAMED.get(name, (name,))), f"{call}({name}={value!r}): {text}"
