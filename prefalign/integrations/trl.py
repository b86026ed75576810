"""TRL's trainers with the fused log-prob op where their own chunked one was.

::

    trainer = DPOTrainer(...)  # or KTO, GRPO, RLOO, SFT
    fuse(trainer)
    trainer.train()

Each of the five gives the model object (and the reference's) a forward pass of its own, which runs
the backbone, takes the hidden states that have a label and hands them, with the head, to a function
that it looks up by name: ``ChunkedLogProbFunction``. ``fuse`` gives those objects the same forward
pass with the name bound to ``linear_token_logps``. Losses, metrics and everything else stay TRL's;
no module, class or other trainer changes, and ``unfuse`` puts the old forward pass back.

What TRL computes while a trainer is being built (``precompute_ref_log_probs``) comes before
``fuse``; with the ``FusedHead`` mixin it is fused too, and LoRA on the head is let through.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from .._head import Head, head_arguments, read_head, refuse_head_adapter, with_head
from ..attention import causal_lm
from ..errors import ModelError
from ..kernels.linear_token_logps import linear_token_logps

TESTED = ("1.15", "1.16")
"""TRL's versions that are tested; others are refused."""

TRAINERS = ("DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer", "SFTTrainer")

# What TRL's forward pass looks up when it is called, and its answer to "is this device Triton's",
# which decides whether it drops the rows without a label: here they are dropped on any device.
_OP = "_ChunkedLogProbFunction"
_DROPS_ROWS = "_use_triton"
# Its context that gathers the head under ZeRO-3: here ``with_head`` does, for backward as well.
_GATHERS = "maybe_gather_lm_head_ctx"


def fuse(trainer: Any) -> None:
    """Make a TRL trainer compute its per-token log-probs with ``linear_token_logps``.

    The numbers are TRL's up to rounding: in float32 and float64 the rounding of sums, in 16 bits
    less, for TRL rounds logits to 16 bits. ``mean_token_accuracy`` counts a token whose logit is
    equalled by another's as right; TRL does if the token comes first in the vocabulary.
    Fusing a fused trainer changes nothing.

    Args:
        trainer: A ``DPOTrainer``, ``KTOTrainer``, ``GRPOTrainer``, ``RLOOTrainer`` or
            ``SFTTrainer`` of TRL, or a subclass's, before or after training.

    Raises:
        ImportError: TRL is missing, or of a version that is not in ``TESTED``.
        TypeError: Another trainer.
        ValueError: A setting that is not supported, named: Liger's kernels, FSDP1, tensor
            parallelism, a processor of images, SFT's label smoothing or loss function.
        ModelError: A head that is not supported, or a model whose forward pass is not TRL's.
    """
    if hasattr(trainer, "_forwards_before_fuse"):
        return
    _check_version()
    _check_trainer(trainer)
    before = []  # all checks come before the first change
    for wrapped in (trainer.model, getattr(trainer, "ref_model", None)):
        if wrapped is None:
            continue
        model = causal_lm(trainer.accelerator.unwrap_model(wrapped))
        _check_head(model)
        before.append((model, _trls_forward(model)))
    trainer._forwards_before_fuse = before
    for model, forward in before:
        # A trainer may watch what passes through the heads (``trl_trainers``).
        op = getattr(trainer, "_logps_op", _FusedLogps)(model)
        names = {_OP: op, _DROPS_ROWS: lambda device: True, _GATHERS: lambda *head: nullcontext()}
        _install(model, _rebound(forward, names), trainer)


def unfuse(trainer: Any) -> None:
    """Give the models of a fused trainer TRL's own forward pass again.

    Args:
        trainer: What ``fuse`` was given; one that is not fused is left as it is.

    Raises:
        ModelError: The head has LoRA, which TRL's own would leave out.
    """
    before = getattr(trainer, "_forwards_before_fuse", ())
    for model, _ in before:
        refuse_head_adapter(model, "TRL's own log-prob function")
    for model, forward in before:
        _install(model, forward, trainer)
    if before:
        del trainer._forwards_before_fuse


@contextmanager
def fused(trainer: Any) -> Iterator[None]:
    """Return a context in which ``trainer`` is fused; see ``fuse``. One that was fused stays so."""
    was_fused = hasattr(trainer, "_forwards_before_fuse")
    fuse(trainer)
    try:
        yield
    finally:
        if not was_fused:
            unfuse(trainer)


class FusedHead:
    """A mixin that fuses a TRL trainer from its start: ``class Trainer(FusedHead, DPOTrainer)``.

    It adds two things to ``fuse``: reference log-probs that TRL computes beforehand are fused too,
    and the model may have LoRA on its head (given as a PEFT model, or by ``peft_config``), which
    TRL refuses because its own op would leave it out. Such a model cannot be unfused.

    Args:
        model: As TRL takes it; with LoRA on the head, the model itself and not its name.
        *args: TRL's.
        **kwargs: TRL's.

    Raises:
        As ``fuse``, and whatever TRL does.
    """

    model: Any

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        _check_version()
        hidden = isinstance(model, nn.Module)
        with _head_without_adapter(causal_lm(model)) if hidden else nullcontext():
            super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        fuse(self)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        _show_adapter(causal_lm(self.model))  # past TRL's check
        fuse(self)
        return super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]


class _FusedLogps:
    """``linear_token_logps`` with the call of TRL's autograd function, for one model."""

    def __init__(self, model: nn.Module):
        self.model = model

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: Sequence[str],
    ) -> tuple[Tensor | None, ...]:
        # The head is read anew: an adapter on it is not in ``weight``, and may have been switched.
        def logps(hidden: Tensor, head: Head) -> tuple[Tensor | None, ...]:
            if (softcap or None) != head.softcap or not math.isclose(logit_scale, head.logit_scale):
                raise ModelError(
                    f"{type(self.model).__name__}: TRL reads a logit scale of {logit_scale} and a "
                    f"softcap of {softcap} from its config, expected {head.logit_scale} and "
                    f"{head.softcap}: train it without fuse"
                )
            found = linear_token_logps(
                hidden,
                targets=targets,
                temperature=temperature,
                outputs=["lse", *(name for name in outputs if name != "log_probs")],
                **head_arguments(head, hidden),
            )
            return (
                found.logps,
                found.entropy,
                found.log_sum_sq_probs,
                found.mean_logits,
                found.is_top1,
            )

        return with_head(self.model, hidden, logps)


def _check_version() -> None:
    try:
        import trl
    except ImportError as error:
        raise ImportError("fuse needs TRL: pip install 'prefalign[trl]'") from error
    if not trl.__version__.startswith(tuple(f"{version}." for version in TESTED)):
        raise ImportError(
            f"TRL {trl.__version__} is not one that fuse was tested with, expected "
            f"{' or '.join(TESTED)}: pip install 'trl=={TESTED[-1]}.*'"
        )


def _check_trainer(trainer: Any) -> None:
    import trl
    from transformers import ProcessorMixin

    known: Any = tuple(getattr(trl, name) for name in TRAINERS)
    if not isinstance(trainer, known):
        raise TypeError(
            f"trainer: expected one of TRL's {', '.join(TRAINERS)}, got "
            f"{type(trainer).__module__}.{type(trainer).__name__}"
        )
    args, accelerator = trainer.args, trainer.accelerator
    zero = getattr(getattr(accelerator.state, "deepspeed_plugin", None), "zero_stage", None)
    fsdp2 = getattr(accelerator, "is_fsdp2", False)
    parallel = getattr(accelerator, "parallelism_config", None)
    smoothing = isinstance(trainer, trl.SFTTrainer) and args.label_smoothing_factor
    refused = {
        "use_liger_kernel=True (it replaces parts of the model)": args.use_liger_kernel,
        "FSDP1 (use FSDP2)": trainer.is_fsdp_enabled and not fsdp2,
        "FSDP2 or DeepSpeed's ZeRO-3 with this trainer (use DDP or ZeRO-2)": (fsdp2 or zero == 3)
        and hasattr(trainer, "_logps_op"),
        "tensor parallelism": parallel is not None and parallel.tp_size > 1,
        "a processing_class that is a processor, as vision models have": isinstance(
            trainer.processing_class, ProcessorMixin
        ),
        "label_smoothing_factor, which needs the logits": smoothing,
        "a compute_loss_func, which is given the logits": trainer.compute_loss_func is not None,
    }
    for what, there in refused.items():
        if there:
            raise ValueError(f"trainer: fuse does not support {what}: leave it out, or do not fuse")


def _check_head(model: nn.Module) -> None:
    # Its LoRA may have dropout, which counts while training.
    in_eval = [module for module in model.modules() if not module.training]
    for module in in_eval:
        module.training = True
    try:
        read_head(model)
    finally:
        for module in in_eval:
            module.training = False


def _trls_forward(model: nn.Module) -> Callable[..., Any]:
    """Return the function, yet to be bound, that TRL has set as this object's forward pass."""
    # Accelerate's mixed precision, where it is already on, is around it.
    own = vars(model)
    function = getattr(own.get("_original_forward", own.get("forward")), "__func__", None)
    if function is None or _OP not in function.__code__.co_names:
        raise ModelError(
            f"{type(model).__name__}'s forward pass is not the one that TRL {' or '.join(TESTED)} "
            "sets: call fuse on a trainer as TRL builds it, before anything else changes its model"
        )
    return function


def _rebound(function: Any, names: dict[str, Any]) -> Callable[..., Any]:
    """Return a copy of ``function`` that finds ``names`` among its globals."""
    found = {**function.__globals__, **names}
    # torch.compile would look the globals up in the module of this name.
    found.pop("__name__")
    # A code object of its own: torch.compile keeps what it made by that, and its names in globals.
    code = function.__code__.replace()
    copy = FunctionType(code, found, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(copy, function)


def _install(model: Any, function: Callable[..., Any], trainer: Any) -> None:
    """Set ``function`` as this object's forward pass, inside accelerate's mixed precision."""
    forward = MethodType(function, model)
    if "_original_forward" in vars(model):
        from accelerate.utils import convert_outputs_to_fp32

        @functools.wraps(function)
        def autocast(self: Any, *args: Any, **kwargs: Any) -> Any:
            with trainer.accelerator.autocast():
                return function(self, *args, **kwargs)

        model._original_forward = forward
        model.forward = MethodType(convert_outputs_to_fp32(autocast), model)
    else:
        model.forward = forward


@contextmanager
def _head_without_adapter(model: Any) -> Iterator[None]:
    """Let TRL, which refuses an adapter on the head, see the layer under it."""
    get_head = model.get_output_embeddings

    def without_adapter() -> Any:
        head = get_head()
        return head.get_base_layer() if hasattr(head, "lora_A") else head

    model.get_output_embeddings = without_adapter
    try:
        yield
    finally:
        _show_adapter(model)


def _show_adapter(model: nn.Module) -> None:
    model.__dict__.pop("get_output_embeddings", None)
