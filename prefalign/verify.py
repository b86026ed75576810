"""``prefalign verify``: one DPO step of the library's against an ordinary one, on your own model.

Eager PyTorch, the library's trainer and, where it is installed, TRL's make two steps on the same
pairs. What is compared: losses and log-probs of each pair in both steps, and the gradients of the
first. Errors are counted from the same steps in float64, where the model is small enough, and may
be twice eager PyTorch's own; else from eager PyTorch, and may be what roundings can add up to.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .attention import causal_lm
from .data import load_preferences
from .errors import DataError, ModelError, RunError
from .kernels.objectives import couples_batch, needs_reference, resolve
from .loading import check_finite, first_line, load_tokenizer
from .packing import Group
from .tokenization import check_vocabulary, groups_from_pairs, tokenize_preferences
from .verify_config import VerifySettings
from .verify_eager import FALL, Outcome, load, run_eager
from .verify_errors import (
    AFTER,
    BEFORE,
    GRADIENT,
    WORST,
    GradientErrors,
    Limits,
    Measure,
    copy_gradients,
    gradient_errors,
    measure,
)
from .verify_sides import SkippedError, run_prefalign, run_trl

EXACT_PARAMETERS = 200_000_000
"""Models of more parameters are not run in float64 unless that is asked for."""

# Log-normal lengths, in tokens: mean and sigma, of prompts and of responses.
_PROMPTS, _RESPONSES, _LONGEST = (180.0, 1.0), (280.0, 0.7), 1024


def main(settings: VerifySettings) -> int:
    """Compare the sides, print the table, and return 0 where prefalign passes and 1 where not.

    Raises:
        UserError: Something in the settings, the data or the model cannot be used.
    """
    settings.validate()
    _check_loss(settings)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("verify runs on one process: start it without a launcher")
    device = _device(settings)
    model = load(settings, torch.device("cpu"))
    check_finite(model)
    facts = ModelFacts.of(model)
    groups = read_pairs(settings, model)
    del model
    print(_heading(settings, facts, groups, device), flush=True)
    report = compare(settings, facts, groups, device)
    print(report.text)
    return 0 if report.passed else 1


def _check_loss(settings: VerifySettings) -> None:
    try:
        terms = resolve(
            settings.loss_type, beta=settings.beta, label_smoothing=settings.label_smoothing
        )
    except ValueError as error:
        raise RunError(str(error)) from error
    if couples_batch(terms) or not needs_reference(terms):
        raise RunError(
            f"loss_type: expected a loss of single pairs with a reference, got "
            f"{settings.loss_type!r}"
        )


class ModelFacts(NamedTuple):
    """What is said of a model.

    Args:
        name: Its class.
        parameters: How many it has.
        trained: How many of them are trained.
        dtype: What it computes in.
    """

    name: str
    parameters: int
    trained: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> ModelFacts:
        """Read them off a model."""
        lm = causal_lm(model)
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        trained = sum(size for size, requires_grad in sizes if requires_grad)
        dtype = lm.get_input_embeddings().weight.dtype
        return cls(type(lm).__name__, sum(size for size, _ in sizes), trained, dtype)


def _device(settings: VerifySettings) -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if settings.device == "cuda" and (found is None or found.type != "cuda"):
        raise RunError("device: expected cpu or auto, since there is no such GPU, got 'cuda'")
    return torch.device("cpu") if settings.device == "cpu" or found is None else found


# Pairs


def read_pairs(settings: VerifySettings, model: nn.Module) -> list[Group]:
    """Return the pairs, chosen first: the first of the data, or random tokens.

    Raises:
        UserError: They cannot be read, or are another tokenizer's.
    """
    lm: Any = causal_lm(model)
    config = lm.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    longest = min(settings.max_length, context or settings.max_length)
    longest_prompt = min(settings.max_prompt_length, longest - 1)
    head = lm.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(lm).__name__} has no output head")
    vocabulary = min(head.weight.shape[0], lm.get_input_embeddings().weight.shape[0])
    if settings.preferences is None:
        most = min(longest_prompt, longest // 2)
        return random_pairs(settings.pairs, vocabulary, longest, most, settings.seed)
    source = settings.preferences
    tokenizer = load_tokenizer(settings.tokenizer or settings.model)
    rows = load_preferences(source)
    if not len(rows):
        raise DataError("there are no pairs", source=source)
    tokenized = tokenize_preferences(
        rows.select(range(min(settings.pairs, len(rows)))),
        tokenizer,
        max_length=longest,
        max_prompt_length=longest_prompt,
        source=source,
    )
    check_vocabulary(tokenized, vocabulary, source)
    return list(groups_from_pairs(tokenized))


def random_pairs(
    pairs: int, vocabulary: int, max_length: int, max_prompt_length: int, seed: int
) -> list[Group]:
    """Return pairs of random tokens, with lengths like UltraFeedback's."""
    generator = torch.Generator().manual_seed(seed)

    def ids(lengths: tuple[float, float], most: int) -> list[int]:
        mean, sigma = lengths
        noise = torch.randn((), generator=generator, dtype=torch.float64).item()
        drawn = round(math.exp(math.log(mean) - sigma**2 / 2 + sigma * noise))
        count = max(1, min(drawn, most, _LONGEST))
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    groups = []
    for i in range(pairs):
        prompt = ids(_PROMPTS, max_prompt_length)
        room = max_length - len(prompt)
        groups.append(Group(prompt, [ids(_RESPONSES, room), ids(_RESPONSES, room)], i))
    return groups


# The comparison


class Report(NamedTuple):
    """What came out.

    Args:
        text: The table and the verdict.
        passed: The verdict.
    """

    text: str
    passed: bool


def compare(
    settings: VerifySettings, facts: ModelFacts, groups: Sequence[Group], device: torch.device
) -> Report:
    """Run the sides one after the other and judge them.

    Raises:
        ModelError: Eager PyTorch's own numbers are not finite, or the memory is not enough.
    """
    sides: dict[str, Outcome] = {}
    sides["eager"], rate = run_eager(settings, groups, device, copy_gradients)
    eager = sides["eager"]
    if not all(x.isfinite().all() for x in (*eager.losses, *eager.logps)):
        raise ModelError(f"the model's own losses are not finite in {_short(facts.dtype)}")
    answer, gradients, remarks = eager, eager.gradients, []
    exact = settings.exact
    if exact == "auto":
        exact = "float64" if facts.parameters <= EXACT_PARAMETERS else "none"
    if exact != "none":
        where = torch.device("cpu") if device.type == "mps" else device
        dtype = getattr(torch, exact)
        try:
            answer, _ = run_eager(settings, groups, where, copy_gradients, rate=rate, dtype=dtype)
        except (RuntimeError, ModelError) as error:
            remarks.append(f"There is no {exact} answer: {first_line(error)}.")
        else:
            gradients = answer.gradients
            eager.gradients = gradient_errors(eager.gradients, gradients)

    def keep(model: nn.Module) -> GradientErrors:
        return gradient_errors(model, gradients)

    sides["prefalign"] = run_prefalign(settings, groups, device, keep, rate)
    try:
        sides["TRL"] = run_trl(settings, groups, device, keep, rate)
    except SkippedError as skipped:
        remarks.append(f"TRL is not compared: {skipped}.")
    measures = measure(sides, answer, Limits(facts.dtype, device, groups, eager))
    return render(measures, sides, answer, exact, rate, remarks)


# What is printed


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _heading(
    settings: VerifySettings, facts: ModelFacts, groups: Sequence[Group], device: torch.device
) -> str:
    trained = "" if facts.trained == facts.parameters else f", {facts.trained / 1e6:.3g} M trained"
    if settings.preferences is None:
        source = "random tokens, with lengths like UltraFeedback's"
    else:
        source = f"the first of {settings.preferences}"
    prompts = sum(len(group.prompt_ids) for group in groups)
    responses = sum(len(ids) for group in groups for ids in group.response_ids)
    return (
        f"Model  {settings.model}: {facts.name}, {facts.parameters / 1e6:.3g} M parameters"
        f"{trained}, {_short(facts.dtype)}, on {device.type}\n"
        f"Pairs  {len(groups)}, {source}: {prompts:,} tokens of prompts, {responses:,} of responses"
        f"\nLoss   {settings.loss_type}, beta {settings.beta:g}"
        + (f", label smoothing {settings.label_smoothing:g}" if settings.label_smoothing else "")
    )


def render(
    measures: Sequence[Measure],
    sides: Mapping[str, Outcome],
    answer: Outcome,
    exact: str,
    rate: float,
    remarks: Sequence[str],
) -> Report:
    """Return the table, what was allowed, and the verdict."""
    eager = sides["eager"]
    has_exact = answer is not eager
    columns = {exact: answer, **sides} if has_exact else dict(sides)
    rows = [["", *columns, "allowed"]]
    for step, when in enumerate((BEFORE, AFTER)):
        means = [f"{x.losses[step].double().mean().item():.7f}" for x in columns.values()]
        rows.append([f"loss {when}", *means, ""])
        for each in measures:
            if each.step == when:
                name = f"  {each.name.split(' in ')[0].removesuffix(f' {when}')}"
                errors = [each.errors.get(side) for side in columns]
                shown = ["-" if e is None else f"{e:.1e}" for e in errors]
                rows.append([name, *shown, f"{each.allowed:.1e}"])
    timed = [side for side in columns if columns[side] is not answer or not has_exact]
    seconds = [f"{columns[x].seconds:.3g}" if x in timed else "-" for x in columns]
    rows.append(["seconds a step", *seconds, ""])
    if eager.peak is not None:
        peaks = [f"{(x.peak or 0) / 2**30:.2f}" for x in columns.values()]
        rows.append(["peak memory, GiB", *peaks, ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )
    worst = next(each for each in measures if each.name.startswith(WORST))
    if has_exact:
        rule = f"Errors are counted from {exact}. Twice eager PyTorch's are allowed, or what "
        rule += "rounding alone can make, if that is more."
    else:
        rule = "Errors are differences from eager PyTorch. What is allowed is what the roundings of"
        rule += " the model's dtype can add up to."
    passes = sides["prefalign"].passes
    notes = [
        f"The worst gradient is that of {worst.name.removeprefix(WORST).strip()}.",
        rule,
        f"The step is SGD's, of learning rate {rate:.3g}: to first order it takes {FALL} off the "
        "loss.",
        f"A step of prefalign's is {len(passes)} "
        f"pass{'es' if len(passes) > 1 else ''} of at most {max(passes):,} tokens; eager PyTorch "
        "takes a sequence at a time, TRL a pair.",
        *remarks,
    ]
    if "TRL" in sides and not all(each.holds("TRL") for each in measures):
        notes.append("TRL's errors are larger than what is allowed prefalign.")
    failed = [each for each in measures if not each.holds("prefalign")]
    if failed and worst not in failed and any(each.name == GRADIENT for each in failed):
        failed.append(worst)  # where to look
    verdict = "PASS"
    if failed:
        verdict = "FAIL: " + "; ".join(
            f"{each.name}: {each.errors['prefalign']:.1e}, allowed {each.allowed:.1e}"
            for each in failed
        )
    return Report("\n".join(["", table, "", *notes, "", verdict]), not failed)
