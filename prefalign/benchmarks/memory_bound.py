"""Who is measured: the ops that start from logits or log-probs, bound by memory or launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import prefalign

from .cases import Case, Forward, Outputs, Unsupported
from .providers import BARE, EAGER, OURS, PEER, Provider, pick

# --- token_logps: logits [N, V] given ---


def _token_ours(case: Case) -> Forward:
    return lambda: {"logps": prefalign.token_logps(case["logits"], case["targets"])}


def _token_eager(case: Case) -> Forward:
    def forward() -> Outputs:
        logits = case["logits"]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return {"logps": pick(logits, case["targets"])}

    return forward


def _token_trl(case: Case) -> Forward:
    from trl.trainer.utils import selective_log_softmax

    return lambda: {"logps": selective_log_softmax(case["logits"], case["targets"])}


def _token_native(case: Case) -> Forward:
    return lambda: {
        "logps": -F.cross_entropy(case["logits"], case["targets"], reduction="none")
    }  # fmt: skip


def _token_liger(case: Case) -> Forward:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    if case.device.type != "cuda":
        raise Unsupported("its kernels need a GPU")

    def forward() -> Outputs:
        # It writes the gradient over the logits it is given: a copy keeps the inputs the same.
        result = LigerCrossEntropyFunction.apply(
            case["logits"].clone(), case["targets"], None, -100, 0.0, 0.0, "none"
        )
        return {"logps": -(result[0] if isinstance(result, tuple) else result)}

    return forward


def _bare_copy(case: Case) -> Forward:
    logits = case["logits"].detach()
    target = torch.empty_like(logits)

    def forward() -> Outputs:
        target.copy_(logits)
        return {}

    return forward


TOKEN = (
    Provider("prefalign", _token_ours, OURS),
    Provider("eager", _token_eager, EAGER),
    Provider("TRL", _token_trl, PEER, "trl", "1.16.0"),
    Provider("torch cross_entropy", _token_native, PEER, "torch", "2.13.0"),
    Provider("Liger", _token_liger, PEER, "liger-kernel", "0.8.5"),
    Provider("one copy of the logits", _bare_copy, BARE),
)


# --- The loss heads: ours, eager, and eager under torch.compile ---


def _against_compiled(ours: Callable, eager: Callable) -> tuple[Provider, ...]:
    """Return three providers of functions of a case that give the outputs."""

    def compiled(case: Case) -> Forward:
        return torch.compile(lambda: eager(case))

    return (
        Provider("prefalign", lambda case: lambda: ours(case), OURS),
        Provider("eager", lambda case: lambda: eager(case), EAGER),
        Provider("eager, compiled", compiled, PEER, "torch", "2.13.0"),
    )


def _sums_ours(case: Case) -> Outputs:
    found = prefalign.sequence_logps(case["token_logps"], cu_seqlens=case["cu_seqlens"])
    return {"sums": found.sums}


def _sums_eager(case: Case) -> Outputs:
    token_logps = case["token_logps"]
    sums = token_logps.new_zeros(case["cu_seqlens"].shape[0] - 1)
    return {"sums": sums.index_add(0, case["sequence"], token_logps)}


SIDES = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
EXTRAPOLATED = ("extrapolated_chosen", "extrapolated_rejected")


def _loss_ours(case: Case) -> Outputs:
    found = prefalign.preference_loss(*(case[name] for name in SIDES), beta=case["beta"])
    return found._asdict()


def _margin(case: Case, chosen: str, rejected: str) -> Tensor:
    return (case[chosen] - case["reference_chosen"]) - (case[rejected] - case["reference_rejected"])


def _rewards(case: Case) -> Outputs:
    return {
        f"{side}_rewards": case["beta"]
        * (case[f"policy_{side}"].detach() - case[f"reference_{side}"])
        for side in ("chosen", "rejected")
    }


def _loss_eager(case: Case) -> Outputs:
    z = case["beta"] * _margin(case, "policy_chosen", "policy_rejected")
    return {"losses": -F.logsigmoid(z)} | _rewards(case)


def _noise_ours(case: Case) -> Outputs:
    found = prefalign.noise_aware_loss(
        *(case[name] for name in SIDES + EXTRAPOLATED), beta=case["beta"], alpha=case["alpha"],
        threshold=case["threshold"],
    )._asdict()  # fmt: skip
    return {name: value for name, value in found.items() if name != "is_noisy"}


def _noise_eager(case: Case) -> Outputs:
    confidences = torch.sigmoid(case["beta"] * _margin(case, *EXTRAPOLATED))
    smoothing = torch.where(confidences < case["threshold"], case["alpha"], 0.0)
    z = case["beta"] * _margin(case, "policy_chosen", "policy_rejected")
    losses = -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)
    return {"losses": losses, "confidences": confidences} | _rewards(case)


def _pairwise_ours(case: Case) -> Outputs:
    logits = prefalign.pairwise_preference_logits(
        case["policy"], case["reference"], group_sizes=case["sizes"], beta=case["beta"]
    )
    return {"logits": logits}


def _pairwise_eager(case: Case) -> Outputs:
    rewards = case["beta"] * (case["policy"] - case["reference"])
    padded = rewards[case["place"]] * case["inside"]  # [G, K]
    pairs = case["inside"][:, :, None] * case["inside"][:, None, :]
    return {"logits": (padded[:, :, None] - padded[:, None, :]) * pairs}


SUMS = _against_compiled(_sums_ours, _sums_eager)
LOSS = _against_compiled(_loss_ours, _loss_eager)
NOISE = _against_compiled(_noise_ours, _noise_eager)
PAIRWISE = _against_compiled(_pairwise_ours, _pairwise_eager)
