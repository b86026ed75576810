"""``python -m prefalign.benchmarks``: what ``prefalign bench`` runs."""

from __future__ import annotations

import argparse
import logging
import sys

from ..errors import UserError
from .options import HELP, add_options


def main() -> int:
    """Return 1 where prefalign failed its gate, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m prefalign.benchmarks", description=HELP)
    add_options(parser)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("prefalign").setLevel(logging.INFO)
    from .runner import run

    try:
        return run(options)
    except UserError as error:
        print(f"prefalign: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
