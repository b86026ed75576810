"""SPA's noise-aware loss in TRL's ``DPOTrainer``, through fused heads.

::

    config = NoiseAwareDPOConfig(output_dir="spa-1", noise_extrapolation=0.5)
    trainer = NoiseAwareDPOTrainer(model, args=config, train_dataset=pairs)
    trainer.train()

Data, collator, PEFT, the reference and metrics are TRL's; the loss, its threshold and its schedule
are those of ``noise_aware.NoiseAwareTrainer``. PLE's trainer is in ``trl_enhancement``.

SPA's loss (arXiv 2406.04412) is DPO's and one term, for ``log sigmoid(-z) = log sigmoid(z) - z``::

    -(1 - a) * log sigmoid(z) - a * log sigmoid(-z) = -log sigmoid(z) + a * z

so TRL's own loss is kept and the term added. What it takes beyond DPO are log-probs of logits that
are extrapolated from the reference's through the policy's. TRL runs the policy, then the reference;
each hands its hidden states to the fused op, and at the second all is there for
``linear_token_logps_triple``: in a step that looks at confidences, one more product of the policy's
hidden states with its head. Other steps cost what DPO's do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._head import Head, head_arguments, read_head, refuse_head_adapter
from ..errors import ModelError
from ..kernels.linear_token_logps_triple import linear_token_logps_triple
from ..kernels.sequence_logps import sequence_logps
from ..noise_aware import NoiseAwareTrainer, NoiseThreshold
from ..spa_config import NoiseSettings
from ._trl_pairs import DPO_ONLY, DPOConfig, PairTrainer, check, option
from .trl import _FusedLogps
from .trl_enhancement import EnhancementDPOConfig, EnhancementDPOTrainer

__all__ = [
    "EnhancementDPOConfig",
    "EnhancementDPOTrainer",
    "NoiseAwareDPOConfig",
    "NoiseAwareDPOTrainer",
]


@dataclass
class NoiseAwareDPOConfig(DPOConfig):
    """TRL's ``DPOConfig`` and the settings of SPA's noise-aware loss, as in ``NoiseSettings``.

    ``restore_callback_states_from_checkpoint`` is True by default: the window is a callback's.

    Args:
        noise_alpha: Label smoothing of a pair judged noisy.
        noise_alpha_warmup: Share of the steps, at the start, over which it is 0.
        noise_extrapolation: λ of this iteration. 0 takes confidence from the policy itself.
        noise_quantile: The threshold is this quantile of the window's confidences.
        noise_window: Pairs in the window; until it is full no pair is judged noisy.

    Raises:
        ValueError: A value out of its range, named.
    """

    noise_alpha: float = option(0.1, "Label smoothing of pairs judged noisy.")
    noise_alpha_warmup: float = option(0.2, "Share of the steps over which noise_alpha is 0.")
    noise_extrapolation: float = option(0.5, "Extrapolation of the logits, lambda; 0 for none.")
    noise_quantile: float = option(0.1, "The threshold: this quantile of recent confidences.")
    noise_window: int = option(64, "How many pairs the threshold looks back on.")
    restore_callback_states_from_checkpoint: bool = option(
        True, "Go on with the window of a checkpoint that training is resumed from."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha, warmup, quantile = self.noise_alpha, self.noise_alpha_warmup, self.noise_quantile
        extrapolation, window = self.noise_extrapolation, self.noise_window
        check("noise_alpha", alpha, 0 <= alpha <= 0.5, "from 0 to 0.5")
        check("noise_alpha_warmup", warmup, 0 <= warmup <= 1, "from 0 to 1")
        check("noise_quantile", quantile, 0 <= quantile <= 1, "from 0 to 1")
        finite = math.isfinite(extrapolation) and extrapolation >= 0
        check("noise_extrapolation", extrapolation, finite, "0 or more")
        check("noise_window", window, window >= 2, "2 or more")


@dataclass
class _Seen:
    """What passed through the heads in one loss; log-probs ``[N]``, only the policy's a graph's."""

    extrapolation: float
    head: Head | None = None
    hidden: Tensor | None = None
    policy: Tensor | None = None
    reference: Tensor | None = None
    extrapolated: Tensor | None = None


class _WatchedLogps(_FusedLogps):
    """The fused op of one model, seen by a trainer while it computes a loss."""

    def __init__(self, model: nn.Module, trainer: NoiseAwareDPOTrainer):
        super().__init__(model)
        self.trainer = trainer

    def apply(self, hidden: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        seen = self.trainer._seen
        if seen is not None and seen.policy is not None and seen.extrapolation:
            return self._reference(seen, hidden, *args[2:4]), None, None, None, None
        found = super().apply(hidden, *args)
        if seen is None:
            return found
        if seen.policy is None:
            seen.policy, seen.hidden = found[0], hidden.detach()
            seen.head = read_head(self.model)
        else:
            seen.reference = found[0]
        return found

    def _reference(
        self, seen: _Seen, hidden: Tensor, targets: Tensor, temperature: float
    ) -> Tensor:
        """Return the reference's log-probs, and leave the extrapolated ones in ``seen``."""
        assert seen.hidden is not None and seen.head is not None
        arguments = head_arguments(seen.head, seen.hidden)
        head = read_head(self.model)
        if head.weight is not seen.head.weight:
            theirs = head_arguments(head, seen.hidden)
            arguments |= {"ref_weight": theirs["weight"], "ref_bias": theirs["bias"]}
        _, seen.reference, seen.extrapolated = linear_token_logps_triple(
            seen.hidden,
            hidden.to(seen.hidden.dtype),
            targets=targets,
            temperature=temperature,
            extrapolation=seen.extrapolation,
            **arguments,
        )
        return seen.reference


class NoiseAwareDPOTrainer(PairTrainer):
    """TRL's ``DPOTrainer`` with SPA's noise-aware loss and de-coupled noise detection.

    A pair whose confidence, under logits extrapolated from the reference's through the policy's, is
    below a rolling quantile is taken for noise, and its label smoothed. The threshold is one for an
    optimiser step, whose confidences, of all processes and accumulated batches, come into the
    window when it is done. Logged beside TRL's metrics: ``noise/share`` of the pairs,
    ``noise/threshold``, ``noise/alpha`` and, in steps that look at it, ``noise/confidence``.

    Args:
        model: As TRL takes it.
        ref_model: As TRL takes it (π_{i-1}). None: the model as it is at the start, by a copy or,
            with PEFT, by the adapter switched off. Its head must have the model's shape.
        args: A ``NoiseAwareDPOConfig``.
        **kwargs: TRL's.

    Raises:
        ImportError: TRL is of a version that is not tested.
        TypeError: ``args`` is of another class.
        ValueError: A setting that is not supported, named: another loss, or reference log-probs
            computed beforehand, which are not enough to extrapolate from. In training, an empty
            prompt after PEFT's virtual tokens. And as ``fuse``.
        ModelError: LoRA on the head where there is extrapolation, a reference whose head does not
            fit. And as ``fuse``.
    """

    config_class = NoiseAwareDPOConfig
    fixed = DPO_ONLY

    # When alpha is what, and which steps look at confidences: as in prefalign's own trainer.
    threshold: Any = NoiseAwareTrainer.threshold
    warmup_steps: Any = NoiseAwareTrainer.warmup_steps
    alpha: Any = NoiseAwareTrainer.alpha
    looks: Any = NoiseAwareTrainer.looks

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any):
        args = self.checked(args)
        self.extrapolation = args.noise_extrapolation
        if self.extrapolation and args.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs: extrapolation takes the reference's hidden states, "
                "expected False, or noise_extrapolation=0; got True with "
                f"noise_extrapolation={self.extrapolation}"
            )
        self.noise = NoiseSettings(
            alpha=args.noise_alpha,
            alpha_warmup=args.noise_alpha_warmup,
            lambdas=[args.noise_extrapolation],
            quantile=args.noise_quantile,
            window=args.noise_window,
        )
        self._seen: _Seen | None = None
        self._step_confidences: list[Tensor] = []
        threshold = NoiseThreshold(args.noise_quantile, args.noise_window)
        callbacks = [*(kwargs.pop("callbacks", None) or []), threshold]
        super().__init__(model, ref_model, args, callbacks=callbacks, **kwargs)
        if self.extrapolation:
            self._check_heads()
        adapters = getattr(self.model, "peft_config", {}).values()
        self._has_virtual_tokens = any(adapter.is_prompt_learning for adapter in adapters)

    def _logps_op(self, model: nn.Module) -> _WatchedLogps:
        return _WatchedLogps(model, self)

    def _check_heads(self) -> None:
        heads = []
        for model in (self.model, self.model if self.ref_model is None else self.ref_model):
            refuse_head_adapter(model, "the noise-aware loss")
            head = read_head(model)
            heads.append((tuple(head.weight.shape), head.logit_scale, head.softcap))
        if heads[0] != heads[1]:
            raise ModelError(
                "ref_model: expected a head of the model's (shape, logit scale, softcap), "
                f"{heads[0]}, got {heads[1]}: set noise_extrapolation=0"
            )

    @contextmanager
    def _watching(self, extrapolation: float) -> Iterator[_Seen]:
        self._seen = seen = _Seen(extrapolation)
        try:
            yield seen
        finally:
            self._seen = None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean loss of a batch of pairs."""
        if self._has_virtual_tokens and inputs["completion_mask"][:, 0].any():
            # The first token of such a response has a log-prob from the policy alone.
            raise ValueError("prompt: with virtual tokens expected some text, got an empty prompt")
        looks, alpha = self.looks, self.alpha
        with self._watching(self.extrapolation if looks else 0.0) as seen:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, *outputs = found if return_outputs else (found,)
        threshold = self.threshold.value(loss.device)
        metrics = {"noise/alpha": alpha, "noise/threshold": threshold, "noise/share": 0.0}
        if looks:
            margins, confidences = self._margins(seen, inputs)
            is_noisy = confidences < threshold
            if alpha:
                loss = loss + (alpha * is_noisy * margins).mean()
                metrics["noise/share"] = is_noisy
            metrics["noise/confidence"] = confidences
            if self.model.training:
                self._step_confidences.append(self.accelerator.gather(confidences))
        self._store(metrics)
        return (loss, *outputs) if return_outputs else loss

    def _margins(self, seen: _Seen, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return β times each pair's margin, ``[B]`` with a graph, and its confidence, ``[B]``."""
        policy = seen.policy
        if policy is None:
            raise ModelError(
                f"{type(self).__name__} takes its log-probs from the fused op: do not unfuse it"
            )
        counts = inputs["completion_mask"][:, 1:].sum(1)
        ends = nn.functional.pad(counts.cumsum(0), (1, 0)).to(policy.device)

        def margins(logps: Tensor) -> Tensor:
            chosen, rejected = sequence_logps(logps, cu_seqlens=ends).sums.chunk(2)
            return chosen - rejected

        if seen.reference is not None:
            reference = margins(seen.reference)
        else:
            reference = inputs["ref_chosen_logps"] - inputs["ref_rejected_logps"]
        z = self.beta * (margins(policy) - reference)
        if seen.extrapolated is None:
            return z, z.detach().sigmoid()
        return z, torch.sigmoid(self.beta * (margins(seen.extrapolated) - reference))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one batch; after an optimiser step's last one, take its confidences in."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self._step_confidences:
            seen = torch.cat(self._step_confidences).double()
            self.threshold.push(torch.stack([torch.zeros_like(seen), seen, seen], dim=1))
            self.threshold.judged = []  # rows without an id to list them by
            self._step_confidences = []
        return loss
