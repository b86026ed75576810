"""The fused linear preference losses of Liger's ``chunked_loss``, made of the ops of this library.

::

    # was: from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    from prefalign.integrations.liger import LigerFusedLinearDPOLoss

DPO, SimPO, ORPO, CPO and KTO, with the names (with and without their prefix), arguments, defaults
and returns of liger-kernel 0.8.5, which need not be installed. ``ref_logps`` takes reference
log-probs that were computed before, which Liger does not. What Liger would take and leave out is
refused. How it is computed is in ``_liger_scores.py``; ``docs/from_liger.md`` says what differs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels._common import check_choice, check_number, check_tensor
from ..kernels.loss_rows import log_odds
from ..kernels.unpaired_loss import unpaired_loss
from ._liger_scores import FusedLinear, Output, Paired, Reference, check_head, logit_sums, sequences

DPO_LOSSES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "discopop",
)  # fmt: skip
"""What ``loss_type`` of the DPO module may be, as in Liger."""

_TAU = 0.05


class FusedLinearDPOLoss(Paired):
    """DPO and its kin from hidden states, as ``LigerFusedLinearDPOLoss``.

    Args:
        ignore_index: Target of the positions that do not count. Default -100.
        beta: Scale of the margin, per nat. Above 0, default 0.1.
        alpha: Weight of the NLL, if there is one. Default 1.
        compute_nll_loss: Whether the chosen sequences' NLL is added. Default False.
        compiled: Has no effect: nothing is compiled.
        use_ref_model: Whether scores are against a reference. Default True.
        average_log_prob: Whether scores are means over tokens, the reference's too. Default False.
        chunk_size: Has no effect: memory is bounded by tokens, not by pairs.
        loss_type: A name in ``DPO_LOSSES``. Default ``"sigmoid"``.
        label_smoothing: Probability that a label is flipped, in [0, 0.5]. ``"sigmoid"`` (cDPO),
            ``"robust"`` (below 0.5) and ``"exo_pair"`` (above 0) take it. Default 0.
        discopop_tau: Temperature of ``"discopop"``, above 0; for others its default, 0.05.

    Raises:
        TypeError, ValueError: An option of the wrong type, out of range, or that the loss does not
            take, named.

    Source: as in ``losses.LOSSES``.
    """

    loss_type: str
    label_smoothing: float
    discopop_tau: float

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = _TAU,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index, beta=beta, alpha=alpha, compute_nll_loss=compute_nll_loss,
            compiled=compiled, use_ref_model=use_ref_model, average_log_prob=average_log_prob,
            chunk_size=chunk_size, loss_type=loss_type, label_smoothing=label_smoothing,
            discopop_tau=discopop_tau,
        )  # fmt: skip

    def _loss(self) -> dict[str, Any]:
        check_choice("loss_type", self.loss_type, DPO_LOSSES)
        tau = check_number("discopop_tau", self.discopop_tau, above=0)
        options = {"discopop_tau": tau} if self.loss_type == "discopop" else None
        if not options and tau != _TAU:
            raise ValueError(
                f"discopop_tau: expected {_TAU} with loss_type={self.loss_type!r}, which has none, "
                f"got {tau}"
            )
        return {
            "loss_type": self.loss_type,
            "label_smoothing": self.label_smoothing,
            "loss_options": options,
        }

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
    ) -> Output:
        """Return the loss and its statistics.

        Args:
            lin_weight: ``[V, D]``, the head's weight, in the dtype of ``_input``.
            _input: ``[2B, T, D]``, float, the last hidden states: B chosen, then B rejected.
            target: ``[2B, T]``, int64 or int32: the token to score at each position.
            bias: ``[V]``, float, or None.
            ref_input: ``[2B, T, D']``, the reference's hidden states. A constant; so are the rest.
            ref_weight: ``[V', D']``, the reference's head. Needed with ``ref_input``.
            ref_bias: ``[V']`` or None.
            ref_logps: ``[2B]``, float, in place of these three: the reference's log-probs in nats,
                summed over the tokens that count, also with ``average_log_prob``.

        Returns:
            ``(loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean,
            nll_loss, chosen_rewards, rejected_rewards))``, the loss ``[]``, differentiable in
            ``_input``, ``lin_weight`` and ``bias``, once; the others detached: log-probs (sums, or
            means with ``average_log_prob``) and rewards ``[B]``, means ``[]`` over positions,
            ignored ones too, and vocabulary. float32 (float64 from float64).

        Raises:
            TypeError, ValueError: A tensor of the wrong type, dtype, shape or device, a reference
                that is missing, given twice or not taken, or one with a gradient in ``ref_logps``.
        """
        reference = Reference(ref_input, ref_weight, ref_bias, ref_logps)
        return self._run(lin_weight, _input, target, bias, reference)


class FusedLinearSimPOLoss(Paired):
    """SimPO from hidden states, as ``LigerFusedLinearSimPOLoss``: scores are means over tokens.

    Args:
        ignore_index: As in ``FusedLinearDPOLoss``, as are all but the last.
        beta: Scale of the margin. Above 0, default 0.1.
        alpha: Weight of the NLL. Default 1.
        label_smoothing: In [0, 0.5]. Default 0.
        compute_nll_loss: Default True, as in Liger. The paper's loss has no NLL: pass False.
        compiled: Has no effect.
        gamma: The margin asked for, after the scale. At least 0, default 0.5.
        chunk_size: Has no effect.

    Source: arXiv 2405.14734, equation 6.
    """

    label_smoothing: float
    gamma: float

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index, beta=beta, alpha=alpha, label_smoothing=label_smoothing,
            compute_nll_loss=compute_nll_loss, compiled=compiled, gamma=gamma,
            chunk_size=chunk_size,
        )  # fmt: skip

    def _loss(self) -> dict[str, Any]:
        gamma = check_number("gamma", self.gamma, low=0)
        options = {"simpo_gamma": gamma}
        return {
            "loss_type": "simpo",
            "label_smoothing": self.label_smoothing,
            "loss_options": options,
        }

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Output:
        """Return what ``FusedLinearDPOLoss`` does; rewards are ``beta`` times the means."""
        return self._run(lin_weight, _input, target, bias)


class FusedLinearCPOLoss(Paired):
    """CPO from hidden states, as ``LigerFusedLinearCPOLoss``.

    Args:
        ignore_index: As in ``FusedLinearDPOLoss``, as are all but ``compute_nll_loss``.
        beta: Scale of the margin. Above 0, default 0.1.
        alpha: Weight of the NLL. Default 1.
        label_smoothing: In [0, 0.5]. Default 0.
        compute_nll_loss: Default True.
        compiled: Has no effect.
        average_log_prob: Default False.
        chunk_size: Has no effect.

    Source: arXiv 2401.08417.
    """

    label_smoothing: float

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index, beta=beta, alpha=alpha, label_smoothing=label_smoothing,
            compute_nll_loss=compute_nll_loss, compiled=compiled,
            average_log_prob=average_log_prob, chunk_size=chunk_size,
        )  # fmt: skip

    def _loss(self) -> dict[str, Any]:
        return {"loss_type": "policy_sigmoid", "label_smoothing": self.label_smoothing}

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Output:
        """Return what ``FusedLinearDPOLoss`` does; rewards are ``beta`` times the log-probs."""
        return self._run(lin_weight, _input, target, bias)


class FusedLinearORPOLoss(Paired):
    """ORPO from hidden states, as ``LigerFusedLinearORPOLoss``: scores are means over tokens.

    Args:
        ignore_index: As in ``FusedLinearDPOLoss``.
        beta: Weight of the odds ratio, the paper's lambda. Above 0, default 0.1.
        compute_nll_loss: Whether the chosen sequences' NLL is added. Default True.
        compiled: Has no effect.
        chunk_size: Has no effect.

    Source: arXiv 2403.07691, equations 6 and 7.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index, beta=beta, compute_nll_loss=compute_nll_loss,
            compiled=compiled, chunk_size=chunk_size,
        )  # fmt: skip

    def _loss(self) -> dict[str, Any]:
        return {"loss_type": "odds_ratio"}

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Output:
        """Return what ``FusedLinearDPOLoss`` does, and two means more.

        ``nll_target``, ``[2B, T]``, are the NLL's own targets, of which the first half counts;
        default ``target``. The two are the mean over pairs of log sigmoid of the log odds ratio,
        and of the log odds ratio.
        """
        loss, stats = self._run(lin_weight, _input, target, bias, nll_target=nll_target)
        ratios = log_odds(stats[0]) - log_odds(stats[1])
        pairs = max(1, len(ratios))
        return loss, (*stats, F.logsigmoid(ratios).sum() / pairs, ratios.sum() / pairs)


# One by one


class FusedLinearKTOLoss(FusedLinear):
    """KTO from hidden states, as ``LigerFusedLinearKTOLoss``, whose call begins with ``_input``.

    Args:
        ignore_index: As in ``FusedLinearDPOLoss``.
        beta: Scale of the log-ratio, per nat. Above 0, default 0.1.
        compiled: Has no effect.
        use_ref_model: Whether scores are against a reference. Default False, as in Liger.
        average_log_prob: Whether scores are means over tokens. Default False.
        chunk_size: Has no effect.

    Source: arXiv 2402.01306, equation 7 of version 1, with both weights 1.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index, beta=beta, compiled=compiled, use_ref_model=use_ref_model,
            average_log_prob=average_log_prob, chunk_size=chunk_size,
        )  # fmt: skip

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | float | None = None,
        *,
        ref_logps: Tensor | None = None,
    ) -> Output:
        """Return the loss and its statistics. Shapes are those of ``FusedLinearDPOLoss``, S for 2B.

        Args:
            _input: ``[S, T, D]``, the last hidden states.
            lin_weight: ``[V, D]``, the head's weight.
            target: ``[S, T]``.
            bias: ``[V]`` or None.
            preference_labels: ``[S]``, bool: which sequences are desirable. Not optional.
            ref_input: ``[S, T, D']``.
            ref_weight: ``[V', D']``.
            ref_bias: ``[V']`` or None.
            kl: The baseline in nats, a number or a tensor of one element, or ``[S]``, one for each
                sequence. A constant. Default None, which is 0.
            ref_logps: ``[S]``, sums, in place of ``ref_input``, ``ref_weight`` and ``ref_bias``.

        Returns:
            ``(loss, (chosen_logps_sum, rejected_logps_sum, chosen_logits_sum, rejected_logits_sum,
            chosen_rewards_sum, rejected_rewards_sum))``, each ``[]``: sums over the desirable and
            over the other sequences; of the logits over positions and vocabulary too.
        """
        check_head(_input, lin_weight, target, bias)
        like, shape = ("_input", _input), target.shape[:1]
        check_tensor(
            "preference_labels", preference_labels, dtypes=(torch.bool,), shape=shape, like=like
        )
        ref = self._reference(_input, target, Reference(ref_input, ref_weight, ref_bias, ref_logps))
        against, baseline = ref, 0.0 if kl is None else kl
        if isinstance(kl, Tensor):
            one = kl.numel() == 1
            check_tensor("kl", kl, shape=None if one else shape, like=like, constant=True)
            against, baseline = (ref, kl.reshape(())) if one else (ref + kl, 0.0)
        elif kl is not None:
            check_number("kl", kl)
        head = _input, lin_weight, target, bias
        scores = self._scores(*sequences(*head, self.ignore_index))
        found = unpaired_loss(scores, against, preference_labels, beta=self.beta, baseline=baseline)
        scores = scores.detach()
        sums = scores, logit_sums(_input, lin_weight, bias), self.beta * (scores - ref)
        assert preference_labels is not None
        kinds = preference_labels, ~preference_labels
        return found.losses.sum() / max(1, len(target)), tuple(
            torch.where(kind, values, 0).sum() for values in sums for kind in kinds
        )


LigerFusedLinearDPOLoss = FusedLinearDPOLoss
LigerFusedLinearSimPOLoss = FusedLinearSimPOLoss
LigerFusedLinearORPOLoss = FusedLinearORPOLoss
LigerFusedLinearCPOLoss = FusedLinearCPOLoss
LigerFusedLinearKTOLoss = FusedLinearKTOLoss
