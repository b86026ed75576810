"""The command line: ``prefalign spa --config run.yaml --beta 0.1 ...``."""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import sys
from collections.abc import Sequence

from ._version import __version__
from .errors import UserError

USAGE_ERROR = 2
INTERRUPTED = 130

SPA_HELP = (
    "Spread Preference Annotation (Selfee, arXiv 2406.04412): DPO on a small labelled seed, then "
    "rounds in which the model generates, judges by its own logits and trains on its own labels."
)


def build_parser():
    """Return the parser of the command line and all its subcommands."""
    import jsonargparse

    from .benchmarks.options import HELP, add_options
    from .config import SPASettings

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
    spa = Parser(description=SPA_HELP, usage="prefalign spa [--config FILE] [--OPTION VALUE ...]")
    spa.add_argument("--config", action="config", help="YAML file of settings; options override it")
    switches = {
        "resume": "Go on with the run that output_dir holds.",
        "overwrite": "Remove the run that output_dir holds, and start anew.",
    }
    for name, text in switches.items():
        spa.add_argument(f"--{name}", action="store_true", help=text)
    spa.add_class_arguments(SPASettings, as_group=True, skip=set(switches))
    commands.add_subcommand("spa", spa, help=SPA_HELP.split(":")[0])
    bench = Parser(description=HELP, usage="prefalign bench [--OPTION VALUE ...]")
    add_options(bench)
    commands.add_subcommand("bench", bench, help=HELP.split(":")[0])
    return parser


def one_line(message: object) -> str:
    """Return a message as one line, without runs of blanks."""
    return re.sub(r"\s+", " ", str(message)).strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for what the user can mend, 130 on Ctrl-C."""
    if list(sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(f"prefalign {__version__}")  # without importing torch
        return 0
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        parser.print_help()
        return USAGE_ERROR
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("prefalign").setLevel(logging.INFO)
    _hush_libraries()
    try:
        settings = parser.instantiate(parsed)[parsed.command]
        return COMMANDS[parsed.command](settings)
    except UserError as error:
        return _fail(one_line(error))
    except KeyboardInterrupt:
        hint = "; --resume goes on from here" if parsed.command == "spa" else ""
        print(f"\nprefalign: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not _disk_full(error):
            raise
        return _fail(
            f"output_dir: no disk space left ({one_line(error)}); "
            "make room, then --resume goes on from here"
        )


def run_spa(settings) -> int:
    """Run SPA and print where its results are."""
    from .config import SPASettings
    from .report import summary_table
    from .spa import SPA

    values = {name: settings[name] for name in SPASettings.__dataclass_fields__}
    spa = SPA(SPASettings(**values))
    spa.run()
    if spa.parts.process.is_main_process:
        print(f"\n{summary_table(spa.parts.run.path)}\n")
        print(f"Report: {spa.parts.run.path / 'report.html'}")
    process = spa.parts.process
    if process.num_processes > 1:
        # Gloo waits forever at exit where a DDP model outlives its process group.
        del spa
        gc.collect()
        process.wait_for_everyone()
        process.destroy_process_group()
    return 0


def run_bench(options) -> int:
    """Run the microbenchmarks; 1 where prefalign failed its own correctness gate."""
    from .benchmarks.runner import run

    return run(options)


COMMANDS = {"spa": run_spa, "bench": run_bench}


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


if __name__ == "__main__":
    sys.exit(main())
