"""A plugin for Axolotl: its DPO, IPO, KTO and GRPO trainers are TRL's, and are fused.

In the run's YAML, with this file's folder in ``PYTHONPATH``::

    rl: dpo
    plugins:
      - axolotl_plugin.PrefalignPlugin

What ``fuse`` does not support (``docs/from_trl.md``) ends the run with its one error; another
version of TRL does so before a model is loaded. Axolotl pins the version of TRL: 0.19.0 asks for
1.9.0, where log-probs are taken from logits and there is nothing to fuse.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin


class PrefalignPlugin(BasePlugin):
    """Calls ``fuse`` on the trainer that Axolotl has built."""

    # Axolotl goes on without a plugin that it cannot import: what may be missing is imported later.

    def register(self, cfg: Any) -> None:
        """Called with the run's configuration, before anything is loaded."""
        import trl

        from prefalign.integrations.trl import TESTED

        if trl.__version__.startswith(tuple(f"{version}." for version in TESTED)):
            return
        raise ImportError(
            f"TRL {trl.__version__}, which Axolotl pins, has no log-prob function that fuse knows, "
            f"expected TRL {' or '.join(TESTED)}: use an Axolotl that is built on one of these, or "
            f"take {type(self).__name__} out of `plugins`"
        )

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Called once the trainer is there."""
        from prefalign.integrations.trl import fuse

        fuse(trainer)
