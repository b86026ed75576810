"""Reward functions for test runs."""

import zlib


def letters(prompts, completions):
    """Prefer responses with many different letters: any fixed order of texts will do."""
    return [float(len(set(completion))) for completion in completions]


def lots(prompts, completions):
    """Draw lots, from 0 to 1: no two texts are alike, and nothing is to be learned."""
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]


def turns(prompts, completions):
    """Score the assistant's message; anything but conversations is an error."""
    assert all(messages[-1]["role"] == "user" for messages in prompts)
    assert all([m["role"] for m in messages] == ["assistant"] for messages in completions)
    return [float(len(set(messages[0]["content"]))) for messages in completions]


def raises(prompts, completions):
    """Fail, as a service that is not there."""
    raise ConnectionError("no\nanswer")


def nan(prompts, completions):
    """Judge all but the second completion."""
    return [float("nan") if i == 1 else 1.0 for i in range(len(completions))]


def few(prompts, completions):
    """Leave one out."""
    return [0.0] * (len(completions) - 1)


def strings(prompts, completions):
    """Give grades."""
    return ["good"] * len(completions)


def echoes(prompts, completions, answer):
    """A reward that needs a column: 1 where the completion begins like the row's answer."""
    assert len(answer) == len(prompts)
    pairs = zip(completions, answer, strict=True)
    return [float(text[:1] == str(want)[:1]) for text, want in pairs]
