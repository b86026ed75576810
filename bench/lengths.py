"""Lengths like UltraFeedback's: log-normal prompts with a heavy tail, responses a little longer.

python bench/lengths.py 4096     # what is drawn, in figures
"""

from __future__ import annotations

import sys

import torch

VOCAB = 32_000
LONGEST = 1024
PROMPT_MEAN, PROMPT_SIGMA = 180.0, 1.0
RESPONSE_MEAN, RESPONSE_SIGMA = 280.0, 0.7
_FIRST_TOKEN = 10


def draw_lengths(pairs: int, seed: int = 0) -> torch.Tensor:
    """Return tokens of prompt, chosen and rejected response, int64 ``[pairs, 3]``.

    Log-normal with the means above before they are cut to 1 to 1,024.
    """
    generator = torch.Generator().manual_seed(seed)
    means = torch.tensor([PROMPT_MEAN, RESPONSE_MEAN, RESPONSE_MEAN], dtype=torch.float64)
    sigmas = torch.tensor([PROMPT_SIGMA, RESPONSE_SIGMA, RESPONSE_SIGMA], dtype=torch.float64)
    noise = torch.randn(pairs, 3, generator=generator, dtype=torch.float64)
    drawn = torch.exp(means.log() - sigmas.square() / 2 + sigmas * noise)
    return drawn.round().long().clamp(1, LONGEST)


def draw_pairs(pairs: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Return rows of random ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` of such lengths."""
    generator = torch.Generator().manual_seed(seed + 1)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {
            name: torch.randint(_FIRST_TOKEN, VOCAB, (length,), generator=generator).tolist()
            for name, length in zip(names, row, strict=True)
        }
        for row in draw_lengths(pairs, seed).tolist()
    ]


def main() -> None:
    """Print means, quantiles, and what padding and repeated prompts add in batches of 8 pairs."""
    lengths = draw_lengths(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
    for name, column in zip(("prompt", "chosen", "rejected"), lengths.unbind(1), strict=True):
        points = torch.quantile(column.double(), torch.tensor([0.1, 0.5, 0.9, 0.99]).double())
        listed = ", ".join(f"{p:.0f}" for p in points)
        print(f"{name:<9} mean {column.double().mean():.0f}; 10, 50, 90, 99 %: {listed}")
    batches = lengths[: len(lengths) // 8 * 8].view(-1, 8, 3)
    longest = (batches[..., :1] + batches[..., 1:]).amax((1, 2))
    padded = (16 * longest).sum().item()
    print(f"tokens needed, of those padded: {batches.sum().item() / padded:.2f}")


if __name__ == "__main__":
    main()
