"""Every launch of the head's kernels and of ``token_logps``, as it is shipped for each target.

What the compile test holds to the card and what ``bench/compile_table.py`` tabulates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from . import _gemm_kernel, _linear_kernels, _linear_triton, _token_logps_triton
from ._crosscompile import TARGETS, Resources, compile_kernel
from .configs import TABLE

_INTS = (
    "N V V_begin V_end V_size D M K split_size num_splits stride_part stride_xn stride_rn "
    "stride_wv stride_sv stride_zn stride_am stride_ak stride_bk stride_cm stride_on ignore_index"
).split()
_FLOATS = ("pre", "post", "extrapolation", "slope_scale", "alpha", "k")
_DIVISIBLE = (
    "D K split_size stride_xn stride_rn stride_wv stride_sv stride_zn stride_am stride_ak "
    "stride_bk stride_cm stride_on"
).split()
_UNALIGNED = ("split_size", "stride_zn")
_OPERANDS = "x_ptr ref_x_ptr w_ptr ref_w_ptr bias_ptr ref_bias_ptr a_ptr b_ptr out_ptr".split()
_FLOAT_POINTERS = (
    "low_ptr up_ptr part_ptr state_ptr scale_ptr z_ptr m_ptr s_ptr zy_ptr acc_ptr g_ptr "
    "g_entropy_ptr entropy_ptr row_scale_ptr c_ptr"
).split()

_PLAIN = {"SOFTCAP": False, "HAS_BIAS": False, "HAS_REF_BIAS": False}
_FULL = {"SOFTCAP": True, "HAS_BIAS": True, "HAS_REF_BIAS": True}
_LOGITS = {
    "TRIPLE": False, "SHARED": True, "EXTRAS": False, "STATS": True, "STORE_Z": False,
    "RANK": 0, "LOWEST": -1e30, "stride_xd": 1, "stride_rd": 1, "stride_wd": 1, "stride_sd": 1,
}  # fmt: skip
_TRIPLE = _LOGITS | {"TRIPLE": True}
_TWO_HEADS = _TRIPLE | _FULL | {"SHARED": False, "STORE_Z": True}
_GEMM = {"ACCUMULATE": True, "HAS_ROW_SCALE": True, "MASK_K": False, "stride_bn": 1}
_GEMM_T = {"ACCUMULATE": False, "HAS_ROW_SCALE": False, "MASK_K": True, "stride_bn": 1}
_WEIGHTS = {"SOFTCAP": True, "HAS_G": True, "BACKWARD": True, "ENTROPY": True}

LOGITS = {
    "forward": _LOGITS | _PLAIN,
    "forward, full, z": _LOGITS | _FULL | {"STORE_Z": True},
    "forward, extras, z": _LOGITS | _FULL | {"EXTRAS": True, "STORE_Z": True},
    "recompute": _LOGITS | _FULL | {"STATS": False, "STORE_Z": True},
    "triple": _TRIPLE | _PLAIN,
    "triple, two heads, z": _TWO_HEADS,
    "forward, unaligned": _LOGITS | _PLAIN,
    "adapter": _LOGITS | _PLAIN | {"RANK": 16},
    "adapter, full, z": _LOGITS | _FULL | {"RANK": 16, "STORE_Z": True},
    "adapter, extras, z": _LOGITS | _FULL | {"RANK": 16, "EXTRAS": True, "STORE_Z": True},
    "adapter, recompute": _LOGITS | _FULL | {"RANK": 16, "STATS": False, "STORE_Z": True},
}
OTHERS = {
    "gemm": _GEMM | {"stride_ak": 1},
    "gemm, transposed": _GEMM_T | {"stride_am": 1},
    "gemm, narrow": _GEMM | {"stride_ak": 1},
    "gemm, narrow, transposed": _GEMM_T | {"stride_am": 1},
    "weights": _WEIGHTS,
    "combine": {"EXTRAS": True},
    "jacobian": {"SOFTCAP": True, "stride_wd": 1},
}
TOKENS = ("token_logps", "token_logps, extras", "token_logps combine",
          "token_logps backward", "token_logps backward, extras")  # fmt: skip
_SINGLE = (
    "forward, extras, z", "adapter, extras, z", "triple, two heads, z", "gemm, transposed"
)  # fmt: skip


class Launch(NamedTuple):
    """One kernel, as compiled for one target."""

    name: str
    target: str
    dtype: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...]

    def compile(self) -> Resources:
        """Return what it uses, from Triton's cache where it is there."""
        return compile_kernel(
            self.fn, self.signature, self.constexprs, self.target, self.num_warps,
            self.num_stages, self.divisible,
        )  # fmt: skip


def head_launch(name: str, target: str, dtype: str = "bf16") -> Launch:
    """Return the launch of one of ``LOGITS`` or ``OTHERS`` on ``target``."""
    row = TABLE[target]
    logits, gemm = name in LOGITS, name.startswith("gemm")
    flags = LOGITS[name] if logits else OTHERS[name]
    blocks = (
        (row.half_gemm if gemm else row.half)
        if dtype == "bf16"
        else (row.single_gemm if gemm else row.single)
    )
    signature = {
        **dict.fromkeys(_INTS, "i32"),
        **dict.fromkeys(_FLOATS, "fp32"),
        **dict.fromkeys(_FLOAT_POINTERS, "*fp32"),
        **dict.fromkeys(_OPERANDS, f"*{dtype}"),
        "targets_ptr": "*i64",
    }
    blocks = blocks.for_columns(32) if "narrow" in name else blocks
    tma = blocks.tma and name not in ("gemm, transposed", "forward, unaligned")
    blocks = blocks if tma else blocks.by_pointers()
    blocks = blocks.with_adapter() if flags.get("RANK") else blocks
    n, v, d = blocks[:3]
    warps, stages = blocks.num_warps, blocks.num_stages
    shared = {"UPCAST": False, "USE_TMA": tma, "PIECES": blocks.pieces, "GROUP": row.group}
    if logits:
        fn = _linear_kernels._logits_kernel
        lone = not (flags["TRIPLE"] or flags["EXTRAS"])
        flags = flags | shared | {"PAIR": blocks.pair and lone, "CUT": dtype == "bf16"}
        flags |= {"BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": d}
        if tma:
            signature |= dict.fromkeys(("x_ptr", "ref_x_ptr"), f"tensordesc<{dtype}[{n}, {d}]>")
            signature |= dict.fromkeys(("w_ptr", "ref_w_ptr"), f"tensordesc<{dtype}[{v}, {d}]>")
    elif gemm:
        fn = _gemm_kernel._gemm_kernel
        flags = flags | shared | {"BLOCK_M": n, "BLOCK_N": v, "BLOCK_K": d}
        if tma:
            signature["a_ptr"] = f"tensordesc<{dtype}[{n}, {d}]>"
            signature["b_ptr"] = f"tensordesc<{dtype}[{d}, {v}]>"
    elif name == "weights":
        fn, warps, stages = _linear_kernels._weights_kernel, 8, 3
        flags = flags | {"BLOCK_N": 16, "BLOCK_V": 256}
    elif name == "combine":
        fn, warps, stages = _linear_kernels._combine_kernel, 1, 3
        flags = flags | {"BLOCK_N": _linear_triton.COMBINE_ROWS}
    else:
        fn, warps, stages = _linear_kernels._jacobian_kernel, 4, 3
        flags = flags | {"BLOCK_N": 16, "BLOCK_D": 128}
    divisible = _UNALIGNED if name == "forward, unaligned" else _DIVISIBLE
    return Launch(name, target, dtype, fn, signature, flags, warps, stages, tuple(divisible))


def token_launch(name: str, target: str, dtype: str = "bf16") -> Launch:
    """Return the launch of one of ``TOKENS`` on ``target``."""
    row, extras = TABLE[target], "extras" in name or "combine" in name
    if "combine" in name:
        fn = _token_logps_triton._combine_kernel
    elif "backward" in name:
        fn = _token_logps_triton._backward_kernel
    else:
        fn = _token_logps_triton._forward_kernel
    names = list(fn.arg_names)
    flags = {x: extras or x == "LOGPS" for x in names if x.isupper() and x not in ("V", "BLOCK_V")}
    constexprs = flags | {"stride_v": 1, "BLOCK_V": row.token_block}
    for x in ("entropy_ptr", "mean_ptr", "top1_ptr", "sum_sq_ptr", "grad_entropy_ptr"):
        if not extras:
            constexprs[x] = None
    constexprs = {x: value for x, value in constexprs.items() if x in names}
    signature = {x: "*fp32" if x.endswith("_ptr") else "i32" for x in names}
    signature |= {
        "logits_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}", "targets_ptr": "*i64",
        "top1_ptr": "*i1", "stride_outer": "i64", "temperature": "fp32", "softcap": "fp32",
    }  # fmt: skip
    signature = {x: kind for x, kind in signature.items() if x in names and x not in constexprs}
    divisible = ("stride_outer", "stride_inner", "V", "split_size")
    warps = 1 if "combine" in name else row.token_warps
    return Launch(name, target, dtype, fn, signature, constexprs, warps, 3, divisible)


def shipped() -> Iterator[Launch]:
    """Yield every launch of every target; float32 where its blocks or stages differ."""
    for target in TARGETS:
        for name in (*LOGITS, *OTHERS):
            yield head_launch(name, target)
        for name in TOKENS:
            yield token_launch(name, target)
    for target in ("sm_89", "gfx942"):
        for name in _SINGLE:
            yield head_launch(name, target, "fp32")
