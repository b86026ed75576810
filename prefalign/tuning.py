"""``prefalign sft`` and ``prefalign dpo``: one stage of training, of the algorithms' parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .config import DPOSettings, SFTSettings
from .errors import RunError
from .evaluation import Evaluated
from .kernels.objectives import Term, needs_reference, resolve
from .loop import Run
from .pipeline import INIT
from .planner import Work
from .sft_trainer import SFTTrainer
from .tokenization import groups_from_pairs, groups_from_sft, is_conversational
from .trainer import PreferenceTrainer


class SFT(Run[SFTSettings]):
    """Supervised fine-tuning on demonstrations.

    Args:
        settings: Every setting.

    Raises:
        UserError: Something in the settings, the data or the model cannot be used; before training.
    """

    algorithm = "sft"

    def read_data(self) -> None:
        """Read the demonstrations."""
        self.demonstrations = self.read_demonstrations(self.settings.data.sft)

    @property
    def conversational(self) -> bool:
        """Whether the demonstrations are conversations."""
        return is_conversational(self.demonstrations)

    def works(self) -> list[Work]:
        """Return the one training."""
        return [self.work("sft", groups_from_sft(self.demonstrations))]

    def start(self) -> None:
        """Train on the demonstrations."""
        self.parts.train(
            "sft",
            INIT,
            groups_from_sft(self.demonstrations),
            epochs=self.settings.training.epochs,
            trainer_class=SFTTrainer,
        )

    def models(self) -> list[Evaluated]:
        """Return the model before and after."""
        return [self.evaluated(INIT, "base"), self.evaluated("sft", "SFT")]


class DPO(Run[DPOSettings]):
    """Preference optimisation on labelled pairs, with any loss of ``preference_loss``.

    Args:
        settings: Every setting.

    Raises:
        UserError: Something in the settings, the data or the model cannot be used; before training.
    """

    algorithm = "dpo"

    def prepare(self) -> None:
        """Check what the loss is made of."""
        try:
            self.terms: tuple[Term, ...] = resolve(**vars(self.settings.loss))
        except (TypeError, ValueError) as error:
            raise RunError(f"loss.{error}") from error

    def read_data(self) -> None:
        """Read the pairs."""
        self.pairs = self.read_pairs(self.settings.data.preferences)

    @property
    def conversational(self) -> bool:
        """Whether the pairs are conversations."""
        return is_conversational(self.pairs)

    def works(self) -> list[Work]:
        """Return the one training."""
        scored = needs_reference(self.terms)
        return [self.work("dpo", groups_from_pairs(self.pairs), scored=scored)]

    def start(self) -> None:
        """Train on the pairs, against the given model's log-probs, which are computed once."""
        groups: Sequence[Any] = groups_from_pairs(self.pairs)
        if needs_reference(self.terms):
            groups = self.with_reference("dpo/reference", INIT, groups)
        self.parts.train(
            "dpo",
            INIT,
            groups,
            epochs=self.settings.training.epochs,
            trainer_class=PreferenceTrainer,
            **vars(self.settings.loss),
        )

    def models(self) -> list[Evaluated]:
        """Return the model before and after."""
        return [self.evaluated(INIT, "base"), self.evaluated("dpo", "DPO")]
