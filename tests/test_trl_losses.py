"""The loss family against TRL's: its own ``_compute_loss`` on the same token log-probs.

TRL's method reads a dozen attributes of its trainer; a stand-in has those, and a stand-in model
gives the log-probs. So every loss type, divergence, sum, ``ld_alpha`` and weight of TRL's is
compared, values and gradients, without a model.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from prefalign.kernels.preference_loss import preference_loss
from prefalign.kernels.token_weights import length_desensitized_weights, wpo_weights

trl = pytest.importorskip("trl")

B, T, PROMPT = 5, 13, 3


def example(seed=0):
    """Return a padded batch of TRL's: chosen first, then rejected, of B pairs."""
    gen = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, T - PROMPT + 1, (2 * B,), generator=gen)
    place = torch.arange(T)
    mask = ((place >= PROMPT) & (place < PROMPT + lengths[:, None])).long()
    logps = -torch.rand(2 * B, T - 1, generator=gen, dtype=torch.float64) * 2
    counted = mask[:, 1:]
    return {
        "logps": logps * counted,
        "reference": (logps + 0.3 * torch.randn(logps.shape, generator=gen)) * counted,
        "squares": -torch.rand(2 * B, T - 1, generator=gen, dtype=torch.float64),
        "mask": mask,
    }


def trl_loss(given, loss_type, **changes):
    """Return TRL's loss, its gradient by the token log-probs, and the rewards that it logs."""
    leaf = given["logps"].clone().requires_grad_()
    sums = given["reference"].sum(1)
    if changes.get("ld_alpha") is not None:
        sums = (given["reference"] * tail_weights(given["mask"][:, 1:], changes["ld_alpha"])).sum(1)
    outputs = SimpleNamespace(
        log_probs=leaf, log_sum_sq_probs=given["squares"], entropy=torch.zeros_like(leaf),
        mean_logits=torch.zeros_like(leaf), is_top1=torch.zeros_like(leaf).bool(),
    )  # fmt: skip
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    same = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x
    )
    trainer = SimpleNamespace(
        **{
            "model": SimpleNamespace(training=True), "accelerator": same, "ld_alpha": None,
            "aux_loss_enabled": False, "precompute_ref_logps": True, "beta": 0.3,
            "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 1.0,
            "loss_types": names, "loss_weights": [1.0] * len(names), "label_smoothing": 0.0,
            "use_weighting": False, "args": SimpleNamespace(discopop_tau=0.05),
            "_metrics": defaultdict(lambda: defaultdict(list)), "_total_train_tokens": 0,
            "_tp_size": 1, **changes,
        }
    )  # fmt: skip
    inputs = {
        "input_ids": given["mask"], "attention_mask": given["mask"],
        "completion_mask": given["mask"], "ref_chosen_logps": sums[:B],
        "ref_rejected_logps": sums[B:],
    }  # fmt: skip
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    (grad,) = torch.autograd.grad(loss, leaf)
    grad = grad * given["mask"][:, 1:]  # a model's log-probs are constants at the other places
    logged = trainer._metrics["train"]
    return loss, grad, logged["rewards/chosen"][0], logged["rewards/rejected"][0]


def tail_weights(mask, ld_alpha):
    """Return LD-DPO's weights of a padded batch."""
    place, lengths = mask.cumsum(1), mask.sum(1)
    shared = torch.minimum(lengths[:B], lengths[B:]).repeat(2)[:, None]
    return torch.where(place <= shared, 1.0, ld_alpha) * mask


def pack(padded, mask):
    """Return the tokens that count, packed chosen, rejected, chosen, ... and their bounds."""
    order = torch.arange(2 * B).view(2, B).T.flatten()
    kept = mask[order, 1:].bool()
    return padded[order][kept], torch.cat(
        [torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]
    )


def our_loss(given, loss_type, impl="chunked", ld_alpha=None, use_weighting=False, **options):
    """Return what ``trl_loss`` does, of this library's."""
    leaf = given["logps"].clone().requires_grad_()
    mask = given["mask"]
    packed, cu = pack(leaf, mask)
    reference, _ = pack(given["reference"], mask)
    weights = None
    if use_weighting:
        squares, _ = pack(given["squares"], mask)
        weights = wpo_weights(packed, squares, cu_seqlens=cu)
    if ld_alpha is not None:
        of_token = length_desensitized_weights(cu, ld_alpha, tokens=packed.numel())
        packed, reference = packed * of_token, reference * of_token
    sums, ref = (
        torch.stack([x.sum() for x in values.split(cu.diff().tolist())])
        for values in (packed, reference)
    )
    counts = cu.diff()
    out = preference_loss(
        sums[0::2], sums[1::2], ref[0::2], ref[1::2], loss_type=loss_type, beta=0.3,
        chosen_counts=counts[0::2], rejected_counts=counts[1::2], weights=weights, impl=impl,
        **options,
    )  # fmt: skip
    loss = out.losses.mean()
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss, grad, out.chosen_rewards.mean().item(), out.rejected_rewards.mean().item()


def compare(given, loss_type, tol=1e-9, **options):
    """Check value, gradient and both rewards. TRL's EXO has its smoothing in float32."""
    tol = max(tol, 1e-6) if "exo_pair" in loss_type else tol
    theirs, found = trl_loss(given, loss_type, **options), our_loss(given, loss_type, **options)
    for a, b in zip(found, theirs, strict=True):
        a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
        torch.testing.assert_close(a, b, rtol=tol, atol=tol / 10)


SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
DIVERGENT = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "sft")


@pytest.mark.parametrize("smoothing", [0.001, 0.2])
@pytest.mark.parametrize("loss_type", TYPES)
def test_every_loss_type(loss_type, smoothing):
    smoothing = smoothing if loss_type in SMOOTHED else 0.0
    for seed in range(3):
        compare(example(seed), loss_type, label_smoothing=smoothing)


KINDS = {
    "forward": ("forward_kl", 1.0),
    "js": ("js_divergence", 1.0),
    "alpha 0": ("alpha_divergence", 0.0),
    "alpha 0.5": ("alpha_divergence", 0.5),
    "alpha 1": ("alpha_divergence", 1.0),
    "alpha 2": ("alpha_divergence", 2.0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss_type", DIVERGENT)
def test_every_divergence(loss_type, kind):
    name, coef = KINDS[kind]
    smoothing = 0.2 if loss_type in SMOOTHED else 0.0
    given, tol = example(), 1e-9
    if name == "alpha_divergence" and coef != 1:  # TRL's goes through float32
        given = {key: x.float() if x.is_floating_point() else x for key, x in given.items()}
        tol = 2e-5
    options = {"f_divergence_type": name, "f_alpha_divergence_coef": coef}
    compare(given, loss_type, tol=tol, label_smoothing=smoothing, **options)


SUMS = {
    "mpo": (("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0)),
    "rpo": (("sigmoid", "sft"), (1.0, 0.5)),
    "batch": (("aot", "hinge", "aot_unpaired"), (0.3, -0.2, 1.0)),
    "tokens": (("ipo", "sigmoid_norm", "discopop"), (0.1, 1.0, 2.0)),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums(name):
    losses, weights = SUMS[name]
    compare(example(), losses, loss_weights=list(weights))


@pytest.mark.parametrize("ld_alpha", [0.0, 0.375, 1.0])
@pytest.mark.parametrize("loss_type", TYPES)
def test_length_desensitized(loss_type, ld_alpha):
    if loss_type == "sft":
        pytest.skip("TRL's SFT term does not see the weights, ours is of the weighted sums")
    smoothing = 0.1 if loss_type in SMOOTHED else 0.0
    compare(example(), loss_type, ld_alpha=ld_alpha, label_smoothing=smoothing)


@pytest.mark.parametrize("loss_type", TYPES)
def test_wpo(loss_type):
    smoothing = 0.1 if loss_type in SMOOTHED else 0.0
    given, options = example(), {"use_weighting": True, "label_smoothing": smoothing}
    if loss_type in ("hinge", "sft"):
        # TRL multiplies in place, which these two's results do not stand.
        with pytest.raises(RuntimeError):
            trl_loss(given, loss_type, **options)
        assert our_loss(given, loss_type, **options)[1].isfinite().all()
    elif loss_type.startswith("aot"):
        # TRL's losses are sorted and its weights are not; ours are those of each chosen one's pair.
        theirs, found = trl_loss(given, loss_type, **options), our_loss(given, loss_type, **options)
        assert (theirs[0] - found[0]).abs() > 1e-6
    else:
        compare(given, loss_type, **options)
