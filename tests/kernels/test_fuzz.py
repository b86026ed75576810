"""Every op against float64 at random: shapes, strides, dtypes, scales, masks, flags, budgets.

The default run is short and the same every time. ``PREFALIGN_FUZZ_EXAMPLES=2000`` runs about that
many cases in all, from a random seed that is printed (``PREFALIGN_FUZZ_SEED`` repeats it). A
failure prints a case; put it into ``FOUND`` and it is checked for ever.
"""

import dataclasses
import math
from unittest import mock

import pytest
import torch
from fuzzing import DEVICE, LONG, SEED, assert_same, contract, examples, moved, same, spoil
from hypothesis import given
from hypothesis import strategies as st
from prefalign.kernels import (
    _token_logps_chunked,
    configs,
)
from prefalign.kernels import (
    pairwise_preference_logits as pairwise_page,
)
from prefalign.kernels import (
    sequence_logps as sequence_page,
)
from prefalign.kernels.linear_token_logps import linear_token_logps
from prefalign.kernels.linear_token_logps_triple import linear_token_logps_triple
from prefalign.kernels.noise_aware_loss import noise_aware_loss
from prefalign.kernels.pairwise_preference_logits import pairwise_preference_logits
from prefalign.kernels.plan import plan_head
from prefalign.kernels.preference_loss import preference_loss
from prefalign.kernels.sequence_logps import sequence_logps
from prefalign.kernels.token_logps import token_logps
from strategies import (
    HeadCase,
    LogitsCase,
    PairsCase,
    SequenceCase,
    groups_cases,
    head_cases,
    logits_cases,
    pairs_cases,
    sequence_cases,
)
from tolerance import EPS


@pytest.fixture(scope="module", autouse=True)
def announce(request):
    if LONG:
        line = f"\nfuzzing: {LONG} cases, PREFALIGN_FUZZ_SEED={SEED}"
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(line)


# What every check shares.


def check_top1(found, z, targets, live, what, slack):
    """Check ``is_top1`` where the target is no nearer to the largest logit than rounding goes."""
    at = torch.where(live, targets, 0).long()[..., None]
    gap = (z.amax(-1) - z.gather(-1, at)[..., 0]).nan_to_num(0, math.inf, 0)
    sure = live & ((gap == 0) | (gap > 8 * EPS * slack))
    assert torch.equal(found[sure], (gap == 0)[sure]), what
    assert not found[~live].any(), what


def largest(tensor):
    """Return the largest finite size of an element, 0 without one."""
    finite = tensor[tensor.isfinite()].abs()
    return finite.amax().item() if finite.numel() else 0.0


# token_logps


def run_tokens(case, logits, targets, g, e, impl):
    """Return outputs by name and, under "grad", the gradient; a second backward must repeat it."""
    leaf = logits.detach().requires_grad_()
    options = {
        "temperature": case.temperature, "softcap": case.softcap, "ignore_index": case.ignore_index,
        "outputs": case.outputs, "impl": impl,
    }  # fmt: skip
    found = token_logps(leaf, targets, **options)
    found = found._asdict() if case.outputs else {"logps": found}
    found = {name: value for name, value in found.items() if value is not None}
    assert set(found) == {"logps", *case.outputs}
    roots, grads = zip(
        *((found[name], grad.to(found[name].dtype))
          for name, grad in (("logps", g), ("entropy", e))
          if case.roots in (name, "both")), strict=True,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(roots, leaf, grads, retain_graph=True)
    (again,) = torch.autograd.grad(roots, leaf, grads)
    assert same(grad, again), "second backward"
    assert grad.dtype == logits.dtype
    return {name: value.detach() for name, value in found.items()} | {"grad": grad}


def check_tokens(case):
    """Check the op with blocks and chunks so small that a row has several, and rows too."""
    row = configs.TABLE["interpreter"]._replace(token_block=case.block)
    with (
        mock.patch.dict(configs.TABLE, {"interpreter": row}),
        mock.patch.object(_token_logps_chunked, "CHUNK_BYTES", case.block * case.V),
    ):
        check_tokens_in_chunks(case)


def check_tokens_in_chunks(case):
    logits, targets, live, g, e = map(moved, case.build())
    clean = logits.clone().masked_fill_(~live[..., None], 0)
    clean_g, clean_e = (x.masked_fill(~live, 0) for x in (g, e))
    if case.poison:
        spoil(logits, ~live)
        spoil(g, ~live)
        spoil(e, ~live)
    before = [x.clone() for x in (logits, targets, g, e)]
    actual = run_tokens(case, logits, targets, g, e, case.impl)
    assert all(same(a, b) for a, b in zip(before, (logits, targets, g, e), strict=True)), "written"
    assert_same(run_tokens(case, logits, targets, g, e, case.impl), actual, "a second run")
    with torch.no_grad():
        bare = token_logps(
            logits, targets, temperature=case.temperature, softcap=case.softcap,
            ignore_index=case.ignore_index, impl=case.impl,
        )  # fmt: skip
    assert same(bare, actual["logps"]), "logps with and without a gradient"

    exact = run_tokens(case, clean.double(), targets, clean_g, clean_e, "reference")
    wide = clean if clean.dtype == torch.float64 else clean.float()
    eager = run_tokens(case, wide, targets, clean_g, clean_e, "reference")
    eager["grad"] = run_tokens(case, clean, targets, clean_g, clean_e, "reference")["grad"]
    z = clean.double()
    z = (z if case.softcap is None else case.softcap * (z / case.softcap).tanh()) / case.temperature
    capped = 0.0 if case.softcap is None else case.softcap / case.temperature
    size = largest(z)
    upstream = largest(torch.stack((clean_g, clean_e)))
    unit = 1 + capped
    terms = {"lse": size + unit, "mean_logits": size, "entropy": unit + math.log(case.V)}
    terms |= {"grad": upstream * unit / case.temperature}
    for name, value in actual.items():
        if name == "is_top1":
            check_top1(value, z, targets, live, name, capped)
            continue
        wanted = torch.float64 if case.dtype == torch.float64 else torch.float32
        assert value.dtype == (case.dtype if name == "grad" else wanted), name
        assert (value[~live] == 0).all(), f"{name}: not 0 without a target"
        contract(value, eager[name], exact[name].double(), name, terms.get(name, unit))


@examples(0.27)
@given(logits_cases())
def test_token_logps(case):
    check_tokens(case)


# linear_token_logps and its triple


def plan_of(case, rows):
    if case.workspace is None:
        return None
    plan = plan_head(
        rows, case.V, case.D, dtype=case.dtype, hidden_grad="h" in case.needs,
        weight_grad="w" in case.needs or ("b" in case.needs and case.bias is not None),
        entropy_grad=case.roots != "logps", workspace_bytes=case.workspace, device=DEVICE,
    )  # fmt: skip
    change = {"row_chunk": case.rows, "vocab_tile": case.tile}
    change = {name: value for name, value in change.items() if value is not None}
    if case.recompute and plan.strategy == "row_jacobian":
        change["strategy"] = "recompute"
    return dataclasses.replace(plan, **change)


def run_head(case, tensors, impl, triple=False, dtype=None):
    """Return every output by name, and the gradients under "h", "w" and "b"."""
    names = {"h": "hidden", "w": "weight", "b": "bias"}
    given = {
        name: None if value is None else value.detach().to(dtype or value.dtype)
        for name, value in tensors.items()
        if name not in ("targets", "live", "g", "e")
    }
    needs = [letter for letter in case.needs if given[names[letter]] is not None]
    for letter in needs:
        given[names[letter]] = given[names[letter]].requires_grad_()
    plan = plan_of(case, tensors["targets"].numel()) if impl != "reference" else None
    options = case.options | {"impl": impl, "plan": plan}
    if triple:
        found = linear_token_logps_triple(targets=tensors["targets"], **given, **options,
                                          extrapolation=case.extrapolation)._asdict()  # fmt: skip
        roots = [found["policy"]]
        assert not found["reference"].requires_grad and not found["extrapolated"].requires_grad
    else:
        given = {name: given[name] for name in ("hidden", "weight", "bias")}
        found = linear_token_logps(
            targets=tensors["targets"], outputs=case.outputs, **given, **options
        )
        found = found._asdict() if case.outputs else {"logps": found}
        found = {name: value for name, value in found.items() if value is not None}
        assert set(found) == {"logps", *case.outputs}
        wanted = {"logps": ["logps"], "entropy": ["entropy"], "both": ["logps", "entropy"]}
        roots = [found[name] for name in wanted[case.roots]]
    result = {name: value.detach() for name, value in found.items()}
    if not needs:
        assert not any(root.requires_grad for root in roots)
        return result
    grads = {"logps": "g", "entropy": "e", "both": "ge"}[case.roots]
    grads = [tensors[name].to(roots[0].dtype) for name in grads]
    leaves = [given[names[letter]] for letter in needs]
    first = torch.autograd.grad(roots, leaves, grads, retain_graph=True)
    second = torch.autograd.grad(roots, leaves, grads)
    assert all(same(a, b) for a, b in zip(first, second, strict=True)), "second backward"
    assert all(a.dtype == leaf.dtype for a, leaf in zip(first, leaves, strict=True))
    return result | dict(zip(needs, first, strict=True))


def head_terms(case, tensors, triple):
    """Return the size of the terms inside each output and gradient, and the logits, in float64."""
    wide = {
        name: value if value is None or not value.is_floating_point() else value.double()
        for name, value in tensors.items()
    }

    def one(hidden, weight, bias):
        z = hidden @ weight.T
        size = hidden.abs() @ weight.T.abs()
        if bias is not None:
            z, size = z + bias, size + bias.abs().nan_to_num(0, 0, 0)
        z = z * case.logit_scale
        if case.softcap is not None:
            z = case.softcap * (z / case.softcap).tanh()
        return z / case.temperature, largest(size) * abs(case.logit_scale) / case.temperature

    capped = 0.0 if case.softcap is None else case.softcap / case.temperature
    z, size = one(wide["hidden"], wide["weight"], wide["bias"])
    unit = 1 + size + capped
    scale = abs(case.logit_scale) / case.temperature
    upstream = largest(torch.stack((wide["g"], wide["e"])))
    by_row = upstream * unit * scale
    columns = wide["hidden"].abs().reshape(-1, case.D).sum(0)
    # A frozen head's Jacobian is kept in the dtype of hidden, and float16 has a smallest number.
    kept = upstream * 2**-25 / EPS if case.dtype == torch.float16 else 0.0
    terms = {
        # A float32 sum of V terms, of which equal weight rows leave exactly nothing.
        "h": by_row * largest(wide["weight"]) * (1 + case.V**0.5 / 8) + kept,
        "w": by_row * largest(columns),
        "b": by_row * z.shape[:-1].numel(),
    }
    if triple:
        heads = wide["weight"] if wide["ref_weight"] is None else wide["ref_weight"]
        own = wide["ref_bias"]
        if own is None and wide["ref_weight"] is None:
            own = wide["bias"]
        _, other = one(wide["ref_hidden"], heads, own)
        terms["reference"] = 1 + other + capped
        terms["extrapolated"] = (1 + 2 * abs(case.extrapolation)) * (unit + other)
    return terms, unit, z


def check_head(case, triple=False):
    clean = {name: moved(value) for name, value in case.build().items()}
    live = clean["live"]
    if not triple:
        clean = {name: value for name, value in clean.items() if not name.startswith("ref_")}
    dirty = dict(clean)
    for name in ("hidden", "ref_hidden", "g", "e"):
        if name in clean:
            if case.poison:
                dirty[name] = moved(case.build()[name])
                spoil(dirty[name], ~live)
            value = clean[name]
            dead = (~live).view(live.shape + (1,) * (value.ndim - live.ndim))
            clean[name] = value.masked_fill(dead, 0)
    before = {name: None if x is None else x.clone() for name, x in dirty.items()}
    actual = run_head(case, dirty, case.impl, triple)
    assert_same(before, dirty, "written to")
    assert_same(run_head(case, dirty, case.impl, triple), actual, "a second run")
    bare = run_head(dataclasses.replace(case, needs=""), dirty, case.impl, triple)
    assert_same({name: actual[name] for name in bare}, bare, "with and without a gradient")

    exact = run_head(case, clean, "reference", triple, torch.float64)
    eager = run_head(case, clean, "reference", triple)
    if case.dtype.itemsize == 2:  # outputs are as exact as a float32 head's, not as a 16-bit one's
        single = run_head(case, clean, "reference", triple, torch.float32)
        eager |= {name: value for name, value in single.items() if name not in "hwb"}
    terms, unit, z = head_terms(case, clean, triple)
    wanted = torch.float64 if case.dtype == torch.float64 else torch.float32
    for name, value in actual.items():
        if name == "is_top1":
            check_top1(value, z, clean["targets"], live, name, unit)
            continue
        if name not in "wb":
            assert (value[~live] == 0).all(), f"{name}: not 0 without a target"
        assert name in "hwb" or value.dtype == wanted, name
        inside = terms.get(name, unit + math.log(case.V))
        contract(value, eager[name], exact[name].double(), name, inside)
    return actual, dirty


@examples(0.28)
@given(head_cases())
def test_linear_token_logps(case):
    check_head(case)


def check_triple(case):
    actual, tensors = check_head(case, triple=True)
    single = {name: x for name, x in tensors.items() if not name.startswith("ref_")}
    single = run_head(dataclasses.replace(case, outputs=()), single, case.impl)
    assert same(actual["policy"], single.pop("logps")), "policy is not what the single op gives"
    for name, value in single.items():
        assert same(actual[name], value), f"{name} is not what the single op gives"
    if case.same and not case.two_heads and not case.ref_bias:
        assert same(actual["reference"], actual["policy"]), "one model, two log-probs"
    if case.extrapolation == 0.0:
        assert same(actual["extrapolated"], actual["policy"]), "extrapolated by nothing"


@examples(0.12)
@given(head_cases(triple=True))
def test_linear_token_logps_triple(case):
    check_triple(case)


# sequence_logps


def run_sequences(case, logps, cu, mask, g, impl):
    leaf = logps.detach().requires_grad_()
    found = sequence_logps(leaf, cu_seqlens=cu, mask=mask, impl=impl)
    g = g.to(found.sums.dtype)
    (grad,) = torch.autograd.grad(found.sums, leaf, g, retain_graph=True)
    (again,) = torch.autograd.grad(found.sums, leaf, g)
    assert same(grad, again), "second backward"
    return {"sums": found.sums.detach(), "counts": found.counts, "grad": grad}


def check_sequences(case):
    with mock.patch.object(sequence_page, "BLOCK_T", case.block):
        logps, cu, mask, g = map(moved, case.build())
        clean = logps if mask is None else logps.masked_fill(mask == 0, 0)
        if case.poison and mask is not None:
            spoil(logps, mask == 0)
        actual = run_sequences(case, logps, cu, mask, g, case.impl)
        assert_same(run_sequences(case, logps, cu, mask, g, case.impl), actual, "a second run")
        exact = run_sequences(case, clean.double(), cu, mask, g, "reference")
        wide = clean if clean.dtype == torch.float64 else clean.float()
        eager = run_sequences(case, wide, cu, mask, g, "reference")
        assert torch.equal(actual["counts"], exact["counts"])
        assert actual["sums"].dtype == wide.dtype and actual["grad"].dtype == logps.dtype
        contract(actual["sums"], eager["sums"], exact["sums"], "sums", 1.0)
        contract(actual["grad"], eager["grad"], exact["grad"], "grad", 0.0)
        if mask is not None:
            assert (actual["grad"][mask == 0] == 0).all()
        # The last sequence alone, or the rows in another order: the same bits.
        if cu is not None and cu.numel() > 1:
            part = slice(int(cu[-2]), int(cu[-1]))
            ends = torch.tensor([0, part.stop - part.start], device=cu.device)
            own = None if mask is None else mask[part]
            alone = sequence_logps(logps[part], cu_seqlens=ends, mask=own, impl=case.impl).sums
            assert same(alone, actual["sums"][-1:]), "a sequence alone sums to other bits"
        elif cu is None:
            own = None if mask is None else mask.flip(0)
            turned = sequence_logps(logps.flip(0), mask=own, impl=case.impl).sums
            assert same(turned.flip(0), actual["sums"]), "other bits in another order"


@examples(0.07)
@given(sequence_cases())
def test_sequence_logps(case):
    check_sequences(case)


# preference_loss and noise_aware_loss


def run_pairs(case, values, weights, g, impl, noise_aware, dtype=None):
    values = [x.detach().to(dtype or x.dtype) for x in values]
    weights = weights if weights is None or dtype is None else weights.to(dtype)
    leaves = [x.requires_grad_() for x, key in zip(values, "cr", strict=False) if key in case.needs]
    options = {"beta": case.beta, "weights": weights, "impl": impl}
    if noise_aware:
        alpha, threshold = case.smoothing, case.threshold
        if case.scalars:
            alpha, threshold = (torch.tensor(x, device=DEVICE) for x in (alpha, threshold))
        found = noise_aware_loss(*values, alpha=alpha, threshold=threshold, **options)
    else:
        found = preference_loss(*values[:4], label_smoothing=case.smoothing, **options)
    result = {name: value.detach() for name, value in found._asdict().items()}
    if not leaves:
        assert not found.losses.requires_grad
        return result
    g = g.to(found.losses.dtype)
    first = torch.autograd.grad(found.losses, leaves, g, retain_graph=True)
    second = torch.autograd.grad(found.losses, leaves, g)
    assert all(same(a, b) for a, b in zip(first, second, strict=True)), "second backward"
    return result | dict(zip(case.needs, first, strict=True))


def check_pairs(case, noise_aware=False):
    values, weights, g = case.build()
    values, weights, g = [moved(x) for x in values], moved(weights), moved(g)
    args = values, weights, g
    actual = run_pairs(case, *args, case.impl, noise_aware)
    assert_same(run_pairs(case, *args, case.impl, noise_aware), actual, "a second run")
    exact = run_pairs(case, *args, "reference", noise_aware, torch.float64)
    used = [*values[: 6 if noise_aware else 4], *([] if weights is None else [weights])]
    wide = torch.float64 if any(x.dtype == torch.float64 for x in used) else torch.float32
    eager = run_pairs(case, *args, "reference", noise_aware, wide)
    size = max([largest(x) for x in values], default=0.0) * 4 * case.beta
    heavy = 1.0 if weights is None else largest(weights)
    terms = {"losses": (size + 1) * heavy, "confidences": size}
    terms |= dict.fromkeys("cr", largest(g) * case.beta * (1 + size) * heavy)
    unsure = torch.zeros(case.B, dtype=torch.bool, device=DEVICE)
    if noise_aware:
        # A confidence within rounding of the threshold may fall on either side of it.
        unsure = (exact["confidences"] - case.threshold).abs() <= 8 * EPS * (1 + size)
        if wide == torch.float32 or not case.scalars:
            unsure &= exact["confidences"] != 0.5  # exact where the two models agree
    for name, value in actual.items():
        if name == "is_noisy":
            assert torch.equal(value[~unsure], exact[name][~unsure]), name
            continue
        keep = ~unsure if name in ("losses", "c", "r") else slice(None)
        value, ours, want = value[keep], eager[name][keep], exact[name][keep].double()
        contract(value, ours, want, name, terms.get(name, size))
        assert name in "cr" or value.dtype == wide, name
    if case.scale == 0.0 and weights is None and not case.infinite and case.B:
        kinds = {x.dtype for x in values}
        if len(kinds) == 1:
            assert (actual["losses"] == torch.tensor(2.0, dtype=wide).log().item()).all()


@examples(0.06)
@given(pairs_cases())
def test_preference_loss(case):
    check_pairs(case)


@examples(0.06)
@given(pairs_cases(noise_aware=True))
def test_noise_aware_loss(case):
    check_pairs(case, noise_aware=True)


# pairwise_preference_logits


def run_groups(case, policy, reference, groups, g, impl, dtype=None):
    leaf = policy.detach().to(dtype or policy.dtype).requires_grad_(case.needs)
    reference = reference.to(dtype or reference.dtype)
    options = {"beta": case.beta, "layout": case.layout, "impl": impl, **groups}
    found = pairwise_preference_logits(leaf, reference, **options)
    if not case.needs:
        return {"logits": found}
    g = g.to(found.dtype)
    (grad,) = torch.autograd.grad(found, leaf, g, retain_graph=True)
    (again,) = torch.autograd.grad(found, leaf, g)
    assert same(grad, again), "second backward"
    return {"logits": found.detach(), "grad": grad}


def check_groups(case):
    with mock.patch.object(pairwise_page, "MAX_BLOCK_K", case.block):
        policy, reference, groups, g = case.build()
        args = moved(policy), moved(reference), groups, moved(g)
        actual = run_groups(case, *args, case.impl)
        assert_same(run_groups(case, *args, case.impl), actual, "a second run")
    exact = run_groups(case, *args, "reference", torch.float64)
    wide = torch.float64 if torch.float64 in case.dtypes else torch.float32
    eager = run_groups(case, *args, "reference", wide)
    if case.needs:
        eager["grad"] = eager["grad"].to(case.dtypes[0])
    size = case.beta * (largest(policy) + largest(reference))
    widest = max(case.sizes, default=0)
    terms = {"logits": size, "grad": case.beta * largest(g) * widest}
    for name, value in actual.items():
        contract(value, eager[name], exact[name].double(), name, terms[name])
    logits = actual["logits"]
    assert logits.dtype == wide
    start = 0
    for i, size in enumerate(case.sizes):
        if case.layout == "padded":
            block = logits[i, :size, :size]
            assert (logits[i, size:] == 0).all() and (logits[i, :, size:] == 0).all()
        else:
            block = logits[start : start + size * size].view(size, size)
            start += size * size
        assert torch.equal(block, -block.T) and (block.diagonal() == 0).all()


@examples(0.07)
@given(groups_cases())
def test_pairwise_preference_logits(case):
    check_groups(case)


# torch.compile


@examples(0.02)
@given(st.one_of(logits_cases(), head_cases()))
def test_compiled_whole_gives_the_same_bits(case):
    tensors = case.build()
    if isinstance(case, LogitsCase):
        leaf, targets, _, *grads = map(moved, tensors)
        options = {"temperature": case.temperature, "softcap": case.softcap}

        def call(leaf):
            return token_logps(
                leaf, targets, ignore_index=case.ignore_index, impl=case.impl, **options
            )
    else:
        leaf, weight, targets, bias, *grads = (
            moved(tensors[name]) for name in ("hidden", "weight", "targets", "bias", "g")
        )

        def call(leaf):
            return linear_token_logps(
                leaf, weight, targets, bias=bias, impl=case.impl, **case.options
            )

    leaf = leaf.detach().requires_grad_()
    torch._dynamo.reset()
    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = function(leaf)
        results.append((out.detach(), *torch.autograd.grad(out, leaf, grads[0].to(out.dtype))))
    assert all(same(a, b) for a, b in zip(*results, strict=True))


# What was found, minimised.

FOUND = {
    "a Triton kernel read strided targets as if they were contiguous": (
        check_tokens, LogitsCase(impl="triton", lead=(2,), ignored=0.0, target_layout="stepped")
    ),
    "and expanded ones beyond their memory": (
        check_tokens, LogitsCase(impl="triton", lead=(9,), ignored=0.0, target_layout="expanded")
    ),
    "so did the head's": (
        check_head, HeadCase(impl="triton", lead=(4,), ignored=0.0,
                             layouts=("contiguous", "contiguous", "stepped"))
    ),
    "and the triple's": (
        check_triple, HeadCase(impl="triton", lead=(4,), ignored=0.0,
                               layouts=("contiguous", "contiguous", "stepped"))
    ),
    "NaN in an ignored row times the softcap's slope in Triton's backward": (
        check_head, HeadCase(impl="triton", lead=(17,), V=1, D=1, ignored=1.0, softcap=5.0,
                             needs="hw")
    ),
    "the head's reference multiplied the lowest number with an upstream above 1": (
        check_head, HeadCase(lead=(), V=63, D=1, dtype=torch.float64, ignored=0.0, bias="-inf",
                             outputs=("lse", "entropy"), roots="entropy")
    ),
    "a smoothed loss of an impossible response was inf - inf": (
        check_pairs, PairsCase(B=1, infinite=(0,), smoothing=0.1)
    ),
    "in Triton too": (
        check_pairs, PairsCase(impl="triton", B=1, infinite=(0,), smoothing=0.1)
    ),
    "the sum's order depended on the strides of the log-probs": (
        check_sequences, SequenceCase(shape=(1, 15), layout="stepped")
    ),
    "the reference multiplied a smoothing of 0 with an infinity": (
        check_pairs, PairsCase(B=1, infinite=(1,))
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FOUND)
def test_found_before(what):
    check, case = FOUND[what]
    check(case)


# Invalid arguments: each is refused by name, whatever the rest.


def small_calls():
    """Return {op: (function, valid keyword arguments)}."""
    x, y, p = torch.randn(3, 5), torch.zeros(3).long(), torch.randn(6)
    hidden, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    scalars = {"temperature": 1.0, "softcap": 3.0, "ignore_index": -100}
    head = {"hidden": hidden, "weight": weight, "targets": y, "bias": bias, "logit_scale": 1.0}
    models = ("policy", "reference", "extrapolated")
    pairs = {f"{who}_{what}_logps": p for who in models for what in ("chosen", "rejected")}
    pairs |= {"weights": p.abs(), "beta": 0.1}
    alone = {name: value for name, value in pairs.items() if "extrapolated" not in name}
    group = {"policy_logps": p, "reference_logps": p, "beta": 0.1, "layout": "padded"}
    ref = {"ref_hidden": hidden, "ref_weight": weight, "ref_bias": bias, "extrapolation": 0.5}
    packed = {"token_logps": p, "cu_seqlens": torch.tensor([0, 2, 6]), "mask": p > 0}
    plan = {"plan": plan_head(3, 5, 4)}
    return {
        "token_logps": (token_logps, {"logits": x, "targets": y, "outputs": ("lse",), **scalars}),
        "linear": (linear_token_logps, {**head, **scalars, **plan, "outputs": ("lse",)}),
        "triple": (linear_token_logps_triple, {**head, **ref, **scalars, **plan}),
        "packed": (sequence_logps, packed),
        "padded": (sequence_logps, {"token_logps": x, "mask": x > 0}),
        "preference": (
            preference_loss, {**alone, "loss_type": "sigmoid", "label_smoothing": 0.1}
        ),
        "noise_aware": (noise_aware_loss, {**pairs, "alpha": 0.1, "threshold": 0.5}),
        "sizes": (pairwise_preference_logits, {**group, "group_sizes": [2, 4]}),
        "cu": (pairwise_preference_logits, {**group, "cu_groups": torch.tensor([0, 2, 6])}),
    }  # fmt: skip


def bad_tensors(name, good):
    """Yield what must not be taken in place of the tensor ``good``."""
    yield from (3, "x", [1.0], good.tolist(), torch.float32)
    yield good.to(torch.complex64)
    if name != "cu_groups":  # on any device, and torch itself says that it cannot be read
        yield good.to("meta")
    yield good.to_sparse()
    yield good[None]
    if name != "policy_logps":  # which may be of any length; the others are then wrong
        yield torch.cat([good, good])
    if good.is_floating_point():
        yield from (good.long(), good > 0, good.to(torch.float8_e4m3fn))
    elif good.dtype == torch.long:
        yield from (good.float(), good > 0, good.to(torch.uint8), good + 7, good - 1)


BAD = {
    "number": ("x", None, math.nan, math.inf, -math.inf, True, 10**400, 1j, [1.0], -1.0),
    "name": ("", None, 3, [], {}, b"sigmoid", "SIGMOID", ("padded",)),
    "outputs": (3, None, "lse", ("lse", "lse"), ("nope",), (3,), (["lse"],), ("lse", "")),
    "ignore_index": (None, "x", 1.5, True, 2**70, torch.tensor(1)),
    "plan": (3, "x", plan_head(3, 6, 4), plan_head(3, 5, 5))
    + tuple(
        dataclasses.replace(plan_head(3, 5, 4), **{name: value})
        for name in ("row_chunk", "vocab_tile", "budget_bytes")
        for value in (0, -1, 1.5)
    ),
    "group_sizes": (4, 0, "ab", [2, 3], [7, -1], [6.0], [[6]], torch.tensor([6.0]), [True] * 6),
}


def bad_values(name, good):
    """Yield what must be refused where ``good`` is taken."""
    if name in BAD:
        yield from BAD[name]
    elif isinstance(good, torch.Tensor):
        yield from bad_tensors(name, good)
    elif isinstance(good, float):
        signed = ("logit_scale", "extrapolation")  # any finite number will do
        nothing = ("softcap",)  # may be None
        for value in BAD["number"]:
            if not (value == -1.0 and name in signed) and not (value is None and name in nothing):
                yield value
    else:
        yield from BAD["name"]


def optional(name):
    """Return names of arguments that a message may blame, ``name`` itself first."""
    blamed = {"hidden": ("hidden", "weight", "targets"), "logits": ("logits", "targets")}
    blamed |= {"weight": ("weight", "bias", "plan"), "ref_bias": ("ref_bias",)}
    blamed |= {"policy_logps": ("policy_logps", "reference_logps")}
    blamed |= {"token_logps": ("token_logps", "cu_seqlens", "mask")}
    blamed |= {"policy_chosen_logps": ("policy_chosen_logps", "policy_rejected_logps")}
    return blamed.get(name, (name,))


def every_bad_call():
    for op, (_, arguments) in small_calls().items():
        for name, good in arguments.items():
            for number, _ in enumerate(bad_values(name, good)):
                yield op, name, number
        yield from ((op, "impl", number) for number in range(len(BAD["name"])))


BAD_CALLS = list(every_bad_call())


def check_refused(op, name, number, impl):
    function, arguments = small_calls()[op]
    value = list(bad_values(name, arguments.get(name)))[number]
    arguments |= {"impl": impl} if name != "impl" else {}
    with pytest.raises((TypeError, ValueError)) as raised:
        function(**(arguments | {name: value}))
    text = str(raised.value)
    assert text.startswith(optional(name)), f"{op}({name}={value!r}): {text}"


@pytest.mark.parametrize("op", small_calls())
def test_every_bad_argument_is_refused_by_name(op):
    for case in BAD_CALLS:
        if case[0] == op:
            check_refused(*case, "chunked")


@examples(0.1)
@given(st.sampled_from(BAD_CALLS), st.sampled_from(("chunked", "triton", "reference")))
def test_bad_arguments_are_refused_by_every_implementation(bad, impl):
    check_refused(*bad, impl)
