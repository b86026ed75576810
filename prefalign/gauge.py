"""The gauge against collapse: whether the judge is still right, and lengths still sane.

SPA's judge learns from its own labels. Summed log-ratios favour length, so a judge that has begun
to fail drives the model to ever longer text and feeds on it. Three readings show it before the
rewards do: the judge's accuracy on human labels that it never trained on, the mean length of the
responses against the labelled ones', and the share of responses cut at the length limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .config import GaugeSettings
from .spa_config import SPAGaugeSettings


@dataclass(frozen=True)
class GaugeReading:
    """One iteration's readings.

    Args:
        judge_accuracy: Share of held-out pairs that the judge orders as people did; ties half. None
            where there is no judge.
        held_out_pairs: How many pairs that is.
        mean_tokens: Mean length of the iteration's responses, in tokens.
        length_ratio: That, relative to the given responses' mean length.
        cut_share: Share of the responses cut at the length limit.
    """

    judge_accuracy: float | None
    held_out_pairs: int
    mean_tokens: float
    length_ratio: float
    cut_share: float

    def warnings(self, settings: GaugeSettings) -> list[str]:
        """Return a sentence for each reading past its threshold."""
        found = []
        if (
            self.judge_accuracy is not None
            and isinstance(settings, SPAGaugeSettings)
            and self.judge_accuracy < settings.min_accuracy
        ):
            found.append(
                f"the judge orders {self.judge_accuracy:.0%} of {self.held_out_pairs} held-out "
                f"human pairs rightly, less than gauge.min_accuracy {settings.min_accuracy:.0%}"
            )
        if self.length_ratio > settings.max_length_ratio:
            found.append(
                f"responses average {self.mean_tokens:.1f} tokens, {self.length_ratio:.2f} times "
                f"the given ones', more than gauge.max_length_ratio {settings.max_length_ratio}"
            )
        if self.cut_share > settings.max_cut:
            found.append(
                f"{self.cut_share:.0%} of the responses were cut at the length limit, more than "
                f"gauge.max_cut {settings.max_cut:.0%}"
            )
        return found


def read_gauge(
    response_tokens: Sequence[int],
    cut: Sequence[bool],
    given_tokens: float,
    held_out_margins: Sequence[float] = (),
) -> GaugeReading:
    """Take a reading.

    Args:
        response_tokens: Length of each of the iteration's responses.
        cut: Whether each was cut at the length limit.
        given_tokens: Mean length of the responses that people gave.
        held_out_margins: The judge's reward of the chosen less that of the rejected response, for
            each held-out pair.
    """
    right = sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in held_out_margins)
    mean = sum(response_tokens) / len(response_tokens)
    return GaugeReading(
        judge_accuracy=right / len(held_out_margins) if held_out_margins else None,
        held_out_pairs=len(held_out_margins),
        mean_tokens=mean,
        length_ratio=mean / given_tokens,
        cut_share=sum(cut) / len(cut),
    )
