"""The ops as ``torch.nn.Module``: options at construction, tensors at the call.

Each is as thin as ``torch.nn.GELU`` over ``torch.nn.functional.gelu``: what an argument means, and
what comes back, is in the docstring of the function that it calls. None holds a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from . import enhancement_loss as _enhancement_loss
from . import linear_token_logps as _linear_token_logps
from . import noise_aware_loss as _noise_aware_loss
from . import pairwise_preference_logits as _pairwise_preference_logits
from . import preference_loss as _preference_loss
from . import sequence_logps as _sequence_logps
from . import token_logps as _token_logps
from . import unpaired_loss as _unpaired_loss


class _Op(nn.Module):
    """An op with its options bound, which its repr shows."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class TokenLogps(_Op):
    """``token_logps`` as a module: ``forward(logits, targets)``."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        outputs: Sequence[str] = (),
        impl: str = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            softcap=softcap,
            ignore_index=ignore_index,
            outputs=tuple(outputs),
            impl=impl,
        )

    def forward(self, logits: Tensor, targets: Tensor) -> Any:
        """Return the log-probs ``[...]`` of ``targets`` ``[...]`` under ``logits`` ``[..., V]``."""
        return _token_logps.token_logps(logits, targets, **self.options)


class LinearTokenLogps(_Op):
    """``linear_token_logps`` as a module, its tensors in the order of Liger's fused losses."""

    def __init__(
        self,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        ignore_index: int = -100,
        outputs: Sequence[str] = (),
        impl: str = "auto",
    ) -> None:
        super().__init__(
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            ignore_index=ignore_index,
            outputs=tuple(outputs),
            impl=impl,
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Any:
        """Return the log-probs ``[...]`` of ``target`` under ``_input @ lin_weight.T + bias``.

        ``lin_weight`` is ``[V, D]``, ``_input`` ``[..., D]``, ``bias`` ``[V]``.
        """
        return _linear_token_logps.linear_token_logps(
            _input, lin_weight, target, bias=bias, **self.options
        )


class SequenceLogps(_Op):
    """``sequence_logps`` as a module: ``forward(token_logps, cu_seqlens, mask)``."""

    def __init__(self, *, impl: str = "auto") -> None:
        super().__init__(impl=impl)

    def forward(
        self, token_logps: Tensor, cu_seqlens: Tensor | None = None, mask: Tensor | None = None
    ) -> _sequence_logps.SequenceLogps:
        """Return the sum and the count of each sequence of ``[N]`` or ``[S, T]`` log-probs."""
        return _sequence_logps.sequence_logps(
            token_logps, cu_seqlens=cu_seqlens, mask=mask, **self.options
        )


class PreferenceLoss(_Op):
    """``preference_loss`` as a module: four log-probs ``[B]``, policy before reference."""

    def __init__(
        self,
        *,
        loss_type: str | Sequence[str] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = 1.0,
        loss_options: Mapping[str, float] | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            loss_type=loss_type,
            loss_weights=loss_weights,
            beta=beta,
            label_smoothing=label_smoothing,
            f_divergence_type=f_divergence_type,
            f_alpha_divergence_coef=f_alpha_divergence_coef,
            loss_options=loss_options,
            impl=impl,
        )

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        weights: Tensor | None = None,
        chosen_counts: Tensor | None = None,
        rejected_counts: Tensor | None = None,
    ) -> _preference_loss.PreferenceLoss:
        """Return the losses and the rewards ``[B]``."""
        return _preference_loss.preference_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            weights=weights,
            chosen_counts=chosen_counts,
            rejected_counts=rejected_counts,
            **self.options,
        )


class NoiseAwareLoss(_Op):
    """``noise_aware_loss`` as a module; what changes by the step comes with the call."""

    def __init__(self, *, beta: float = 0.1, impl: str = "auto") -> None:
        super().__init__(beta=beta, impl=impl)

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        extrapolated_chosen_logps: Tensor,
        extrapolated_rejected_logps: Tensor,
        *,
        alpha: float | Tensor = 0.1,
        threshold: float | Tensor,
        weights: Tensor | None = None,
    ) -> _noise_aware_loss.NoiseAwareLoss:
        """Return the losses, the rewards, the flags and the confidences ``[B]``."""
        return _noise_aware_loss.noise_aware_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            extrapolated_chosen_logps,
            extrapolated_rejected_logps,
            alpha=alpha,
            threshold=threshold,
            weights=weights,
            **self.options,
        )


class UnpairedLoss(_Op):
    """``unpaired_loss`` as a module; the baseline, made at each step, comes with the call."""

    def __init__(
        self,
        *,
        loss_type: str = "kto",
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            loss_type=loss_type,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            impl=impl,
        )

    def forward(
        self,
        policy_logps: Tensor,
        reference_logps: Tensor,
        desirable: Tensor,
        *,
        baseline: float | Tensor | None = None,
        weights: Tensor | None = None,
    ) -> _unpaired_loss.UnpairedLoss:
        """Return the losses and the rewards ``[S]``."""
        return _unpaired_loss.unpaired_loss(
            policy_logps,
            reference_logps,
            desirable,
            baseline=baseline,
            weights=weights,
            **self.options,
        )


class EnhancementLoss(_Op):
    """``enhancement_loss`` as a module; the threshold, which decays, comes with the call."""

    def __init__(
        self,
        *,
        ranking: str = "mean",
        sft: str = "mean",
        temperature: float = 1.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(ranking=ranking, sft=sft, temperature=temperature, impl=impl)

    def forward(
        self,
        plain_logps: Tensor,
        guided_logps: Tensor,
        plain_rewards: Tensor,
        guided_rewards: Tensor,
        plain_lengths: Tensor | None = None,
        guided_lengths: Tensor | None = None,
        *,
        threshold: float | Tensor,
    ) -> _enhancement_loss.EnhancementLoss:
        """Return the losses and the flags ``[B]``, and the weights ``[B, 2]``."""
        return _enhancement_loss.enhancement_loss(
            plain_logps,
            guided_logps,
            plain_rewards,
            guided_rewards,
            plain_lengths=plain_lengths,
            guided_lengths=guided_lengths,
            threshold=threshold,
            **self.options,
        )


class PairwisePreferenceLogits(_Op):
    """``pairwise_preference_logits`` as a module: ``forward(policy, reference, group_sizes)``."""

    def __init__(self, *, beta: float = 0.1, layout: str = "padded", impl: str = "auto") -> None:
        super().__init__(beta=beta, layout=layout, impl=impl)

    def forward(
        self,
        policy_logps: Tensor,
        reference_logps: Tensor,
        group_sizes: Sequence[int] | Tensor | None = None,
        cu_groups: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of every pair within each group of the ``[R]`` log-probs."""
        return _pairwise_preference_logits.pairwise_preference_logits(
            policy_logps,
            reference_logps,
            group_sizes=group_sizes,
            cu_groups=cu_groups,
            **self.options,
        )
