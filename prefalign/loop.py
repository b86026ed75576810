"""What every command does around its algorithm: one loop, and algorithms that plug into it.

    start                                   train π_0, from labels or demonstrations
    for each arm, for i = 1, 2, ...:        an algorithm is one arm; each of its baselines another
        generate                            responses of π_{i-1}
        score                               examples from them: by a judge, by rewards
        train                               π_i
    compare, evaluate, report

An algorithm is a subclass of ``Run`` that says what these are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from accelerate.utils import gather_object
from datasets import Dataset

from .config import GaugeSettings, RunSettings
from .data import load_preferences, load_prompts, load_sft
from .errors import CollapseError
from .evaluation import Evaluated, evaluate
from .fake_models import fake_from_config
from .gauge import GaugeReading
from .logp_cache import with_reference_logps
from .memory_model import Training
from .packing import Group
from .pipeline import Pipeline
from .planner import Request, Work, replaced
from .planning import check, device_memory
from .report import write_report
from .rewards import Reward, load_reward
from .run_folder import StepLog
from .tokenization import (
    check_vocabulary,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_sft,
)

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings", bound=RunSettings)


class Arm(NamedTuple):
    """One way to go through the iterations: the algorithm itself, or a baseline of it.

    Args:
        start: The stage that its π_0 comes from.
        key: Its folder; the algorithm's own iterations lie in the run's.
        name: What tables call it.
    """

    start: str
    key: str = ""
    name: str = ""

    def stage(self, i: int) -> str:
        """Return the name of iteration i's stage."""
        if i == 0:
            return self.start
        return f"{self.key}/iteration-{i}" if self.key else f"iteration-{i}"


class Run(Generic[Settings]):
    """One command's work over one output folder.

    Args:
        settings: Every setting.
        plan_for: ``cuda`` or ``cpu``: read the data and no weights, write nothing, to be planned
            for such a device (``memory_request``) and not run.

    Raises:
        UserError: Something in the settings, the data or the model cannot be used; before training.
    """

    algorithm: ClassVar[str]
    pipeline: ClassVar[type[Pipeline]] = Pipeline

    def __init__(self, settings: Settings, *, plan_for: str | None = None):
        settings.validate()
        self.settings = settings
        self.plan_for = plan_for
        self.reward: Reward | None = None
        if settings.evaluation.reward and plan_for is None:
            self.reward = load_reward(settings.evaluation.reward)
        self.prepare()
        self.parts = self.pipeline(settings, self.algorithm)
        self.tokenizer = self.parts.tokenizer
        if plan_for is None:
            self.parts.check_model()
        else:
            self.parts.pretend(fake_from_config(settings.model).model)
        self.prompts: list[Dataset] = []
        self.read_data()
        if settings.evaluation.reward:
            assert settings.evaluation.prompts is not None
            self.eval_prompts = self.read_evaluation_prompts(settings.evaluation.prompts)
        if plan_for is None:
            self.parts.begin(memory=self.fit_memory())

    def run(self) -> None:
        """Run the algorithm, or what is left of it."""
        self.start()
        for arm in self.arms():
            for i, prompts in enumerate(self.prompts, 1):
                responses = self.generate(arm, i, prompts)
                examples = self.score(arm, i, responses)
                self.train(arm, i, examples)
                self.report()
        self.compare()
        if self.reward is not None:
            evaluate(self.parts, self.models(), self.eval_prompts, self.reward)
        self.report()

    # Memory, before the first step

    def works(self) -> list[Work]:
        """Return the trainings of the run; the lengths of what is yet to come are its limits."""
        raise NotImplementedError

    def work(self, name: str, groups: Sequence[Group], **kwargs: Any) -> Work:
        """Return one training, by its name, its groups and ``Training``'s further fields."""
        scored = kwargs.pop("scored", False)
        processes = self.parts.process.num_processes
        training = Training(self.settings.training, processes=processes, **kwargs)
        return Work(name, groups, training, scored)

    def awaited(self, prompts: Iterable[Sequence[int]], responses: int) -> list[Group]:
        """Return groups of prompts and as many responses, which will be generated, at their limit.

        Of more prompts than a plan needs, the longest.
        """
        longest = sorted(prompts, key=len, reverse=True)[: 8 * self.settings.training.batch_size]
        response = [0] * self.settings.generation.max_new_tokens
        return [Group(ids, [response] * responses) for ids in longest]

    @property
    def generated_to(self) -> list[Dataset]:
        """The prompts that responses are generated to."""
        evaluated = [self.eval_prompts] if self.settings.evaluation.reward else []
        return [*self.prompts, *evaluated]

    def memory_request(self) -> Request:
        """Return what a plan of this run is made from."""
        columns = [
            ids
            for prompts in self.generated_to
            for name in ("prompt_ids", "guided_ids")
            if name in prompts.column_names
            for ids in prompts[name]
        ]
        if self.settings.generation.backend == "vllm":
            columns = []  # it takes a share of the device of its own
        return Request(
            self.settings.model,
            self.works(),
            self.settings,
            self.plan_for or self.parts.process.device.type,
            prompt_tokens=max(map(len, columns), default=0),
        )

    def fit_memory(self) -> dict[str, Any]:
        """Predict the peak of memory; refuse or adapt the run where it would not fit.

        Returns:
            What the run folder keeps: ``changes`` of settings, and ``scoring_tokens``. A run that
            is resumed starts from these, so that it computes the same whatever limit it has now.
        """
        memory, device = self.settings.memory, self.parts.process.device.type
        limit = device_memory(memory.limit, device, "memory.limit")
        if self.parts.process.num_processes > 1:
            limit = min(gather_object([limit]), key=lambda size: (size is not None, size or 0))
        kept = self.parts.run.begun_with("memory") or {}
        self._change(kept.get("changes", {}))
        most = kept.get("scoring_tokens")
        changes: dict[str, Any] = {}
        if memory.on_excess != "off" and limit is not None:
            changes, found = check(self.memory_request, limit, memory.on_excess)
            self._change(changes)
            tokens = [x for x in (most, found) if x is not None]
            most = min(tokens, default=None)
        self.parts.scoring_tokens = most or self.settings.training.max_tokens
        if kept and changes:
            logger.warning("memory: what this run still does may differ by rounding")
        changes = {**kept.get("changes", {}), **changes}
        return {"changes": changes, "scoring_tokens": self.parts.scoring_tokens}

    def _change(self, changes: dict[str, Any]) -> None:
        self.settings = self.parts.settings = replaced(self.settings, changes)

    # What an algorithm says

    def prepare(self) -> None:
        """Load what is needed besides the model and the data."""

    def read_data(self) -> None:
        """Read and check the data; ``self.prompts`` holds the prompts of each iteration."""
        raise NotImplementedError

    def start(self) -> None:
        """Train π_0."""
        raise NotImplementedError

    def arms(self) -> Sequence[Arm]:
        """Return what goes through the iterations."""
        return ()

    def generate(self, arm: Arm, i: int, prompts: Dataset) -> list[dict[str, Any]]:
        """Return a row for each prompt, with the responses of π_{i-1}."""
        raise NotImplementedError

    def score(self, arm: Arm, i: int, responses: list[dict[str, Any]]) -> Sequence[Group]:
        """Score the responses and return the examples that iteration i trains on."""
        raise NotImplementedError

    def train(self, arm: Arm, i: int, examples: Sequence[Group]) -> None:
        """Train π_i."""
        raise NotImplementedError

    def compare(self) -> None:
        """Train what the result is to be compared with."""

    def models(self) -> list[Evaluated]:
        """Return every model that is to be evaluated; the first is the baseline."""
        raise NotImplementedError

    # Data

    @property
    def lengths(self) -> dict[str, int]:
        """The limits on tokens, as the tokenising functions take them."""
        data = self.settings.data
        return {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}

    def read_pairs(self, source: str) -> Dataset:
        """Read and tokenise preference pairs."""
        rows = load_preferences(source)
        return self._checked(
            tokenize_preferences(rows, self.tokenizer, source=source, **self.lengths), source
        )

    def read_prompts(self, source: str, keep: Sequence[str] = ()) -> Dataset:
        """Read and tokenise prompts; ``keep`` are further columns, for reward functions."""
        # Beside conversations, a plain prompt is a user's message.
        rows = load_prompts(source, conversational=self.conversational, keep=keep)
        return self._checked(
            tokenize_prompts(rows, self.tokenizer, source=source, **self.lengths), source
        )

    def read_evaluation_prompts(self, source: str) -> Dataset:
        """Read and tokenise the prompts of the evaluation."""
        return self.read_prompts(source)

    def read_demonstrations(self, source: str) -> Dataset:
        """Read and tokenise demonstrations."""
        rows = load_sft(source)
        return self._checked(
            tokenize_sft(rows, self.tokenizer, source=source, **self.lengths), source
        )

    @property
    def conversational(self) -> bool:
        """Whether the labelled data are conversations."""
        return False

    def _checked(self, rows: Dataset, source: str) -> Dataset:
        check_vocabulary(rows, self.parts.vocabulary, source)
        return rows

    def with_reference(self, name: str, stage: str, groups: Sequence[Group]) -> list[Group]:
        """Return groups with the log-probs that ``stage``'s policy gives their responses."""
        return with_reference_logps(groups, self.parts.score(name, stage, groups))

    # The gauge

    def record_gauge(
        self, stage: str, gauge: GaugeSettings, reading: GaugeReading, **facts: Any
    ) -> None:
        """Write a reading down, once; warn, or stop the run, where it is past a threshold."""
        log = StepLog(self.parts.run.path / "gauge.jsonl")
        taken = log.rows(stage)
        self.parts.process.wait_for_everyone()  # all have looked before one writes
        warnings = taken[-1]["warnings"] if taken else reading.warnings(gauge)
        if not taken:
            for warning in warnings:
                self.say(f"{stage}: warning: {warning}")
            if self.parts.process.is_main_process:
                row = {"stage": stage, "step": 0, **asdict(reading), "warnings": warnings}
                log.append([row | facts])
        self.parts.process.wait_for_everyone()
        if warnings and gauge.on_collapse == "stop":
            self.report()
            raise CollapseError(
                f"{stage}: stopped before training: {'; '.join(warnings)} "
                "(go on with --resume --gauge.on_collapse warn)"
            )

    # What the user sees

    def say(self, message: str) -> None:
        """Tell the user, once and not from every process."""
        if self.parts.process.is_main_process:
            logger.info(message)

    def report(self) -> None:
        """Write ``report.html`` over what there is."""
        if self.parts.process.is_main_process:
            write_report(self.parts.run.path)
        self.parts.process.wait_for_everyone()

    def evaluated(self, stage: str, name: str) -> Evaluated:
        """Return a stage's model as one to evaluate on the evaluation's prompts."""
        return Evaluated(stage, name, stage, self.eval_prompts["prompt_ids"])
