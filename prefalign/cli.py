"""The command line: ``prefalign spa --config run.yaml --beta 0.1 ...``."""

from __future__ import annotations

import dataclasses
import errno
import gc
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from ._version import __version__
from .errors import UserError

USAGE_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


class Command(NamedTuple):
    """A command.

    Args:
        settings: Where its settings are, as ``module:class``.
        run: Where the algorithm, or a tool's function, is.
        help: What it does; the part before the first colon is its line in the overview.
    """

    settings: str
    run: str
    help: str


RUNS = {
    "spa": Command(
        "spa_config:SPASettings",
        "spa:SPA",
        "Spread Preference Annotation (Selfee, arXiv 2406.04412): DPO on a small labelled seed, "
        "then rounds in which the model generates, judges by its own logits and trains on its own "
        "labels.",
    ),
    "ple": Command(
        "ple_config:PLESettings",
        "ple:PLE",
        "Progressively Label Enhancement (arXiv 2408.02599): SFT, then rounds in which the model "
        "answers plainly and under principles, rewards score both answers, and a falling "
        "threshold on their gap decides between a ranking loss and weighted SFT.",
    ),
    "dpo": Command(
        "config:DPOSettings",
        "tuning:DPO",
        "Preference optimisation on labelled pairs: DPO (arXiv 2305.18290) or another preference "
        "loss.",
    ),
    "sft": Command(
        "config:SFTSettings",
        "tuning:SFT",
        "Supervised fine-tuning on demonstrations: the mean negative log-prob of their tokens.",
    ),
}
# Commands that make no run: each function takes its settings and returns the exit status.
TOOLS: dict[str, Command] = {
    "verify": Command(
        "verify_config:VerifySettings",
        "verify:main",
        "Compare a DPO step with an ordinary one: the library's fused, packed step and eager "
        "PyTorch's, and TRL's where it is installed, on your own model and pairs. Prints losses, "
        "log-probs, gradients, time and memory, and PASS (exit status 0) or FAIL (1).",
    ),
    "plan": Command(
        "plan_config:PlanSettings",
        "planning:main",
        "Whether training fits in memory, before its first step: the peak of each phase by "
        "component, from the model's configuration and the data's lengths; and where it does not, "
        "the settings that fit, fastest first. Exit status 1 where it does not fit.",
    ),
}
SWITCHES = {
    "resume": "Go on with the run that output_dir holds.",
    "overwrite": "Remove the run that output_dir holds, and start anew.",
}


def build_parser():
    """Return the parser of the command line and all its subcommands."""
    import jsonargparse

    from .benchmarks.options import HELP, add_options

    class Parser(jsonargparse.ArgumentParser):
        """A parser whose errors are one line."""

        def error(self, message, ex=None):
            self.exit(USAGE_ERROR, f"prefalign: error: {one_line(message)}\n")

        def format_help(self):
            return super().format_help().replace("``", "")  # the docstrings' mark-up

    jsonargparse.set_parsing_settings(add_print_completion_argument=True)
    parser = Parser(
        prog="prefalign",
        description="Fused kernels and a thin trainer for aligning language models.",
        version=__version__,
    )
    commands = parser.add_subcommands(dest="command")
    for name, command in RUNS.items():
        usage = f"prefalign {name} [--config FILE] [--OPTION VALUE ...]"
        sub = Parser(description=command.help, usage=usage)
        sub.add_argument(
            "--config", action="config", help="YAML file of settings; options override it"
        )
        for switch, text in SWITCHES.items():
            sub.add_argument(f"--{switch}", action="store_true", help=text)
        sub.add_argument(
            "--plan",
            choices=("cuda", "cpu"),
            help="Predict the run's peak of memory on such a device of memory.limit, and stop; "
            "reads the data and no weights.",
        )
        sub.add_class_arguments(_find(command.settings), as_group=True, skip=set(SWITCHES))
        commands.add_subcommand(name, sub, help=command.help.split(":")[0])
    for name, command in TOOLS.items():
        usage = f"prefalign {name} [--OPTION VALUE ...]"
        sub = Parser(description=command.help, usage=usage)
        sub.add_class_arguments(_find(command.settings), as_group=True)
        commands.add_subcommand(name, sub, help=command.help.split(":")[0])
    bench = Parser(description=HELP, usage="prefalign bench [--OPTION VALUE ...]")
    add_options(bench)
    commands.add_subcommand("bench", bench, help=HELP.split(":")[0])
    return parser


def one_line(message: object) -> str:
    """Return a message as one line, without runs of blanks."""
    return re.sub(r"\s+", " ", str(message)).strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for what the user can mend, 130 on Ctrl-C."""
    try:
        status = run_command(arguments)
        sys.stdout.flush()  # here, and not at exit, where an error would be said
        return status
    except BrokenPipeError:  # prefalign ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def run_command(arguments: Sequence[str] | None) -> int:
    """Run a command and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"prefalign {__version__}")  # without importing torch
        return 0
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return USAGE_ERROR
    parsed = parser.parse_args(_config_first(_with_underscores(arguments)))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("prefalign").setLevel(logging.INFO)
    _hush_libraries()
    try:
        settings = parser.instantiate(parsed)[parsed.command]
        if parsed.command == "bench":
            return run_bench(settings)
        if parsed.command in TOOLS:
            return run_tool(TOOLS[parsed.command], settings)
        return run_algorithm(RUNS[parsed.command], settings)
    except UserError as error:
        return _fail(one_line(error))
    except KeyboardInterrupt:
        hint = "; --resume goes on from here" if parsed.command in RUNS else ""
        print(f"\nprefalign: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        if not _disk_full(error):
            raise
        return _fail(
            f"output_dir: no disk space left ({one_line(error)}); "
            "make room, then --resume goes on from here"
        )


def _config_first(arguments: list[str]) -> list[str]:
    """Move ``--config FILE`` in front of the options, which override it wherever they stand."""
    first: list[str] = []
    rest = arguments[1:]
    while any(found := [a == "--config" or a.startswith("--config=") for a in rest]):
        place = found.index(True)
        size = 2 if rest[place] == "--config" else 1
        first += rest[place : place + size]
        del rest[place : place + size]
    return [*arguments[:1], *first, *rest]


def _with_underscores(arguments: list[str]) -> list[str]:
    """Take ``--gpu-memory`` for ``--gpu_memory``."""
    found = []
    for argument in arguments:
        name, sign, value = argument.partition("=")
        dashed = re.fullmatch(r"--[a-z][\w.-]*", name)
        found.append(f"--{name[2:].replace('-', '_')}{sign}{value}" if dashed else argument)
    return found


def _find(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


def _settings(command: Command, values) -> Any:
    kind = _find(command.settings)
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})


def run_tool(command: Command, values) -> int:
    """Run a command that makes no run, and return its exit status."""
    return _find(command.run)(_settings(command, values))


def run_algorithm(command: Command, values) -> int:
    """Run an algorithm and print where its results are."""
    from .report import summary_table

    if values.plan:
        return plan_algorithm(command, values)
    run = _find(command.run)(_settings(command, values))
    run.run()
    if run.parts.process.is_main_process:
        print(f"\n{summary_table(run.parts.run.path)}\n")
        print(f"Report: {run.parts.run.path / 'report.html'}")
    process = run.parts.process
    if process.num_processes > 1:
        # Gloo waits forever at exit where a DDP model outlives its process group.
        del run
        gc.collect()
        process.wait_for_everyone()
        process.destroy_process_group()
    return 0


def plan_algorithm(command: Command, values) -> int:
    """Print what a run would need; 1 where it would not fit."""
    from .planning import show

    settings = _settings(command, values)
    # Nothing is written: a run in the folder is left as it is.
    unhindered = dataclasses.replace(settings, resume=False, overwrite=True)
    run = _find(command.run)(unhindered, plan_for=values.plan)
    return show(run.memory_request(), settings.memory.limit, "memory.limit")


def run_bench(options) -> int:
    """Run the microbenchmarks; 1 where prefalign failed its own correctness gate."""
    from .benchmarks.runner import run

    return run(options)


def _fail(message: str) -> int:
    print(f"prefalign: error: {message}", file=sys.stderr)
    return USAGE_ERROR


def _disk_full(error: BaseException) -> bool:
    # safetensors and torch raise errors of their own around the system's.
    full = getattr(error, "errno", None) == errno.ENOSPC
    return full or os.strerror(errno.ENOSPC) in str(error)


def _hush_libraries() -> None:
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


if __name__ == "__main__":
    sys.exit(main())
