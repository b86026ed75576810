"""Every op inside a compiled model: one graph, for every length, with eager's numbers."""

import functools

import pytest
import torch
import torch._dynamo.testing
from compiled import EVERY, LISTS, OPS, D, TinyCausal, make_batch, step
from prefalign.kernels import modules
from prefalign.kernels.objectives import loss_names
from tiny_models import VOCAB, tiny_model

import prefalign as P

LENGTHS = (
    [3, 2, 4, 5],
    [6, 1, 2, 2, 3, 4],
    [9, 9, 1, 7, 2, 8, 3, 3],
    [7, 6, 5, 4, 3, 2, 1, 8, 2, 2],
    [2, 2, 8, 1, 2, 3, 4, 5, 6, 7],  # the same sizes, other bounds
)
RECOMPILED = "Detected recompile when torch.compile stance is 'fail_on_recompile'"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend="aot_eager", **options):
    return torch.compile(model, fullgraph=True, backend=backend, **options)


def check(model, call, lengths, seed=0):
    given = make_batch(lengths, seed)
    found, wanted = step(model, call, *given), step(model, model, *given)
    assert found.keys() == wanted.keys() and len(found) > 3
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert all(grad.count_nonzero() for grad in wanted.values())


@pytest.mark.parametrize("name", OPS)
def test_one_graph_for_every_length(name):
    # By default the first shape is compiled for itself and the second for any.
    model = TinyCausal(OPS[name])
    call = compiled(model)
    for i, lengths in enumerate(LENGTHS):
        with torch.compiler.set_stance("default" if i < 2 else "fail_on_recompile"):
            check(model, call, lengths, seed=i)


@pytest.mark.parametrize("name", ["pair_loss_head, ple", "linear_preference_loss"])
def test_dynamic_from_the_first_shape(name):
    model = TinyCausal(OPS[name], frozen=True)
    call = compiled(model, dynamic=True)
    for i, lengths in enumerate(LENGTHS):
        with torch.compiler.set_stance("default" if i < 1 else "fail_on_recompile"):
            check(model, call, lengths, seed=i)


def test_one_pair_alone_is_compiled_for_once():
    # Dynamo takes sizes of 0 and 1 to be constants.
    model = TinyCausal(OPS["linear_preference_loss"])
    call = compiled(model)
    for lengths in (*LENGTHS[:2], [4, 3]):
        check(model, call, lengths)
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in ([2, 6], *LENGTHS):
            check(model, call, lengths)


# Each reference once: the other ops of the table are made of these.
REFERENCES = (
    "token_logps", "linear_token_logps, adapter", "linear_token_logps_triple",
    "linear_token_kl", "noise_aware_loss", "unpaired_loss", "enhancement_loss",
    "pairwise_preference_logits of a list", "pair_loss_head, ple", "linear_preference_loss",
)  # fmt: skip


@pytest.mark.parametrize("name", REFERENCES)
def test_the_reference_is_one_graph_too(name):
    model = TinyCausal(EVERY[name], impl="reference")
    call = compiled(model)
    check(model, call, LENGTHS[3])
    check(model, call, LENGTHS[4])  # what it compiled holds no values of cu_seqlens


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_sizes_is_compiled_for(name):
    model = TinyCausal(LISTS[name])
    call = compiled(model)
    check(model, call, LENGTHS[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        check(model, call, [5, 2, 1, 6])
        with pytest.raises(RuntimeError, match=RECOMPILED):
            check(model, call, LENGTHS[1])
    check(model, call, LENGTHS[1])


@pytest.mark.parametrize("loss", loss_names())
def test_every_loss_of_the_table(loss):
    smoothing = {"label_smoothing": 0.1} if loss in ("cdpo", "exo_pair") else {}

    def both(logps, cu, refs):
        sums, counts = P.sequence_logps(logps, cu_seqlens=cu)
        apart = P.preference_loss(
            sums[0::2], sums[1::2], refs[0::2], refs[1::2], loss_type=loss,
            chosen_counts=counts[0::2], rejected_counts=counts[1::2], **smoothing,
        )  # fmt: skip
        whole = P.pair_loss_head(logps, cu_seqlens=cu, ref_logps=refs, loss=loss, **smoothing)
        return apart.losses, whole.losses

    call = compiled(both, backend="eager", dynamic=True)
    for i, lengths in enumerate(LENGTHS[:3]):
        batch = make_batch(lengths, seed=i)[1]
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            found = call(batch.ref_hidden[:, 0], batch.cu, batch.refs)
        torch.testing.assert_close(found, both(batch.ref_hidden[:, 0], batch.cu, batch.refs))


def test_modules():
    ids, batch = make_batch(LENGTHS[0])
    model = TinyCausal(None)
    hidden, logps = model.hidden(ids), batch.refs
    four = logps, logps.flip(0), -logps, logps / 2
    lengths = batch.lengths, batch.lengths.flip(0)
    calls = {
        modules.TokenLogps(softcap=5.0): (hidden, batch.targets % D),
        modules.LinearTokenLogps(outputs=("entropy",)): (model.head, hidden, batch.targets),
        modules.SequenceLogps(): (hidden[:, 0], batch.cu),
        modules.PreferenceLoss(beta=0.3): four,
        modules.NoiseAwareLoss(): (*four, logps, -logps),
        modules.UnpairedLoss(loss_type="apo_zero_unpaired"): (*four[:2], logps > 0),
        modules.EnhancementLoss(): (*four, *lengths),
        modules.PairwisePreferenceLogits(): (logps, logps.flip(0), 2),
    }
    for module, given in calls.items():
        with_threshold = isinstance(module, modules.NoiseAwareLoss | modules.EnhancementLoss)
        options = {"threshold": 0.1} if with_threshold else {}
        found = compiled(module, backend="eager")(*given, **options)
        torch.testing.assert_close(found, module(*given, **options))


def test_by_inductor():
    model = TinyCausal(OPS["linear_preference_loss"])
    call = compiled(model, "inductor", dynamic=True)
    for i, lengths in enumerate(LENGTHS):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            check(model, call, lengths, seed=i)


def test_a_whole_model():
    model = tiny_model("llama", num_hidden_layers=1)
    backbone = functools.partial(model.base_model, use_cache=False)

    def loss(ids, targets, cu, refs):
        hidden = backbone(input_ids=ids).last_hidden_state
        return P.linear_preference_loss(
            hidden.flatten(0, 1), model.lm_head.weight, targets.flatten(), cu_seqlens=cu,
            ref_logps=refs,
        ).losses.mean()  # fmt: skip

    call = compiled(loss, dynamic=True)
    for i, (pairs, tokens) in enumerate(((2, 7), (3, 9), (5, 13), (4, 8))):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(3, VOCAB, (2 * pairs, tokens), generator=generator)
        targets = ids.roll(-1, 1)
        targets[:, [0, -1]] = -100
        cu = torch.arange(0, ids.numel() + 1, tokens)
        given = ids, targets, cu, torch.randn(2 * pairs, generator=generator)
        results = []
        for fn in (call, loss):
            with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
                value = fn(*given)
            results.append((value, *torch.autograd.grad(value, model.parameters())))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


# Numbers that change from step to step.

LOGPS = torch.tensor(
    [
        [-1.0, -4.0, 2.0],
        [0.5, 1.0, -2.0],
        [1.0, 1.0, 1.5],
        [1.25, 3.0, -1.0],
        [2.0, 0.5, 1.0],
        [1.0, 2.0, 3.0],
    ]
)
COUNTS = torch.tensor([2, 1, 4])
TOKENS, CU, REFS = LOGPS.flatten()[:8], torch.tensor([0, 2, 4, 7, 8]), torch.linspace(1, -1, 4)


def head(**options):
    return P.pair_loss_head(TOKENS, cu_seqlens=CU, **options).losses


NUMBERS = {
    "preference_loss beta": lambda x: P.preference_loss(*LOGPS[:4], beta=x).losses,
    "noise_aware_loss alpha": lambda x: P.noise_aware_loss(*LOGPS, alpha=x, threshold=0.5).losses,
    "noise_aware_loss threshold": lambda x: P.noise_aware_loss(*LOGPS, threshold=x).losses,
    "enhancement_loss threshold": lambda x: (
        P.enhancement_loss(
            *LOGPS[:4], plain_lengths=COUNTS, guided_lengths=COUNTS, threshold=x
        ).losses
    ),
    "unpaired_loss baseline": lambda x: P.unpaired_loss(*LOGPS[:2], COUNTS > 1, baseline=x).losses,
    "pair_loss_head threshold": lambda x: head(
        loss="noise_aware", ref_logps=REFS, extrapolated_token_logps=-TOKENS, threshold=x
    ),
    "pair_loss_head threshold of PLE": lambda x: head(loss="ple", rewards=REFS, threshold=x),
}
VALUES = (0.1, 0.3, 0.2, 0.45, 0.7)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_tensor_that_changes_is_compiled_once(name):
    call = compiled(NUMBERS[name], backend="eager")
    found = []
    for i, value in enumerate(VALUES):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            found.append(call(torch.tensor(value)))
        torch.testing.assert_close(found[-1], NUMBERS[name](value))
    assert not all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("name", [name for name in NUMBERS if "beta" not in name])
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_number_that_the_op_makes_a_tensor_is_compiled_at_most_twice(name, dynamic):
    call = compiled(NUMBERS[name], backend="eager", dynamic=dynamic)
    for i, value in enumerate(VALUES):
        with torch.compiler.set_stance("fail_on_recompile" if i > 1 else "default"):
            found = call(value)
        torch.testing.assert_close(found, NUMBERS[name](value))


def test_any_other_number_is_a_constant_of_the_graph():
    counter = torch._dynamo.testing.CompileCounter()
    call = compiled(NUMBERS["preference_loss beta"], backend=counter)
    for value in (0.1, 0.3, 0.2, 0.1, 0.3, 0.2):
        torch.testing.assert_close(call(value), NUMBERS["preference_loss beta"](value))
    assert counter.frame_count == 3
