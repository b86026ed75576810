"""Padded sequences, their hidden states and a head: from these to scores, and to losses of pairs.

Hidden states are ``[S, T, D]``; those of pairs are B chosen and then, in the same order, B
rejected. Rows whose target is ``ignore_index`` are dropped before the head on every device, at a
host sync a call. The others go through ``linear_token_logps`` and ``sequence_logps``. A sequence's
score is its sum or, per token, its mean, and of S = 2B scores::

    nll = -(sum of the chosen sequences' log-probs) / (number of their tokens)
    loss = alpha * nll + sum_b l(score[b], score[B + b]) / B        l of ``preference_loss``

``liger.py`` has the modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels._common import INTEGERS, check_ignore_index, check_number, check_tensor
from ..kernels.linear_token_logps import linear_token_logps
from ..kernels.objectives import resolve
from ..kernels.preference_loss import preference_loss
from ..kernels.sequence_logps import SequenceLogps, sequence_logps

Output = tuple[Tensor, tuple[Tensor, ...]]


class Reference(NamedTuple):
    """The reference's side of a call: a head and its hidden states, or sums of log-probs."""

    ref_input: Tensor | None = None
    ref_weight: Tensor | None = None
    ref_bias: Tensor | None = None
    ref_logps: Tensor | None = None


# From padded hidden states to scores


def check_head(hidden, weight, target, bias, names=("_input", "lin_weight", "bias")) -> None:
    """Check a head's tensors under the names that the caller knows."""
    name, weight_name, bias_name = names
    check_tensor(name, hidden, ndim=3)
    like = (name, hidden)
    check_tensor("target", target, dtypes=INTEGERS, ndim=2, like=like)
    if hidden.shape[:2] != target.shape:
        raise ValueError(
            f"{name}: expected shape {(*target.shape, 'D')}, as target has it, "
            f"got {tuple(hidden.shape)}"
        )
    autocast = torch.is_autocast_enabled(hidden.device.type)
    dtypes = {} if autocast else {"dtypes": (hidden.dtype,)}
    check_tensor(weight_name, weight, ndim=2, like=like, **dtypes)
    if weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"{weight_name}: expected shape [V, {hidden.shape[2]}], as {name} has it, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_tensor(bias_name, bias, shape=weight.shape[:1], like=like)


def _token_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Sequence[Tensor], ignore: int
) -> list[Tensor]:
    """Return the log-probs of what each of ``targets`` asks for, by one pass of the head.

    Each is ``[<=S, T]``, of the first sequences, and gives as many as it has tokens, in order.
    """
    flat = [target.reshape(-1) for target in targets]
    rows = [(labels != ignore).nonzero()[:, 0] for labels in flat]
    labels = torch.cat([labels[index] for labels, index in zip(flat, rows, strict=True)])
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if len(targets) > 1 or len(labels) < len(hidden):
        hidden = hidden.index_select(0, torch.cat(rows))
    logps = linear_token_logps(hidden, weight, labels, bias=bias, ignore_index=ignore)
    return list(logps.split([len(index) for index in rows]))


def _sums(logps: Tensor, target: Tensor, ignore: int) -> SequenceLogps:
    """Return sums and counts of the sequences whose tokens ``logps`` are."""
    counts = (target != ignore).sum(-1)
    return sequence_logps(logps, cu_seqlens=F.pad(counts.cumsum(0), (1, 0)))


def sequences(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore: int
) -> SequenceLogps:
    """Return the sums and the numbers of tokens of S padded sequences, ``[S]`` each."""
    (logps,) = _token_logps(hidden, weight, bias, [target], ignore)
    return _sums(logps, target, ignore)


@torch.no_grad()
def logit_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``[S]``: the sums of all logits, those of ignored positions too, as Liger has them.

    The sum over positions and vocabulary is the product of two sums: no logit is made.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    sums = (hidden.sum(1, dtype=dtype) * weight.sum(0, dtype=dtype)).sum(-1)
    return sums if bias is None else sums + hidden.shape[1] * bias.sum(dtype=dtype)


class FusedLinear(nn.Module):
    """Options under Liger's names, checked; and what a reference gives."""

    ignore_index: int
    beta: float
    use_ref_model = False
    average_log_prob = True

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)
            flag = name in ("compiled", "compute_nll_loss", "use_ref_model", "average_log_prob")
            if flag and not isinstance(value, bool):
                raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
        check_ignore_index(options["ignore_index"])
        check_number("beta", options["beta"], above=0)
        chunk_size = options["chunk_size"]
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
            raise TypeError(f"chunk_size: expected an int, got {type(chunk_size).__name__}")
        check_number("chunk_size", chunk_size, low=1)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)

    def _scores(self, sums: Tensor, counts: Tensor) -> Tensor:
        return sums / counts.clamp(min=1) if self.average_log_prob else sums

    def _reference(self, like: Tensor, target: Tensor, reference: Reference) -> Tensor:
        """Return the reference's scores ``[S]``, zeros without one."""
        ref_input, ref_weight, ref_bias, ref_logps = reference
        if not self.use_ref_model:
            _refuse("with use_ref_model=False", **reference._asdict())
            return torch.zeros(target.shape[0], device=like.device)
        if (ref_input is None) == (ref_logps is None):
            raise ValueError(
                "ref_input, ref_logps: expected one of the two with use_ref_model=True, got "
                + ("neither" if ref_input is None else "both")
            )
        if ref_logps is not None:
            _refuse("with ref_logps", ref_weight=ref_weight, ref_bias=ref_bias)
            shape, of = target.shape[:1], ("_input", like)
            check_tensor("ref_logps", ref_logps, shape=shape, like=of, constant=True)
            wide = ref_logps.to(torch.promote_types(ref_logps.dtype, torch.float32))
            return self._scores(wide, (target != self.ignore_index).sum(-1))
        names = ("ref_input", "ref_weight", "ref_bias")
        check_head(ref_input, ref_weight, target, ref_bias, names)
        assert ref_input is not None and ref_weight is not None
        with torch.no_grad():
            found = sequences(ref_input, ref_weight, target, ref_bias, self.ignore_index)
        return self._scores(*found)


def _refuse(why: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: expected None {why}, got {type(value).__name__}")


# Pairs


class Paired(FusedLinear):
    """The losses that compare a chosen and a rejected sequence."""

    alpha = 1.0
    compute_nll_loss: bool

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        check_number("alpha", self.alpha)
        resolve(**self._loss())

    def _loss(self) -> dict[str, Any]:
        """Return what ``preference_loss`` takes besides tensors and beta."""
        raise NotImplementedError

    def _run(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None,
        reference: Reference | None = None,
        nll_target: Tensor | None = None,
    ) -> Output:
        """Return the loss and what all four return beside it."""
        check_head(_input, lin_weight, target, bias)
        if len(target) % 2:
            raise ValueError(
                "target: expected [2B, T], the chosen and then the rejected sequences, "
                f"got {len(target)}"
            )
        pairs, targets = len(target) // 2, [target]
        if nll_target is not None:
            if not self.compute_nll_loss:
                raise ValueError("nll_target: expected None with compute_nll_loss=False")
            like = ("_input", _input)
            check_tensor("nll_target", nll_target, dtypes=INTEGERS, shape=target.shape, like=like)
            nll_target, chosen_target = nll_target[:pairs], target[:pairs]
            same = nll_target == chosen_target
            targets.append(nll_target.masked_fill(same, self.ignore_index))
        ref = None if reference is None else self._reference(_input, target, reference)
        logps, *others = _token_logps(_input, lin_weight, bias, targets, self.ignore_index)
        sums, counts = _sums(logps, target, self.ignore_index)
        scores = self._scores(sums, counts)
        ones = torch.ones_like(counts[:pairs])  # a mean is per token already
        found = preference_loss(
            *_halves(scores), *(() if ref is None else _halves(ref)), beta=self.beta,
            chosen_counts=ones, rejected_counts=ones, **self._loss(),
        )  # fmt: skip
        loss, nll = found.losses.sum() / max(1, pairs), sums.new_zeros(())
        if self.compute_nll_loss:
            total, tokens = sums[:pairs].sum(), counts[:pairs].sum()
            if nll_target is not None:
                kept = same[chosen_target != self.ignore_index]
                total = torch.where(kept, logps[: len(kept)], 0).sum() + others[0].sum()
                tokens = (nll_target != self.ignore_index).sum()
            nll = -total / tokens.clamp(min=1)
            loss = loss + self.alpha * nll
        logits = logit_sums(_input, lin_weight, bias) / (target.shape[1] * lin_weight.shape[0])
        return loss, (
            *_halves(scores.detach()),
            *(x.sum() / max(1, pairs) for x in _halves(logits)),
            nll.detach(),
            found.chosen_rewards,
            found.rejected_rewards,
        )


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return what belongs to the chosen and to the rejected sequences."""
    half = len(values) // 2
    return values[:half], values[half:]
