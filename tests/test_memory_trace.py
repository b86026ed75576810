"""Live bytes, op by op: what is counted, when, and as what."""

import pytest
import torch
from prefalign.kernels.linear_token_logps import linear_token_logps
from prefalign.kernels.linear_token_logps_triple import linear_token_logps_triple
from prefalign.kernels.plan import plan_head
from tiny_models import tiny_model
from torch import nn

from prefalign.memory_trace import (
    ACTIVATIONS,
    ATTENTION,
    CACHE,
    GRADIENTS,
    HEAD,
    WEIGHTS,
    MemoryTrace,
    head_workspace,
    labelled,
)

KIB = 1024


def kib(n):
    """Return a float32 tensor of n KiB."""
    return torch.empty(n * KIB // 4)


def test_live_bytes_are_counted_exactly():
    before = kib(7)
    with MemoryTrace("cpu") as trace:
        assert trace.now == 0  # what was made before is not known of
        trace.add([before], WEIGHTS)
        assert trace.now == 7 * KIB
        a = kib(1)
        assert trace.now == 8 * KIB
        views = [a.view(16, 16), a[3:], a.detach(), a.view(16, 16).t()]
        assert trace.now == 8 * KIB
        a.add_(1)
        assert trace.now == 8 * KIB
        b = a.repeat(4)
        assert trace.now == 12 * KIB == trace.peak
        del a
        assert trace.now == 12 * KIB  # its views live
        del views
        assert trace.now == 11 * KIB
        del b
        assert trace.now == 7 * KIB
        c = kib(2)
        assert trace.now == 9 * KIB and trace.peak == 12 * KIB
        assert trace.at_peak == {WEIGHTS: 7 * KIB, ACTIVATIONS: 5 * KIB}
        trace.restart()
        assert trace.peak == 9 * KIB
        del c
    del before
    assert trace.now == 0


def test_what_an_expression_makes_in_between_counts():
    x = kib(4)
    with MemoryTrace("cpu") as trace:
        y = (x + 1) * 2
        assert (trace.now, trace.peak) == (4 * KIB, 8 * KIB)
        y += x
        assert trace.peak == 8 * KIB


def test_a_tensor_counts_once_and_may_be_labelled_anew():
    with MemoryTrace("cpu") as trace:
        x = kib(3)
        trace.add([x], CACHE)
        trace.add([x, x.view(3, -1)], CACHE)
        with labelled(ATTENTION):
            y = kib(1)
        z = kib(5)
        assert trace.now == 9 * KIB
        assert trace.at_peak == {CACHE: 3 * KIB, ATTENTION: KIB, ACTIVATIONS: 5 * KIB}
        del x, y, z
    assert trace.now == 0


def test_what_is_held_for_a_moment_is_a_peak_and_no_more():
    with MemoryTrace("cpu") as trace:
        x = kib(2)
        trace.hold(10 * KIB, HEAD)
        assert (trace.now, trace.peak) == (2 * KIB, 12 * KIB)
        assert trace.at_peak == {ACTIVATIONS: 2 * KIB, HEAD: 10 * KIB}
        del x


def test_gradients_are_counted_as_such_as_soon_as_they_are_there():
    layers = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    layers[0].weight.requires_grad_(False)
    weight = 64 * 64 * 4
    x = torch.randn(8, 64, requires_grad=True)
    with MemoryTrace("cpu") as trace:
        trace.add([*layers.parameters(), x], WEIGHTS)
        with trace.watch_gradients(layers):
            layers(x).sum().backward()
        trace.restart()
        assert trace.at_peak[GRADIENTS] == weight  # of the trained one alone
        assert trace.at_peak[WEIGHTS] == 2 * weight + 8 * 64 * 4
        layers.zero_grad()
        trace.restart()
        assert GRADIENTS not in +trace.at_peak


def test_saved_activations_live_until_backward():
    x = torch.randn(KIB, 16, requires_grad=True)
    with MemoryTrace("cpu") as trace:
        y = x.exp().tanh()  # both results are saved
        assert trace.now == 2 * 64 * KIB
        y.sum().backward()
        del y
        trace.add([x.grad], GRADIENTS)
        trace.restart()
        assert trace.at_peak == {GRADIENTS: 64 * KIB}


# The head


def test_the_heads_workspace_is_there_while_it_runs():
    hidden, weight = torch.randn(300, 64, requires_grad=True), torch.randn(5000, 64)
    targets = torch.randint(5000, (300,))
    with MemoryTrace("cpu") as trace:
        trace.add([hidden, weight, targets], WEIGHTS)
        before = trace.now
        logps = linear_token_logps(hidden, weight, targets)
        made = trace.now - before  # log-probs, their like, and the Jacobian of the frozen head
        assert hidden.nbytes + logps.nbytes <= made < hidden.nbytes + 10 * logps.nbytes
        assert trace.peak - trace.now >= 300 * 1024 * 4  # a tile of logits
        assert trace.at_peak[HEAD] >= 300 * 1024 * 4
        trace.restart()
        logps.sum().backward()
        assert trace.at_peak[HEAD] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_workspace_is_the_plans_for_that_device(dtype, device):
    hidden = torch.empty(2000, 512, dtype=dtype, device="meta")
    weight = torch.empty(32000, 512, dtype=dtype, device="meta")
    given = {"hidden": hidden, "weight": weight, "budget": 0}
    name = "prefalign::linear_token_logps"
    plan = plan_head(2000, 32000, 512, dtype=dtype, device=device)
    triple = head_workspace(f"{name}_triple", given, device)
    assert triple == plan.workspace_bytes
    single = head_workspace(name, given, device)
    if device == "cpu" and dtype == torch.float32:
        assert 2 * plan.row_chunk * plan.vocab_tile * 4 < single < triple
    else:
        assert single == triple
    trained = plan_head(2000, 32000, 512, dtype=dtype, device=device, weight_grad=True)
    given["needs"] = "hw"
    assert head_workspace(f"{name}_backward", given, device) == trained.workspace_bytes
    given["budget"] = 2**20
    assert head_workspace(f"{name}_backward", given, device) <= trained.workspace_bytes
    assert head_workspace("prefalign::scale_rows", {"grad": hidden}, device) == 0


def test_the_triple_counts_too():
    model = tiny_model("llama")
    weight = model.get_output_embeddings().weight
    hidden, other = torch.randn(2, 40, 32).unbind()
    targets = torch.randint(200, (40,))
    with MemoryTrace("cpu") as trace:
        linear_token_logps_triple(hidden, other, weight, targets, extrapolation=1.0)
        assert trace.at_peak[HEAD] > 40 * weight.shape[0] * 4
