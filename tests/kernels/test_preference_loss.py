"""preference_loss and noise_aware_loss: values and gradients against float64, and exact ln 2."""

import math

import pytest
import torch
from prefalign.kernels._pair_losses import BLOCK_B
from prefalign.kernels.noise_aware_loss import noise_aware_loss
from prefalign.kernels.preference_loss import preference_loss
from tolerance import assert_as_exact_as_eager

IMPLS = ("chunked", "triton")
EVERY = (*IMPLS, "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, BLOCK_B - 1, BLOCK_B, BLOCK_B + 1, 307)
LN2 = torch.tensor(math.log(2))


def example(pairs, device, dtype=torch.float32, seed=0, count=6, scale=20.0):
    """Return ``count`` log-probs, weights and an upstream, ``[B]`` each."""
    generator = torch.Generator().manual_seed(seed)
    logps = -60 + scale * torch.randn(count, pairs, generator=generator)
    weights = torch.rand(pairs, generator=generator)
    upstream = torch.randn(pairs, generator=generator)
    return list(logps.to(device, dtype)), weights.to(device), upstream.to(device)


def run(op, logps, upstream, impl, **options):
    """Return the op's outputs by name, and the gradients of the two policy log-probs."""
    chosen, rejected = (t.detach().requires_grad_() for t in logps[:2])
    found = op(chosen, rejected, *logps[2:], impl=impl, **options)
    grads = torch.autograd.grad(found.losses, (chosen, rejected), upstream.to(found.losses.dtype))
    return {**found._asdict(), "grad_chosen": grads[0], "grad_rejected": grads[1]}


def check(op, logps, upstream, impl, **options):
    actual = run(op, logps, upstream, impl, **options)
    weights = options.pop("weights", None)
    eager_weights = None if weights is None else weights.to(logps[0].dtype)
    eager = run(op, logps, upstream, "reference", weights=eager_weights, **options)
    exact_weights = None if weights is None else weights.double()
    wide = [t.double() for t in logps]
    exact = run(op, wide, upstream, "reference", weights=exact_weights, **options)
    for name, value in actual.items():
        if value.dtype == torch.bool:
            assert torch.equal(value, exact[name]), name
            continue
        dtype = logps[0].dtype if name.startswith("grad") else torch.float32
        assert value.dtype == dtype, name
        assert_as_exact_as_eager(value, eager[name], exact[name], name)
    return actual


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairs", SIZES)
@pytest.mark.parametrize("impl", IMPLS)
def test_losses_rewards_and_gradients(impl, pairs, dtype, smoothing, weighted, device):
    logps, weights, upstream = example(pairs, device, dtype, count=4)
    options = {"weights": weights} if weighted else {}
    found = check(preference_loss, logps, upstream, impl, label_smoothing=smoothing, **options)
    assert torch.equal(found["grad_chosen"], -found["grad_rejected"])


def noise_options(kind, device):
    if kind == "numbers":
        return {"alpha": 0.3, "threshold": 0.4}
    return {
        "alpha": torch.tensor(0.3, device=device),
        "threshold": torch.tensor(0.4, device=device),
    }


@pytest.mark.parametrize("kind", ["numbers", "tensors"])
@pytest.mark.parametrize("pairs", SIZES)
@pytest.mark.parametrize("impl", IMPLS)
def test_noise_aware(impl, pairs, kind, device):
    logps, weights, upstream = example(pairs, device)
    options = noise_options(kind, device)
    found = check(noise_aware_loss, logps, upstream, impl, weights=weights, **options)
    assert torch.equal(found["is_noisy"], found["confidences"] < 0.4)
    if pairs > 1:
        assert 0 < found["is_noisy"].sum() < pairs


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_noise_aware_half_precision(impl, dtype, device):
    # Halves of small integers: every dtype holds them and their differences exactly, so that all
    # judge the same pairs noisy.
    logps, weights, upstream = example(97, device)
    logps = [(t / 4).round().to(dtype) for t in logps]
    check(noise_aware_loss, logps, upstream, impl, alpha=0.25, threshold=0.45, beta=0.0625)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.37, 0.5])
@pytest.mark.parametrize("impl", IMPLS)
def test_ln_2_exactly_where_policy_is_reference(impl, smoothing, device):
    logps, _, upstream = example(301, device, count=2)
    found = run(preference_loss, logps * 2, upstream, impl, label_smoothing=smoothing, beta=0.3)
    assert torch.equal(found["losses"], LN2.to(device).expand(301))
    assert (found["chosen_rewards"] == 0).all() and (found["rejected_rewards"] == 0).all()


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.6])
@pytest.mark.parametrize("impl", IMPLS)
def test_noise_aware_ln_2_and_ties(impl, threshold, device):
    # At the first step every confidence ties at one half: the comparison is strict.
    logps, _, upstream = example(301, device, count=2)
    found = run(noise_aware_loss, logps * 3, upstream, impl, alpha=0.3, threshold=threshold)
    assert torch.equal(found["losses"], LN2.to(device).expand(301))
    assert (found["confidences"] == 0.5).all()
    assert found["is_noisy"].all() if threshold > 0.5 else not found["is_noisy"].any()


@pytest.mark.parametrize("impl", EVERY)
def test_noise_aware_is_dpo_on_clean_pairs_and_cdpo_on_noisy_ones(impl, device):
    logps, _, upstream = example(97, device)
    found = run(noise_aware_loss, logps, upstream, impl, alpha=0.3, threshold=0.5)
    for smoothing, kept in ((0.0, ~found["is_noisy"]), (0.3, found["is_noisy"])):
        plain = run(preference_loss, logps[:4], upstream, impl, label_smoothing=smoothing)
        for name, value in plain.items():
            torch.testing.assert_close(found[name][kept], value[kept], rtol=1e-6, atol=1e-6)
    warm_up = run(noise_aware_loss, logps, upstream, impl, alpha=0.0, threshold=0.5)
    dpo = run(preference_loss, logps[:4], upstream, impl)
    assert all(torch.equal(warm_up[name], dpo[name]) for name in dpo)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("impl", EVERY)
def test_no_overflow_at_any_margin(impl, smoothing, device):
    margins = torch.tensor([1e4, -1e4, 300.0, -300.0, 1e-8, -1e-8, 20.0, -20.0], device=device)
    zero = torch.zeros_like(margins)
    found = check(
        preference_loss,
        [margins, zero, zero, zero],
        torch.ones_like(margins),
        impl,
        label_smoothing=smoothing,
        beta=1.0,
    )
    z = margins.double()
    loss = torch.nn.functional.softplus(-z.abs(), threshold=1e9) + z.neg().clamp(min=0)
    loss = loss + smoothing * z
    torch.testing.assert_close(found["losses"].double(), loss, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("impl", IMPLS)
def test_infinite_margins_without_smoothing(impl, device):
    chosen = torch.tensor([math.inf, -math.inf], device=device)
    zero = torch.zeros_like(chosen)
    found = run(preference_loss, [chosen, zero, zero, zero], zero + 1, impl)
    assert found["losses"].tolist() == [0, math.inf]
    torch.testing.assert_close(found["grad_chosen"], torch.tensor([0, -0.1], device=device))
    noisy = run(noise_aware_loss, [chosen, *[zero] * 5], zero + 1, impl, threshold=0.0)
    assert noisy["losses"].tolist() == [0, math.inf]


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_pairs(impl, device):
    logps, weights, upstream = example(280, device)
    # Every input has a stride of its own.
    strided = [t[: 40 * step : step] for step, t in enumerate(logps, start=1)]
    options = {"weights": weights[::7], "threshold": 0.4}
    upstream = upstream[::7]
    whole = [t.contiguous() for t in strided]
    found = run(noise_aware_loss, strided, upstream, impl, **options)
    expected = run(noise_aware_loss, whole, upstream.contiguous(), impl, **options)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    del options["threshold"]
    found = run(preference_loss, strided[:4], upstream, impl, **options)
    expected = run(preference_loss, whole[:4], upstream.contiguous(), impl, **options)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("op", [preference_loss, noise_aware_loss])
@pytest.mark.parametrize("impl", EVERY)
def test_only_the_losses_are_differentiable(impl, op, device):
    logps, _, _ = example(5, device, count=4 if op is preference_loss else 6)
    options = {} if op is preference_loss else {"threshold": 0.5}
    logps[0].requires_grad_()
    found = op(*logps, impl=impl, **options)._asdict()
    assert {name for name, value in found.items() if value.requires_grad} == {"losses"}
    found["losses"].sum().backward()
    assert logps[0].grad is not None and logps[1].grad is None
    with torch.no_grad():
        assert not op(*logps, impl=impl, **options).losses.requires_grad


@pytest.mark.parametrize("op", [preference_loss, noise_aware_loss])
@pytest.mark.parametrize("impl", EVERY)
def test_empty_batch(impl, op, device):
    logps, _, upstream = example(0, device, count=4 if op is preference_loss else 6)
    options = {} if op is preference_loss else {"threshold": 0.5}
    found = run(op, logps, upstream, impl, **options)
    assert all(value.shape == (0,) for value in found.values())


@pytest.mark.parametrize("impl", ("chunked", "reference"))
def test_float64_stays(impl, device):
    logps, _, upstream = example(9, device, torch.float64)
    for name, value in run(noise_aware_loss, logps, upstream, impl, threshold=0.5).items():
        assert value.dtype == (torch.bool if name == "is_noisy" else torch.float64)
    mixed = [logps[0].float(), *logps[1:4]]
    assert preference_loss(*mixed, impl="chunked").losses.dtype == torch.float64


PAIR = [torch.zeros(3) for _ in range(6)]


def pair(**changes):
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    names = (*names, "extrapolated_chosen", "extrapolated_rejected")
    given = {f"{name}_logps": value for name, value in zip(names, PAIR, strict=True)}
    return {**given, "threshold": 0.5, **changes}


BAD = {
    r"policy_rejected_logps: expected shape \(3,\), got \(2,\)": {
        "policy_rejected_logps": torch.zeros(2)
    },
    r"policy_chosen_logps: expected 1 dimension\(s\), got shape \(3, 1\)": {
        "policy_chosen_logps": torch.zeros(3, 1)
    },
    "reference_chosen_logps: expected dtype .*, got int64": {
        "reference_chosen_logps": torch.zeros(3).long()
    },
    "reference_rejected_logps: expected a tensor on cpu.* got meta": {
        "reference_rejected_logps": torch.zeros(3, device="meta")
    },
    "reference_chosen_logps: expected a constant, got a tensor that requires grad": {
        "reference_chosen_logps": torch.zeros(3, requires_grad=True)
    },
    "weights: expected a constant": {"weights": torch.ones(3, requires_grad=True)},
    r"weights: expected shape \(3,\), got \(\)": {"weights": torch.tensor(1.0)},
    "beta: expected a number above 0, got 0": {"beta": 0},
    "impl: expected one of": {"impl": "eager"},
}
BAD_PREFERENCE = {
    "loss_type: expected one of 'sigmoid', .* got 'hinges'": {"loss_type": "hinges"},
    "label_smoothing: expected a number of at most 0.5, got 0.6": {"label_smoothing": 0.6},
    "label_smoothing: expected a number of at least 0, got -0.1": {"label_smoothing": -0.1},
}
BAD_NOISE_AWARE = {
    "beta: expected a number, got Tensor": {"beta": torch.tensor(0.1)},
    "extrapolated_chosen_logps: expected a constant": {
        "extrapolated_chosen_logps": torch.zeros(3, requires_grad=True)
    },
    "alpha: expected a number of at most 1, got 1.5": {"alpha": 1.5},
    "threshold: expected a number of at least 0, got -1": {"threshold": -1},
    "threshold: expected a number of at least 0, got nan": {"threshold": math.nan},
    r"threshold: expected 0 dimension\(s\), got shape \(3,\)": {"threshold": torch.zeros(3)},
    "alpha: expected dtype .*, got int64": {"alpha": torch.tensor(1)},
}


@pytest.mark.parametrize("message", [*BAD, *BAD_PREFERENCE])
@pytest.mark.parametrize("impl", ("chunked", "reference"))
def test_bad_arguments_of_preference_loss(impl, message):
    given = {"impl": impl, **pair(**{**BAD, **BAD_PREFERENCE}[message])}
    for name in ("threshold", "extrapolated_chosen_logps", "extrapolated_rejected_logps"):
        del given[name]
    with pytest.raises((TypeError, ValueError), match=message):
        preference_loss(**given)


@pytest.mark.parametrize("message", [*BAD, *BAD_NOISE_AWARE])
@pytest.mark.parametrize("impl", ("chunked", "reference"))
def test_bad_arguments_of_noise_aware_loss(impl, message):
    given = {"impl": impl, **pair(**{**BAD, **BAD_NOISE_AWARE}[message])}
    with pytest.raises((TypeError, ValueError), match=message):
        noise_aware_loss(**given)


def test_constants_may_require_grad_where_none_is_recorded():
    reference = torch.zeros(3, requires_grad=True)
    with torch.no_grad():
        assert preference_loss(*PAIR[:2], reference, PAIR[3]).losses.shape == (3,)


@pytest.mark.gpu
def test_no_host_sync_on_a_gpu():
    logps = [torch.zeros(5, device="cuda", requires_grad=i < 2) for i in range(6)]
    tensors = noise_options("tensors", "cuda")
    run_once = [lambda: noise_aware_loss(*logps, **tensors), lambda: preference_loss(*logps[:4])]
    for call in run_once:
        call().losses.sum().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call().losses.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
