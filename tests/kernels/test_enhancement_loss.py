"""enhancement_loss: both branches, every form, values and gradients."""

import math

import pytest
import torch
from crosscompile import TARGETS, compile_kernel
from prefalign.kernels import enhancement_loss as page
from prefalign.kernels.enhancement_loss import BLOCK_B, enhancement_loss
from prefalign.kernels.enhancement_terms import RANKINGS, SFT, needs_lengths
from tolerance import assert_as_exact_as_eager

IMPLS = ("chunked", "triton")
EVERY = (*IMPLS, "reference")
SIZES = (1, BLOCK_B - 1, BLOCK_B, BLOCK_B + 1, 307)
FORMS = [(ranking, sft) for ranking in RANKINGS for sft in SFT]
INF, NAN = math.inf, math.nan


def example(pairs, device, dtype=torch.float32, ranking="mean", seed=0):
    """Return the op's tensors by name and an upstream; gaps are eighths, in every dtype alike."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, pairs, generator=generator)
    logps = -3 - noise.abs() if ranking == "probability" else -60 + 20 * noise
    rewards = torch.randint(-16, 17, (2, pairs), generator=generator) / 8
    lengths = torch.randint(1, 40, (2, pairs), generator=generator)
    upstream = torch.randn(pairs, generator=generator).to(device)
    logps, rewards = logps.to(device, dtype), rewards.to(device, dtype)
    lengths = lengths.to(device)
    given = {
        "plain_logps": logps[0],
        "guided_logps": logps[1],
        "plain_rewards": rewards[0],
        "guided_rewards": rewards[1],
        "plain_lengths": lengths[0].int(),
        "guided_lengths": lengths[1],
    }
    return given, upstream


def pairs_of(device, plain, guided, gaps=None, lengths=None, dtype=torch.float32):
    """Return the op's tensors from lists: log-probs, reward gaps and (plain, guided) lengths."""
    gaps = [1.0] * len(plain) if gaps is None else gaps
    lengths = [(2, 4)] * len(plain) if lengths is None else lengths
    plain_lengths, guided_lengths = torch.tensor(lengths, device=device).unbind(-1)
    return {
        "plain_logps": torch.tensor(plain, device=device, dtype=dtype),
        "guided_logps": torch.tensor(guided, device=device, dtype=dtype),
        "plain_rewards": torch.zeros(len(gaps), device=device, dtype=dtype),
        "guided_rewards": torch.tensor(gaps, device=device, dtype=dtype),
        "plain_lengths": plain_lengths,
        "guided_lengths": guided_lengths,
    }


def run(given, upstream=None, *, impl, threshold=0.25, **options):
    """Return the op's outputs by name, and the gradients of the two log-probs."""
    leaves = [given[name].detach().requires_grad_() for name in ("plain_logps", "guided_logps")]
    given = {**given, "plain_logps": leaves[0], "guided_logps": leaves[1]}
    found = enhancement_loss(**given, impl=impl, threshold=threshold, **options)
    upstream = torch.ones_like(found.losses) if upstream is None else upstream
    grads = torch.autograd.grad(found.losses, leaves, upstream.to(found.losses.dtype))
    return {**found._asdict(), "grad_plain": grads[0], "grad_guided": grads[1]}


def wide(given):
    """Return the same tensors in float64, lengths but for."""
    return {name: t.double() if t.is_floating_point() else t for name, t in given.items()}


def literal(given, ranking, sft, threshold, temperature):
    """Return losses and gradients by pair, from Python's own arithmetic."""
    out = []
    for p, g, rp, rg, n, m in zip(*(t.tolist() for t in given.values()), strict=True):
        if rg - rp > threshold:
            if ranking in ("mean", "logistic"):
                s, ds = (p / n, g / m), (1 / n, 1 / m)
            elif ranking == "sum":
                s, ds = (p, g), (1, 1)
            else:
                s = ds = (math.exp(p), math.exp(g))
            gap = s[0] - s[1]
            if ranking == "logistic":
                loss, slope = math.log1p(math.exp(gap)), 1 / (1 + math.exp(-gap))
            else:
                loss, slope = max(0, gap), float(gap > 0)
            out.append((loss, slope * ds[0], -slope * ds[1]))
        else:
            exps = math.exp(rp / temperature), math.exp(rg / temperature)
            w = exps[0] / sum(exps), exps[1] / sum(exps)
            n, m = (n, m) if sft == "mean" else (1, 1)
            out.append((-(w[0] * p / n + w[1] * g / m), -w[0] / n, -w[1] / m))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize(("ranking", "sft"), FORMS)
@pytest.mark.parametrize("impl", ("chunked", "reference"))
def test_every_form_is_what_its_formula_says(impl, ranking, sft, temperature):
    given, _ = example(61, "cpu", torch.float64, ranking)
    options = {"ranking": ranking, "sft": sft, "temperature": temperature}
    found = run(given, impl=impl, **options)
    expected = literal(given, **options, threshold=0.25)
    actual = torch.stack([found[name] for name in ("losses", "grad_plain", "grad_guided")], -1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    rewards = torch.stack([given["plain_rewards"], given["guided_rewards"]], -1)
    weights = (rewards / temperature).softmax(-1)
    torch.testing.assert_close(found["weights"], weights, rtol=1e-12, atol=0)
    assert 5 < found["is_ranked"].sum() < 56


def check(given, upstream, impl, **options):
    actual = run(given, upstream, impl=impl, **options)
    eager = run(given, upstream, impl="reference", **options)
    exact = run(wide(given), upstream, impl="reference", **options)
    assert torch.equal(actual.pop("is_ranked"), exact["is_ranked"])
    for name, value in actual.items():
        dtype = given["plain_logps"].dtype if name.startswith("grad") else torch.float32
        assert value.dtype == dtype, name
        assert_as_exact_as_eager(value, eager[name], exact[name], name)


@pytest.mark.parametrize("pairs", SIZES)
@pytest.mark.parametrize(("ranking", "sft"), FORMS)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients(impl, ranking, sft, pairs, device):
    given, upstream = example(pairs, device, ranking=ranking)
    check(given, upstream, impl, ranking=ranking, sft=sft, temperature=0.7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision(impl, ranking, dtype, device):
    given, upstream = example(131, device, dtype, ranking)
    check(given, upstream, impl, ranking=ranking)


@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("impl", EVERY)
def test_just_below_at_and_above_the_threshold(impl, ranking, kind, device):
    # The gap at the threshold is not above it.
    threshold = torch.tensor(0.7, device=device)
    below, above = (torch.nextafter(threshold, threshold + way).item() for way in (-1, 1))
    gaps = [below, threshold.item(), above]
    given = pairs_of(device, [-1.0] * 3, [-6.0] * 3, gaps)
    given_threshold = threshold if kind == "tensor" else 0.7
    found = run(given, impl=impl, threshold=given_threshold, ranking=ranking)
    assert found["is_ranked"].tolist() == [False, False, True]
    # The eager float64 answer of each branch alone.
    tuned = run(wide(given), impl="reference", threshold=INF)
    ranked = run(wide(given), impl="reference", threshold=-INF, ranking=ranking)
    for name in ("losses", "grad_plain", "grad_guided"):
        expected = torch.stack([tuned[name][0], tuned[name][1], ranked[name][2]]).float()
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7)
        assert (expected[1] - expected[2]).abs() > 0.01


@pytest.mark.parametrize(("ranking", "sft"), FORMS)
@pytest.mark.parametrize("impl", ("chunked", "reference"))
def test_gradcheck(impl, ranking, sft):
    given, _ = example(23, "cpu", torch.float64, ranking)
    plain, guided = given.pop("plain_logps"), given.pop("guided_logps")
    means = plain / given["plain_lengths"] - guided / given["guided_lengths"]
    assert min(means.abs().min(), (plain - guided).abs().min()) > 1e-3  # from the hinge's kink

    def losses(plain, guided):
        options = {"threshold": 0.25, "ranking": ranking, "sft": sft, "impl": impl}
        return enhancement_loss(plain, guided, **given, **options).losses

    assert torch.autograd.gradcheck(losses, (plain.requires_grad_(), guided.requires_grad_()))


@pytest.mark.parametrize("ranking", RANKINGS)
def test_table_slopes_are_the_derivatives_of_its_values(ranking):
    row = RANKINGS[ranking]
    line = torch.linspace(-9, 0, 19, dtype=torch.float64)
    plain, guided = (
        x.flatten().requires_grad_() for x in torch.meshgrid(line, line, indexing="ij")
    )
    expected = torch.autograd.grad(row.value(plain, guided).sum(), (plain, guided))
    for slope, grad in zip(row.slopes(plain.detach(), guided.detach()), expected, strict=True):
        torch.testing.assert_close(slope, grad, rtol=1e-12, atol=1e-14)
    assert row.source


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_tie_has_no_hinge_and_half_a_logistic_slope(impl, ranking, device):
    given = pairs_of(device, [-3.0, -0.5], [-3.0, -0.5], lengths=[(4, 4), (2, 2)])
    found = run(given, impl=impl, ranking=ranking)
    if ranking == "logistic":
        log_2 = torch.tensor(math.log(2), device=device)
        assert torch.equal(found["losses"], log_2.expand(2))
        assert found["grad_plain"].tolist() == [0.125, 0.25]
        assert found["grad_guided"].tolist() == [-0.125, -0.25]
    else:
        assert all((found[name] == 0).all() for name in ("losses", "grad_plain", "grad_guided"))


@pytest.mark.parametrize("impl", EVERY)
def test_a_logistic_loss_is_exact_where_it_is_small_and_where_it_is_large(impl, device):
    gaps = torch.tensor([-60.0, -20.0, -12.0, 30.0, 1e4], dtype=torch.float64)
    given = pairs_of(device, gaps.tolist(), [0.0] * 5, lengths=[(1, 1)] * 5)
    found = run(given, impl=impl, ranking="logistic")
    losses = gaps.exp().log1p().where(gaps < 100, gaps)
    torch.testing.assert_close(found["losses"].cpu().double(), losses, rtol=1e-6, atol=0)
    slopes = found["grad_plain"].cpu().double()
    torch.testing.assert_close(slopes, gaps.sigmoid(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sign", [-1, 1], ids=["ranked", "tuned"])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("impl", EVERY)
def test_an_infinite_threshold_leaves_one_loss_alone(impl, as_tensor, sign, device):
    given, _ = example(61, device)
    threshold = sign * INF
    if as_tensor:
        threshold = torch.tensor(threshold, device=device)
    found = run(given, impl=impl, threshold=threshold)
    assert (found["is_ranked"] == (sign < 0)).all()
    by_number = run(given, impl=impl, threshold=sign * 1e300)  # infinite in float32
    assert all(torch.equal(found[name], by_number[name]) for name in found)


@pytest.mark.parametrize(("ranking", "sft"), FORMS)
@pytest.mark.parametrize("threshold", [-INF, INF])
@pytest.mark.parametrize("impl", EVERY)
def test_an_empty_response_counts_as_zero_where_a_mean_is_taken(
    impl, threshold, ranking, sft, device
):
    given = pairs_of(device, [0.0, -2.0, 0.0], [-6.0, 0.0, 0.0], lengths=[(0, 3), (2, 0), (0, 0)])
    found = run(given, impl=impl, threshold=threshold, ranking=ranking, sft=sft)
    assert all(value.isfinite().all() for value in found.values())
    averaged = RANKINGS[ranking].per_token if threshold < 0 else sft == "mean"
    if averaged:
        assert (found["grad_plain"][[0, 2]] == 0).all()
        assert (found["grad_guided"][[1, 2]] == 0).all()
    if threshold < 0 and ranking == "mean":
        assert found["losses"].tolist() == [2, 0, 0]
        torch.testing.assert_close(found["grad_guided"].cpu(), torch.tensor([-1 / 3, 0, 0]))
    if threshold > 0 and averaged:
        weights = found["weights"].cpu()
        expected = torch.stack([2 * weights[0, 1], weights[1, 0], torch.tensor(0.0)])
        torch.testing.assert_close(found["losses"].cpu(), expected)


@pytest.mark.parametrize(("ranking", "sft"), FORMS)
@pytest.mark.parametrize("impl", EVERY)
def test_infinite_and_large_log_probs_give_no_nan(impl, ranking, sft, device):
    plain, guided = [-INF, -1.0, -INF, -1e30, -3e38], [-1.0, -INF, -INF, -1e-30, -3e38]
    options = {"impl": impl, "ranking": ranking, "sft": sft}
    ranked = run(pairs_of(device, plain, guided), **options, threshold=-INF)
    tuned = run(pairs_of(device, plain, guided), **options, threshold=INF)
    for found in (ranked, tuned):
        assert not any(value.isnan().any() for value in found.values())
        assert found["grad_plain"].isfinite().all() and found["grad_guided"].isfinite().all()
    # Plain is far behind: nothing to rank. Far ahead: an infinite loss, but for the probability.
    assert ranked["losses"][0] == 0 and ranked["losses"][3] == 0
    if ranking == "probability":
        torch.testing.assert_close(ranked["losses"][1].item(), math.exp(-1))
    else:
        assert ranked["losses"][1] == INF
    assert ranked["grad_plain"][2] == 0 and ranked["grad_guided"][2] == 0
    assert (tuned["losses"][:3] == INF).all()


@pytest.mark.parametrize("sft", SFT)
@pytest.mark.parametrize("impl", EVERY)
def test_a_weight_of_zero_leaves_no_trace_of_minus_infinity(impl, sft, device):
    given = pairs_of(device, [-INF, -2.0], [-8.0, -INF], [500.0, -500.0])
    found = run(given, impl=impl, threshold=INF, sft=sft)
    assert found["losses"].tolist() == ([2, 1] if sft == "mean" else [8, 2])
    assert found["weights"].tolist() == [[0, 1], [1, 0]]
    assert found["grad_plain"][0] == 0 and found["grad_guided"][1] == 0


@pytest.mark.parametrize("impl", EVERY)
def test_infinite_rewards_weigh_one_response_alone(impl, device):
    given = pairs_of(device, [-2.0, -2.0], [-8.0, -8.0], [INF, -INF])
    found = run(given, impl=impl, threshold=INF)
    assert found["losses"].tolist() == [2, 1]
    assert run(given, impl=impl)["is_ranked"].tolist() == [True, False]


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("impl", EVERY)
def test_nan_is_never_hidden(impl, ranking, device):
    gap = run(pairs_of(device, [-2.0], [-8.0], [NAN]), impl=impl, ranking=ranking, threshold=-INF)
    assert not gap["is_ranked"].any()
    assert gap["weights"].isnan().all() and gap["losses"].isnan().all()
    logps = pairs_of(device, [NAN, -1.0], [-1.0, NAN])
    for threshold in (-INF, INF):
        found = run(logps, impl=impl, ranking=ranking, threshold=threshold)
        assert found["losses"].isnan().all()


@pytest.mark.parametrize("impl", EVERY)
def test_the_probability_of_a_real_response_has_no_effect(impl, device):
    given = pairs_of(device, [-120.0], [-300.0])
    found = run(given, impl=impl, ranking="probability")
    assert all((found[name] == 0).all() for name in ("losses", "grad_plain", "grad_guided"))
    assert run(given, impl=impl, ranking="sum")["losses"] == 180


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_pairs(impl, device):
    given, upstream = example(240, device)
    # Every input has a stride of its own.
    strided = {name: t[: 40 * step : step] for step, (name, t) in enumerate(given.items(), 1)}
    found = run(strided, upstream[::6], impl=impl)
    whole = {name: t.contiguous() for name, t in strided.items()}
    expected = run(whole, upstream[::6].contiguous(), impl=impl)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(("ranking", "sft"), FORMS)
@pytest.mark.parametrize("impl", EVERY)
def test_lengths_are_needed_where_a_mean_is_taken(impl, ranking, sft, device):
    given, _ = example(7, device, ranking=ranking)
    whole = run(given, impl=impl, ranking=ranking, sft=sft)
    bare = {name: t for name, t in given.items() if not name.endswith("lengths")}
    if needs_lengths(ranking, sft):
        with pytest.raises(ValueError, match="plain_lengths: expected the number of tokens"):
            run(bare, impl=impl, ranking=ranking, sft=sft)
        with pytest.raises(ValueError, match="guided_lengths: expected the number of tokens"):
            run({**bare, "plain_lengths": given["plain_lengths"]}, impl=impl, ranking=ranking)
    else:
        assert (ranking, sft) in (("sum", "sum"), ("probability", "sum"))
        found = run(bare, impl=impl, ranking=ranking, sft=sft)
        assert all(torch.equal(found[name], whole[name]) for name in found)


@pytest.mark.parametrize("impl", EVERY)
def test_only_the_losses_are_differentiable(impl, device):
    given, _ = example(5, device)
    given["plain_logps"].requires_grad_()
    found = enhancement_loss(**given, threshold=0.0, impl=impl)._asdict()
    assert {name for name, value in found.items() if value.requires_grad} == {"losses"}
    found["losses"].sum().backward()
    assert given["plain_logps"].grad is not None and given["guided_logps"].grad is None
    with torch.no_grad():
        assert not enhancement_loss(**given, threshold=0.0, impl=impl).losses.requires_grad


@pytest.mark.parametrize("impl", EVERY)
def test_empty_batch(impl, device):
    given, upstream = example(0, device)
    for name, value in run(given, upstream, impl=impl).items():
        assert value.shape == ((0, 2) if name == "weights" else (0,))


def test_float64_stays(device):
    given, _ = example(9, device)
    mixed = {**given, "plain_rewards": given["plain_rewards"].double()}
    for found in (run(wide(given), impl="chunked"), run(mixed, impl="chunked")):
        assert found["losses"].dtype == found["weights"].dtype == torch.float64
    with pytest.raises(ValueError, match="impl: 'triton' computes in float32"):
        run(mixed, impl="triton") if page.triton else pytest.skip("needs Triton")


BAD = {
    r"guided_logps: expected shape \(3,\), got \(2,\)": {"guided_logps": torch.zeros(2)},
    r"plain_logps: expected 1 dimension\(s\), got shape \(3, 1\)": {
        "plain_logps": torch.zeros(3, 1)
    },
    "plain_rewards: expected a tensor, got list": {"plain_rewards": [0.0] * 3},
    "plain_rewards: expected dtype .*, got int64": {"plain_rewards": torch.zeros(3).long()},
    "guided_rewards: expected a tensor on cpu.* got meta": {
        "guided_rewards": torch.zeros(3, device="meta")
    },
    "guided_rewards: expected a constant, got a tensor that requires grad": {
        "guided_rewards": torch.zeros(3, requires_grad=True)
    },
    "plain_lengths: expected dtype int32, int64, got float32": {"plain_lengths": torch.ones(3)},
    r"guided_lengths: expected shape \(3,\), got \(1,\)": {
        "guided_lengths": torch.ones(1, dtype=torch.int64)
    },
    "ranking: expected one of 'mean', 'sum', 'probability', 'logistic', got 'hinge'": {
        "ranking": "hinge"
    },
    "sft: expected one of 'mean', 'sum', got None": {"sft": None},
    "temperature: expected a number above 0, got 0": {"temperature": 0},
    "temperature: expected a finite number, got inf": {"temperature": INF},
    "threshold: expected a finite number, got nan": {"threshold": NAN},
    "threshold: expected a number, got str": {"threshold": "inf"},
    "threshold: expected a number, got bool": {"threshold": True},
    r"threshold: expected 0 dimension\(s\), got shape \(3,\)": {"threshold": torch.zeros(3)},
    "threshold: expected dtype .*, got int64": {"threshold": torch.tensor(1)},
    "threshold: expected a constant": {"threshold": torch.tensor(0.2, requires_grad=True)},
    "impl: expected one of": {"impl": "eager"},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("impl", ("chunked", "reference"))
def test_bad_arguments(impl, message):
    given, _ = example(3, "cpu")
    with pytest.raises((TypeError, ValueError), match=message):
        enhancement_loss(**{**given, "threshold": 0.2, "impl": impl, **BAD[message]})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("ranking", "sft"), FORMS)
def test_compiles_without_spills(ranking, sft, target):
    pytest.importorskip("triton")
    fn, row = page._forward_kernel, RANKINGS[ranking]
    constexprs = {"RANKING": row.device, "RANKS_MEANS": row.per_token, "BLOCK_B": BLOCK_B}
    constexprs["TUNES_MEANS"] = sft == "mean"
    kinds = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in fn.arg_names}
    kinds |= {"plain_lengths_ptr": "*i32", "guided_lengths_ptr": "*i64"}
    kinds |= {"is_ranked_ptr": "*i1", "temperature": "fp32"}
    if not needs_lengths(ranking, sft):
        constexprs |= {"plain_lengths_ptr": None, "guided_lengths_ptr": None}
    signature = {name: kind for name, kind in kinds.items() if name not in constexprs}
    used = compile_kernel(fn, signature, constexprs, target)
    assert used.registers > 0
    assert used.spills == 0
    assert used.shared_bytes <= 99 << 10
    if target == "sm_90":
        # A launch turns an integer argument of 1 into a constant.
        ones = {name: 1 for name, kind in signature.items() if kind == "i32"}
        rest = {name: kind for name, kind in signature.items() if name not in ones}
        assert compile_kernel(fn, rest, constexprs | ones, target).spills == 0


@pytest.mark.gpu
def test_no_host_sync_on_a_gpu():
    given, _ = example(5, "cuda")
    given["plain_logps"].requires_grad_()
    for threshold in (0.2, -INF, torch.tensor(0.2, device="cuda")):
        enhancement_loss(**given, threshold=threshold).losses.sum().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            enhancement_loss(**given, threshold=threshold).losses.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
