"""PLE's loss in TRL's ``DPOTrainer``, through a fused head.

::

    config = EnhancementDPOConfig(output_dir="ple-1", enhancement_threshold=0.2)
    trainer = EnhancementDPOTrainer(model, args=config, train_dataset=scored)
    trainer.train()

Data, collator, PEFT and what is around a step are TRL's; the loss (arXiv 2408.02599) and its
threshold are those of ``enhancement.EnhancementTrainer``. There is no reference: none is loaded and
none is run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn

from ..kernels.enhancement_loss import check_forms, enhancement_loss
from ..kernels.sequence_logps import sequence_logps
from ._trl_pairs import DPO_ONLY, DPOConfig, PairTrainer, check, option

REWARDS = ("chosen_reward", "rejected_reward")
"""The columns of the rewards, beside ``chosen`` (guided) and ``rejected`` (plain)."""


@dataclass
class EnhancementDPOConfig(DPOConfig):
    """TRL's ``DPOConfig`` and the settings of PLE's loss, as in ``EnhancementSettings``.

    Args:
        enhancement_threshold: τ at the first step. The paper's is ``0.2 * 0.9**i`` in iteration i,
            a run of the trainer each. Infinities make one loss of the two.
        enhancement_step_decay: What τ is multiplied with after every optimiser step.
        enhancement_ranking: The ranking loss's score: ``mean``, ``sum``, ``probability``,
            ``logistic``.
        enhancement_sft: The weighted SFT loss's log-probs: ``mean`` or ``sum``.
        enhancement_temperature: Temperature of the softmax that turns two rewards into weights.

    Raises:
        ValueError: A value out of its range, named.
    """

    enhancement_threshold: float = option(0.2, "Pairs whose reward gap is above it are ranked.")
    enhancement_step_decay: float = option(1.0, "What it is multiplied with after every step.")
    enhancement_ranking: str = option("mean", "Ranking loss: mean, sum, probability, logistic.")
    enhancement_sft: str = option("mean", "Log-probs of the weighted SFT loss: mean, sum.")
    enhancement_temperature: float = option(1.0, "Temperature of the weights.")

    def __post_init__(self) -> None:
        super().__post_init__()
        threshold, decay = self.enhancement_threshold, self.enhancement_step_decay
        temperature = self.enhancement_temperature
        check("enhancement_threshold", threshold, not math.isnan(threshold), "a number")
        check("enhancement_step_decay", decay, 0 < decay <= 1, "more than 0 and at most 1")
        check("enhancement_temperature", temperature, temperature > 0, "more than 0")
        check_forms(self.enhancement_ranking, self.enhancement_sft)


class _RewardCollator:
    """A collator of TRL's whose batches have the rewards, ``[B]`` float32 each."""

    def __init__(self, collate: Any):
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rewards = {name: [_reward(row, name) for row in examples] for name in REWARDS}
        batch = self.collate(examples)
        return {**batch, **{name: torch.tensor(values) for name, values in rewards.items()}}


def _reward(row: dict[str, Any], name: str) -> float:
    value = row.get(name)
    if not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"{name}: expected a column with a number in every row, got {value!r}")
    return float(value)


class EnhancementDPOTrainer(PairTrainer):
    """TRL's ``DPOTrainer`` with PLE's loss: no reference, and a reward for each response.

    ``chosen`` is the response that was generated under the principles, ``rejected`` the plain one,
    both after the plain prompt; ``chosen_reward`` and ``rejected_reward`` are columns of numbers.
    Where the first is ahead by more than the threshold, the guided response is ranked above the
    plain one; elsewhere both are imitated, with weights from their rewards.

    Logged: ``rewards/*`` (these rewards), ``logps/*`` (sums), ``entropy``, ``mean_token_accuracy``
    (of the guided), ``ple/ranked`` (the share), ``ple/guided_weight`` and ``ple/threshold``.

    Args:
        model: As TRL takes it.
        ref_model: None.
        args: An ``EnhancementDPOConfig``.
        **kwargs: TRL's.

    Raises:
        ImportError: TRL is of a version that is not tested.
        TypeError: ``args`` is of another class.
        ValueError: A setting that is not supported, named: those of DPO's loss (``beta`` among
            them) and of a reference, and ``ref_model``. A dataset without the rewards. As ``fuse``.
        ModelError: As ``fuse``.
    """

    config_class = EnhancementDPOConfig
    fixed = {
        **DPO_ONLY,
        "beta": DPOConfig.beta,
        "sync_ref_model": False,
        "precompute_ref_log_probs": False,
    }

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any):
        args = self.checked(args)
        if ref_model is not None:
            raise ValueError(
                f"ref_model: {type(self).__name__} has no reference, expected None, "
                f"got a {type(ref_model).__name__}"
            )
        for dataset in _datasets(kwargs.get("train_dataset"), kwargs.get("eval_dataset")):
            row = next(iter(dataset))
            for name in REWARDS:
                _reward(row, name)
        # Without PEFT, TRL loads a reference unless its log-probs are computed beforehand; those
        # would be by ``_precompute_ref_logps``.
        is_peft = isinstance(model, nn.Module) and is_peft_model(model)
        args.precompute_ref_log_probs = not is_peft and kwargs.get("peft_config") is None
        try:
            super().__init__(model, None, args, **kwargs)
        finally:
            args.precompute_ref_log_probs = False
        self.precompute_ref_logps = False
        self.data_collator = _RewardCollator(self.data_collator)

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        names: Any = self._signature_columns
        names.extend(name for name in REWARDS if name not in names)

    @property
    def current_threshold(self) -> float:
        """τ at the current step."""
        args: Any = self.args
        return args.enhancement_threshold * args.enhancement_step_decay**self.state.global_step

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean loss of a batch of pairs."""
        inputs = dict(inputs)
        guided_rewards, plain_rewards = (inputs.pop(name) for name in REWARDS)
        completion_mask = inputs.pop("completion_mask")
        labels = inputs["input_ids"].masked_fill(completion_mask == 0, -100)
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs, labels=labels, fused_lm_head=True)
        mask = completion_mask[:, 1:] != 0
        # Of prompt tuning's virtual tokens, in front, there are log-probs too.
        width = mask.shape[1]
        logps = outputs.log_probs[:, -width:]
        guided, plain = sequence_logps(logps, mask=mask).sums.chunk(2)
        guided_lengths, plain_lengths = mask.sum(1).chunk(2)
        args: Any = self.args
        threshold = self.current_threshold
        out = enhancement_loss(
            plain,
            guided,
            plain_rewards,
            guided_rewards,
            plain_lengths=plain_lengths,
            guided_lengths=guided_lengths,
            threshold=threshold,
            ranking=args.enhancement_ranking,
            sft=args.enhancement_sft,
            temperature=args.enhancement_temperature,
        )
        loss = out.losses.mean()
        gap = guided_rewards - plain_rewards
        guided_mask = mask.chunk(2)[0]
        metrics = {
            "ple/ranked": out.is_ranked,
            "ple/guided_weight": out.weights[:, 1],
            "rewards/chosen": guided_rewards,
            "rewards/rejected": plain_rewards,
            "rewards/margins": gap,
            "rewards/accuracies": gap > 0,
            "logps/chosen": guided,
            "logps/rejected": plain,
            "entropy": outputs.entropy[:, -width:][mask],
            "mean_token_accuracy": outputs.is_top1[:, -width:].chunk(2)[0][guided_mask],
        }
        if math.isfinite(threshold):  # JSON knows no infinity
            metrics["ple/threshold"] = threshold
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"] = outputs.aux_loss
        self._store(metrics)
        if not return_outputs:
            return loss
        with torch.no_grad():  # compute_metrics takes logits
            return loss, model(**inputs)


def _datasets(*given: Any) -> list[Any]:
    """Return the datasets of what TRL takes as such: none, one, or several by name."""
    several = [list(x.values()) if isinstance(x, dict) else [x] for x in given if x is not None]
    return [dataset for some in several for dataset in some]
