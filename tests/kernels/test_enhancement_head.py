"""loss="ple" of pair_loss_head and linear_preference_loss: tokens and hidden states to losses."""

import math

import pytest
import torch
from crosscompile import TARGETS, compile_kernel
from prefalign.kernels import enhancement_head as page
from prefalign.kernels.enhancement_loss import enhancement_loss
from prefalign.kernels.enhancement_terms import RANKINGS, SFT
from prefalign.kernels.linear_preference_loss import linear_preference_loss
from prefalign.kernels.loss_heads import pair_loss_head
from prefalign.kernels.sequence_logps import BLOCK_T, sequence_logps
from tolerance import assert_as_exact_as_eager

IMPLS = ("chunked", "triton")
EVERY = (*IMPLS, "reference")
FORMS = [(ranking, sft) for ranking in RANKINGS for sft in SFT]
LENGTHS = {
    "one": (1, 1),
    "ragged": (3, BLOCK_T + 1, 1, 7, BLOCK_T, BLOCK_T - 1, 2 * BLOCK_T + 3, 5),
    "empty": (0, 4, 6, 0, 0, 0),
}
INF = math.inf


def example(lengths, device, dtype=torch.float32, scale=1.0):
    """Return token log-probs, the bounds, rewards in eighths, a mask and an upstream."""
    generator = torch.Generator().manual_seed(0)
    tokens, pairs = sum(lengths), len(lengths) // 2
    logps = -scale * torch.rand(tokens, generator=generator)
    rewards = torch.randint(-16, 17, (2 * pairs,), generator=generator) / 8
    mask = torch.rand(tokens, generator=generator) < 0.8
    upstream = torch.randn(pairs, generator=generator)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return (
        logps.to(device, dtype),
        cu.to(device),
        rewards.to(device, dtype),
        mask.to(device),
        upstream.to(device),
    )


def run(logps, cu, rewards, mask, upstream, impl, threshold=0.25, **options):
    leaf = logps.detach().requires_grad_()
    options = {"rewards": rewards, "threshold": threshold, "mask": mask, "impl": impl, **options}
    found = pair_loss_head(leaf, cu_seqlens=cu, loss="ple", **options)
    (grad,) = torch.autograd.grad(found.losses, leaf, upstream.to(found.losses.dtype))
    return {**{k: v for k, v in found._asdict().items() if v is not None}, "grad": grad}


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("ranking", "sft"), FORMS)
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients(impl, name, ranking, sft, masked, device):
    # Small log-probs, whose probabilities do not vanish.
    logps, cu, rewards, mask, upstream = example(LENGTHS[name], device, scale=0.01)
    mask = mask if masked else None
    options = {"ranking": ranking, "sft": sft, "reward_temperature": 0.7}
    actual = run(logps, cu, rewards, mask, upstream, impl, **options)
    eager = run(logps, cu, rewards, mask, upstream, "reference", **options)
    exact = run(logps.double(), cu, rewards.double(), mask, upstream, "reference", **options)
    assert torch.equal(actual["counts"], exact["counts"])
    assert torch.equal(actual["is_ranked"], exact["is_ranked"])
    assert torch.equal(actual["chosen_rewards"], rewards[0::2])
    assert torch.equal(actual["rejected_rewards"], rewards[1::2])
    assert actual.keys() == exact.keys() and not {"is_noisy", "confidences"} & actual.keys()
    for key in ("losses", "margins", "sums", "sft_weights", "grad"):
        inside = actual["sums"].abs().max().item() if key == "margins" else 0.0
        assert actual[key].dtype == torch.float32, key
        assert_as_exact_as_eager(actual[key], eager[key], exact[key], key, inside)


@pytest.mark.parametrize(("ranking", "sft"), FORMS)
@pytest.mark.parametrize("impl", EVERY)
def test_it_is_enhancement_loss_of_the_sums(impl, ranking, sft, device):
    logps, cu, rewards, mask, upstream = example(LENGTHS["ragged"], device, scale=0.01)
    options = {"ranking": ranking, "sft": sft, "impl": impl}
    leaf = logps.clone().requires_grad_()
    sums, counts = sequence_logps(leaf, cu_seqlens=cu, mask=mask, impl=impl)
    expected = enhancement_loss(
        sums[1::2], sums[0::2], rewards[1::2], rewards[0::2], plain_lengths=counts[1::2],
        guided_lengths=counts[0::2], threshold=0.25, **options,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(expected.losses, leaf, upstream)
    found = run(logps, cu, rewards, mask, upstream, **options)
    assert 0 < expected.is_ranked.sum() < 4
    assert torch.equal(found["sums"], sums) and torch.equal(found["counts"], counts)
    assert torch.equal(found["losses"], expected.losses)
    assert torch.equal(found["is_ranked"], expected.is_ranked)
    assert torch.equal(found["sft_weights"], expected.weights)
    torch.testing.assert_close(found["grad"], grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("ranking", "sft"), FORMS)
@pytest.mark.parametrize("threshold", [-INF, 0.25, INF])
def test_gradcheck(threshold, ranking, sft):
    logps, cu, rewards, mask, _ = example((3, 2, 1, 4, 5, 2), "cpu", torch.float64)

    def losses(x):
        return pair_loss_head(
            x, cu_seqlens=cu, loss="ple", rewards=rewards, threshold=threshold, mask=mask,
            ranking=ranking, sft=sft, impl="chunked",
        ).losses  # fmt: skip

    assert torch.autograd.gradcheck(losses, logps.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision(impl, dtype, device):
    given = example(LENGTHS["ragged"], device, dtype)
    actual, eager = run(*given, impl), run(*given, "reference")
    exact = run(*(t.double() if t.dtype == dtype else t for t in given), "reference")
    assert actual["grad"].dtype == dtype and actual["losses"].dtype == torch.float32
    for key in ("losses", "sft_weights", "grad"):
        assert_as_exact_as_eager(actual[key], eager[key], exact[key], key)


@pytest.mark.parametrize("threshold", [-INF, INF])
@pytest.mark.parametrize("impl", EVERY)
def test_masked_tokens_and_empty_responses_count_for_nothing(impl, threshold, device):
    logps, cu, rewards, mask, upstream = example(LENGTHS["empty"], device)
    mask[:4] = False
    spoiled = torch.where(mask, logps, math.nan)
    found = run(spoiled, cu, rewards, mask.int(), upstream, impl, threshold)
    clean = run(torch.where(mask, logps, 0), cu, rewards, mask, upstream, impl, threshold)
    assert all(torch.equal(found[key], clean[key]) for key in found)
    assert found["counts"].tolist() == [0, 0, mask[4:].sum().item(), 0, 0, 0]
    assert (found["grad"][~mask] == 0).all()
    assert found["losses"][0] == 0 and found["losses"][2] == 0
    if threshold > 0:
        weight = found["sft_weights"][1, 1] / found["counts"][2] * upstream[1]
        torch.testing.assert_close(found["grad"][mask], -weight.expand(int(mask.sum())))


@pytest.mark.parametrize("impl", EVERY)
def test_no_pairs(impl, device):
    logps, cu, rewards, _, upstream = example((), device)
    found = run(logps, cu, rewards, None, upstream, impl)
    assert all(value.shape[0] == 0 for value in found.values())


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl, device):
    logps, cu, rewards, mask, upstream = example(LENGTHS["ragged"], device)
    given = [torch.stack([t] * 3, -1)[:, 1] for t in (logps, cu, rewards, mask, upstream)]
    assert all(t.stride(0) == 3 for t in given)
    found, expected = run(*given, impl), run(logps, cu, rewards, mask, upstream, impl)
    assert all(torch.equal(found[key], expected[key]) for key in found)


# The linear head in front


def linear_example(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    lengths, vocab, width = (3, 5, 2, 7, 4, 4, 0, 6), 37, 8
    tokens = sum(lengths)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype)
    weight = (torch.randn(vocab, width, generator=generator) / 2).to(device, dtype)
    bias = torch.randn(vocab, generator=generator).to(device, dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator).to(device)
    targets[[0, 4, 9]] = -100
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device)
    rewards = (torch.randint(-8, 9, (8,), generator=generator) / 8).to(device, dtype)
    return (hidden, weight, bias), targets, cu, rewards


def run_linear(leaves, targets, cu, rewards, impl, reduction="none", **options):
    hidden, weight, bias = leaves = [t.detach().requires_grad_() for t in leaves]
    options = {"threshold": 0.0, "softcap": 9.0, "temperature": 0.8, **options}
    found = linear_preference_loss(
        hidden, weight, targets, bias=bias, cu_seqlens=cu, loss="ple", rewards=rewards,
        reduction=reduction, impl=impl, **options,
    )  # fmt: skip
    upstream = torch.arange(1, found.losses.numel() + 1, device=hidden.device)
    upstream = upstream.view(found.losses.shape).to(found.losses.dtype)
    grads = torch.autograd.grad(found.losses, leaves, upstream)
    names = ("grad_hidden", "grad_weight", "grad_bias")
    return {**found._asdict(), **dict(zip(names, grads, strict=True))}


def by_hand(leaves, targets, cu, rewards, ranking, sft, reduction):
    """Return the losses and their gradients in float64, from the logits and a loop."""
    hidden, weight, bias = leaves = [t.double().requires_grad_() for t in leaves]
    logits = 9 * torch.tanh((hidden @ weight.T + bias) / 9) / 0.8
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    losses = []
    for b in range(len(rewards) // 2):
        sums, means = [], []
        for s in (2 * b, 2 * b + 1):
            rows = slice(int(cu[s]), int(cu[s + 1]))
            kept = logps[rows][targets[rows] != -100]
            sums.append(kept.sum())
            means.append(kept.mean() if len(kept) else kept.sum())
        guided, plain = rewards[2 * b].double(), rewards[2 * b + 1].double()
        if guided - plain > 0:
            score = means if ranking in ("mean", "logistic") else sums
            score = [x.exp() for x in sums] if ranking == "probability" else score
            gap = score[1] - score[0]
            losses.append(gap.exp().log1p() if ranking == "logistic" else gap.relu())
        else:
            weights = torch.stack([guided, plain]).div(0.5).softmax(0)
            x = torch.stack(means if sft == "mean" else sums)
            losses.append(-(weights * x).sum())
    losses = torch.stack(losses)
    losses = losses if reduction == "none" else losses.mean()
    upstream = torch.arange(1, losses.numel() + 1, device=hidden.device).double()
    return losses, *torch.autograd.grad(losses, leaves, upstream.view(losses.shape))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("ranking", "sft"), FORMS)
@pytest.mark.parametrize("impl", ("chunked", "reference"))
def test_linear_in_float64(impl, ranking, sft, reduction):
    given = linear_example("cpu", torch.float64)
    options = {"ranking": ranking, "sft": sft, "reward_temperature": 0.5}
    found = run_linear(*given, impl, reduction, **options)
    assert 0 < found["is_ranked"].sum() < 4
    expected = by_hand(*given, ranking, sft, reduction)
    keys = ("losses", "grad_hidden", "grad_weight", "grad_bias")
    for key, value in zip(keys, expected, strict=True):
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("impl", IMPLS)
def test_linear_in_float32(impl, reduction, device):
    leaves, targets, cu, rewards = linear_example(device)
    actual = run_linear(leaves, targets, cu, rewards, impl, reduction)
    eager = run_linear(leaves, targets, cu, rewards, "reference", reduction)
    wide = [t.double() for t in leaves]
    exact = run_linear(wide, targets, cu, rewards.double(), "reference", reduction)
    assert torch.equal(actual.pop("is_ranked"), exact["is_ranked"])
    for key, value in actual.items():
        inside = exact[key].abs().max().item() if key.startswith("grad") else 0.0
        assert_as_exact_as_eager(value, eager[key], exact[key], key, inside)


def test_linear_answers_in_the_dtype_of_the_hidden_states(device):
    leaves, targets, cu, rewards = linear_example(device)
    expected = run_linear(leaves, targets, cu, rewards, "chunked")
    threshold = torch.zeros((), dtype=torch.float64, device=device)
    found = run_linear(leaves, targets, cu, rewards.double(), "chunked", threshold=threshold)
    assert found["losses"].dtype == torch.float32
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("impl", EVERY)
def test_linear_ignores_rows_without_a_target(impl, device):
    (hidden, weight, bias), targets, cu, rewards = linear_example(device)
    expected = run_linear((hidden, weight, bias), targets, cu, rewards, impl)
    hidden[targets == -100] = 3.0
    found = run_linear((hidden, weight, bias), targets, cu, rewards, impl)
    assert torch.equal(found["losses"], expected["losses"])
    assert (found["grad_hidden"][targets == -100] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_linear_compiles_as_one_graph(impl, device):
    leaves, targets, cu, rewards = linear_example(device)
    threshold = torch.tensor(0.0, device=device)

    def mean(hidden, weight, bias):
        return linear_preference_loss(
            hidden, weight, targets, bias=bias, cu_seqlens=cu, loss="ple", rewards=rewards,
            threshold=threshold, reduction="mean", impl=impl,
        ).losses  # fmt: skip

    leaves = [t.requires_grad_() for t in leaves]
    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager")
    expected, found = mean(*leaves), compiled(*leaves)
    assert torch.equal(found, expected)
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (found, expected)), strict=True):
        assert torch.equal(a, b)


# Contract


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, device):
    logps, cu, rewards, mask, _ = example((3, 5, 2, 4), device)
    scalar = torch.tensor(0.2, device=device)
    args = (logps.requires_grad_(), rewards, mask, cu, scalar, "mean", "sum", 0.7, impl)
    torch.library.opcheck(torch.ops.prefalign.enhancement_head, args)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_is_pure_and_deterministic(impl, device):
    logps, cu, rewards, mask, upstream = example(LENGTHS["ragged"], device)
    leaf = logps.clone().requires_grad_()
    options = {"rewards": rewards, "threshold": 0.25, "mask": mask, "impl": impl}
    found = pair_loss_head(leaf, cu_seqlens=cu, loss="ple", **options)
    assert [name for name, x in found._asdict().items() if x is not None and x.requires_grad] == [
        "losses"
    ]
    first, second, tripled = (
        torch.autograd.grad(found.losses, leaf, u, retain_graph=True)[0]
        for u in (upstream, upstream, -3 * upstream)
    )
    assert torch.equal(first, second) and torch.equal(leaf, logps)
    torch.testing.assert_close(tripled, -3 * first)
    again = run(logps, cu, rewards, mask, upstream, impl)
    assert torch.equal(again["losses"], found.losses) and torch.equal(again["grad"], first)


PAIR = {"cu_seqlens": torch.tensor([0, 2, 3]), "rewards": torch.zeros(2), "threshold": 0.2}
BAD = {
    "rewards: expected a tensor with loss='ple', got None": {"rewards": None},
    r"rewards: expected shape \(2,\), got \(1,\)": {"rewards": torch.zeros(1)},
    "rewards: expected a constant": {"rewards": torch.zeros(2, requires_grad=True)},
    "threshold: expected a number with loss='ple', got None": {"threshold": None},
    "threshold: expected a finite number, got nan": {"threshold": math.nan},
    "ranking: expected one of 'mean', 'sum', 'probability', 'logistic', got 'hinge'": {
        "ranking": "hinge"
    },
    "sft: expected one of 'mean', 'sum', got 'none'": {"sft": "none"},
    "reward_temperature: expected a number above 0, got 0": {"reward_temperature": 0},
    "ref_logps: expected none with loss='ple', got Tensor": {"ref_logps": torch.zeros(2)},
    "weights: expected none with loss='ple', got Tensor": {"weights": torch.zeros(1)},
    "alpha: expected none with loss='ple', got 0.1": {"alpha": 0.1},
    "label_smoothing: expected none with loss='ple', got 0.1": {"label_smoothing": 0.1},
    "impl: expected one of": {"impl": "eager"},
}
FOREIGN = {"rewards": torch.zeros(2), "ranking": "mean", "sft": "sum", "reward_temperature": 1.0}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    given = {**PAIR, **BAD[message], "loss": "ple"}
    with pytest.raises((TypeError, ValueError), match=message):
        pair_loss_head(torch.zeros(3), **given)
    targets = torch.zeros(3, dtype=torch.int64)
    with pytest.raises((TypeError, ValueError), match=message):
        linear_preference_loss(torch.zeros(3, 4), torch.zeros(5, 4), targets, **given)


@pytest.mark.parametrize("name", FOREIGN)
def test_other_losses_refuse_its_options(name):
    message = f"{name}: expected None, only 'ple' takes it"
    given = {"cu_seqlens": PAIR["cu_seqlens"], "ref_logps": torch.zeros(2), name: FOREIGN[name]}
    with pytest.raises(ValueError, match=message):
        pair_loss_head(torch.zeros(3), **given)
    targets = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        linear_preference_loss(torch.zeros(3, 4), torch.zeros(5, 4), targets, **given)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("ranking", "sft"), FORMS)
def test_compiles_without_spills(ranking, sft, target):
    pytest.importorskip("triton")
    fn, row = page._forward_kernel, RANKINGS[ranking]
    constexprs = {"RANKING": row.device, "RANKS_MEANS": row.per_token, "HAS_MASK": True}
    constexprs |= {"TUNES_MEANS": sft == "mean", "BLOCK_T": BLOCK_T}
    kinds = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in fn.arg_names}
    kinds |= {"cu_ptr": "*i64", "counts_ptr": "*i64", "mask_ptr": "*i1", "is_ranked_ptr": "*i1"}
    kinds |= {"temperature": "fp32"}
    signature = {name: kind for name, kind in kinds.items() if name not in constexprs}
    used = compile_kernel(fn, signature, constexprs, target)
    assert used.spills == 0
    assert used.shared_bytes <= 99 << 10
    if target == "sm_90":
        ones = {name: 1 for name, kind in signature.items() if kind == "i32"}
        rest = {name: kind for name, kind in signature.items() if name not in ones}
        assert compile_kernel(fn, rest, constexprs | ones, target).spills == 0


@pytest.mark.gpu
def test_no_host_sync_on_a_gpu():
    logps, cu, rewards, mask, _ = example(LENGTHS["ragged"], "cuda")
    leaf = logps.requires_grad_()
    options = {"rewards": rewards, "mask": mask, "cu_seqlens": cu, "loss": "ple"}
    for threshold in (0.2, torch.tensor(0.2, device="cuda")):
        pair_loss_head(leaf, threshold=threshold, **options).losses.sum().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            pair_loss_head(leaf, threshold=threshold, **options).losses.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
