"""Who is measured: the ops of a head.

A provider's ``build(case)`` imports what it needs and returns its forward.
A peer that cannot be imported raises ImportError there and one that cannot do the case raises
``Unsupported``; either is named in the results. Nothing here is copied from a peer: each is called
through the function that its users call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import prefalign

from .cases import Case, Forward, Outputs, Unsupported

OURS, EAGER, PEER, BARE = "ours", "eager", "peer", "bare"
LogpsFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

# TRL calls its function with this width (trl.trainer.utils).
_TRL_CHUNK = 32_768


@dataclass(frozen=True)
class Provider:
    """One competitor: its name, how it is built, its role, its package and the version compared.

    ``build(case)`` gives its forward; in ``_HEADS``, the function of log-probs to compose one from.
    """

    name: str
    build: Callable[[Case], Any]
    role: str = PEER
    package: str | None = None
    version: str | None = None


# --- Per-token log-probs of a head: (hidden [N, D], weight [V, D], targets [N]) -> [N] ---


def _ours(case: Case) -> LogpsFunction:
    softcap = case.shape.softcap
    return lambda hidden, weight, targets: prefalign.linear_token_logps(
        hidden, weight, targets, softcap=softcap
    )


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    z = F.linear(hidden, weight)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z if z.dtype == torch.float64 else z.float()


def pick(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-prob of each target, eagerly, in the logits' dtype."""
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def _eager(case: Case) -> LogpsFunction:
    softcap = case.shape.softcap
    return lambda hidden, weight, targets: pick(_logits(hidden, weight, softcap), targets)


def _trl(case: Case) -> LogpsFunction:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    softcap = case.shape.softcap
    return lambda hidden, weight, targets: ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, _TRL_CHUNK, softcap, 1.0, ()
    )[0]


def _torch_native(chunked: bool) -> Callable[[Case], LogpsFunction]:
    def build(case: Case) -> LogpsFunction:
        if case.shape.softcap is not None:
            raise Unsupported("no softcap")
        try:
            native = F.linear_cross_entropy
            options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        except AttributeError:
            raise Unsupported("not in this torch") from None
        return lambda hidden, weight, targets: (
            -native(hidden, weight, targets, reduction="none", options=options)
        )

    return build


def _liger(case: Case) -> LogpsFunction:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    if case.device.type != "cuda":
        raise Unsupported("its kernels need a GPU")
    softcap = case.shape.softcap

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        result = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets, None, None, -100, 0.0, 0.0, "none", softcap
        )
        return -(result[0] if isinstance(result, tuple) else result)

    return logps


def _cut(case: Case) -> LogpsFunction:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if case.device.type == "cuda" else "torch_compile"
    softcap = case.shape.softcap
    return lambda hidden, weight, targets: (
        -linear_cross_entropy(hidden, weight, targets, softcap=softcap, reduction="none", impl=impl)
    )


_HEADS = (
    Provider("prefalign", _ours, OURS),
    Provider("eager", _eager, EAGER),
    Provider("TRL", _trl, PEER, "trl", "1.16.0"),
    Provider("torch native", _torch_native(False), PEER, "torch", "2.13.0"),
    Provider("torch native, chunked", _torch_native(True), PEER, "torch", "2.13.0"),
    Provider("Liger", _liger, PEER, "liger-kernel", "0.8.5"),
    Provider("Cut Cross-Entropy", _cut, PEER, "cut-cross-entropy", "25.1.1"),
)


def _per_head(compose: Callable[[Case, LogpsFunction], Forward], *without: str) -> list[Provider]:
    """Return the heads' providers for an op that is composed of their log-probs."""

    def builder(head: Provider) -> Callable[[Case], Forward]:
        return lambda case: compose(case, head.build(case))

    return [replace(head, build=builder(head)) for head in _HEADS if head.name not in without]


def _bare_gemms(case: Case) -> Forward:
    """The GEMMs alone, into buffers made once: logits, and what each gradient takes.

    One for each of hidden's and the weight's gradient, and one for a reference's logits.
    """
    hidden, weight = case["hidden"].detach(), case["weight"].detach()
    logits = torch.mm(hidden, weight.T)
    passes = 1 + ("ref_hidden" in case.inputs)
    dhidden = torch.empty_like(hidden) if "hidden" in case.wrt else None
    dweight = torch.empty_like(weight) if "weight" in case.wrt else None

    def forward() -> Outputs:
        for _ in range(passes):
            torch.mm(hidden, weight.T, out=logits)
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden)
        if dweight is not None:
            torch.mm(logits.T, hidden, out=dweight)
        return {}

    return forward


BARE_GEMMS = Provider("bare GEMMs", _bare_gemms, BARE)


# --- linear_token_logps ---


def _head(case: Case, logps: LogpsFunction) -> Forward:
    return lambda: {"logps": logps(case["hidden"], case["weight"], case["targets"])}


HEAD = (*_per_head(_head), BARE_GEMMS)


# --- linear_token_logps_triple ---


def _triple_ours(case: Case) -> Forward:
    return lambda: prefalign.linear_token_logps_triple(
        case["hidden"], case["ref_hidden"], case["weight"], case["targets"],
        extrapolation=case["extrapolation"], softcap=case.shape.softcap,
    )._asdict()  # fmt: skip


def _triple_eager(case: Case) -> Forward:
    scale = case["extrapolation"]

    def forward() -> Outputs:
        policy = _logits(case["hidden"], case["weight"], case.shape.softcap)
        with torch.no_grad():
            reference = _logits(case["ref_hidden"], case["weight"], case.shape.softcap)
            extrapolated = (1 + scale) * policy - scale * reference
        found = zip(
            ("policy", "reference", "extrapolated"), (policy, reference, extrapolated), strict=True
        )
        return {name: pick(logits, case["targets"]) for name, logits in found}

    return forward


def _triple(case: Case, logps: LogpsFunction) -> Forward:
    """Three passes: extrapolated logits of one shared head are those of extrapolated states."""
    if case.shape.softcap is not None:
        raise Unsupported("extrapolation after a softcap needs the logits")
    scale = case["extrapolation"]

    def forward() -> Outputs:
        hidden, other, rest = case["hidden"], case["ref_hidden"], (case["weight"], case["targets"])
        with torch.no_grad():
            reference = logps(other, *rest)
            extrapolated = logps((1 + scale) * hidden - scale * other, *rest)
        return {
            "policy": logps(hidden, *rest), "reference": reference, "extrapolated": extrapolated
        }  # fmt: skip

    return forward


def _policy_and_reference(case: Case) -> Forward:
    """Our own two calls, without the extrapolated log-probs: what the triple is compared with."""
    logps = _ours(case)
    rest = (case["weight"], case["targets"])

    def forward() -> Outputs:
        with torch.no_grad():
            reference = logps(case["ref_hidden"], *rest)
        return {"policy": logps(case["hidden"], *rest), "reference": reference}

    return forward


TRIPLE = (
    Provider("prefalign", _triple_ours, OURS),
    Provider("eager", _triple_eager, EAGER),
    *_per_head(_triple, "prefalign", "eager"),
    Provider("prefalign, policy + reference", _policy_and_reference, BARE),
    BARE_GEMMS,
)


# --- From hidden states to the DPO loss: packed pairs, chosen and rejected in turn ---


def _dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    ratios = policy - reference
    return -F.logsigmoid(beta * (ratios[0::2] - ratios[1::2])).mean()


def _dpo(case: Case, logps: LogpsFunction) -> Forward:
    def sums(hidden: Tensor) -> Tensor:
        found = logps(hidden, case["weight"], case["targets"])
        found = found if found.dtype == torch.float64 else found.float()
        return found.view(case["sequences"], -1).sum(-1)

    def forward() -> Outputs:
        with torch.no_grad():
            reference = sums(case["ref_hidden"])
        return {"loss": _dpo_loss(sums(case["hidden"]), reference, case["beta"])}

    return forward


def _dpo_ours(case: Case) -> Forward:
    from ..kernels.linear_preference_loss import linear_preference_loss

    def forward() -> Outputs:
        found = linear_preference_loss(
            case["hidden"], case["weight"], case["targets"], cu_seqlens=case["cu_seqlens"],
            ref_hidden=case["ref_hidden"], softcap=case.shape.softcap, beta=case["beta"],
            reduction="mean",
        )  # fmt: skip
        return {"loss": found.losses}

    return forward


def _dpo_in_steps(case: Case) -> Forward:
    """Our ops one after the other, as a trainer that keeps its own loss calls them."""
    logps = _ours(case)
    rest = (case["weight"], case["targets"])

    def sums(hidden: Tensor) -> tuple[Tensor, ...]:
        per_token = logps(hidden, *rest).view(case["sequences"], -1)
        found = prefalign.sequence_logps(per_token).sums
        return found[0::2], found[1::2]

    def forward() -> Outputs:
        with torch.no_grad():
            reference = sums(case["ref_hidden"])
        policy = sums(case["hidden"])
        losses = prefalign.preference_loss(*policy, *reference, beta=case["beta"]).losses
        return {"loss": losses.mean()}

    return forward


def _dpo_liger(case: Case) -> Forward:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    if case.shape.softcap is not None:
        raise Unsupported("no softcap")
    loss = LigerFusedLinearDPOLoss(beta=case["beta"])
    S = case["sequences"]

    def chosen_first(x: Tensor) -> Tensor:
        x = x.view(S // 2, 2, x.shape[0] // S, *x.shape[1:])
        return x.transpose(0, 1).flatten(0, 1).contiguous()

    targets = chosen_first(case["targets"])

    def forward() -> Outputs:
        weight = case["weight"]
        hidden, other = (chosen_first(case[name]) for name in ("hidden", "ref_hidden"))
        found = loss(weight, hidden, targets, ref_input=other, ref_weight=weight.detach())
        return {"loss": found[0]}

    return forward


DPO = (
    Provider("prefalign", _dpo_ours, OURS),
    Provider("prefalign, in steps", _dpo_in_steps, OURS),
    *_per_head(_dpo, "prefalign", "Liger"),
    Provider("Liger", _dpo_liger, PEER, "liger-kernel", "0.8.5"),
    BARE_GEMMS,
)
