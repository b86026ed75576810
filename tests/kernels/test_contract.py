"""What every op owes: opcheck, torch.compile, determinism, a backward pass that is pure."""

import pytest
import torch
import torch._dynamo.testing
from prefalign.kernels.enhancement_loss import enhancement_loss
from prefalign.kernels.noise_aware_loss import noise_aware_loss
from prefalign.kernels.pairwise_preference_logits import pairwise_preference_logits
from prefalign.kernels.preference_loss import preference_loss
from prefalign.kernels.sequence_logps import sequence_logps
from prefalign.kernels.token_logps import token_logps

IMPLS = ("chunked", "triton")


def tokens(device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 37, generator=generator).to(device)
    targets = torch.randint(37, (2, 5), generator=generator).to(device)
    targets[1, 3] = -100
    return logits, targets


def logps(count, device):
    generator = torch.Generator().manual_seed(0)
    return list((5 * torch.randn(count, 6, generator=generator)).to(device))


def token_case(device, impl):
    logits, targets = tokens(device)

    def call(x):
        found = token_logps(x, targets, softcap=9.0, outputs=("entropy", "lse"), impl=impl)
        return found.logps, found.entropy

    return call, [logits]


def sequence_case(device, impl):
    cu = torch.tensor([0, 2, 2, 6], device=device, dtype=torch.int32)
    mask = torch.tensor([1, 1, 0, 1, 1, 0], device=device).bool()
    return (
        lambda x: (sequence_logps(x, cu_seqlens=cu, mask=mask, impl=impl).sums,),
        logps(1, device),
    )


def preference_case(device, impl):
    _, _, *reference, weights = logps(5, device)
    options = {"label_smoothing": 0.1, "weights": weights, "impl": impl}
    return (
        lambda c, r: (preference_loss(c, r, *reference, **options).losses,),
        logps(2, device),
    )


def noise_aware_case(device, impl):
    _, _, *constants = logps(6, device)
    options = {"alpha": 0.3, "threshold": 0.5, "impl": impl}
    return (
        lambda c, r: (noise_aware_loss(c, r, *constants, **options).losses,),
        logps(2, device),
    )


def enhancement_case(device, impl):
    rewards, lengths = logps(2, device), torch.tensor([3, 1, 4, 1, 5, 9], device=device)
    options = {"plain_lengths": lengths, "guided_lengths": lengths.flip(0), "impl": impl}
    options |= {"threshold": 0.5, "ranking": "logistic"}
    return (
        lambda p, g: (enhancement_loss(p, g, *rewards, **options).losses,),
        logps(2, device),
    )


def pairwise_case(device, impl):
    policy, reference = logps(2, device)
    options = {"group_sizes": [4, 2], "impl": impl}
    return lambda x: (pairwise_preference_logits(x, reference, **options),), [policy]


CASES = {
    "token_logps": token_case,
    "sequence_logps": sequence_case,
    "preference_loss": preference_case,
    "noise_aware_loss": noise_aware_case,
    "enhancement_loss": enhancement_case,
    "pairwise_preference_logits": pairwise_case,
}


@pytest.fixture(params=CASES)
def case(request, impl, device):
    """Return a function of leaves that require grad, the leaves, and an upstream per output."""
    call, leaves = CASES[request.param](device, impl)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    generator = torch.Generator().manual_seed(9)
    upstreams = [torch.randn(out.shape, generator=generator).to(device) for out in call(*leaves)]
    return call, leaves, upstreams


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_backward_gives_the_same(case):
    call, leaves, upstreams = case
    outs = call(*leaves)
    first = torch.autograd.grad(outs, leaves, upstreams, retain_graph=True)
    other = torch.autograd.grad(outs, leaves, [u * -3 for u in upstreams], retain_graph=True)
    second = torch.autograd.grad(outs, leaves, upstreams)
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("impl", IMPLS)
def test_deterministic_bit_for_bit(case):
    call, leaves, upstreams = case
    expected = call(*leaves)
    expected = (*expected, *torch.autograd.grad(expected, leaves, upstreams))
    for _ in range(3):
        outs = call(*leaves)
        outs = (*outs, *torch.autograd.grad(outs, leaves, upstreams))
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_and_upstreams_are_never_written(case):
    call, leaves, upstreams = case
    before = [t.detach().clone() for t in (*leaves, *upstreams)]
    outs = call(*leaves)
    kept = [out.detach().clone() for out in outs]
    torch.autograd.grad(outs, leaves, upstreams)
    assert all(torch.equal(a, b) for a, b in zip((*leaves, *upstreams), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(outs, kept, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_each_input_alone_may_require_grad(case):
    call, leaves, upstreams = case
    expected = torch.autograd.grad(call(*leaves), leaves, upstreams)
    for i, leaf in enumerate(leaves):
        alone = [other if other is leaf else other.detach() for other in leaves]
        (grad,) = torch.autograd.grad(call(*alone), leaf, upstreams)
        assert torch.equal(grad, expected[i])
    assert not any(out.requires_grad for out in call(*(leaf.detach() for leaf in leaves)))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_refused_not_wrong(case):
    # Also of a linear root, whose upstream is a constant: what a backward pass keeps depends on
    # the leaves too, and to autograd it is constant.
    call, leaves, upstreams = case
    outs = call(*leaves)
    with pytest.raises(NotImplementedError, match="expected one derivative, got a second"):
        torch.autograd.grad(outs, leaves, upstreams, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_as_one_graph_gives_the_same(case):
    # Liger #1338: a wrong loss under compile with ignore_index.
    call, leaves, upstreams = case
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, found = call(*leaves), compiled(*leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    wanted = torch.autograd.grad(expected, leaves, upstreams)
    grads = torch.autograd.grad(found, leaves, upstreams)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def test_compiled_once_for_every_length():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def loss(logits, targets, reference):
        sums = sequence_logps(token_logps(logits, targets), mask=targets != -100).sums
        return preference_loss(sums[::2], sums[1::2], reference[::2], reference[1::2]).losses

    compilations = []
    for pairs, length in ((2, 5), (3, 7), (4, 19)):
        logits = torch.randn(2 * pairs, length, 11, requires_grad=True)
        targets = torch.randint(11, (2 * pairs, length))
        targets[1, 2] = -100
        with torch.no_grad():
            reference = sequence_logps(token_logps(logits, targets)).sums
        losses = loss(logits, targets, reference)
        assert torch.equal(losses, torch.tensor(2.0).log().expand(pairs))
        losses.sum().backward()
        assert (logits.grad[1, 2] == 0).all() and (logits.grad[0, 2] != 0).any()
        compilations.append(counter.frame_count)
    assert compilations[0] > 0 and compilations == compilations[:1] * 3


def opcheck_samples(device, impl):
    logits, targets = tokens(device)
    ops = torch.ops.prefalign
    c, r, a, b, e, f, w = logps(7, device)
    cu = torch.tensor([0, 2, 6], device=device)
    scalar = torch.tensor(0.3, device=device)
    lengths = torch.arange(6, device=device)
    leaf = logits.clone().requires_grad_()
    c, r = c.requires_grad_(), r.requires_grad_()
    row = torch.randn(2, 5, device=device)
    detached = c.detach()
    return {
        "token_logps": (ops.token_logps, (leaf, targets, 0.7, 9.0, -100, "entropy", impl)),
        "token_logps_backward": (
            ops.token_logps_backward,
            (row, None, logits, targets, row, row, row, 0.7, None, -100, impl),
        ),
        "sequence_logps": (ops.sequence_logps, (c, cu, None, impl)),
        "sequence_logps_backward": (
            ops.sequence_logps_backward,
            (scalar[None].repeat(2), detached, cu, None, impl),
        ),
        "preference_loss": (
            ops.preference_loss,
            (c, r, a, b, lengths, lengths, w, a, "ipo", 0.1, 0.0, 0.0, "js_divergence", 0.0, impl),
        ),
        "noise_aware_loss": (
            ops.noise_aware_loss,
            (c, r, a, b, e, f, None, scalar, scalar, 0.1, impl),
        ),
        "enhancement_loss": (
            ops.enhancement_loss,
            (c, r, lengths, lengths, a, b, scalar, "mean", "mean", 0.7, impl),
        ),
        "enhancement_loss_of_sums": (
            ops.enhancement_loss,
            (c, r, None, None, a, b, scalar, "sum", "sum", 0.7, impl),
        ),
        "pairwise_preference_logits": (
            ops.pairwise_preference_logits,
            (c, a, cu, 4, 20, 0.1, True, impl),
        ),
        "pairwise_preference_logits_flat": (
            ops.pairwise_preference_logits,
            (c, a, cu, 4, 20, 0.1, False, impl),
        ),
        "pairwise_preference_logits_backward": (
            ops.pairwise_preference_logits_backward,
            (torch.randn(2, 4, 4, device=device), detached, cu, 4, 0.1, True, impl),
        ),
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", opcheck_samples("cpu", "chunked"))
def test_opcheck(name, impl, device):
    op, args = opcheck_samples(device, impl)[name]
    torch.library.opcheck(op, args)
