"""pair_loss_head: sums, losses and token gradients of ragged pairs in one launch each way."""

import math

import pytest
import torch
from crosscompile import TARGETS, compile_kernel
from pair_losses import LOPSIDED
from prefalign.kernels import _loss_heads_triton as kernels
from prefalign.kernels.loss_heads import pair_loss_head
from prefalign.kernels.losses import LOSSES, Objective, device_options
from prefalign.kernels.noise_aware_loss import noise_aware_loss
from prefalign.kernels.objectives import loss_names
from prefalign.kernels.preference_loss import preference_loss
from prefalign.kernels.sequence_logps import BLOCK_T, sequence_logps
from tolerance import assert_as_exact_as_eager

IMPLS = ("chunked", "triton")
EVERY = (*IMPLS, "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = {
    "ragged": [5, 1, 0, 3, 17, 9, 1, 1],
    "one": [1, 1],
    "long": [BLOCK_T - 1, BLOCK_T + 1, BLOCK_T, 2 * BLOCK_T + 7],
}
NAMES = ("losses", "chosen_rewards", "rejected_rewards", "margins", "sums")


def example(lengths, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens, pairs = sum(lengths), len(lengths) // 2
    logps = -3 * torch.rand(3, tokens, generator=generator)
    return {
        "logps": list(logps.to(device, dtype)),
        "cu": torch.tensor([0, *lengths]).cumsum(0).to(device),
        "mask": (torch.rand(tokens, generator=generator) > 0.3).to(device),
        "weights": torch.rand(pairs, generator=generator).to(device),
        "upstream": torch.randn(pairs, generator=generator).to(device),
    }


def run(given, impl, dtype=None, refs="sums", masked=False, weighted=False, **options):
    policy, ref, beyond = (t if dtype is None else t.to(dtype) for t in given["logps"])
    cu, mask = given["cu"], given["mask"] if masked else None
    if options.get("loss") == "noise_aware":
        options["extrapolated_token_logps"] = beyond
    if refs == "sums":
        exact = sequence_logps(ref.double(), cu_seqlens=cu, mask=mask, impl="chunked").sums
        options["ref_logps"] = exact.to(policy.dtype)
    else:
        options["ref_token_logps"] = ref
    if weighted:
        options["weights"] = given["weights"].to(policy.dtype)
    leaf = policy.detach().requires_grad_()
    out = pair_loss_head(leaf, cu_seqlens=cu, mask=mask, impl=impl, **options)
    (grad,) = torch.autograd.grad(out.losses, leaf, given["upstream"].to(out.losses.dtype))
    return out, grad


OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2, "masked": True, "weighted": True},
    "tokens": {"refs": "tokens", "masked": True},
    "noisy": {"refs": "tokens", "loss": "noise_aware", "threshold": 0.5, "alpha": 0.3},
    "noisy_sums": {"loss": "noise_aware", "threshold": 0.45, "masked": True, "weighted": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients(impl, dtype, lengths, options, device):
    given, options = example(LENGTHS[lengths], device, dtype), OPTIONS[options]
    out, grad = run(given, impl, **options)
    eager, eager_grad = run(given, "reference", **options)
    # Reference sums in the policy's dtype are the input: the exact answer starts from the same.
    exact, exact_grad = run(given, "reference", torch.float64, **options)
    assert grad.dtype == dtype and out.losses.dtype == torch.float32
    assert torch.equal(out.counts, exact.counts)
    if dtype == torch.float32 or options.get("refs") == "tokens":
        # A margin is what is left of two sums, a thousand times its size.
        size = exact.sums.abs().max().item()
        for name in NAMES:
            values = (getattr(found, name) for found in (out, eager, exact))
            inside = size if name in ("sums", "margins") else 0.1 * size
            assert_as_exact_as_eager(*values, name, inside=inside)
        inside = 0.1 * size * exact_grad.abs().max().item()
        assert_as_exact_as_eager(grad, eager_grad, exact_grad, "grad", inside=inside)
    if "threshold" in options:
        assert torch.equal(out.is_noisy, out.confidences < options["threshold"])
    if options.get("masked"):
        assert (grad[~given["mask"]] == 0).all()


@pytest.mark.parametrize("options", [{}, {"masked": True, "weighted": True, "refs": "tokens"}])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_loss_of_each_sequence_by_itself(impl, options, device, monkeypatch):
    monkeypatch.setitem(LOSSES, "lopsided", LOPSIDED)
    given = example(LENGTHS["ragged"], device)
    out, grad = run(given, impl, loss="lopsided", **options)
    eager, eager_grad = run(given, "reference", loss="lopsided", **options)
    exact, exact_grad = run(given, "reference", torch.float64, loss="lopsided", **options)
    for name in NAMES:
        values = (getattr(found, name) for found in (out, eager, exact))
        assert_as_exact_as_eager(*values, name, inside=exact.sums.abs().max().item())
    assert_as_exact_as_eager(grad, eager_grad, exact_grad, "grad", inside=1.0)
    assert (exact_grad[:5].sum() + exact_grad[5:6].sum()).abs() > 1e-3  # and not opposite


@pytest.mark.parametrize("loss", (*loss_names(), "noise_aware"))
@pytest.mark.parametrize("impl", IMPLS)
def test_gives_what_the_separate_ops_give(impl, loss, device):
    given = example(LENGTHS["ragged"], device)
    options = {"loss": loss, "refs": "tokens", "masked": True, "weighted": True}
    options |= {"threshold": 0.5, "alpha": 0.3} if loss == "noise_aware" else {}
    smoothing = {"label_smoothing": 0.1} if loss in ("cdpo", "exo_pair") else {}
    options |= smoothing
    out, grad = run(given, impl, **options)
    leaf = given["logps"][0].detach().requires_grad_()
    found = [
        sequence_logps(x, cu_seqlens=given["cu"], mask=given["mask"], impl=impl)
        for x in (leaf, *given["logps"][1:])
    ]
    sums = [x[i::2] for x, _ in found for i in (0, 1)]
    if loss == "noise_aware":
        want = noise_aware_loss(*sums, alpha=0.3, threshold=0.5, weights=given["weights"])
        assert torch.equal(out.is_noisy, want.is_noisy)
    else:
        counts = {"chosen_counts": out.counts[0::2], "rejected_counts": out.counts[1::2]}
        want = preference_loss(
            *sums[:4], loss_type=loss, weights=given["weights"], **counts, **smoothing
        )
    assert torch.equal(out.sums, found[0].sums) and torch.equal(out.counts, found[0].counts)
    torch.testing.assert_close(out.losses, want.losses, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out.chosen_rewards, want.chosen_rewards, rtol=1e-6, atol=1e-7)
    (expected,) = torch.autograd.grad(want.losses, leaf, given["upstream"])
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", ("sigmoid", "cdpo", "sigmoid_norm", "noise_aware"))
@pytest.mark.parametrize("impl", IMPLS)
def test_ln_2_exactly_where_policy_is_reference(impl, loss, device):
    given = example(LENGTHS["ragged"] + LENGTHS["long"], device)
    given["logps"] = given["logps"][:1] * 3
    options = {"loss": loss, "refs": "tokens", "masked": True}
    options |= {"threshold": 0.6} if loss == "noise_aware" else {"label_smoothing": 0.1}
    out, _ = run(given, impl, **options)
    assert torch.equal(out.losses, torch.full_like(out.losses, math.log(2)))
    assert (out.margins == 0).all() and (out.chosen_rewards == 0).all()
    sums = sequence_logps(given["logps"][0], cu_seqlens=given["cu"], impl=impl).sums
    again = pair_loss_head(given["logps"][0], cu_seqlens=given["cu"], ref_logps=sums, impl=impl)
    assert torch.equal(again.losses, out.losses)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_pair_does_not_depend_on_the_others(impl, device):
    lengths = LENGTHS["ragged"]
    given, other = example(lengths, device), example(lengths, device)
    first = sum(lengths[:4])
    for x in other["logps"]:
        x[first:] = -1e4
    (a, ga), (b, gb) = (run(g, impl, refs="tokens") for g in (given, other))
    alone = example(lengths[:4], device) | {"logps": [x[:first] for x in given["logps"]]}
    alone["upstream"] = given["upstream"][:2]
    c, gc = run(alone, impl, refs="tokens")
    for name in NAMES:
        x, y, z = (getattr(out, name) for out in (a, b, c))
        assert torch.equal(x[: z.numel()], y[: z.numel()]) and torch.equal(x[: z.numel()], z), name
    assert torch.equal(ga[:first], gb[:first]) and torch.equal(ga[:first], gc)


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_tokens_may_hold_nan(impl, device):
    given = example(LENGTHS["ragged"], device)
    clean = run(given, impl, refs="tokens", masked=True)
    given["logps"] = [x.masked_fill(~given["mask"], torch.nan) for x in given["logps"]]
    out, grad = run(given, impl, refs="tokens", masked=True)
    assert torch.equal(out.losses, clean[0].losses) and torch.equal(grad, clean[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_dtypes_of_bounds_and_integer_masks(impl, device):
    given = example(LENGTHS["ragged"], device)
    expected = run(given, impl, refs="tokens", masked=True)
    given["logps"] = [torch.stack([x, x + 9], 1)[:, 0] for x in given["logps"]]
    given["cu"] = given["cu"].int()
    given["upstream"] = torch.stack([given["upstream"]] * 3, 1)[:, 1]
    out, grad = run(given, impl, refs="tokens", masked=True)
    assert torch.equal(out.losses, expected[0].losses) and torch.equal(grad, expected[1])
    leaf, ref, _ = given["logps"]
    ints = pair_loss_head(
        leaf, cu_seqlens=given["cu"], ref_token_logps=ref, mask=given["mask"].int(), impl=impl
    )
    assert torch.equal(ints.losses, expected[0].losses)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_backward_determinism_and_purity(impl, device):
    given = example(LENGTHS["ragged"], device)
    leaf = given["logps"][0].detach().requires_grad_()
    grads = []
    for _ in range(2):
        out = pair_loss_head(
            leaf, cu_seqlens=given["cu"], ref_token_logps=given["logps"][1], impl=impl
        )
        for _ in range(2):
            grads += torch.autograd.grad(out.losses, leaf, given["upstream"], retain_graph=True)
    assert all(torch.equal(grads[0], other) for other in grads[1:])
    (tripled,) = torch.autograd.grad(out.losses, leaf, 3 * given["upstream"])
    torch.testing.assert_close(tripled, 3 * grads[0])
    assert not any(x.requires_grad for x in out[1:6])
    root = pair_loss_head(
        leaf, cu_seqlens=given["cu"], ref_token_logps=given["logps"][1], impl=impl
    ).losses.square()
    with pytest.raises(NotImplementedError, match="pair_loss_head: expected one derivative"):
        torch.autograd.grad(root.sum(), leaf, create_graph=True)


@pytest.mark.parametrize("impl", EVERY)
def test_empty(impl, device):
    none, cu = torch.zeros(0, device=device), torch.tensor([0], device=device)
    leaf = none.clone().requires_grad_()
    out = pair_loss_head(leaf, cu_seqlens=cu, ref_token_logps=none, impl=impl)
    assert out.losses.shape == out.sums.shape == (0,)
    out.losses.sum().backward()
    assert leaf.grad is None or leaf.grad.shape == (0,)
    cu = torch.tensor([0, 0, 0], device=device)
    out = pair_loss_head(leaf, cu_seqlens=cu, ref_token_logps=none, impl=impl)
    torch.testing.assert_close(out.losses, torch.tensor([math.log(2)], device=device))
    assert out.counts.tolist() == [0, 0]


def test_float64_stays(device):
    given = example(LENGTHS["ragged"], device, torch.float64)
    (a, ga), (b, gb) = (run(given, impl, refs="tokens") for impl in ("chunked", "reference"))
    assert a.losses.dtype == torch.float64
    torch.testing.assert_close(a.losses, b.losses, rtol=1e-13, atol=0)
    torch.testing.assert_close(ga, gb, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", ("sigmoid", "noise_aware"))
@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole_and_passes_opcheck(impl, loss, device):
    given = example([3, 2, 1, 4], device)
    policy, ref, beyond = given["logps"]
    noisy = loss == "noise_aware"
    options = {"threshold": 0.5, "extrapolated_token_logps": beyond} if noisy else {}

    def step(x):
        return pair_loss_head(
            x, cu_seqlens=given["cu"], ref_token_logps=ref, mask=given["mask"], loss=loss,
            impl=impl, **options,
        ).losses  # fmt: skip

    leaf = policy.detach().requires_grad_()
    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        losses = fn(leaf)
        results.append((losses, *torch.autograd.grad(losses, leaf, given["upstream"])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    scalar = torch.tensor(0.4, device=device)
    more = (scalar, scalar) if noisy else (None, None)
    torch.library.opcheck(
        torch.ops.prefalign.pair_loss_head.default,
        (leaf, ref, beyond if noisy else None, given["mask"], given["cu"], given["weights"],
         *more, True, "sigmoid", 0.1, 0.0, 0.0, "reverse_kl", 0.0, impl),
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.prefalign.pair_loss_head_backward.default,
        (given["upstream"], given["weights"].repeat(2), given["cu"], None, 10, torch.float32, impl),
    )


def test_tokens_of_no_sequence_have_no_gradient(device):
    # On a GPU nobody checks that cu_seqlens covers the tokens: every element must be written.
    cu, slopes = torch.tensor([1, 2, 4], device=device), torch.tensor([1.0, -2.0], device=device)
    grad = torch.ops.prefalign.pair_loss_head_backward(
        slopes[:1], slopes, cu, None, 6, torch.float32, "triton"
    )
    assert grad.tolist() == [0, 1, -2, -2, 0, 0]


TOKENS, CU = torch.zeros(6), torch.tensor([0, 1, 3, 4, 6])
SUMS = {"ref_logps": torch.zeros(4)}
NOISY = {**SUMS, "loss": "noise_aware"}
BAD = {
    "ref_logps, ref_token_logps: expected exactly one of them, got neither": {},
    "ref_logps, ref_token_logps: expected exactly one of them, got both": {
        **SUMS,
        "ref_token_logps": TOKENS,
    },
    r"ref_logps: expected shape \(4,\), got \(2,\)": {"ref_logps": torch.zeros(2)},
    "ref_logps: expected a constant": {"ref_logps": torch.zeros(4, requires_grad=True)},
    r"ref_token_logps: expected shape \(6,\)": {"ref_token_logps": torch.zeros(4)},
    r"cu_seqlens: expected \[2B \+ 1\].* got 4": {**SUMS, "cu_seqlens": CU[:4]},
    "cu_seqlens: expected to rise from 0 to the 6 tokens": {**SUMS, "cu_seqlens": CU - 1},
    "loss: expected one of 'sigmoid'.*, got 'hinges'": {**SUMS, "loss": "hinges"},
    "beta: expected a number above 0": {**SUMS, "beta": 0},
    "label_smoothing: expected a number of at most 0.5": {**SUMS, "label_smoothing": 0.7},
    "label_smoothing: expected 0 with loss='noise_aware'": {
        **NOISY,
        "threshold": 0.5,
        "label_smoothing": 0.1,
    },
    "threshold: expected a number with loss='noise_aware', got None": NOISY,
    "threshold: expected None, only 'noise_aware'": {**SUMS, "threshold": 0.5},
    "alpha: expected None, only 'noise_aware'": {**SUMS, "alpha": 0.5},
    "alpha: expected a number of at most 1": {**NOISY, "threshold": 0.5, "alpha": 2},
    "extrapolated_token_logps: expected a tensor with": {**NOISY, "threshold": 0.5},
    "extrapolated_token_logps: .* None with": {**SUMS, "extrapolated_token_logps": TOKENS},
    r"weights: expected shape \(2,\), got \(4,\)": {**SUMS, "weights": torch.ones(4)},
    "mask: expected dtype bool": {**SUMS, "mask": TOKENS},
    r"token_logps: expected 1 dimension\(s\)": {**SUMS, "token_logps": torch.zeros(2, 3)},
    "impl: expected one of": {**SUMS, "impl": "fast"},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("impl", ("chunked", "reference"))
def test_bad_arguments(impl, message):
    given = {"token_logps": TOKENS, "cu_seqlens": CU, "impl": impl, **BAD[message]}
    with pytest.raises((TypeError, ValueError), match=message):
        pair_loss_head(**given)


def forward_kernel(noise, name):
    loss = LOSSES[name]
    fn = kernels._forward_kernel
    constexprs = {"REF_TOKENS": noise, "NOISE": noise, "HAS_MASK": noise, "HAS_WEIGHTS": True}
    constexprs |= {
        "HAS_REFERENCE": loss.reference,
        **device_options(Objective(loss=name, beta=0.1)),
        "BLOCK_T": BLOCK_T,
        "stride_l": 1,
        "stride_w": 1,
    }
    if not noise:
        absent = ("extrapolated", "mask", "alpha", "threshold", "is_noisy", "confidences")
        constexprs |= {f"{name}_ptr": None for name in absent}
    return fn, constexprs


KERNELS = {
    "noise_aware": lambda: forward_kernel(True, "sigmoid"),
    "backward": lambda: (kernels._backward_kernel, {"HAS_MASK": True, "BLOCK_T": BLOCK_T}),
} | {name: lambda name=name: forward_kernel(False, name) for name in LOSSES}
KINDS = {"cu_ptr": "*i64", "counts_ptr": "*i64", "mask_ptr": "*i1", "is_noisy_ptr": "*i1"}
KINDS |= {name: "fp32" for name in ("beta", "label_smoothing", "extra", "power")}


WHOLE = ("noise_aware", "backward", "sigmoid")
CASES = [
    (name, target)
    for name in KERNELS
    for target in (TARGETS if name in WHOLE else ("sm_90", "gfx942"))
]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_compiles_without_spills(name, target):
    pytest.importorskip("triton")
    fn, constexprs = KERNELS[name]()
    guess = {key: "*fp32" if key.endswith("_ptr") else "i32" for key in fn.arg_names}
    kinds = {key: kind for key, kind in {**guess, **KINDS}.items() if key in guess}
    signature = {key: kind for key, kind in kinds.items() if key not in constexprs}
    used = compile_kernel(fn, signature, constexprs, target)
    assert used.spills == 0
    assert used.shared_bytes <= 99 << 10
    if target == "sm_90":
        ones = {key: 1 for key, kind in signature.items() if kind == "i32"}
        rest = {key: kind for key, kind in signature.items() if key not in ones}
        assert compile_kernel(fn, rest, constexprs | ones, target).spills == 0


@pytest.mark.gpu
def test_no_host_sync_on_a_gpu():
    given = example(LENGTHS["ragged"], "cuda")
    threshold = torch.tensor(0.5, device="cuda")
    leaf = given["logps"][0].requires_grad_()
    refs = {"cu_seqlens": given["cu"], "ref_token_logps": given["logps"][1]}
    noisy = {"extrapolated_token_logps": given["logps"][2], "threshold": threshold}
    alpha = torch.tensor(0.1, device="cuda")
    noisy |= {"loss": "noise_aware", "alpha": alpha}
    for options in ({}, noisy):
        pair_loss_head(leaf, **refs, **options).losses.sum().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            pair_loss_head(leaf, **refs, **options).losses.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
