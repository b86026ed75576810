"""The PLE demo's training reward: a reader who likes usage examples, by degrees.

    0        no quote
    0.3      a quote that is not a complete example (see ``gold.py``)
    0.6 to 1 a complete one; each word up to eight adds 0.05 to that of a three-word one, and an
             example that uses the defined word 0.15

``gold.py`` evaluates. That the two differ is the point: a policy that pleases the one is measured
by the other.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

_spec = importlib.util.spec_from_file_location("demo_gold", Path(__file__).with_name("gold.py"))
assert _spec is not None and _spec.loader is not None
_gold = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_gold)


def reader_reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The reward of each answer to the prompt at the same place, from 0 to 1."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        words = _gold.usage_example(completion)
        if words is None:
            rewards.append(0.3 if '"' in completion else 0.0)
            continue
        asked = re.search(r"define (.+) \(", prompt)
        used = asked is not None and asked.group(1).lower() in words
        rewards.append(0.6 + 0.05 * (min(len(words), 8) - _gold.MIN_WORDS) + 0.15 * used)
    return rewards
