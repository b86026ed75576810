"""A process that scores groups through a cache: beside another, or until it kills itself."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from tiny_models import tiny_model
from training import random_groups

from prefalign import models
from prefalign.attention import use_packed_attention
from prefalign.logp_cache import LogpCache


def main(folder, count, lookahead, backwards, dies_in_pass):
    """Score ``count`` groups once the file ``go`` is there, and print the log-probs."""
    folder = Path(folder)
    model = tiny_model("llama")
    use_packed_attention(model)
    groups = random_groups(int(count))[:: -1 if int(backwards) else 1]
    passes = []
    real = models.pack_parts

    def watched(*args, **kwargs):
        passes.append(1)
        if len(passes) == int(dies_in_pass):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    models.pack_parts = watched
    cached = LogpCache(folder / "cache").of(model)
    (folder / f"ready-{os.getpid()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.002)
    found = list(cached.logps(groups, max_tokens=1000, lookahead=int(lookahead)))
    print(json.dumps(found[:: -1 if int(backwards) else 1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
