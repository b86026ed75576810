"""Compile a Triton kernel for a GPU that is not here, and say what it would use.

A test session without a GPU runs under ``TRITON_INTERPRET=1``, which replaces every jitted
function, those of ``triton.language`` included. So the compiler runs in one worker process without
that variable; kernels travel by name, and a request and its answer are a line of JSON each.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection
from typing import Any, NamedTuple

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
"""Shared memory that one block may use, in bytes."""


class Resources(NamedTuple):
    """What one thread and one block of a compiled kernel use."""

    registers: int
    spills: int
    shared_bytes: int


def compile_kernel(
    fn: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    target: str,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: Collection[str] = (),
) -> Resources:
    """Compile ``fn`` for ``target`` and return what it uses.

    ``signature`` gives the type of each argument that is not in ``constexprs``, such as
    ``"*fp32"`` or ``"i32"``. Pointers count as divisible by 16, as a launch finds them; name in
    ``divisible`` the integers that are too. An integer that is 1 at launch, such as the innermost
    stride, is a constant there: put it in ``constexprs``. A constexpr may be a jitted function.
    """
    request = {
        "fn": _name(fn),
        "signature": signature,
        "constexprs": {
            key: {"jit": _name(value)} if hasattr(value, "fn") else value
            for key, value in constexprs.items()
        },
        "target": target,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "divisible": list(divisible),
    }
    worker = _worker()
    worker.stdin.write(json.dumps(request) + "\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith(_MARK):
            answer = json.loads(line.removeprefix(_MARK))
            if "error" in answer:
                raise RuntimeError(f"{request['fn']} for {target}: {answer['error']}")
            return Resources(**answer)
    raise RuntimeError(f"{request['fn']} for {target}: the compiler process died")


_MARK = "compiled: "


def _name(fn: Any) -> str:
    inner = getattr(fn, "fn", fn)
    return f"{inner.__module__}:{inner.__qualname__}"


@functools.cache
def _worker() -> subprocess.Popen:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    worker = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    atexit.register(worker.kill)
    return worker


def _resolve(name: str) -> Any:
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def _compile(request: dict[str, Any]) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = _resolve(request["fn"])
    constexprs = {
        key: _resolve(value["jit"]) if isinstance(value, dict) else value
        for key, value in request["constexprs"].items()
    }
    types = {
        name: "constexpr" if name in constexprs else request["signature"][name]
        for name in fn.arg_names
    }
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or name in request["divisible"]
    }
    positions = {(fn.arg_names.index(name),): value for name, value in constexprs.items()}
    name = request["target"]
    if name.startswith("sm_"):
        target = GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", name, 64)
    compiled = triton.compile(
        ASTSource(fn, types, constexprs=positions, attrs=attrs),
        target=target,
        options={"num_warps": request["num_warps"], "num_stages": request["num_stages"]},
    )
    shared = compiled.metadata.shared
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        counts = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", text)}
        # Scalar registers spill to lanes of vector registers, not to memory: not counted.
        return Resources(counts["vgpr_count"], counts["vgpr_spill_count"], shared)
    return Resources(*_cubin_usage(compiled.asm["cubin"]), shared)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack and local memory, which is where spills go."""
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _serve() -> None:
    for line in sys.stdin:
        try:
            answer = _compile(json.loads(line))._asdict()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(_MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
