r"""The demo's annotator: a reward that reads an answer and likes usage examples.

It stands in for the people who would label pairs and judge the outcome, and is used for nothing
but that: the labels of the seed pairs (and of the "DPO on all labels" arm, which SPA is compared
with) and the evaluation. SPA never sees it.

=====  ==========================================================================================
2      the answer closes with a complete quoted usage example that uses the defined word
1      it closes with a complete quoted usage example
0      anything else
=====  ==========================================================================================

*Complete*: opened and closed by double quotes, no quote left open anywhere, the closing one the
answer's last character (a full stop may follow); at least three words between, most of them
different from each other and at least one of them not a function word. So neither a text that runs
to the length limit nor ``"of the of or"`` in quotes scores.

*Uses the word*: the example holds the word or a regular inflection of it (-s, -es, -ed, -ing, -er,
-est, -ly, with a doubled consonant, a dropped e, or y turned to i).
"""

import re
from collections.abc import Callable, Sequence

MIN_WORDS = 3
FUNCTION_WORDS = frozenset(
    "a an and are as at be but by for from had has have he her his i in into is it its of on or "
    "our she so that the their them they this to was we were which who with you".split()
)
_PROMPT = re.compile(r"define (.+) \(\w+\):")
_WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*")
_ENDINGS = ("s", "es", "ed", "d", "ing", "er", "r", "ers", "est", "st", "ly", "y", "n", "en")


def defined_word(prompt: str) -> str:
    """The word that a prompt such as ``define harbor (noun):`` asks for, in lower case."""
    match = _PROMPT.search(prompt)
    if match is None:
        raise ValueError(f"not a prompt of this demo: {prompt!r}")
    return match[1].lower()


def inflections(word: str) -> set[str]:
    """The word, its regular inflections, and some forms that do not exist (harmless)."""
    stems = {word}
    if word.endswith("e"):
        stems.add(word[:-1])
    if word.endswith("y"):
        stems.add(word[:-1] + "i")
    if re.search(r"[aeiou][bdgklmnprt]$", word):
        stems.add(word + word[-1])
    return {word} | {stem + ending for stem in stems for ending in _ENDINGS}


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


def score(prompt: str, completion: str) -> float:
    """The reward of one answer: 0, 1 or 2."""
    example = usage_example(completion)
    if example is None:
        return 0.0
    return 2.0 if inflections(defined_word(prompt)).intersection(example) else 1.0


def gold_reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The reward of each answer to the prompt at the same place."""
    return [score(p, c) for p, c in zip(prompts, completions, strict=True)]


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


def mean_reward(prompts: Sequence[str], completions: Sequence[str]) -> float:
    """The mean reward of the answers."""
    rewards = gold_reward(prompts, completions)
    return sum(rewards) / len(rewards)


def win_rate(prompts: Sequence[str], ours: Sequence[str], theirs: Sequence[str]) -> float:
    """The share of prompts where our answer has the higher reward; a tie counts one half."""
    pairs = zip(gold_reward(prompts, ours), gold_reward(prompts, theirs), strict=True)
    wins = [0.5 if a == b else float(a > b) for a, b in pairs]
    return sum(wins) / len(wins)
