"""The loss heads' kernels compile for every target, spill nothing and fit the smallest card."""

import pytest
from crosscompile import SHARED_LIMIT, TARGETS, compile_kernel
from prefalign.kernels import _pair_losses, pairwise_preference_logits, unpaired_loss
from prefalign.kernels import sequence_logps as sequence
from prefalign.kernels.losses import LOSSES, Objective, device_options
from prefalign.kernels.unpaired_losses import UNPAIRED_LOSSES

pytest.importorskip("triton")

FLOAT = "*fp32"


def types(fn, constexprs, **given):
    """Return the types of a kernel's arguments: float32 pointers and int32 but for those given."""
    guess = {name: FLOAT if name.endswith("_ptr") else "i32" for name in fn.arg_names}
    return {name: kind for name, kind in {**guess, **given}.items() if name not in constexprs}


def sequence_kernel(fn, packed):
    constexprs = {"PACKED": packed, "HAS_MASK": packed, "BLOCK_T": sequence.BLOCK_T}
    constexprs |= {"stride_lt": 1, "stride_mt": 1, "stride_gs": 1}
    constexprs |= {} if packed else {"cu_ptr": None, "mask_ptr": None}
    constexprs = {name: value for name, value in constexprs.items() if name in fn.arg_names}
    kinds = {"cu_ptr": "*i32", "mask_ptr": "*i1", "N": "i64"}
    kinds |= {"counts_ptr": "*i64"} if "counts_ptr" in fn.arg_names else {}
    return fn, types(fn, constexprs, **kinds), constexprs, 4, ()


def pair_kernel(name, noise):
    fn = _pair_losses._forward_kernel
    constexprs = {"NOISE": noise, "HAS_WEIGHTS": True, "HAS_BETAS": noise}
    row = LOSSES[name]
    constexprs |= {"HAS_REFERENCE": row.reference, **device_options(Objective(name, 0.1))}
    constexprs |= {"BLOCK_B": _pair_losses.BLOCK_B}
    if not noise:
        absent = ("extrapolated_chosen", "extrapolated_rejected", "alpha", "threshold", "is_noisy")
        constexprs |= {f"{name}_ptr": None for name in (*absent, "confidences")}
    kinds = dict.fromkeys(("beta", "label_smoothing", "extra", "power"), "fp32")
    kinds |= {"is_noisy_ptr": "*i1", "chosen_counts_ptr": "*i64", "rejected_counts_ptr": "*i64"}
    return fn, types(fn, constexprs, **kinds), constexprs, 4, ()


def unpaired_kernel(row):
    fn = unpaired_loss._forward_kernel
    constexprs = {"OF_RATIO": row.baseline == "log-ratio", "OF_REWARD": row.baseline == "reward"}
    constexprs |= {"HAS_WEIGHTS": True, "LOSS": row.device, "BLOCK_S": unpaired_loss.BLOCK_S}
    constexprs |= {} if row.baseline else {"baseline_ptr": None}
    kinds = dict.fromkeys(("beta", "desirable_weight", "undesirable_weight"), "fp32")
    return fn, types(fn, constexprs, desirable_ptr="*i1", **kinds), constexprs, 4, ()


def pairwise_kernel(fn, padded):
    constexprs = {"PADDED": padded, "BLOCK_K": pairwise_preference_logits.MAX_BLOCK_K}
    constexprs |= {"blocks_ptr": None} if padded else {}
    kinds = {"cu_ptr": "*i64", "blocks_ptr": "*i64", "beta": "fp32"}
    return fn, types(fn, constexprs, **kinds), constexprs, 4, ()


KERNELS = {
    "sequence_logps_forward": lambda: sequence_kernel(sequence._forward_kernel, True),
    "sequence_logps_backward": lambda: sequence_kernel(sequence._backward_kernel, True),
    "sequence_logps_rows_forward": lambda: sequence_kernel(sequence._forward_kernel, False),
    "noise_aware_loss": lambda: pair_kernel("sigmoid", True),
    "pairwise_forward": lambda: pairwise_kernel(pairwise_preference_logits._forward_kernel, True),
    "pairwise_backward": lambda: pairwise_kernel(
        pairwise_preference_logits._backward_kernel, False
    ),
} | {f"preference_loss_{name}": lambda name=name: pair_kernel(name, False) for name in LOSSES}
KERNELS |= {
    f"unpaired_loss_{name}": lambda row=row: unpaired_kernel(row)
    for name, row in UNPAIRED_LOSSES.items()
}


FEW = ("sm_80", "sm_90", "gfx942")  # for the rows of a table, which differ in a few lines
CASES = [
    (name, target)
    for name in KERNELS
    for target in (FEW if name.startswith(("preference_loss", "unpaired_loss")) else TARGETS)
]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_compiles_without_spills(name, target):
    fn, signature, constexprs, num_warps, divisible = KERNELS[name]()
    used = compile_kernel(fn, signature, constexprs, target, num_warps, divisible=divisible)
    assert used.registers > 0
    assert used.spills == 0
    assert used.shared_bytes <= min(99 << 10, SHARED_LIMIT[target])


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_where_every_size_and_stride_is_one(name):
    # A launch turns an integer argument of 1 into a constant: another program than the usual one.
    fn, signature, constexprs, num_warps, _ = KERNELS[name]()
    ones = {key: 1 for key, kind in signature.items() if kind in ("i32", "i64")}
    signature = {key: kind for key, kind in signature.items() if key not in ones}
    used = compile_kernel(fn, signature, constexprs | ones, "sm_90", num_warps)
    assert used.spills == 0
