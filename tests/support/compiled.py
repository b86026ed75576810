"""A causal model in a few lines, and every op on top of it, to be compiled and transformed."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import prefalign as P

V, D, RANK = 29, 16, 3


class Batch(NamedTuple):
    """What the ops take beside hidden states: N tokens of S packed sequences."""

    targets: torch.Tensor
    cu: torch.Tensor
    refs: torch.Tensor
    ref_hidden: torch.Tensor
    rewards: torch.Tensor
    lengths: torch.Tensor


class TinyCausal(nn.Module):
    """Token ids [N] to hidden states [N, D], each of those so far, and a head's weight."""

    def __init__(self, op, impl="chunked", dtype=torch.float32, frozen=False, wrap=None):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(V, D)
            self.layer = nn.Linear(D, D)
            self.head = nn.Parameter(torch.randn(V, D) / 2, requires_grad=not frozen)
            self.a = nn.Parameter(torch.randn(RANK, D) / 4)
            self.b = nn.Parameter(torch.randn(V, RANK) / 4)
        self.to(dtype)
        self.op, self.impl, self.wrap = op, impl, wrap or (lambda block, *args: block(*args))

    def hidden(self, ids):
        x = self.embedding(ids)
        return x + torch.tanh(self.layer(x.cumsum(0)))

    def top(self, hidden, *batch):
        """The block that holds the op: what is checkpointed."""
        return self.op(self, hidden, Batch(*batch))

    def forward(self, ids, batch):
        out = self.wrap(self.top, self.hidden(ids), *batch)
        # An upstream that differs from element to element.
        return (out * torch.cos(torch.arange(out.numel(), device=out.device)).view(out.shape)).sum()


def make_batch(lengths, seed=0, dtype=torch.float32):
    """Return packed pairs: their ids [N] and what the ops take. Some tokens are prompts."""
    generator = torch.Generator().manual_seed(seed)
    ends = [0]
    for n in lengths:
        ends.append(ends[-1] + n)
    N, S = ends[-1], len(lengths)
    targets = torch.randint(V, (N,), generator=generator)
    targets[::3] = -100
    return torch.randint(V, (N,), generator=generator), Batch(
        targets=targets,
        cu=torch.tensor(ends),
        refs=(-math.log(V) * torch.rand(S, generator=generator) * 3).to(dtype),
        ref_hidden=torch.randn(N, D, generator=generator).to(dtype),
        rewards=torch.randn(S, generator=generator).to(dtype),
        lengths=torch.tensor(lengths),
    )


def _logits(m, h, b):
    return P.token_logps(F.linear(h, m.head), b.targets, softcap=9.0, impl=m.impl)


def _linear(m, h, b):
    found = P.linear_token_logps(
        h, m.head, b.targets, logit_scale=0.7, outputs=("entropy",), impl=m.impl
    )
    return found.logps + 0.1 * found.entropy


def _adapter(m, h, b):
    adapter = P.HeadAdapter(m.a, m.b, 0.5)
    return P.linear_token_logps(h, m.head, b.targets, adapter=adapter, impl=m.impl)


def _triple(m, h, b):
    return P.linear_token_logps_triple(
        h, b.ref_hidden.to(h.dtype), m.head, b.targets, extrapolation=0.5, impl=m.impl
    ).policy


def _tokens(m, h, b):
    return P.linear_token_logps(h, m.head, b.targets, impl=m.impl)


def _sums(m, h, b):
    return P.sequence_logps(_tokens(m, h, b), cu_seqlens=b.cu, impl=m.impl).sums


def _both(m, h, b):
    sums = _sums(m, h, b)
    return sums[0::2], sums[1::2], b.refs[0::2], b.refs[1::2]


def _preference(m, h, b):
    return P.preference_loss(*_both(m, h, b), label_smoothing=0.1, impl=m.impl).losses


def _noise_aware(m, h, b):
    pairs = _both(m, h, b)
    beyond = pairs[0].detach() + 1, pairs[1].detach()
    return P.noise_aware_loss(*pairs, *beyond, alpha=0.3, threshold=0.5, impl=m.impl).losses


def _enhancement(m, h, b):
    guided, plain, _, _ = _both(m, h, b)
    return P.enhancement_loss(
        plain, guided, b.rewards[1::2], b.rewards[0::2], plain_lengths=b.lengths[1::2],
        guided_lengths=b.lengths[0::2], threshold=0.3, ranking="logistic", impl=m.impl,
    ).losses  # fmt: skip


def _unpaired(m, h, b):
    return P.unpaired_loss(
        _sums(m, h, b), b.refs, b.rewards > 0, baseline=b.rewards.mean(), impl=m.impl
    ).losses


def _kl(m, h, b):
    kept = b.targets != -100
    return P.linear_token_kl(h, b.ref_hidden.to(h.dtype), m.head, mask=kept, impl=m.impl)


def _tdpo(m, h, b):
    kls = P.sequence_logps(_kl(m, h, b), cu_seqlens=b.cu, impl=m.impl).sums
    return P.tdpo_loss(*_both(m, h, b), kls[0::2], kls[1::2], impl=m.impl).losses


def _rrhf(m, h, b):
    sizes = [2] * (b.refs.shape[0] // 2)
    return P.rrhf_loss(_sums(m, h, b), b.lengths, b.rewards, group_sizes=sizes, impl=m.impl).losses


def _pairwise(m, h, b):
    return P.pairwise_preference_logits(_sums(m, h, b), b.refs, group_sizes=2, impl=m.impl)


def _pairwise_of_a_list(m, h, b):
    sizes = [2] * (b.refs.shape[0] // 2)
    return P.pairwise_preference_logits(_sums(m, h, b), b.refs, group_sizes=sizes, impl=m.impl)


def _preference_of_two(m, h, b):
    found = P.linear_token_logps(h, m.head, b.targets, outputs=("log_sum_sq_probs",), impl=m.impl)
    weights = P.wpo_weights(*found[::5], cu_seqlens=b.cu, impl=m.impl)
    longest = P.length_desensitized_weights(b.cu, 0.5, tokens=h.shape[0])
    sums, counts = P.sequence_logps(found.logps * longest, cu_seqlens=b.cu, impl=m.impl)
    losses = P.preference_loss(
        sums[0::2], sums[1::2], b.refs[0::2], b.refs[1::2], loss_type=("ipo", "sft"),
        loss_weights=(1.0, 0.2), beta=b.rewards.std(), chosen_counts=counts[0::2],
        rejected_counts=counts[1::2], weights=weights, impl=m.impl,
    ).losses  # fmt: skip
    return P.dr_dpo_mean(losses, 0.5)[None]


def _head(**options):
    def op(m, h, b):
        given, tokens = {**options, "ref_logps": b.refs}, _tokens(m, h, b)
        if options.get("loss") == "ple":
            del given["ref_logps"]
            given["rewards"] = b.rewards
        elif options.get("loss") == "noise_aware":
            given["extrapolated_token_logps"] = tokens.detach() * 1.5
        kept = b.targets != -100
        return P.pair_loss_head(tokens, cu_seqlens=b.cu, mask=kept, impl=m.impl, **given).losses

    return op


def _whole(**options):
    def op(m, h, b):
        found = P.linear_preference_loss(
            h, m.head, b.targets, cu_seqlens=b.cu, ref_logps=b.refs, impl=m.impl, **options
        )
        return found.losses.reshape(-1)

    return op


OPS = {
    "token_logps": _logits,
    "linear_token_logps": _linear,
    "linear_token_logps, adapter": _adapter,
    "linear_token_logps_triple": _triple,
    "sequence_logps": _sums,
    "preference_loss": _preference,
    "preference_loss, two of WPO and LD-DPO": _preference_of_two,
    "linear_token_kl, tdpo_loss": _tdpo,
    "noise_aware_loss": _noise_aware,
    "unpaired_loss": _unpaired,
    "enhancement_loss": _enhancement,
    "pairwise_preference_logits": _pairwise,
    "pair_loss_head": _head(),
    "pair_loss_head, noise_aware": _head(loss="noise_aware", threshold=0.5),
    "pair_loss_head, ple": _head(loss="ple", threshold=0.3, ranking="logistic"),
    "linear_preference_loss": _whole(),
    "linear_preference_loss, mean": _whole(reduction="mean"),
}
"""Every op, as a function of the model, its hidden states [N, D] and a batch."""

LISTS = {"pairwise_preference_logits of a list": _pairwise_of_a_list, "rrhf_loss": _rrhf}
"""Ops with a list of sizes, which is part of what is compiled."""

EVERY = {**OPS, **LISTS, "linear_token_kl": _kl}


def step(model, call, ids, batch):
    """Return the loss and every parameter's gradient."""
    model.zero_grad()
    loss = call(ids, batch)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **{name: grad.clone() for name, grad in grads.items()}}
