"""The command's options, without importing torch: ``prefalign bench --help`` is quick."""

from __future__ import annotations

from typing import Any

HELP = (
    "Microbenchmarks: every op against eager PyTorch and the peers that can be imported, on this "
    "machine. Correctness first, then time, share of the machine's peak and memory. Writes JSON, "
    "a Markdown table and a plot of each suite."
)


def add_options(parser: Any) -> None:
    """Add the options to an argparse (or jsonargparse) parser."""
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda, or auto: a GPU where there is one")
    add("--out", default=None, help="folder of the results; default bench-results/<device>")
    add(
        "--suite", "--stages", dest="suite", nargs="+", default=[], metavar="NAME",
        help="suites to run, one after the other, each written as it ends; default all",
    )  # fmt: skip
    add("--shape", nargs="+", default=[], metavar="NAME", help="shapes to run; default all")
    add("--dtype", nargs="+", default=[], metavar="NAME", help="float32, bfloat16; default both")
    add("--quick", action="store_true", help="tiny shapes, few rounds: does it run here at all?")
    add("--full", action="store_true", help="on a CPU, the larger models too: hours")
    add("--seconds", type=float, default=20.0, help="time to spend on the rounds of a case")
    add("--rounds", type=int, default=5, help="the least number of rounds of a case")
    add(
        "--no-memory", "--no_memory", action="store_true",
        help="leave out peak memory and launches",
    )  # fmt: skip
    add("--list", action="store_true", help="print the suites and shapes, and stop")
    add("--revision", default=None, help="git revision to record where there is no repository")
