"""prefalign: fused kernels and a thin trainer for aligning language models with preferences.

The public names are imported when they are first used, so that ``import prefalign`` and
``prefalign --version`` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

_HOMES = {
    "token_logps": "kernels.token_logps",
    "linear_token_logps": "kernels.linear_token_logps",
    "HeadAdapter": "kernels.head_adapter",
    "linear_token_logps_triple": "kernels.linear_token_logps_triple",
    "linear_token_kl": "kernels.linear_token_kl",
    "sequence_logps": "kernels.sequence_logps",
    "length_desensitized_weights": "kernels.token_weights",
    "wpo_weights": "kernels.token_weights",
    "preference_loss": "kernels.preference_loss",
    "tdpo_loss": "kernels.tdpo_loss",
    "dr_dpo_mean": "kernels.reductions",
    "DynamicBeta": "kernels.dynamic_beta",
    "noise_aware_loss": "kernels.noise_aware_loss",
    "unpaired_loss": "kernels.unpaired_loss",
    "kl_baseline": "kernels.unpaired_losses",
    "RunningShift": "kernels.unpaired_losses",
    "enhancement_loss": "kernels.enhancement_loss",
    "released_weights": "kernels.enhancement_loss",
    "pairwise_preference_logits": "kernels.pairwise_preference_logits",
    "rrhf_loss": "kernels.rrhf_loss",
    "pair_loss_head": "kernels.loss_heads",
    "linear_preference_loss": "kernels.linear_preference_loss",
    "plan_pairs": "kernels.linear_preference_loss",
    "plan_head": "kernels.plan",
    "HeadPlan": "kernels.plan",
    "SPA": "spa",
    "SPASettings": "spa_config",
    "PreferenceTrainer": "trainer",
    "NoiseAwareTrainer": "noise_aware",
    "LogpCache": "logp_cache",
    "judge": "judging",
    "Judgement": "judging",
    "PackedBatch": "packing",
    "Group": "packing",
    "pack": "packing",
    "UserError": "errors",
}

__all__ = [
    "__version__",
    "token_logps",
    "linear_token_logps",
    "HeadAdapter",
    "linear_token_logps_triple",
    "linear_token_kl",
    "sequence_logps",
    "length_desensitized_weights",
    "wpo_weights",
    "preference_loss",
    "tdpo_loss",
    "dr_dpo_mean",
    "DynamicBeta",
    "noise_aware_loss",
    "unpaired_loss",
    "kl_baseline",
    "RunningShift",
    "enhancement_loss",
    "released_weights",
    "pairwise_preference_logits",
    "rrhf_loss",
    "pair_loss_head",
    "linear_preference_loss",
    "plan_pairs",
    "plan_head",
    "HeadPlan",
    "SPA",
    "SPASettings",
    "PreferenceTrainer",
    "NoiseAwareTrainer",
    "LogpCache",
    "judge",
    "Judgement",
    "PackedBatch",
    "Group",
    "pack",
    "UserError",
]

if TYPE_CHECKING:
    from .errors import UserError
    from .judging import Judgement, judge
    from .kernels.dynamic_beta import DynamicBeta
    from .kernels.enhancement_loss import enhancement_loss, released_weights
    from .kernels.head_adapter import HeadAdapter
    from .kernels.linear_preference_loss import linear_preference_loss, plan_pairs
    from .kernels.linear_token_kl import linear_token_kl
    from .kernels.linear_token_logps import linear_token_logps
    from .kernels.linear_token_logps_triple import linear_token_logps_triple
    from .kernels.loss_heads import pair_loss_head
    from .kernels.noise_aware_loss import noise_aware_loss
    from .kernels.pairwise_preference_logits import pairwise_preference_logits
    from .kernels.plan import HeadPlan, plan_head
    from .kernels.preference_loss import preference_loss
    from .kernels.reductions import dr_dpo_mean
    from .kernels.rrhf_loss import rrhf_loss
    from .kernels.sequence_logps import sequence_logps
    from .kernels.tdpo_loss import tdpo_loss
    from .kernels.token_logps import token_logps
    from .kernels.token_weights import length_desensitized_weights, wpo_weights
    from .kernels.unpaired_loss import unpaired_loss
    from .kernels.unpaired_losses import RunningShift, kl_baseline
    from .logp_cache import LogpCache
    from .noise_aware import NoiseAwareTrainer
    from .packing import Group, PackedBatch, pack
    from .spa import SPA
    from .spa_config import SPASettings
    from .trainer import PreferenceTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
