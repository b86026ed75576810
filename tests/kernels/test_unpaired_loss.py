"""unpaired_loss against float64, the papers' formulas, TRL's and Liger's."""

import collections
import math
from types import SimpleNamespace

import pytest
import torch
from prefalign.kernels.linear_token_logps import linear_token_logps
from prefalign.kernels.modules import UnpairedLoss
from prefalign.kernels.sequence_logps import sequence_logps
from prefalign.kernels.unpaired_loss import BLOCK_S, unpaired_loss
from prefalign.kernels.unpaired_losses import UNPAIRED_LOSSES, RunningShift, kl_baseline
from tolerance import assert_as_exact_as_eager

IMPLS = ("chunked", "triton")
EVERY = (*IMPLS, "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, BLOCK_S - 1, BLOCK_S, BLOCK_S + 1, 307)
NAMES = tuple(UNPAIRED_LOSSES)
BASELINES = {"kto": 3.7, "bco": -0.4, "apo_zero_unpaired": None}
AT_BASELINE = {"kto": 0.5, "bco": math.log(2), "apo_zero_unpaired": 0.5}


def example(count, device, dtype=torch.float32, seed=0, scale=20.0):
    """Return policy, reference and labels, weights and an upstream, ``[S]`` each."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = -60 + scale * torch.randn(2, count, generator=generator)
    desirable = torch.rand(count, generator=generator) < 0.6
    weights = torch.rand(count, generator=generator)
    upstream = torch.randn(count, generator=generator)
    logps = [policy.to(device, dtype), reference.to(device, dtype), desirable.to(device)]
    return logps, weights.to(device), upstream.to(device)


def run(logps, upstream, impl, **options):
    """Return the outputs by name, and the policy's gradient under "grad"."""
    policy = logps[0].detach().requires_grad_()
    found = unpaired_loss(policy, *logps[1:], impl=impl, **options)
    (grad,) = torch.autograd.grad(found.losses, policy, upstream.to(found.losses.dtype))
    return {**found._asdict(), "grad": grad}


def check(logps, upstream, impl, weights=None, **options):
    policy, reference, desirable = logps
    actual = run(logps, upstream, impl, weights=weights, **options)
    like = None if weights is None else weights.to(policy.dtype)
    eager = run(logps, upstream, "reference", weights=like, **options)
    wide = None if weights is None else weights.double()
    doubles = [policy.double(), reference.double(), desirable]
    exact = run(doubles, upstream, "reference", weights=wide, **options)
    for name, value in actual.items():
        assert value.dtype == (policy.dtype if name == "grad" else torch.float32), name
        assert_as_exact_as_eager(value, eager[name], exact[name], name)
    return actual


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", IMPLS)
def test_losses_rewards_and_gradients(impl, name, count, dtype, weighted, device):
    logps, weights, upstream = example(count, device, dtype)
    options = {"loss_type": name, "baseline": BASELINES[name]}
    if weighted:
        options |= {"weights": weights, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    check(logps, upstream, impl, **options)


def by_the_papers(name, ratio, baseline, beta):
    """Return the loss of a desirable and of an undesirable response, in Python's floats."""

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    if name == "kto":  # lambda - v, with v the value function
        gain, loss = sigmoid(beta * (ratio - baseline)), sigmoid(beta * (baseline - ratio))
        return 1 - gain, 1 - loss
    if name == "apo_zero_unpaired":
        return 1 - sigmoid(beta * ratio), sigmoid(beta * ratio)
    reward = beta * ratio
    return -math.log(sigmoid(reward - baseline)), -math.log(sigmoid(-(reward - baseline)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", EVERY)
def test_formulas_of_the_papers(impl, name, device):
    beta, step, baseline = 0.3, 1e-4, BASELINES[name]
    dtype = torch.float32 if impl == "triton" else torch.float64
    logps, weights, upstream = example(40, device, dtype, scale=5.0)
    options = {"baseline": baseline, "beta": beta, "weights": weights.to(dtype)}
    options |= {"loss_type": name, "desirable_weight": 1.7, "undesirable_weight": 0.6}
    found = run(logps, upstream, impl, **options)
    policy, reference, desirable = (x.tolist() for x in logps)
    losses, slopes = [], []
    for p, r, good, w in zip(policy, reference, desirable, weights.tolist(), strict=True):
        low, at, high = (
            by_the_papers(name, p - r + move, baseline, beta)[0 if good else 1]
            for move in (-step, 0.0, step)
        )
        scale = w * (1.7 if good else 0.6)
        losses.append(scale * at)
        slopes.append(scale * (high - low) / (2 * step))
    tight = (
        {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    )
    wanted = torch.tensor(losses, dtype=torch.float64, device=device)
    torch.testing.assert_close(found["losses"].double(), wanted, **tight)
    wanted = upstream.double() * torch.tensor(slopes, dtype=torch.float64, device=device)
    torch.testing.assert_close(found["grad"].double(), wanted, rtol=1e-5, atol=1e-8)
    rewards = beta * (logps[0] - logps[1])
    torch.testing.assert_close(found["rewards"], rewards, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_table_slopes_are_the_derivatives_of_its_values(name):
    row = UNPAIRED_LOSSES[name]
    z = torch.linspace(-40, 40, 161, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(row.value(z).sum(), z)
    torch.testing.assert_close(row.slope(z.detach()), slope, rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(row.value, z)
    assert row.source


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", EVERY)
def test_exact_at_the_baseline(impl, name, device):
    # Eighths: a shift by the baseline is exact.
    policy = torch.arange(301, device=device) / 8 - 90
    logps = [
        policy,
        policy - (2.5 if name == "kto" else 0),
        torch.arange(301, device=device) % 3 > 0,
    ]
    baseline = {"kto": 2.5, "bco": 0.0, "apo_zero_unpaired": None}[name]
    found = run(logps, torch.ones_like(policy), impl, loss_type=name, baseline=baseline, beta=0.3)
    assert (found["losses"] == torch.tensor(AT_BASELINE[name])).all()
    if name != "kto":
        assert (found["rewards"] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", EVERY)
def test_no_overflow_at_any_log_ratio(impl, name, device):
    ratios = [1e4, -1e4, 300.0, -300.0, 90.0, -90.0, 1e-8, -1e-8, 20.0, -20.0]
    policy = torch.tensor(2 * ratios, device=device)
    desirable = torch.arange(20, device=device) < 10
    logps = [policy, torch.zeros_like(policy), desirable]
    baseline = None if BASELINES[name] is None else 0.0
    options = {"loss_type": name, "baseline": baseline, "beta": 1.0}
    found = check(logps, torch.ones_like(policy), impl, **options)
    z = torch.where(desirable, policy, -policy).double()
    if name == "bco":
        wanted = (-z.abs()).exp().log1p() + z.neg().clamp(min=0)
    else:
        wanted = (-z).exp().clamp(max=1e300) / (1 + (-z).exp().clamp(max=1e300))
    # Relative, far below the eps of 1: nothing cancels.
    keep = wanted > 1e-37
    torch.testing.assert_close(found["losses"].double()[keep], wanted[keep], rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", EVERY)
def test_infinite_log_ratios(impl, name, device):
    policy = torch.tensor([math.inf, -math.inf] * 2, device=device)
    logps = [policy, torch.zeros_like(policy), torch.tensor([1, 1, 0, 0], device=device) > 0]
    upstream = torch.ones(4, device=device)
    found = run(logps, upstream, impl, loss_type=name, baseline=BASELINES[name])
    worst = math.inf if name == "bco" else 1
    assert found["losses"].tolist() == [0, worst, worst, 0]
    slope = 0.1 if name == "bco" else 0.0
    wanted = torch.tensor([0, -slope, slope, 0], device=device)
    torch.testing.assert_close(found["grad"], wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", EVERY)
def test_a_weight_of_zero_makes_zero_of_anything(impl, name, device):
    policy = torch.tensor([math.inf, -math.inf, math.nan, 3.0] * 2, device=device)
    logps = [policy, torch.zeros_like(policy), torch.arange(8, device=device) < 4]
    options = {"loss_type": name, "baseline": BASELINES[name]}
    upstream = torch.arange(1, 9, device=device).float()
    found = run(logps, upstream, impl, undesirable_weight=0, **options)
    assert (found["losses"][4:] == 0).all() and (found["grad"][4:] == 0).all()
    assert found["losses"][3] > 0 and found["grad"][3] < 0
    weights = torch.tensor([0.0, 0, 0, 1] * 2, device=device)
    found = run(logps, upstream, impl, weights=weights, **options)
    dead = weights == 0
    assert (found["losses"][dead] == 0).all() and (found["grad"][dead] == 0).all()
    assert (found["losses"][~dead] > 0).all() and (found["grad"][~dead] != 0).all()


@pytest.mark.parametrize("impl", EVERY)
def test_all_desirable_and_none(impl, device):
    (policy, reference, desirable), _, upstream = example(67, device)
    options = {"baseline": 1.5, "desirable_weight": 2.0, "undesirable_weight": 3.0}
    every = run([policy, reference, desirable | True], upstream, impl, **options)
    none = run([policy, reference, desirable & False], upstream, impl, **options)
    # 1 - sigmoid(z) and 1 - sigmoid(-z) make one, and their derivatives nothing.
    whole = every["losses"] / 2 + none["losses"] / 3
    torch.testing.assert_close(whole, torch.ones_like(policy), rtol=1e-6, atol=0)
    torch.testing.assert_close(every["grad"] / 2, -none["grad"] / 3, rtol=1e-5, atol=1e-8)
    mixed = run([policy, reference, desirable], upstream, impl, **options)
    for key, value in mixed.items():
        assert torch.equal(value, torch.where(desirable, every[key], none[key])), key


@pytest.mark.parametrize("impl", IMPLS)
def test_strided(impl, device):
    logps, weights, upstream = example(280, device)
    strided = [x[: 40 * step : step] for step, x in enumerate((*logps, weights), start=1)]
    strided[1] = strided[1][:1].expand(40)
    whole = [x.contiguous() for x in strided]
    options = {"baseline": 2.0, "undesirable_weight": 0.5}
    upstream = upstream[::7]
    found = run(strided[:3], upstream, impl, weights=strided[3], **options)
    wanted = run(whole[:3], upstream.contiguous(), impl, weights=whole[3], **options)
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("impl", EVERY)
def test_empty_batch(impl, device):
    logps, weights, upstream = example(0, device)
    found = run(logps, upstream, impl, baseline=0.0, weights=weights)
    assert all(value.shape == (0,) for value in found.values())


@pytest.mark.parametrize("impl", EVERY)
def test_only_the_losses_are_differentiable(impl, device):
    (policy, *others), _, _ = example(5, device)
    policy.requires_grad_()
    found = unpaired_loss(policy, *others, baseline=0.0, impl=impl)
    assert found.losses.requires_grad and not found.rewards.requires_grad
    with torch.no_grad():
        assert not unpaired_loss(policy, *others, baseline=0.0, impl=impl).losses.requires_grad


@pytest.mark.parametrize("impl", ("chunked", "reference"))
def test_float64_stays(impl, device):
    logps, weights, upstream = example(9, device, torch.float64)
    options = {"baseline": 0.3, "desirable_weight": 0.1, "weights": weights.double()}
    found = run(logps, upstream, impl, **options)
    assert all(value.dtype == torch.float64 for value in found.values())
    mixed = [logps[0].float(), *logps[1:]]
    assert unpaired_loss(*mixed, baseline=0.0, impl="chunked").losses.dtype == torch.float64


@pytest.mark.parametrize("name", ["kto", "bco"])
@pytest.mark.parametrize("impl", EVERY)
def test_a_baseline_is_a_number_or_a_scalar_on_the_device(impl, name, device):
    logps, _, upstream = example(9, device)
    number = run(logps, upstream, impl, loss_type=name, baseline=0.75)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        scalar = torch.tensor(0.75, dtype=dtype, device=device)
        found = run(logps, upstream, impl, loss_type=name, baseline=scalar)
        assert all(torch.equal(found[key], number[key]) for key in number)
        assert all(found[key].dtype == number[key].dtype for key in number)


# Peers


class Gathered:
    """Stand in for Accelerate where there is one process."""

    device = torch.device("cpu")

    @staticmethod
    def gather_for_metrics(tensor):
        return tensor


def trl_loss(name, policy, reference, desirable, kl, beta, weights):
    """Return the mean loss by TRL's own trainer, given responses of one token."""
    trainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    ones = torch.ones(policy.shape[0], 2, dtype=torch.long)
    policy_kl, reference_kl = kl
    needs_kl = name == "kto"
    itself = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Gathered,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=needs_kl,
        loss_type=name,
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _compute_kl_logps=lambda model, batch: policy_kl if needs_kl else None,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "label": desirable,
        "input_ids": ones,
        "attention_mask": ones,
        "completion_mask": ones,
        "ref_logps": reference,
        "ref_KL_logps": reference_kl,
    }
    zeros = torch.zeros(policy.shape[0], 1)
    outputs = SimpleNamespace(log_probs=policy[:, None], entropy=zeros, mean_logits=zeros)
    loss = trainer._compute_loss(itself, lambda **_: outputs, inputs, False)
    return loss, itself._metrics["train"]


@pytest.mark.parametrize("shift", [0.5, -0.5], ids=["positive", "clamped"])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_as_trl(name, shift):
    (policy, reference, desirable), _, _ = example(24, "cpu", scale=6.0)
    (policy_kl, _, _), _, _ = example(24, "cpu", seed=1, scale=6.0)
    kl = policy_kl, policy_kl - shift
    ours, theirs = (policy.clone().requires_grad_() for _ in range(2))
    wanted, metrics = trl_loss(name, theirs, reference, desirable, kl, 0.2, (1.4, 0.8))
    baseline = kl_baseline(*kl) if name == "kto" else None
    found = unpaired_loss(
        ours, reference, desirable, loss_type=name, baseline=baseline, beta=0.2,
        desirable_weight=1.4, undesirable_weight=0.8,
    )  # fmt: skip
    torch.testing.assert_close(found.losses.mean(), wanted, rtol=1e-6, atol=1e-7)
    found.losses.mean().backward()
    wanted.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    for kind, kept in (("chosen", desirable), ("rejected", ~desirable)):
        assert found.rewards[kept].mean().item() == pytest.approx(metrics[f"rewards/{kind}"][0])
    if name == "kto":
        assert baseline.item() == pytest.approx(metrics["kl"][0], abs=1e-6)
        assert (baseline == 0) == (shift < 0)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_as_liger(scale):
    # Its loss is the mean over the sequences; the gradient is that of a scale of the mean.
    module = pytest.importorskip("liger_kernel.chunked_loss.kto_loss")
    torch.manual_seed(0)
    hidden, ref_hidden = torch.randn(2, 6, 9, 16)
    weight, ref_weight = 0.5 * torch.randn(2, 37, 16)
    bias, ref_bias = torch.randn(2, 37)
    targets = torch.randint(37, (6, 9))
    targets[torch.rand(6, 9) < 0.3] = -100
    desirable = torch.tensor([1, 0, 0, 1, 1, 0]).bool()
    kl = torch.tensor(0.8)
    liger = module.LigerFusedLinearKTOLoss(beta=0.1, compiled=False, use_ref_model=True)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    wanted, _ = liger(
        leaves[0], leaves[1], targets, leaves[2], desirable, ref_hidden, ref_weight, ref_bias, kl
    )

    def ours(dtype):
        x, w, b = leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight, bias)]
        others = (x.to(dtype) for x in (ref_hidden, ref_weight, ref_bias))
        rx, rw, rb = others
        sums = [
            sequence_logps(linear_token_logps(h, v, targets, bias=c), mask=targets != -100).sums
            for h, v, c in ((x, w, b), (rx, rw, rb))
        ]
        loss = unpaired_loss(*sums, desirable, baseline=kl).losses.mean()
        return loss.detach(), torch.autograd.grad(scale * loss, leaves)

    loss, grads = ours(torch.float32)
    exact, exact_grads = ours(torch.float64)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-5, atol=1e-5)
    theirs = torch.autograd.grad(scale * wanted, leaves)
    for a, b, c in zip(grads, theirs, exact_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)


# The op's duties


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, name, device):
    (policy, reference, desirable), weights, _ = example(6, device)
    baseline = None if BASELINES[name] is None else torch.tensor(0.3, device=device)
    numbers = name, 0.1, 1.5, 0.5, impl
    torch.library.opcheck(
        torch.ops.prefalign.unpaired_loss,
        (policy.requires_grad_(), reference, desirable, baseline, weights, *numbers),
    )
    if impl == "chunked":  # whose result is float64 where any of the three is
        logps = policy.detach().bfloat16().requires_grad_(), reference, desirable, baseline
        torch.library.opcheck(
            torch.ops.prefalign.unpaired_loss, (*logps, weights.double(), *numbers)
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("impl", IMPLS)
def test_one_graph_and_a_backward_pass_that_is_pure(impl, name, device):
    (policy, reference, desirable), weights, upstream = example(6, device)
    policy.requires_grad_()

    def call(policy):
        options = {"loss_type": name, "baseline": BASELINES[name], "weights": weights}
        return unpaired_loss(policy, reference, desirable, impl=impl, **options).losses

    losses = call(policy)
    first = torch.autograd.grad(losses, policy, upstream, retain_graph=True)[0]
    other = torch.autograd.grad(losses, policy, -3 * upstream, retain_graph=True)[0]
    second = torch.autograd.grad(losses, policy, upstream)[0]
    assert torch.equal(first, second) and not torch.equal(first, other)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(policy)
    assert torch.equal(compiled, losses)
    assert torch.equal(torch.autograd.grad(compiled, policy, upstream)[0], first)
    with pytest.raises(NotImplementedError, match="^unpaired_loss: expected one derivative"):
        torch.autograd.grad(call(policy).square().sum(), policy, create_graph=True)
    transformed = torch.func.grad(lambda x: (upstream * call(x)).sum())
    assert torch.equal(transformed(policy.detach()), first)


def test_module():
    logps, weights, _ = example(9, "cpu")
    module = UnpairedLoss(loss_type="bco", beta=0.3, desirable_weight=2.0, undesirable_weight=0.5)
    found = module(*logps, baseline=0.2, weights=weights)
    wanted = unpaired_loss(
        *logps, loss_type="bco", baseline=0.2, beta=0.3, desirable_weight=2.0,
        undesirable_weight=0.5, weights=weights,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert "loss_type='bco'" in repr(module)


def arguments(**changes):
    given = {"policy_logps": torch.zeros(3), "reference_logps": torch.zeros(3)}
    return {**given, "desirable": torch.zeros(3).bool(), "baseline": 0.0, **changes}


BAD = {
    r"policy_logps: expected 1 dimension\(s\), got shape \(3, 1\)": {
        "policy_logps": torch.zeros(3, 1)
    },
    r"reference_logps: expected shape \(3,\), got \(2,\)": {"reference_logps": torch.zeros(2)},
    "reference_logps: expected a tensor, got NoneType": {"reference_logps": None},
    "reference_logps: expected a tensor on cpu.* got meta": {
        "reference_logps": torch.zeros(3, device="meta")
    },
    "reference_logps: expected a constant": {"reference_logps": torch.zeros(3, requires_grad=True)},
    "desirable: expected dtype bool, got int64": {"desirable": torch.zeros(3).long()},
    r"desirable: expected shape \(3,\), got \(4,\)": {"desirable": torch.zeros(4).bool()},
    "weights: expected a constant": {"weights": torch.ones(3, requires_grad=True)},
    r"weights: expected shape \(3,\), got \(\)": {"weights": torch.tensor(1.0)},
    "loss_type: expected one of 'kto', .* got 'dpo'": {"loss_type": "dpo"},
    "beta: expected a number above 0, got 0": {"beta": 0},
    "desirable_weight: expected a number of at least 0, got -1": {"desirable_weight": -1},
    "undesirable_weight: expected a finite number, got inf": {"undesirable_weight": math.inf},
    "impl: expected one of": {"impl": "eager"},
    r"baseline: expected a number .*'kto' \(kl_baseline makes it\), got None": {"baseline": None},
    r"baseline: expected a number .*'bco' \(RunningShift makes it\), got None": {
        "baseline": None,
        "loss_type": "bco",
    },
    "baseline: expected None with loss_type='apo_zero_unpaired', .* got float": {
        "loss_type": "apo_zero_unpaired"
    },
    r"baseline: expected 0 dimension\(s\), got shape \(3,\)": {"baseline": torch.zeros(3)},
    "baseline: expected a constant": {"baseline": torch.tensor(0.0, requires_grad=True)},
    "baseline: expected a tensor on cpu.* got meta": {"baseline": torch.zeros((), device="meta")},
    "baseline: expected a finite number, got nan": {"baseline": math.nan},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("impl", ("chunked", "reference"))
def test_bad_arguments(impl, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        unpaired_loss(**{"impl": impl, **arguments(**BAD[message])})


@pytest.mark.gpu
def test_no_host_sync_on_a_gpu():
    policy = torch.zeros(5, device="cuda", requires_grad=True)
    reference, desirable = torch.ones(5, device="cuda"), torch.arange(5, device="cuda") > 2
    shift = RunningShift(device="cuda")

    def call():
        z0 = kl_baseline(policy, reference)
        delta = shift.update(policy - reference)
        losses = unpaired_loss(policy, reference, desirable, baseline=z0).losses
        others = unpaired_loss(policy, reference, desirable, loss_type="bco", baseline=delta).losses
        (losses + others).sum().backward()

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
