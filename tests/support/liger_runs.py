"""Liger-shaped modules: example batches, runs, and the same losses written with logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

NAMES = ("DPO", "SimPO", "ORPO", "CPO", "KTO")
SHAPES = ((2, 5, 8, 11), (6, 9, 16, 37), (8, 7, 24, 101))  # S, T, D, V


def build(library, name, **options):
    return getattr(library, f"LigerFusedLinear{name}Loss")(compiled=False, **options)


def example(name, shape, bias=True, *, kl=None, nll_target=False, seed=0, **options):
    """Return the options of a module and the tensors of a call, by name."""
    S, T, D, V = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    def targets(ignored):
        found = torch.randint(V, (S, T), generator=generator)
        lengths = torch.randint(1, T + 1, (S, 1), generator=generator)
        found[torch.arange(T) >= lengths] = -100
        found[torch.rand(S, T, generator=generator) < ignored] = -100
        found[:, 0] = torch.randint(V, (S,), generator=generator)
        return found

    call = {"_input": normal(S, T, D), "lin_weight": 0.4 * normal(V, D), "target": targets(0.3)}
    call["bias"] = normal(V) if bias else None
    if options.get("use_ref_model", name == "DPO"):
        head = {"ref_input": normal(S, T, D), "ref_weight": 0.4 * normal(V, D)}
        call |= {**head, "ref_bias": normal(V) if bias else None}
    if name == "KTO":
        call["preference_labels"] = torch.rand(S, generator=generator) < 0.6
        call["kl"] = kl if kl is None else torch.tensor(kl)
    if nll_target:
        call["nll_target"] = targets(0.1)
        again = torch.rand(S, T, generator=generator) < 0.6  # the same token, as in practice
        call["nll_target"][again] = call["target"][again]
    return options, call


def cast(call, dtype):
    """Return the call with its floats in another dtype."""
    return {
        key: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x
        for key, x in call.items()
    }


def run(module, call, scale=3.7, leaves=("_input", "lin_weight", "bias")):
    """Return the loss, what is beside it, and the gradients of ``scale`` times the loss."""
    call = dict(call)
    leaves = [name for name in leaves if call[name] is not None]
    for name in leaves:
        call[name] = call[name].detach().clone().requires_grad_()
    loss, stats = module(**call)
    grads = torch.autograd.grad(scale * loss, [call[name] for name in leaves])
    assert not any(value.requires_grad for value in stats)
    return loss.detach(), list(stats), list(grads)


# The same, from the papers


def pair_loss(m, a, b):
    """Return the pairs' losses of scores ``a`` and ``b`` under the options of module ``m``."""
    beta, e, ls = m.beta, getattr(m, "label_smoothing", 0.0), F.logsigmoid
    z, x, y = beta * (a - b), beta * a, beta * b
    kind = {"FusedLinearSimPOLoss": "simpo", "FusedLinearORPOLoss": "orpo"}.get(type(m).__name__)
    kind = kind or getattr(m, "loss_type", "sigmoid")
    if kind == "simpo":
        z = z - m.gamma
    if kind in ("sigmoid", "simpo"):
        return -(1 - e) * ls(z) - e * ls(-z)
    if kind == "orpo":
        odds = [s - torch.log(-torch.expm1(s)) for s in (a, b)]
        return -beta * ls(odds[0] - odds[1])
    if kind == "exo_pair":
        q, p = torch.stack((ls(z), ls(-z))), torch.tensor([1 - e, e], dtype=z.dtype).log()[:, None]
        return (q.exp() * (q - p)).sum(0)
    if kind == "discopop":
        m = (z / m.discopop_tau).sigmoid()
        return -(1 - m) * ls(z) + m * torch.exp(-z)
    return {
        "hinge": lambda: (1 - z).relu(),
        "nca_pair": lambda: -ls(x) - (ls(-x) + ls(-y)) / 2,
        "robust": lambda: (-(1 - e) * ls(z) + e * ls(-z)) / (1 - 2 * e),
        "bco_pair": lambda: -ls(x) - ls(-y),
        "sppo_hard": lambda: (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - x.sigmoid() + y.sigmoid(),
        "apo_down": lambda: x.sigmoid() + 1 - z.sigmoid(),
    }[kind]()


def token_logps(hidden, weight, target, bias):
    logits = F.linear(hidden, weight, bias)
    logps = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return logits.detach(), torch.where(target == -100, 0, logps)


class Eager(torch.nn.Module):
    """A module's loss and statistics, written down again with logits and autograd."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def scores(self, hidden, weight, target, bias):
        _, logps = token_logps(hidden, weight, target, bias)
        sums, counts = logps.sum(-1), (target != -100).sum(-1)
        return sums / counts if self.module.average_log_prob else sums

    def forward(
        self, _input, lin_weight, target, bias=None, ref_input=None, ref_weight=None,
        ref_bias=None, preference_labels=None, kl=None, nll_target=None, ref_logps=None,
    ):  # fmt: skip
        m, half = self.module, len(target) // 2
        logits, logps = token_logps(_input, lin_weight, target, bias)
        score = self.scores(_input, lin_weight, target, bias)
        ref = torch.zeros_like(score)
        if ref_input is not None:
            ref = self.scores(ref_input, ref_weight, target, ref_bias)
        rewards = (m.beta * (score - ref)).detach()
        if preference_labels is not None:
            sign = torch.where(preference_labels, 1, -1)
            losses = 1 - torch.sigmoid(m.beta * (score - ref - (0 if kl is None else kl)) * sign)
            kinds = preference_labels, ~preference_labels
            stats = [
                x[kind].sum() for x in (score.detach(), logits, rewards) for kind in kinds
            ]  # fmt: skip
            return losses.mean(), stats
        losses, nll = pair_loss(m, *(score - ref).split(half)), torch.zeros(())
        if m.compute_nll_loss:
            labels = (target if nll_target is None else nll_target)[:half]
            logps = token_logps(_input[:half], lin_weight, labels, bias)[1]
            nll = -logps.sum() / (labels != -100).sum()
        sides = [*score.detach().split(half), *(x.mean() for x in logits.split(half))]
        stats = [*sides, nll.detach(), *rewards.split(half)]
        if type(m).__name__ == "FusedLinearORPOLoss":
            odds = [s - torch.log(-torch.expm1(s)) for s in sides[:2]]
            stats += [F.logsigmoid(odds[0] - odds[1]).mean(), (odds[0] - odds[1]).mean()]
        return losses.mean() + m.alpha * nll, stats


def named(out, name, call):
    """Yield every number of a run with a name; sums of logits as means, as they are of thousands"""
    loss, stats, grads = out
    yield "loss", loss
    positions = call["target"].shape[1] * call["lin_weight"].shape[0]
    for index, value in enumerate(stats):
        yield f"stats[{index}]", value / positions if name == "KTO" and index in (2, 3) else value
    for leaf, grad in zip(("_input", "lin_weight", "bias"), grads, strict=False):
        yield f"gradient of {leaf}", grad


def assert_equal(ours, theirs, name, call):
    """Check to 1e-5 of the largest number of each tensor, or of 1."""
    pairs = zip(named(ours, name, call), named(theirs, name, call), strict=True)
    for (what, mine), (_, other) in pairs:
        assert mine.shape == other.shape and mine.dtype == other.dtype, what
        allowed = 1e-5 * max(1.0, other.abs().max().item())
        assert (mine - other).abs().max().item() <= allowed, what
