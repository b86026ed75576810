"""Every op under autocast and under gradient checkpointing, eager and compiled."""

import pytest
import torch
from compiled import EVERY, OPS, TinyCausal, make_batch, step
from torch.utils.checkpoint import checkpoint

# The head's gradient in bfloat16 is a sum there, of two rounded ones.
ONCE = [name for name in EVERY if name != "linear_token_kl, tdpo_loss"]
COMPILED = ("linear_token_logps", "enhancement_loss", "pair_loss_head", "linear_preference_loss")
LENGTHS = [5, 3, 4, 6]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def of_hidden(model, hidden, batch, cast):
    """Return what the op gives and its gradients, by the hidden states and by the head."""
    model.zero_grad()
    leaf = hidden.detach().requires_grad_()
    with autocast(cast):
        out = model.top(leaf, *batch)
    out.backward(torch.cos(torch.arange(out.numel())).view(out.shape))
    return out.detach(), leaf.grad, model.head.grad, model.b.grad


def autocast(enabled=True):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize("name", ONCE)
def test_autocast_gives_what_bfloat16_inputs_give(name):
    wide, half = (TinyCausal(EVERY[name], dtype=t) for t in (torch.float32, torch.bfloat16))
    ids, batch = make_batch(LENGTHS)
    hidden = wide.hidden(ids)
    found = of_hidden(wide, hidden, batch, cast=True)
    wanted = of_hidden(half, hidden.bfloat16(), batch, cast=False)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], wanted[0])
    assert not torch.equal(found[0], of_hidden(wide, hidden, batch, cast=False)[0])
    for got, want in zip(found[1:], wanted[1:], strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert got.dtype == torch.float32 and torch.equal(got, want.float())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_autocast_compiled(name, inside):
    model = TinyCausal(OPS[name])
    given = make_batch(LENGTHS)

    def cast(*args):
        with autocast():
            return model(*args)

    call = torch.compile(cast if inside else model, fullgraph=True, backend="aot_eager")
    with autocast():
        wanted = step(model, model, *given)
    if inside:
        found = step(model, call, *given)
    else:
        with autocast():
            found = step(model, call, *given)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert found["loss"].dtype == torch.float32
    assert not torch.equal(found["loss"], step(model, model, *given)["loss"])


def checkpointed(reentrant):
    def wrap(block, *args):
        return checkpoint(block, *args, use_reentrant=reentrant)

    return wrap


def counted(op):
    """Return the op, counting in ``op.calls`` how often it is computed."""

    def call(*args):
        call.count += 1
        return op(*args)

    call.count = 0
    return call


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("name", EVERY)
def test_checkpointing_changes_no_gradient(name, impl, reentrant):
    given = make_batch(LENGTHS)
    plain = TinyCausal(EVERY[name], impl)
    op = counted(EVERY[name])
    saved = TinyCausal(op, impl, wrap=checkpointed(reentrant))
    wanted, found = (step(model, model, *given) for model in (plain, saved))
    assert op.count == 2  # once more in backward
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("name", COMPILED)
def test_checkpointing_compiled(name):
    model = TinyCausal(OPS[name], wrap=checkpointed(reentrant=False))
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    for i, lengths in enumerate((LENGTHS, [3, 3, 1, 7, 2, 2])):
        given = make_batch(lengths, seed=i)
        found, wanted = step(model, call, *given), step(model, model, *given)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
