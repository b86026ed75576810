"""The parts that an algorithm is put together from: load, train, generate, score, evaluate.

Each part is a stage of a run folder: it does its work once, leaves files, and on a resumed run
returns what the files hold. Work over many prompts is cut into chunks, each with a seed and a file
of its own, so a chunk's content depends neither on what ran before nor on how many processes there
are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .attention import causal_lm
from .config import GenerationSettings, RunSettings, TrainingSettings
from .encoding import Text
from .generation import Generator, TransformersGenerator, VLLMGenerator
from .loading import adapter_config
from .logp_cache import CachedModel, LogpCache, logps_of, weights_hash
from .models import check_finite, load_model, load_tokenizer, verify_head
from .packed_trainer import (
    Groups,
    MetricsCallback,
    NoLastCheckpoint,
    PackedTrainer,
    QuietProgress,
    sorted_checkpoints,
    training_arguments,
)
from .packing import Group
from .references import REFERENCE_ADAPTER, Reference, is_peft, reference_of
from .rewards import Rewards
from .run_folder import (
    RunFolder,
    put_in_place,
    read_rows,
    remove,
    require_space,
    write_rows,
)

INIT = "init"
"""The stage whose weights are the model that the run was given, π_init."""


def stage_seed(seed: int, *names: str | int) -> int:
    """Return a seed for one piece of work, the same in every process and on every resume."""
    return zlib.crc32(":".join(map(str, (seed, *names))).encode()) & 0x7FFFFFFF


class Pipeline:
    """The parts, over one run folder and one copy of the policy's weights.

    Args:
        settings: The run's settings.
        algorithm: Name of the algorithm.
    """

    def __init__(self, settings: RunSettings, algorithm: str):
        self.settings = settings
        # Said now: else each of several processes on CPUs would take itself for the only one.
        self.process = PartialState(cpu=not torch.accelerator.is_available())
        self.run = RunFolder(
            settings.output_dir,
            algorithm,
            settings.as_dict(),
            resume=settings.resume,
            overwrite=settings.overwrite,
            main_process=self.process.is_main_process,
        )
        self.training_arguments(INIT, num_groups=1, epochs=1)  # for what it refuses
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(
            settings.model.tokenizer or settings.model.path
        )
        self.cache: LogpCache | None = None
        self.weights: dict[str, str] = {}  # a stage's hash, made once
        self.scoring_tokens = settings.training.max_tokens  # of a pass without gradients
        self.policy: torch.nn.Module | None = None
        self.holds: str | None = None

    def begin(self, **facts: Any) -> None:
        """Open the run folder and the cache for writing; ``facts`` are as for ``RunFolder``."""
        if self.settings.reference_cache is not None:
            self.cache = LogpCache(self.settings.reference_cache)
        self.run.begin(**facts)
        self.process.wait_for_everyone()

    # The policy

    def folder(self, stage: str) -> Path:
        """Return the folder of a stage's files."""
        return self.run.path / stage

    def load(self, stage: str) -> torch.nn.Module:
        """Return the policy with the weights that ``stage`` ended with."""
        if self.holds != stage:
            self.policy = None  # frees the old weights before the new ones are read
            self.policy = self.read_model(stage)
            self.holds = stage
        assert self.policy is not None
        return self.policy

    def read_model(self, stage: str) -> torch.nn.Module:
        """Read the model of a stage beside the policy."""
        model = self.settings.model
        torch.manual_seed(stage_seed(self.settings.seed, "adapter"))  # a fresh adapter is random
        adapter = None if stage == INIT else self.folder(stage) / "model"
        if stage != INIT and model.lora.r == 0:
            return load_model(str(adapter), dtype=model.dtype, device=self.process.device)
        return load_model(
            model.path,
            dtype=model.dtype,
            device=self.process.device,
            lora=model.lora,
            adapter=adapter,
            load_in_4bit=model.load_in_4bit,
        )

    def pretend(self, fake: torch.nn.Module) -> None:
        """Take a model without numbers for π_init, where a run is only planned."""
        self.policy, self.holds = fake, INIT

    def check_model(self) -> None:
        """Refuse a model with NaN in its weights, or whose logits the fused head cannot match."""
        policy = self.load(INIT)
        check_finite(policy)
        verify_head(policy)
        trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        size = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
        models = size * (1 + self.settings.num_models)
        checkpoint = 2 * (size + 8 * trained)  # the new one is written before the old one goes
        require_space(self.run.path, models + checkpoint)

    @property
    def vocabulary(self) -> int:
        """How many token ids the policy knows."""
        embeddings: Any = causal_lm(self.load(self.holds or INIT)).get_input_embeddings()
        return embeddings.weight.shape[0]

    # Training

    def train(
        self,
        stage: str,
        start: str,
        groups: Sequence[Group],
        *,
        epochs: int = 1,
        max_steps: int | None = None,
        trainer_class: type[PackedTrainer],
        learning_rate: float | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Train ``start``'s weights on ``groups`` and keep the result as ``stage``'s.

        Args:
            stage: Name of the stage.
            start: The stage whose weights to start from.
            groups: What to train on; of a pair, the chosen response first.
            epochs: Epochs over them.
            max_steps: Optimiser steps, in the place of ``epochs``.
            trainer_class: The trainer.
            learning_rate: In the place of the settings'.
            **kwargs: Its further arguments; a callable ``reference`` is called to make one.

        Returns:
            The facts kept of the stage: ``steps``, ``pairs``.
        """
        if facts := self.run.finished(stage):
            return facts
        settings = self.settings
        self.holds = None if self.holds != start else self.holds
        policy = self.load(start)
        if callable(reference := kwargs.get("reference")):
            kwargs["reference"] = reference(policy)
        checkpoints = self.folder(stage) / "checkpoints"
        arguments = self.training_arguments(
            stage,
            learning_rate=learning_rate,
            num_groups=len(groups),
            epochs=epochs,
            max_steps=max_steps,
        )
        self.holds = None  # from here on the weights are neither the old stage's nor the new one's
        trainer = trainer_class(
            model=policy,
            args=arguments,
            train_dataset=Groups(groups),
            processing_class=self.tokenizer,  # saved beside the weights
            max_tokens=settings.training.max_tokens,
            share_prompts=settings.training.share_prompts,
            split_pairs=settings.training.split_pairs,
            callbacks=[
                MetricsCallback(lambda step, logs: self._log(stage, step, logs)),
                NoLastCheckpoint(),
            ],
            **kwargs,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(QuietProgress(f"{stage}/train"))
        done = sorted_checkpoints(checkpoints)
        last = done[-1] if done else None
        if self.process.is_main_process:
            step = int(last.name.rsplit("-", 1)[1]) if last else 0
            self.run.metrics.rewind(stage, step)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        facts = {"steps": trainer.state.global_step, "pairs": len(groups), "start": start}
        facts |= self._after_training(stage, trainer)
        self._save(stage, trainer)
        self.run.finish(stage, **facts)
        if self.process.is_main_process:
            remove(checkpoints)
        self.process.wait_for_everyone()
        if trainer.accelerator.distributed_type in (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
        ):
            self.holds = stage
        else:
            self.policy = None  # sharded in place; the next stage reads it from the folder
        return facts

    def _save(self, stage: str, trainer: PackedTrainer) -> None:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        if is_peft(policy) and REFERENCE_ADAPTER in policy.peft_config:
            policy.delete_adapter(REFERENCE_ADAPTER)  # π_{i-1}, which has its own folder
        final = self.folder(stage) / "model"
        temporary = final.with_name("model.partial")
        if self.process.is_main_process:
            remove(temporary)
        self.process.wait_for_everyone()
        trainer.save_model(str(temporary))  # on all processes: a sharded model is gathered
        self.process.wait_for_everyone()
        if self.process.is_main_process:
            put_in_place(temporary, final)

    def training_arguments(
        self, stage: str, *, learning_rate: float | None = None, **counts: Any
    ) -> TrainingArguments:
        """Return transformers' arguments for a stage.

        Raises:
            RunError: A setting is not one that transformers takes.
        """
        training: TrainingSettings = self.settings.training
        if learning_rate is not None:
            training = dataclasses.replace(training, learning_rate=learning_rate)
        return training_arguments(
            training,
            self.folder(stage) / "checkpoints",
            seed=stage_seed(self.settings.seed, stage),
            num_processes=self.process.num_processes,
            **counts,
        )

    def _after_training(self, stage: str, trainer: PackedTrainer) -> dict[str, Any]:
        """Keep what a trainer learned besides the weights; an algorithm may override it."""
        return {}

    def _log(self, stage: str, step: int, logs: dict[str, float]) -> None:
        self.run.metrics.append([{"stage": stage, "step": step, **logs}])

    # Work over many rows, in chunks

    def chunked(
        self,
        name: str,
        rows: Sequence[Any],
        work: Callable[[Sequence[Any], int], list[dict[str, Any]]],
        size: int,
    ) -> list[dict[str, Any]]:
        """Run ``work`` over chunks of ``rows``, each once, and return all that it returned.

        The arguments are those of ``chunk_files``.
        """
        return [row for file in self.chunk_files(name, rows, work, size) for row in read_rows(file)]

    def chunk_files(
        self,
        name: str,
        rows: Sequence[Any],
        work: Callable[[Sequence[Any], int], list[dict[str, Any]]],
        size: int,
    ) -> list[Path]:
        """Run ``work`` over chunks of ``rows``, each once, and return the files that it filled.

        Args:
            name: Folder of the chunks' files, under the run's.
            rows: The rows.
            work: Called as ``work(chunk, seed)``; returns a JSON object for each row.
            size: Rows in a chunk.
        """
        folder = self.run.path / name
        count = math.ceil(len(rows) / size)
        files = [folder / f"{chunk:06d}.jsonl" for chunk in range(count)]
        bar = tqdm(
            total=len(rows), desc=name, disable=not self.process.is_local_main_process, leave=False
        )
        with bar:
            for chunk, file in enumerate(files):
                part = rows[chunk * size : (chunk + 1) * size]
                if not file.exists() and chunk % self.process.num_processes == (
                    self.process.process_index
                ):
                    write_rows(file, work(part, stage_seed(self.settings.seed, name, chunk)))
                bar.update(len(part))
        self.process.wait_for_everyone()
        return files

    def generate(
        self,
        name: str,
        stage: str,
        prompt_ids: Sequence[list[int]],
        *,
        samples: int,
    ) -> list[dict[str, Any]]:
        """Sample ``samples`` responses to each prompt from ``stage``'s policy.

        Returns:
            A row for each prompt: ``prompt_ids`` and, for each response, ``ids`` and ``cut``.
        """
        generator: Generator | None = None  # made when there is something left to generate

        def work(chunk: Sequence[list[int]], seed: int) -> list[dict[str, Any]]:
            nonlocal generator
            if generator is None:
                generator = self._generator(stage, samples)
            return [
                {
                    "prompt_ids": list(ids),
                    "ids": [list(c.ids) for c in completions],
                    "cut": [c.cut for c in completions],
                }
                for ids, completions in zip(
                    chunk, generator.generate(chunk, seed=seed), strict=True
                )
            ]

        return self.chunked(name, prompt_ids, work, self.settings.generation.chunk_size)

    def _generator(self, stage: str, samples: int) -> Generator:
        g: GenerationSettings = self.settings.generation
        kwargs: dict[str, Any] = {
            "samples_per_prompt": samples,
            "temperature": g.temperature,
            "top_p": g.top_p,
            "max_new_tokens": g.max_new_tokens,
        }
        if g.backend == "vllm":
            return VLLMGenerator(self.load(stage), self.tokenizer, **kwargs)
        return TransformersGenerator(
            self.load(stage), self.tokenizer, batch_size=g.batch_size, **kwargs
        )

    def score(self, name: str, stage: str, groups: Sequence[Group]) -> list[list[float]]:
        """Return the log-prob of each group's responses, summed over tokens, under a policy."""
        size = self.settings.generation.chunk_size

        def work(chunk: Sequence[Group], seed: int) -> list[dict[str, Any]]:
            with self.autocast():
                logps = logps_of(
                    self.fixed(stage),
                    chunk,
                    max_tokens=self.scoring_tokens,
                    share_prompts=self.settings.training.share_prompts,
                )
                return [{"logps": x} for x in logps]

        return [row["logps"] for row in self.chunked(name, groups, work, size)]

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return training's mixed precision, for log-probs that its own are compared with."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
            self.settings.training.mixed_precision
        )
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.process.device.type, dtype)

    def fixed(self, stage: str) -> Reference | CachedModel:
        """Return the model of a stage, to score with: π_init may be the policy without adapter."""
        policy = self.policy
        if stage != INIT or policy is None or not self.init_is_base(policy):
            policy = self.load(stage)
        off = stage == INIT and self.init_is_base(policy)
        return self.cached(stage, Reference(policy, adapter_off=off))

    def init_is_base(self, policy: torch.nn.Module) -> bool:
        """Return whether π_init is what is under the adapter: not where it was given with one."""
        return is_peft(policy) and adapter_config(self.settings.model.path) is None

    @contextlib.contextmanager
    def beside(self, stage: str) -> Iterator[Reference | CachedModel]:
        """Give the model of a stage while the policy stays loaded.

        Of an adapter's base model there is one copy: the adapter is off, or a second one is on it.
        """
        policy: Any = self.policy
        assert policy is not None
        if not is_peft(policy):
            yield self.cached(stage, reference_of(policy, frozen=self.read_model(stage)))
        elif stage == INIT and self.init_is_base(policy):
            yield self.fixed(INIT)
        else:
            path = self.settings.model.path if stage == INIT else self.folder(stage) / "model"
            policy.load_adapter(str(path), REFERENCE_ADAPTER)
            try:
                yield self.cached(stage, reference_of(policy, adapter=REFERENCE_ADAPTER))
            finally:
                policy.delete_adapter(REFERENCE_ADAPTER)

    def cached(self, stage: str, reference: Reference) -> Reference | CachedModel:
        """Return the model of a stage with its part of the cache, where the run has one."""
        if self.cache is None:
            return reference
        if stage not in self.weights:
            self.weights[stage] = weights_hash(reference)
        return CachedModel(self.cache, reference, self.weights[stage])

    def reward(
        self,
        name: str,
        rewards: Rewards,
        prompts: Sequence[Text],
        completions: Sequence[Sequence[str]],
        size: int,
        columns: Sequence[dict[str, Any]] | None = None,
    ) -> list[list[float]]:
        """Return the reward of each of each prompt's completions.

        Args:
            name: Folder of the chunks' files, under the run's.
            rewards: The rewards.
            prompts: A prompt for each row, as the reward functions get it.
            completions: Its completions.
            size: Prompts given to the functions at a time.
            columns: What else the functions get of each row, by name.
        """
        Item = tuple[int, Text, Sequence[str], dict[str, Any]]

        def work(chunk: Sequence[Item], seed: int) -> list[dict]:
            flat = [(prompt, text, more) for _, prompt, texts, more in chunk for text in texts]
            scores = rewards.score(
                [prompt for prompt, _, _ in flat],
                [text for _, text, _ in flat],
                {name: [more[name] for _, _, more in flat] for name in chunk[0][3]},
                first_row=chunk[0][0],
            )
            found = iter(scores)
            return [{"rewards": [next(found) for _ in texts]} for _, _, texts, _ in chunk]

        rows = list(zip(itertools.count(), prompts, completions, columns or itertools.repeat({})))
        with rewards.on_device(self.process.device):
            return [row["rewards"] for row in self.chunked(name, rows, work, size)]

    # What is known of a stage, and of a response

    def steps_of(self, stage: str) -> int:
        """Return the optimiser steps between π_init and a stage's weights."""
        steps = 0
        while stage != INIT:
            facts = self.run.finished(stage)
            assert facts is not None, f"{stage} is not finished"
            steps += facts["steps"]
            stage = facts["start"]
        return steps

    def decode(self, ids: Sequence[int]) -> str:
        """Return a response's text."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
