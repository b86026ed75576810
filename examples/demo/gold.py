"""The demo's annotator: a reward that reads an answer and likes usage examples.

It stands in for the people who would label pairs and judge the outcome, and is used for nothing
but that: the labels of the seed pairs (and of the "DPO on all labels" arm, which SPA is compared
with) and the evaluation. SPA never sees it.

It gives 1 to an answer that closes with a complete quoted usage example, and 0 to any other.
*Complete*: opened and closed by double quotes, no quote left open anywhere, the closing one the
answer's last character (a full stop may follow); at least three words between, most of them
different from each other and at least one of them not a function word. So neither a text that runs
to the length limit nor ``"of the of or"`` in quotes scores.
"""

import re
from collections.abc import Callable, Sequence

MIN_WORDS = 3
FUNCTION_WORDS = frozenset(
    "a an and are as at be but by for from had has have he her his i in into is it its of on or "
    "our she so that the their them they this to was we were which who with you".split()
)
_WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*")


def usage_example(completion: str) -> list[str] | None:
    """The words of the complete quoted example that closes the answer, or None."""
    text = completion.strip().removesuffix(".")
    if not text.endswith('"') or text.count('"') % 2:
        return None
    words = _WORD.findall(text.split('"')[-2].lower())
    distinct = set(words)
    if len(words) < MIN_WORDS or 2 * len(distinct) <= len(words) or distinct <= FUNCTION_WORDS:
        return None
    return words


def gold_reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The reward of each answer to the prompt at the same place: 0 or 1."""
    if len(prompts) != len(completions):
        raise ValueError(f"expected {len(prompts)} completions, got {len(completions)}")
    return [float(usage_example(completion) is not None) for completion in completions]


def annotate(
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    reward: Callable[[Sequence[str], Sequence[str]], list[float]] = gold_reward,
) -> list[dict[str, str]]:
    """Label each prompt's responses, best against worst; prompts where all tie are skipped."""
    rows = []
    for prompt, texts in zip(prompts, responses, strict=True):
        rewards = reward([prompt] * len(texts), texts)
        best, worst = max(rewards), min(rewards)
        if best > worst:
            chosen, rejected = texts[rewards.index(best)], texts[rewards.index(worst)]
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows
