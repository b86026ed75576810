"""Progressively Label Enhancement (PLE): learn from what principles bring out, as far as it helps.

arXiv 2408.02599. In each iteration the model answers a query plainly and under principles; rewards
score both answers against the plain query. Where the guided answer is ahead by more than a
threshold, it is ranked above the plain one; elsewhere both are imitated, weighted by their rewards.
The threshold falls from iteration to iteration. The baselines are in ``ple_baselines``, each a
``Method`` beside PLE's own.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from .attention import causal_lm
from .data import load_prompts, split_prompts
from .errors import RunError
from .evaluation import Evaluated
from .gauge import read_gauge
from .loop import Arm, Run
from .packing import Group
from .pipeline import INIT
from .planner import Work
from .ple_baselines import METHODS, Method, Row
from .ple_config import PLESettings
from .principles import load_principles, tokenize_guided
from .rewards import load_rewards, normalised
from .run_folder import read_rows, write_rows
from .sft_trainer import SFTTrainer
from .tokenization import groups_from_sft, is_conversational

SFT = "sft"


class PLE(Run[PLESettings]):
    """The whole algorithm, over one output folder. ``Run.run`` is its loop.

    Args:
        settings: Every setting; the paper's values are the defaults, where it names one.

    Raises:
        UserError: Something in the settings, the data or the model cannot be used; before training.
    """

    algorithm = "ple"

    # 0. Principles, rewards, data

    def prepare(self) -> None:
        """Load the principles and the rewards."""
        settings = self.settings
        self.principles = load_principles(settings.principles)
        if settings.iterations and self.plan_for is None:
            rewards = settings.rewards
            self.rewards = load_rewards(
                rewards.functions,
                rewards.weights,
                setting="rewards.functions",
                dtype=rewards.dtype,
                max_tokens=rewards.max_tokens,
            )

    def read_data(self) -> None:
        """Read the demonstrations and the queries, plain and guided."""
        data, settings = self.settings.data, self.settings
        self.further = settings.rewards.columns
        self.demonstrations = self.read_demonstrations(data.sft) if data.sft else None
        if settings.iterations:
            guided = any(self.method(arm).guided for arm in self.arms())
            self.prompts = split_prompts(
                (self.read_guided if guided else self.read_prompts)(data.prompts, self.further),
                data.prompts_per_iteration,
                iterations=settings.iterations,
                seed=settings.seed,
                source=data.prompts,
            )

    @property
    def conversational(self) -> bool:
        """Whether the demonstrations are conversations."""
        return self.demonstrations is not None and is_conversational(self.demonstrations)

    def read_evaluation_prompts(self, source: str) -> Dataset:
        """Read the evaluation's prompts, guided too where the evaluation asks for that."""
        return (self.read_guided if self.settings.evaluation.guided else self.read_prompts)(source)

    def read_guided(self, source: str, keep: Sequence[str] = ()) -> Dataset:
        """Read prompts and tokenise them, as they are and under the principles."""
        rows = load_prompts(source, conversational=self.conversational, keep=keep)
        config = causal_lm(self.parts.load(INIT)).config.get_text_config()
        room = getattr(config, "max_position_embeddings", None)
        if room is not None:
            room = max(0, room - self.settings.generation.max_new_tokens)
        guided = tokenize_guided(
            rows,
            self.tokenizer,
            self.principles,
            max_guided_length=room,
            source=source,
            **self.lengths,
        )
        return self._checked(guided, source)

    # 1. SFT

    def start(self) -> None:
        """Train π_0 on the demonstrations, where there are any."""
        if self.demonstrations is None:
            return
        self.say(f"{SFT}: {len(self.demonstrations)} demonstrations")
        training = self.settings.training
        self.parts.train(
            SFT,
            INIT,
            groups_from_sft(self.demonstrations),
            epochs=training.sft_epochs,
            learning_rate=training.sft_learning_rate,
            trainer_class=SFTTrainer,
        )

    def works(self) -> list[Work]:
        """Return the training on demonstrations, and the iterations'."""
        works = []
        if self.demonstrations is not None:
            works.append(self.work(SFT, groups_from_sft(self.demonstrations)))
        if self.prompts:
            ids = (x for prompts in self.prompts for x in prompts["prompt_ids"])
            works.append(self.work("iterations", self.awaited(ids, 2)))
        return works

    def arms(self) -> list[Arm]:
        """Return PLE itself, then the baselines that are asked for."""
        start = INIT if self.demonstrations is None else SFT
        return [
            Arm(start, name="PLE" if self.settings.variant == "paper" else "PLE, released code"),
            *(Arm(start, key, METHODS[key].name) for key in self.settings.evaluation.baselines),
        ]

    def method(self, arm: Arm) -> Method:
        """Return what an arm does."""
        return METHODS[arm.key or {"paper": "ple", "released": "released"}[self.settings.variant]]

    # 2a. Generate a plain and a guided response, or whatever the arm's method asks for

    def generate(self, arm: Arm, i: int, prompts: Dataset) -> list[Row]:
        """Return a row for each prompt: its responses, the guided one first, and their rewards."""
        method = self.method(arm)
        # π_0 is the same in all arms, and so are its responses.
        place = self.arms()[0].stage(1) if i == 1 else arm.stage(i)
        samples = method.samples(self.settings)
        rows: list[Row] = [
            {"prompt": prompt, "prompt_ids": list(ids), "guided": [], "ids": [], "cut": []}
            | {"responses": [], "tokens": [], "rewards": []}
            for prompt, ids in zip(prompts["prompt"], prompts["prompt_ids"], strict=True)
        ]
        for guided, count in ((True, int(method.guided)), (False, samples)):
            if not count:
                continue
            name = "guided" if guided else f"plain-{count}"
            found = self.parts.generate(
                f"{place}/generated/{name}",
                arm.stage(i - 1),
                prompts["guided_ids" if guided else "prompt_ids"],
                samples=count,
            )
            texts = [[self.parts.decode(ids) for ids in answer["ids"]] for answer in found]
            # 2b. Against the plain query, always.
            rewards = self.parts.reward(
                f"{place}/rewards/{name}",
                self.rewards,
                list(prompts["prompt"]),
                texts,
                self.settings.rewards.batch_size,
                [json.loads(row) for row in prompts["columns"]] if self.further else None,
            )
            for row, answer, text, reward in zip(rows, found, texts, rewards, strict=True):
                row["guided"] += [guided] * count
                row["ids"] += answer["ids"]
                row["cut"] += answer["cut"]
                row["responses"] += text
                row["tokens"] += [len(ids) for ids in answer["ids"]]
                row["rewards"] += reward
        return rows

    # 2b. Score them, and choose what to learn

    def score(self, arm: Arm, i: int, responses: list[Row]) -> Sequence[Group]:
        """Normalise the rewards, keep the rows, read the gauge; return the method's examples.

        Raises:
            RunError: There are none.
        """
        flat = normalised(
            [reward for row in responses for reward in row["rewards"]],
            self.settings.rewards.normalise,
        )
        scores = iter(flat)
        for row in responses:
            row["scores"] = [next(scores) for _ in row["rewards"]]
        stage = arm.stage(i)
        if self.parts.process.is_main_process and not self.parts.run.finished(stage):
            write_rows(self.parts.folder(stage) / "responses.jsonl", responses)
        self.parts.process.wait_for_everyone()
        examples = self.method(arm).examples(self, arm, i, responses)
        if not examples:
            raise RunError(
                f"{stage}: there is nothing to learn: the responses to each of the "
                f"{len(responses)} prompts are equal, or of equal reward"
            )
        self.watch(arm, i, responses, examples)
        return examples

    def threshold(self, arm: Arm, i: int) -> tuple[float, float]:
        """Return (τ, what every step multiplies it with) as iteration i begins."""
        settings = self.settings.enhancement
        if settings.decay_every == "iteration":
            return settings.threshold * settings.decay ** (i - 1), 1.0
        steps = self.parts.steps_of(arm.stage(i - 1)) - self.parts.steps_of(arm.stage(0))
        return settings.threshold * settings.decay**steps, settings.decay

    def watch(self, arm: Arm, i: int, responses: list[Row], examples: Sequence[Group]) -> None:
        """Say and keep what the iteration is to learn from; warn of a collapse in length."""
        stage = arm.stage(i)
        reading = read_gauge(
            [n for row in responses for n in row["tokens"]],
            [c for row in responses for c in row["cut"]],
            self.given_tokens(arm, i, responses),
        )
        facts: dict[str, Any] = {"examples": len(examples)}
        for guided, name in ((False, "plain"), (True, "guided")):
            found = [
                reward
                for row in responses
                for reward, g in zip(row["rewards"], row["guided"], strict=True)
                if g == guided
            ]
            facts[f"{name}_reward"] = statistics.fmean(found) if found else None
        facts |= self.method(arm).facts(self, arm, i, examples)
        rewards = ", ".join(
            f"{name} {facts[f'{name}_reward']:.3f}"
            for name in ("guided", "plain")
            if facts[f"{name}_reward"] is not None
        )
        ranked = ""
        if facts.get("threshold") is not None:
            ranked = f"; {facts['ranked_share']:.0%} ranked at τ = {facts['threshold']:.3g}"
        self.say(
            f"{stage}: {len(examples)} examples from {len(responses)} prompts; mean reward "
            f"{rewards}{ranked}; responses average {reading.mean_tokens:.1f} tokens, "
            f"{reading.cut_share:.0%} cut"
        )
        self.record_gauge(stage, self.settings.gauge, reading, **facts)

    def given_tokens(self, arm: Arm, i: int, responses: list[Row]) -> float:
        """Return the mean length of the demonstrations, or of π_0's responses if there are none."""
        if self.demonstrations is not None:
            return statistics.fmean(len(ids) for ids in self.demonstrations["response_ids"])
        first = self.parts.folder(arm.stage(1)) / "responses.jsonl"
        rows = responses if i == 1 else read_rows(first)
        return statistics.fmean(n for row in rows for n in row["tokens"])

    # 2c. Train π_i from π_{i-1}

    def train(self, arm: Arm, i: int, examples: Sequence[Group]) -> None:
        """Train π_i by the arm's method."""
        self.parts.train(
            arm.stage(i),
            arm.stage(i - 1),
            examples,
            epochs=self.settings.training.epochs,
            **self.method(arm).training(self, arm, i),
        )

    # 3. What to compare with

    def models(self) -> list[Evaluated]:
        """Return the given model, SFT, PLE after every iteration, and every baseline's last."""
        found = [self.evaluated(INIT, "base")]
        if self.settings.evaluation.guided:
            guided = self.eval_prompts["guided_ids"]
            found.append(Evaluated("init-guided", "base, guided", INIT, guided))
        itself, *baselines = self.arms()
        if self.demonstrations is not None:
            found.append(self.evaluated(SFT, "SFT"))
        last = self.settings.iterations
        found += [self.evaluated(itself.stage(i), f"{itself.name} {i}") for i in range(1, last + 1)]
        if last:
            for arm in baselines:
                model = self.evaluated(arm.stage(last), arm.name.format(self.settings.evaluation))
                found.append(model._replace(key=arm.key))
        return found
