"""Reward functions for test runs."""


def letters(prompts, completions):
    """Prefer responses with many different letters: any fixed order of texts will do."""
    return [float(len(set(completion))) for completion in completions]
