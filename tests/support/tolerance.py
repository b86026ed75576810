"""The one yardstick for numbers: how far eager PyTorch errs at the same precision."""

from __future__ import annotations

import torch

EPS = torch.finfo(torch.float32).eps


def assert_as_exact_as_eager(
    actual: torch.Tensor,
    eager: torch.Tensor,
    exact: torch.Tensor,
    what: str = "value",
    inside: float = 0.0,
) -> None:
    """Check that ``actual`` errs at most twice as far from ``exact`` as ``eager`` does.

    ``exact`` is the float64 answer. The bound holds for the mean and for the maximum. Each has a
    floor, below which eager being better is luck: the mean and the largest size of the answer,
    times one eps of ``actual``'s dtype, or four of float32's for the roundings inside. A caller
    that knows the size of the terms that the answer is summed from gives it as ``inside``: no floor
    is below four eps of float32 of it, since a small answer may be what large terms leave.
    Infinities and NaN must be where the exact answer has them.
    """
    assert exact.dtype == torch.float64, f"{what}: the exact answer is {exact.dtype}"
    assert actual.shape == exact.shape, f"{what}: {actual.shape}, expected {exact.shape}"
    finite = exact.isfinite()
    strange = actual.double()[~finite], exact[~finite]
    assert torch.equal(*(t.nan_to_num(nan=7e77) for t in strange)), f"{what}: not finite alike"
    assert actual[finite].isfinite().all(), f"{what}: NaN or infinity where the answer is finite"
    if not finite.any():
        return
    answer = exact[finite]
    error = (actual.double()[finite] - answer).abs()
    allowed = 2 * (eager.double()[finite] - answer).abs().nan_to_num(0, 0, 0)
    eps = max(torch.finfo(actual.dtype).eps, 4 * EPS)
    for name, reduce in (("mean", torch.mean), ("max", torch.amax)):
        got, bound = reduce(error).item(), reduce(allowed).item()
        floor = max(eps * reduce(answer.abs()).item(), 4 * EPS * inside)
        assert got <= max(bound, floor), (
            f"{what}: {name} error {got:.3e}, allowed {bound:.3e} (twice eager's) or {floor:.3e}"
        )
