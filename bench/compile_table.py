"""Cross-compile every shipped launch and write its resources to ``bench/results/compiled/``.

    python bench/compile_table.py

No GPU is needed. Run it after a change to a kernel or to ``kernels/configs.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import triton
from prefalign.kernels._crosscompile import SHARED_LIMIT, TARGETS
from prefalign.kernels._shipped import shipped

FOLDER = Path(__file__).parent / "results" / "compiled"
BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_V", "BLOCK_D", "BLOCK_K")


def measure() -> list[dict]:
    """Return a row per launch: what it is, its blocks, and what a thread and a block use."""
    return [
        {
            "target": launch.target,
            "kernel": launch.name,
            "dtype": launch.dtype,
            "blocks": {x: launch.constexprs[x] for x in BLOCKS if x in launch.constexprs},
            "pair": launch.constexprs.get("PAIR", False),
            "tma": launch.constexprs.get("USE_TMA", False),
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            **launch.compile()._asdict(),
        }
        for launch in shipped()
    ]


def markdown(rows: list[dict]) -> str:
    """Return the rows as a page with a table per target."""
    lines = [
        "# What the shipped kernels use",
        "",
        f"Compiled by Triton {triton.__version__} without a GPU (`python bench/compile_table.py`). "
        "Registers and spilled bytes are per thread, shared memory per block.",
    ]
    for target in TARGETS:
        lines += [
            "",
            f"## {target} ({SHARED_LIMIT[target] >> 10} KiB of shared memory)",
            "",
            "| kernel | dtype | blocks | warps | stages | registers | spills | shared KiB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            if row["target"] != target:
                continue
            blocks = " × ".join(map(str, row["blocks"].values()))
            blocks += (", pair" if row["pair"] else "") + (", TMA" if row["tma"] else "")
            lines.append(
                f"| {row['kernel']} | {row['dtype']} | {blocks} | {row['num_warps']} | "
                f"{row['num_stages']} | {row['registers']} | {row['spills']} | "
                f"{row['shared_bytes'] / 1024:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table as JSON and as Markdown."""
    rows = measure()
    FOLDER.mkdir(parents=True, exist_ok=True)
    table = {"triton": triton.__version__, "launches": rows}
    (FOLDER / "resources.json").write_text(json.dumps(table, indent=1) + "\n")
    (FOLDER / "resources.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
