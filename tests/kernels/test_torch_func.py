"""Every op under torch.func: what its transforms give, and what is refused, by which name."""

import pytest
import torch
from compiled import EVERY, TinyCausal, make_batch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacrev, jvp, vjp, vmap

import prefalign as P

LENGTHS = [3, 2, 4, 5]
FIRST = {  # the op that the hidden states reach first, which is the one to refuse
    name: "linear_token_logps" for name in EVERY
} | {
    "token_logps": "token_logps",
    "linear_token_logps_triple": "linear_token_logps_triple",
    "linear_token_kl": "linear_token_kl",
    "linear_token_kl, tdpo_loss": "linear_token_(kl|logps)",
}
ONCE = "expected one derivative, got a second .*; impl='reference' has every derivative"
REVERSE = "expected reverse mode .*, got forward mode .*; impl='reference' has both"


def function(name, impl="chunked", dtype=torch.float32, lengths=LENGTHS):
    """Return the op as a function of hidden states and head, those two, and an upstream."""
    model = TinyCausal(EVERY[name], impl, dtype)
    ids, batch = make_batch(lengths, dtype=dtype)
    hidden, weight = model.hidden(ids).detach(), model.head.detach()
    del model._parameters["head"]

    def call(h, w):
        model.__dict__["head"] = w
        return model.top(h, *batch)

    return (
        call,
        (hidden, weight),
        torch.cos(torch.arange(call(hidden, weight).numel(), dtype=dtype)),
    )


def weighted(call, upstream):
    return lambda *args: (call(*args).flatten() * upstream).sum()


def by_autograd(call, args, upstream):
    leaves = [x.detach().requires_grad_() for x in args]
    loss = weighted(call, upstream)(*leaves)
    return loss.detach(), torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("name", EVERY)
def test_grad_and_vjp_give_autograd_s_gradients(name):
    call, args, upstream = function(name)
    loss, wanted = by_autograd(call, args, upstream)
    found, value = grad_and_value(weighted(call, upstream), argnums=(0, 1))(*args)
    out, pull = vjp(call, *args)
    pulled = pull(upstream.view(out.shape))
    assert torch.equal(value, loss) and torch.equal(out, call(*args))
    for got, also, want in zip(found, pulled, wanted, strict=True):
        assert want.count_nonzero() and torch.equal(got, want) and torch.equal(also, want)
    (frozen,) = grad(weighted(call, upstream), argnums=(0,))(*args)
    (wanted,) = by_autograd(lambda h: call(h, args[1]), args[:1], upstream)[1]
    torch.testing.assert_close(frozen, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["linear_token_logps", "enhancement_loss", "pair_loss_head"])
def test_triton_is_transformed_as_well(name, device):
    if device.type != "cpu":
        pytest.skip("the model of these tests is on the CPU, where Triton is interpreted")
    call, args, upstream = function(name, "triton")
    _, wanted = by_autograd(call, args, upstream)
    found = grad(weighted(call, upstream), argnums=(0, 1))(*args)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_vmap_gives_each_element_s(name):
    call, (hidden, weight), upstream = function(name)
    several = torch.stack([hidden, 2 * hidden, hidden.flip(0)], 1)
    singles = several.unbind(1)
    found = vmap(call, in_dims=(1, None))(several, weight)
    assert torch.equal(found, torch.stack([call(h, weight) for h in singles]))

    # The gradient of each element, and ordinary autograd of the whole.
    each = vmap(grad(weighted(call, upstream)), in_dims=(1, None))(several, weight)
    wanted = [by_autograd(lambda h: call(h, weight), (h,), upstream)[1][0] for h in singles]
    assert torch.equal(each, torch.stack(wanted))
    leaf = several.clone().requires_grad_()
    (vmap(call, in_dims=(1, None))(leaf, weight).flatten(1) * upstream).sum().backward()
    assert torch.equal(leaf.grad, torch.stack(wanted, 1))


def test_vmap_over_targets_and_of_a_gradient_s_upstreams():
    logits, generator = torch.randn(5, 7), torch.Generator().manual_seed(0)
    targets = torch.randint(7, (3, 5), generator=generator)
    targets[1, 2] = -100
    found = vmap(lambda y: P.token_logps(logits, y))(targets)
    assert torch.equal(found, P.token_logps(logits.expand(3, 5, 7), targets))
    jacobian = jacrev(lambda x: P.token_logps(x, targets[1]))(logits)  # a vmap of a vjp
    wanted = jacrev(lambda x: P.token_logps(x, targets[1], impl="reference"))(logits)
    torch.testing.assert_close(jacobian, wanted, rtol=1e-5, atol=1e-6)


def test_vmap_over_nothing_is_refused():
    logits, targets = torch.zeros(0, 5, 7), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="token_logps: expected a vmap over at least one element"):
        vmap(lambda x: P.token_logps(x, targets))(logits)


def test_a_gradient_that_the_op_does_not_give_is_refused_inside_a_vmap_too():
    logps = torch.zeros(2, 3)

    def loss(reference):
        return vmap(lambda x, r: P.preference_loss(x, x, r, r).losses)(logps, reference).sum()

    with pytest.raises(ValueError, match="reference_chosen_logps: expected a constant"):
        grad(loss)(logps)


@pytest.mark.parametrize("name", ["token_logps", "enhancement_loss", "linear_preference_loss"])
def test_functional_call(name):
    model, given = TinyCausal(EVERY[name]), make_batch(LENGTHS)
    model(*given).backward()
    parameters = {k: p.detach() for k, p in model.named_parameters() if p.grad is not None}
    found = grad(lambda p: functional_call(model, p, given))(parameters)
    assert all(torch.equal(found[k], p.grad) for k, p in model.named_parameters() if k in found)
    # An ensemble: parameters stacked, one batch.
    twice = {k: torch.stack([x, 1.5 * x]) for k, x in parameters.items()}
    losses = vmap(lambda p: functional_call(model, p, given))(twice)
    wanted = [functional_call(model, {k: x[i] for k, x in twice.items()}, given) for i in (0, 1)]
    torch.testing.assert_close(losses, torch.stack(wanted))


@pytest.mark.parametrize("name", EVERY)
def test_forward_mode_is_refused_by_name(name):
    call, args, _ = function(name)
    message = f"{FIRST[name]}: {REVERSE}"
    with pytest.raises(NotImplementedError, match=message):
        jvp(call, args, args)
    with pytest.raises(NotImplementedError, match=message), forward_ad.dual_level():
        call(forward_ad.make_dual(args[0], args[0]), args[1])
    with forward_ad.dual_level():  # where nothing has a tangent, nothing is amiss
        assert torch.equal(call(*args), call(*args))


@pytest.mark.parametrize("name", EVERY)
def test_a_second_derivative_is_refused_by_name(name):
    call, (hidden, weight), upstream = function(name)

    def loss(h):
        return weighted(call, upstream)(h, weight)

    leaf = hidden.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=f": {ONCE}"):
        torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=f": {ONCE}"):
        grad(lambda h: grad(loss)(h).sum())(hidden)
    with pytest.raises(NotImplementedError, match=f": {ONCE}"):
        grad(loss)(leaf).sum().backward()  # the transform's result, differentiated by autograd
    # Twice differentiated, but by something else.
    scale = torch.tensor(2.0)
    found = grad(lambda s: (s**2 * grad(loss)(hidden)).sum())(scale)
    torch.testing.assert_close(found, 2 * scale * grad(loss)(hidden).sum())


@pytest.mark.parametrize("name", EVERY)
def test_the_reference_has_what_is_refused(name):
    double = torch.float64
    call, args, upstream = function(name, "reference", double)
    fused, _, _ = function(name, "chunked", double)
    generator = torch.Generator().manual_seed(1)
    tangents = tuple(torch.randn(x.shape, generator=generator, dtype=double) for x in args)
    _, pushed = jvp(call, args, tangents)
    pulled = by_autograd(fused, args, upstream)[1]
    wanted = sum((x * t).sum() for x, t in zip(pulled, tangents, strict=True))
    torch.testing.assert_close((pushed.flatten() * upstream).sum(), wanted)

    if "WPO" in name or "tdpo" in name:
        return  # what they hold constant depends on the policy: other gradients ahead and behind
    # The curvature along the tangent: gradients of the fused op a little further on either side.
    loss = weighted(call, upstream)
    _, found = jvp(lambda h: grad(loss)(h, args[1]), args[:1], tangents[:1])
    step = 1e-5 * tangents[0]
    ahead, behind = (
        by_autograd(lambda h: fused(h, args[1]), (args[0] + way * step,), upstream)[1][0]
        for way in (1, -1)
    )
    torch.testing.assert_close(found, (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-6)


def test_constants_of_the_reference_have_no_tangent():
    # no_grad does not stop forward mode.
    hidden, ref_hidden, weight = torch.randn(3, 4), torch.randn(3, 4), torch.randn(5, 4)
    targets, none = torch.tensor([1, 4, 0]), torch.zeros(3)

    def triple(*args):
        return P.linear_token_logps_triple(*args, targets, extrapolation=0.5, impl="reference")

    args = hidden, ref_hidden, weight
    _, (policy, *others) = jvp(triple, args, args)
    assert policy.abs().sum() and all(torch.equal(x, none) for x in others)


def test_a_hessian_by_the_reference():
    logits, targets = torch.randn(2, 3, dtype=torch.float64), torch.tensor([1, 0])
    found = hessian(lambda x: P.token_logps(x, targets, impl="reference").sum())(logits)
    p = logits.softmax(-1)
    wanted = p[:, :, None] * p[:, None, :] - torch.diag_embed(p)
    for i in range(2):
        torch.testing.assert_close(found[i, :, i], wanted[i])
    with pytest.raises(NotImplementedError, match="token_logps: expected reverse mode"):
        hessian(lambda x: P.token_logps(x, targets).sum())(logits)  # forward over reverse


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_a_transform_in_a_compiled_region(transform):
    hidden, weight, targets = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([1, -100, 6, 2])

    def transformed(h, impl):
        def logps(x):
            return P.linear_token_logps(x, weight, targets, impl=impl)

        if transform == "grad":
            return grad(lambda x: logps(x).sum())(h)
        return vmap(logps)(torch.stack([h, 2 * h]))

    def compiled(impl, **options):
        torch._dynamo.reset()
        return torch.compile(transformed, backend="aot_eager", **options)(hidden, impl)

    wanted = transformed(hidden, "chunked")
    with pytest.raises(Exception, match="linear_token_logps: expected torch.func .* outside torch"):
        compiled("chunked", fullgraph=True)
    assert torch.equal(compiled("chunked"), wanted)  # a graph break
    if transform == "grad":
        whole = compiled("reference", fullgraph=True)
        torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-6)


def test_dual_tensors_given_to_a_compiled_function():
    logits, targets = torch.randn(2, 3), torch.tensor([1, 0])
    torch._dynamo.reset()
    call = torch.compile(lambda x: P.token_logps(x, targets), fullgraph=True, backend="aot_eager")
    with (
        pytest.raises(Exception, match="token_logps: expected reverse mode"),
        forward_ad.dual_level(),
    ):
        call(forward_ad.make_dual(logits, logits))


@pytest.mark.parametrize("outputs", [("lse", "mean_logits"), ("lse", "mean_logits", "entropy")])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_every_extra_but_the_entropy_is_a_constant(impl, outputs):
    # As if differentiable they had a gradient of None: no error, and nothing learned.
    hidden, weight = torch.randn(4, 8).requires_grad_(), torch.randn(7, 8).requires_grad_()
    targets = torch.tensor([1, -100, 6, 2])
    found = P.linear_token_logps(hidden, weight, targets, outputs=outputs, impl=impl)
    assert found.logps.requires_grad
    for name in outputs:
        assert getattr(found, name).requires_grad == (name == "entropy")
