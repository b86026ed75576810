"""A model as the judge of its own responses: K to a prompt, all compared with each other.

With p and r a response's log-probs under the policy and its reference, summed over tokens (SPA,
arXiv 2406.04412, equation 7)::

    reward_k = beta * (p_k - r_k)          table[i, j] = reward_i - reward_j

and ``sigmoid(table[i, j])`` is the probability that response i is better than j. A prompt is run
once for its K responses, by each of the two models; what they give is one call of
``pairwise_preference_logits`` for all prompts of a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .kernels.pairwise_preference_logits import pairwise_preference_logits
from .logp_cache import LOOKAHEAD, CachedModel, logps_of
from .models import device_of
from .packing import Group
from .references import Reference


class Judgement(NamedTuple):
    """What a judge says of the K responses to one prompt.

    Attributes:
        policy_logps: Their log-probs under the policy, summed over tokens.
        reference_logps: Those under the reference; 0 without one.
        rewards: ``beta`` times the difference.
        table: Preference logits of each against each, float32 (float64 of a float64 policy)
            ``[K, K]`` on the CPU: antisymmetric, its diagonal exactly 0.
    """

    policy_logps: list[float]
    reference_logps: list[float]
    rewards: list[float]
    table: Tensor


@torch.no_grad()
def judge(
    policy: nn.Module | Reference | CachedModel,
    reference: Reference | CachedModel | None,
    groups: Iterable[Group],
    *,
    beta: float,
    max_tokens: int,
    share_prompts: bool = True,
    lookahead: int = LOOKAHEAD,
) -> Iterator[Judgement]:
    """Yield what the policy, against its reference, says of each group's responses, in order.

    Streams: ``lookahead`` groups are read, run through both models and compared; nothing of a
    window outlasts it, and between two windows the models are as they were before. Where the two
    are one PEFT model, they share its base weights and one sweep over the groups does both;
    otherwise both models are in memory, which is less than training takes for weights, gradients
    and an optimiser's state.

    Args:
        policy: The judge; with ``LogpCache.of``, responses that are known are not computed.
        reference: What it is compared with, likewise; None compares it with nothing.
        groups: G prompts with K responses each, K free to differ.
        beta: Scale of the rewards, per nat.
        max_tokens: As for ``models.score``.
        share_prompts: As for ``models.score``.
        lookahead: As for ``models.score``.
    """
    groups = iter(groups)
    while window := list(islice(groups, lookahead)):
        ours, theirs = (
            [[0.0] * len(group.response_ids) for group in window]
            if model is None
            else list(
                logps_of(
                    model,
                    window,
                    max_tokens=max_tokens,
                    share_prompts=share_prompts,
                    lookahead=lookahead,
                )
            )
            for model in (policy, reference)
        )
        yield from _compare(policy, ours, theirs, beta)


def _compare(
    policy: nn.Module | Reference | CachedModel,
    ours: list[list[float]],
    theirs: list[list[float]],
    beta: float,
) -> list[Judgement]:
    held = policy.reference if isinstance(policy, CachedModel) else policy
    model = held.model if isinstance(held, Reference) else held
    exact = next(p.dtype for p in model.parameters() if p.is_floating_point()) == torch.float64
    dtype, device = torch.float64 if exact else torch.float32, device_of(model)
    flat = [
        torch.tensor([x for row in rows for x in row], dtype=dtype, device=device)
        for rows in (ours, theirs)
    ]
    sizes = [len(row) for row in ours]
    logits = pairwise_preference_logits(*flat, group_sizes=sizes, beta=beta, layout="flat").cpu()
    blocks = logits.split([size * size for size in sizes])
    return [
        Judgement(
            p,
            r,
            [beta * (a - b) for a, b in zip(p, r, strict=True)],
            block.view(size, size).clone(),  # one that is kept does not keep the window
        )
        for p, r, block, size in zip(ours, theirs, blocks, sizes, strict=True)
    ]
