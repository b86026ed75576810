"""RRHF: rank K responses to a prompt by their mean log-probs, and learn the best one.

With p the policy's mean log-prob of a response's tokens and r its reward, for each prompt::

    ranking = sum over i, j with r_i < r_j of max(0, p_i - p_j)
    sft = -(summed log-prob of the response with the largest reward, the first of equal ones)
    losses = ranking + sft_weight * sft

Shapes: R responses in G ragged groups, ``[R]`` in, ``[G]`` out. The pairs are the flat layout of
``pairwise_preference_logits``, the sum of the K_g * K_g elements of the groups, and the sums over
them are ``sequence_logps``: the same kernels, deterministic, and nothing is read back from a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import INTEGERS, check_number, check_tensor, compute_dtype, resolve_impl
from .pairwise_preference_logits import _sizes, pairwise_preference_logits
from .sequence_logps import sequence_logps


class RRHFLoss(NamedTuple):
    """Losses of each prompt and their two terms, and which responses the second is of."""

    losses: Tensor
    ranking: Tensor
    sft: Tensor
    is_best: Tensor


def rrhf_loss_reference(
    policy_logps: Tensor,
    counts: Tensor,
    rewards: Tensor,
    group_sizes: Sequence[int],
    sft_weight: float = 1.0,
) -> RRHFLoss:
    """Return the losses by eager PyTorch, a group at a time, in the dtype given."""
    ranking, sft, is_best = [policy_logps[:0]], [policy_logps[:0]], [counts[:0].bool()]
    sizes = list(group_sizes)
    groups = (x.split(sizes) for x in (policy_logps, counts, rewards))
    for sums, n, r in zip(*groups, strict=True):
        p = sums / n.clamp(min=1)
        ranked = (r[:, None] < r[None, :]) * (p[:, None] - p[None, :]).relu()
        ranking.append(ranked.sum()[None])
        best = torch.arange(len(r), device=r.device) == (r.argmax() if len(r) else 0)
        sft.append(-sums[best].sum()[None])
        is_best.append(best)
    terms = torch.cat(ranking), torch.cat(sft)
    return RRHFLoss(terms[0] + sft_weight * terms[1], *terms, torch.cat(is_best))


def rrhf_loss(
    policy_logps: Tensor,
    counts: Tensor,
    rewards: Tensor,
    *,
    group_sizes: Sequence[int] | Tensor | None = None,
    cu_groups: Tensor | None = None,
    sft_weight: float = 1.0,
    impl: str = "auto",
) -> RRHFLoss:
    """Return RRHF's loss of each prompt, from its responses' log-probs and rewards.

    Equivalent PyTorch, for one group::

        p = policy_logps / counts
        ranking = ((rewards[:, None] < rewards) * (p[:, None] - p).relu()).sum()
        sft = -policy_logps[rewards.argmax()]
        losses = ranking + sft_weight * sft

    Args:
        policy_logps: ``[R]``, any float dtype and stride: log-prob of each response under the
            policy, in nats, summed over its tokens; the responses to one prompt side by side.
        counts: ``[R]``, int32 or int64: the tokens of each. One without tokens has a mean of 0.
        rewards: ``[R]``, float, any scale: only their order counts. A constant. Equal ones are not
            ranked.
        group_sizes: K of each group, a sequence of ints or an integer tensor ``[G]``; 0 is allowed
            and gives 0, and a single response has nothing but the SFT term.
        cu_groups: ``[G + 1]``, integer tensor: where each group begins, from 0 to R. Exactly one of
            the two must be given, and both are read on the host, as in
            ``pairwise_preference_logits``.
        sft_weight: weight of the SFT term, at least 0; default 1, the paper's. (The released code
            multiplies the ranking by 100 and takes the mean over tokens of the SFT term.)
        impl: ``"auto"``, ``"triton"``, ``"chunked"`` or ``"reference"``. Default ``"auto"``.

    Returns:
        ``RRHFLoss(losses, ranking, sft, is_best)``: three ``[G]``, float32 (float64 if an input is;
        the inputs' dtype from the reference), differentiable in ``policy_logps``, once; and ``[R]``
        bool, which response of its group is learned. No gradient goes to a pair at a tie of p.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: both or neither of ``group_sizes`` and ``cu_groups``, sizes that do not add up
            to R, a shape or device that does not fit, ``sft_weight`` out of range, or rewards that
            require grad.

    Source:
        RRHF: Yuan et al., arXiv 2304.05302, equations 2 to 4.
    """
    check_tensor("policy_logps", policy_logps, ndim=1)
    shape, like = policy_logps.shape, ("policy_logps", policy_logps)
    check_tensor("counts", counts, dtypes=INTEGERS, shape=shape, like=like)
    check_tensor("rewards", rewards, shape=shape, like=like, constant=True)
    sft_weight = check_number("sft_weight", sft_weight, low=0)
    dtype = compute_dtype(policy_logps, rewards)
    impl = resolve_impl(impl, policy_logps.device, dtype)
    sizes = _sizes(group_sizes, cu_groups, shape[0])
    rewards = rewards.detach()
    if impl == "reference":
        return rrhf_loss_reference(policy_logps, counts, rewards, sizes, sft_weight)
    device = policy_logps.device
    groups, blocks = (
        torch.tensor([0, *accumulate(ends)], device=device, dtype=torch.int64)
        for ends in (sizes, [size * size for size in sizes])
    )
    sums = policy_logps.to(dtype)
    means, zeros = sums / counts.clamp(min=1), torch.zeros_like(sums, requires_grad=False)
    flat = {"group_sizes": sizes, "beta": 1.0, "layout": "flat", "impl": impl}
    lead = pairwise_preference_logits(means, zeros, **flat)
    worse = pairwise_preference_logits(rewards, zeros, **flat) < 0
    ranking = sequence_logps(lead.relu(), cu_seqlens=blocks, mask=worse, impl=impl).sums
    is_best = _is_best(rewards, groups, max(sizes, default=0))
    sft = -sequence_logps(sums, cu_seqlens=groups, mask=is_best, impl=impl).sums
    return RRHFLoss(ranking + sft_weight * sft, ranking, sft, is_best)


def _is_best(rewards: Tensor, groups: Tensor, widest: int) -> Tensor:
    """Return which response of each group has the largest reward, the first of equal ones."""
    if not widest:
        return torch.zeros_like(rewards, dtype=torch.bool)
    index = torch.arange(rewards.shape[0], device=rewards.device)
    group = torch.searchsorted(groups[1:], index, right=True)
    place = index - groups[group]
    table = rewards.new_full((groups.shape[0] - 1, widest), -torch.inf)
    table[group, place] = rewards
    return place == table.argmax(1)[group]
