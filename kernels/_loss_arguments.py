"""What ``pair_loss_head`` and ``linear_preference_loss`` check of their arguments, in one place."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import INTEGERS, check_choice, check_number, check_tensor
from ._pair_losses import check_scalar
from .enhancement_head import PLE
from .objectives import Term, loss_names, needs_reference, resolve

NOISE_AWARE = "noise_aware"


def check_pair_bounds(cu_seqlens: Tensor, like: tuple[str, Tensor] | None) -> int:
    """Check the type and shape of ``cu_seqlens`` and return B."""
    check_tensor("cu_seqlens", cu_seqlens, dtypes=INTEGERS, ndim=1, like=like)
    if cu_seqlens.shape[0] % 2 == 0:
        raise ValueError(
            "cu_seqlens: expected [2B + 1], a chosen and a rejected sequence for each pair, "
            f"got {cu_seqlens.shape[0]} elements"
        )
    return cu_seqlens.shape[0] // 2


def check_loss(
    loss, beta, label_smoothing, alpha, threshold, like, dtype, loss_weights=None,
    f_divergence_type="reverse_kl", f_alpha_divergence_coef=1.0, loss_options=None,
):  # fmt: skip
    """Check what a loss takes; return (summands, alpha, threshold), the last two tensors or None.

    The noise-aware loss is DPO with a smoothing per pair.
    """
    if isinstance(loss, str):
        check_choice("loss", loss, (*loss_names(), NOISE_AWARE, PLE))
    noisy = loss == NOISE_AWARE
    terms = resolve(
        "sigmoid" if noisy else loss, loss_weights=loss_weights, beta=check_number(
            "beta", beta, above=0
        ), label_smoothing=label_smoothing, f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef, loss_options=loss_options, name="loss",
    )  # fmt: skip
    if noisy:
        if label_smoothing:
            raise ValueError(
                f"label_smoothing: expected 0 with loss='noise_aware', whose smoothing is alpha, "
                f"got {label_smoothing}"
            )
        if loss_weights is not None or f_divergence_type != "reverse_kl":
            raise ValueError(
                "loss_weights, f_divergence_type: expected None and 'reverse_kl' with "
                f"loss='noise_aware', got {loss_weights} and {f_divergence_type!r}"
            )
        if threshold is None:
            raise ValueError("threshold: expected a number with loss='noise_aware', got None")
        alpha = 0.1 if alpha is None else alpha
        return terms, *(
            check_scalar(name, value, like, dtype)
            for name, value in (("alpha", alpha), ("threshold", threshold))
        )
    for name, value in (("alpha", alpha), ("threshold", threshold)):
        if value is not None:
            raise ValueError(f"{name}: expected None, only 'noise_aware' takes it, got {value}")
    return terms, None, None


def is_plain(terms: tuple[Term, ...]) -> bool:
    """Return whether a loss is one row of the table on the pairs as they come: one launch."""
    return len(terms) == 1 and terms[0].kind == "pairs" and terms[0].weight == 1


def check_references(terms: tuple[Term, ...], **given: Tensor | None) -> None:
    """Check that of two forms of the reference one is given, or at most one if none is needed."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) == 2 or (needs_reference(terms) and not names):
        got = "both" if names else "neither"
        raise ValueError(f"{', '.join(given)}: expected exactly one of them, got {got}")


def check_mask(mask: Tensor | None, token_logps: Tensor) -> Tensor | None:
    """Return a mask of tokens as bool."""
    if mask is None:
        return None
    like, dtypes = ("token_logps", token_logps), (torch.bool, *INTEGERS)
    check_tensor("mask", mask, dtypes=dtypes, shape=token_logps.shape, like=like)
    return mask if mask.dtype == torch.bool else mask != 0
