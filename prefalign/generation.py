"""Sampling responses, behind one small interface.

``TransformersGenerator`` uses transformers' own ``generate`` on the one copy of the weights, and
leaves the model as it found it. ``VLLMGenerator`` keeps a second copy in vLLM's engine.

A completion's ids end with the EOS token where the model produced one, so that training teaches it
to stop. A response that was cut at the length limit gets no EOS: the published SPA code appends one
(and so trains on endings that nobody wrote); here the cut is kept and marked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .attention import causal_lm, generation_attention, unwrap
from .errors import ModelError
from .references import is_peft, modules_in_eval
from .tokenization import end_token_ids


@dataclass(frozen=True)
class Completion:
    """One response.

    Attributes:
        ids: Its token ids, the EOS included where there is one; at least one id.
        cut: Whether it stopped at the length limit, without EOS.
    """

    ids: list[int]
    cut: bool


class Generator(Protocol):
    """Something that samples responses."""

    def generate(self, prompt_ids: Sequence[Sequence[int]], *, seed: int) -> list[list[Completion]]:
        """Return the responses to each prompt, K each.

        Args:
            prompt_ids: Each prompt's token ids.
            seed: The same prompts, weights and seed give the same responses, whatever was
                generated before.
        """
        ...


class TransformersGenerator:
    """Sample with transformers' ``generate``, in left-padded batches of similar length.

    The global random state, the attention, train or eval mode, gradient checkpointing and the
    model's generation defaults are the same after a call as before it. Only ``temperature`` and
    ``top_p`` shape the distribution: processors that a checkpoint's generation config asks for
    (repetition penalty, top-k, ...) are left out, as the judge scores the plain distribution.

    Args:
        model: The policy, wrapped or not.
        tokenizer: For its EOS and pad tokens.
        samples_per_prompt: K.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Sample from the likeliest tokens that make up this probability.
        max_new_tokens: Length limit of a response, its EOS included.
        batch_size: Sequences generated at a time.

    Raises:
        ModelError: Neither the tokenizer nor the model names an EOS token.
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        samples_per_prompt: int = 2,
        temperature: float = 0.7,
        top_p: float = 1.0,
        max_new_tokens: int = 300,
        batch_size: int = 32,
    ):
        _check_numbers(samples_per_prompt, temperature, top_p, max_new_tokens, batch_size)
        self.model = model
        self.samples_per_prompt = samples_per_prompt
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.eos_ids = eos_ids(model, tokenizer)
        pad = tokenizer.pad_token_id
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        self._config = GenerationConfig(
            **sampling,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=self.eos_ids[0] if pad is None else pad,
            bos_token_id=tokenizer.bos_token_id,
            use_cache=True,
        )

    def generate(self, prompt_ids: Sequence[Sequence[int]], *, seed: int) -> list[list[Completion]]:
        """Return the responses to each prompt; see ``Generator``."""
        for index, prompt in enumerate(prompt_ids):
            if not len(prompt):
                raise ValueError(f"prompt_ids: expected one token or more, got none in {index}")
        rows = [i for i in range(len(prompt_ids)) for _ in range(self.samples_per_prompt)]
        # Longest first: a batch that does not fit in memory shows at once.
        order = sorted(range(len(rows)), key=lambda r: (-len(prompt_ids[rows[r]]), r))
        completions: list[Completion | None] = [None] * len(rows)
        with _generating(self.model, self._config) as device, _seeded(seed, device):
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                batch = [prompt_ids[rows[r]] for r in chosen]
                for row, completion in zip(chosen, self._generate(batch, device), strict=True):
                    completions[row] = completion
        done = [completion for completion in completions if completion is not None]
        step = self.samples_per_prompt
        return [done[start : start + step] for start in range(0, len(done), step)]

    def _generate(self, prompts: list[Sequence[int]], device: torch.device) -> list[Completion]:
        width = max(map(len, prompts))
        pad = self._config.pad_token_id
        padded = [[pad] * (width - len(ids)) + list(ids) for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        outputs = causal_lm(self.model).generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=self._config,
        )
        return [_completion(ids, self.eos_ids) for ids in outputs[:, width:].tolist()]


class VLLMGenerator:
    """Sample with vLLM, on a second copy of the weights. Untested on the present vLLM version.

    When the generator is made, the policy is saved into a temporary folder and an engine loads it
    from there (of a PEFT policy the adapter alone; the base model comes from where it was loaded).
    Make a new generator after every training stage.

    Args:
        model: As for ``TransformersGenerator``.
        tokenizer: As for ``TransformersGenerator``.
        samples_per_prompt: As for ``TransformersGenerator``.
        temperature: As for ``TransformersGenerator``.
        top_p: As for ``TransformersGenerator``.
        max_new_tokens: As for ``TransformersGenerator``.
        **engine: Further arguments of ``vllm.LLM``, such as ``gpu_memory_utilization``.

    Raises:
        ModelError: vLLM is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        samples_per_prompt: int = 2,
        temperature: float = 0.7,
        top_p: float = 1.0,
        max_new_tokens: int = 300,
        **engine: Any,
    ):
        _check_numbers(samples_per_prompt, temperature, top_p, max_new_tokens, 1)
        try:
            import vllm
        except ImportError as error:
            raise ModelError(
                "generating with vLLM needs the vllm package: pip install 'prefalign[vllm]'"
            ) from error
        self._vllm = vllm
        self.eos_ids = eos_ids(model, tokenizer)
        self._sampling = {
            "n": samples_per_prompt,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_new_tokens,
            "stop_token_ids": self.eos_ids,
            "detokenize": False,
        }
        policy, self._lora = unwrap(model), None
        self._folder = tempfile.TemporaryDirectory(prefix="prefalign-vllm-")
        policy.save_pretrained(self._folder.name)
        if is_peft(policy):
            from vllm.lora.request import LoRARequest

            self._lora = LoRARequest("policy", 1, self._folder.name)
            weights = causal_lm(policy).config.name_or_path
            rank = max(config.r for config in policy.peft_config.values())
            engine = {"enable_lora": True, "max_lora_rank": rank, **engine}
        else:
            tokenizer.save_pretrained(self._folder.name)
            weights = self._folder.name
        self._engine = vllm.LLM(model=weights, **engine)

    def generate(self, prompt_ids: Sequence[Sequence[int]], *, seed: int) -> list[list[Completion]]:
        """Return the responses to each prompt; see ``Generator``."""
        outputs = self._engine.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompt_ids],
            [
                self._vllm.SamplingParams(**self._sampling, seed=seed + index)
                for index in range(len(prompt_ids))
            ],
            lora_request=self._lora,
        )
        return [
            [_completion(list(sample.token_ids), self.eos_ids) for sample in output.outputs]
            for output in outputs
        ]


def eos_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends a response: the model's, the tokenizer's, the chat template's.

    Raises:
        ModelError: There is none.
    """
    config = getattr(causal_lm(model), "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    own = own if isinstance(own, (list, tuple)) else [own]
    ids = sorted({i for i in (*own, *end_token_ids(tokenizer)) if i is not None})
    if not ids:
        raise ModelError("neither the tokenizer nor the model names an EOS token")
    return ids


def _check_numbers(
    samples: int, temperature: float, top_p: float, max_new_tokens: int, batch_size: int
) -> None:
    for name, value in (
        ("samples_per_prompt", samples),
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    if temperature < 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")


def _completion(ids: list[int], eos: Sequence[int]) -> Completion:
    """Return what was generated up to its first EOS; the rest is padding."""
    end = next((i for i, token in enumerate(ids) if token in eos), None)
    return Completion(ids, cut=True) if end is None else Completion(ids[: end + 1], cut=False)


@contextmanager
def _generating(model: nn.Module, config: GenerationConfig) -> Iterator[torch.device]:
    """Make ``model`` ready to generate inside the block; yield its device."""
    lm = causal_lm(model)
    checkpointed: list[Any] = [
        module for module in model.modules() if getattr(module, "gradient_checkpointing", False)
    ]
    defaults = lm.generation_config
    with torch.no_grad(), generation_attention(model), modules_in_eval(model):
        for module in checkpointed:
            module.gradient_checkpointing = False
        # transformers fills what our configuration leaves open from the model's own.
        lm.generation_config = config
        try:
            yield lm.get_input_embeddings().weight.device
        finally:
            lm.generation_config = defaults
            for module in checkpointed:
                module.gradient_checkpointing = True


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside the block; its random state is as before afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
