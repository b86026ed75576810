"""Access to a causal language model: its head, its hidden states, its scores.

A model's own forward pass ends in ``[T, V]`` logits. Nothing here makes them: hidden states after
the final norm are taken at the rows that have a target, and the head's weight goes to the fused
log-prob op, with whatever the architecture puts between the head and its logits (``Head``).
``verify_head`` compares the two once, at start.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .attention import causal_lm, generation_attention, packed_inputs, unwrap, uses_packed_attention
from .errors import ModelError
from .kernels.head_adapter import HeadAdapter
from .kernels.linear_token_logps import linear_token_logps
from .kernels.sequence_logps import sequence_logps
from .loading import check_finite, first_line, load_model, load_tokenizer
from .packing import Group, PackedBatch, pack, split_by_tokens
from .references import Reference, modules_in_eval, reference_of, snapshot_reference

__all__ = [
    "Head",
    "Reference",
    "check_finite",
    "head_arguments",
    "load_model",
    "load_tokenizer",
    "read_head",
    "reference_of",
    "refuse_head_adapter",
    "response_token_logps",
    "score",
    "snapshot_reference",
    "target_hidden",
    "verify_head",
]

# What configs call the numbers between the head and the logits. Cohere, FalconH1 and Muse multiply;
# Granite divides; MiniCPM3 divides the hidden states, which is the same.
_LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_LOGIT_DIVISORS = ("logits_scaling",)
# Model types that multiply where the others divide.
_DIVISOR_IS_FACTOR = {"hyperclovax"}

# The head


@dataclass(frozen=True)
class Head:
    """What turns a hidden state h into logits: ``cap(logit_scale * (weight h + bias))``.

    With an adapter, its ``scaling * b (a h)`` is added to the weight's product.

    Attributes:
        weight: ``[V, D]``, the model's own parameter: gradients flow to it.
        bias: ``[V]`` or None.
        logit_scale: The factor before the cap.
        softcap: z becomes ``softcap * tanh(z / softcap)``, or None.
        adapter: PEFT's LoRA on the head, its own parameters, or None.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    adapter: HeadAdapter | None = None


def read_head(model: nn.Module) -> Head:
    """Return ``model``'s output head; with FSDP2, call it after the forward pass.

    Raises:
        ModelError: The head is missing, quantised, sharded or not on a device, or has an adapter
            other than one plain LoRA.
    """
    lm = causal_lm(model)
    name = type(lm).__name__
    get_head = getattr(lm, "get_output_embeddings", lambda: None)
    layer = _saved_module(get_head())
    if layer is None:
        raise ModelError(f"{name} has no output head")
    layer, adapter = _without_lora(layer, name)
    if not (isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward):
        raise ModelError(
            f"{name}'s output head is a {type(layer).__module__}.{type(layer).__name__}, expected "
            "a plain torch.nn.Linear, or PEFT's LoRA on one: leave it out of quantisation"
        )
    weight, bias = _whole(layer.weight), None if layer.bias is None else _whole(layer.bias)
    if weight.device.type == "meta" or weight.ndim != 2 or not weight.numel():
        raise ModelError(
            f"{name}'s output head is not in this process's memory (offloaded, or sharded by FSDP1 "
            "or ZeRO-3); use FSDP2"
        )
    config = lm.config.get_text_config()
    scale = 1.0
    for field in _LOGIT_FACTORS:
        if (factor := getattr(config, field, None)) is not None:
            scale *= factor
    for field in _LOGIT_DIVISORS:
        if (divisor := getattr(config, field, None)) is not None:
            scale *= divisor if config.model_type in _DIVISOR_IS_FACTOR else 1 / divisor
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(weight, bias, float(scale), None if not softcap else float(softcap), adapter)


def head_arguments(head: Head, hidden: Tensor) -> dict[str, Any]:
    """Return ``head`` as keyword arguments of the fused ops, the weight in ``hidden``'s dtype.

    ``adapter`` is among them where there is one: ``linear_token_logps`` takes it.
    """
    adapter = {} if head.adapter is None else {"adapter": head.adapter}
    return adapter | {
        "weight": head.weight.to(hidden.dtype),
        "bias": head.bias,
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
    }


def refuse_head_adapter(model: nn.Module, user: str) -> None:
    """Refuse a model whose head has LoRA, active or not, on behalf of ``user``, which takes none.

    Raises:
        ModelError: It has.
    """
    lm = causal_lm(model)
    if hasattr(_saved_module(lm.get_output_embeddings()), "lora_A"):
        raise ModelError(
            f"{type(lm).__name__}'s output head has a LoRA adapter, which {user} cannot use: leave "
            "it out of LoRA's target modules"
        )


def _without_lora(layer: nn.Module, name: str) -> tuple[nn.Module, HeadAdapter | None]:
    """Return the layer under PEFT's LoRA, and its one active adapter if that is switched on."""
    try:
        from peft.tuners.lora.layer import Linear as LoraLinear
    except ImportError:
        return layer, None
    if type(layer) is not LoraLinear:
        return layer, None
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its own forward pass does
    active = [x for x in layer.active_adapters if x in layer.lora_A]
    if layer.disable_adapters or layer.merged or not active:
        return layer.base_layer, None
    refused = {
        f"{len(active)} active adapters ({', '.join(active)})": len(active) > 1,
        "a variant of LoRA, such as DoRA": any(x in layer.lora_variant for x in active),
        "a bias in its LoRA": any(layer.lora_bias.get(x) for x in active),
        "dropout in its LoRA while training": any(
            layer.lora_dropout[x].training and getattr(layer.lora_dropout[x], "p", 0) > 0
            for x in active
        ),
    }
    for what, there in refused.items():
        if there:
            raise ModelError(
                f"{name}'s output head has {what}, expected one plain LoRA adapter without "
                "dropout: change that, or leave the head out of LoRA's target modules"
            )
    factors: list[Any] = [layer.lora_A[active[0]], layer.lora_B[active[0]]]
    a, b = (_whole(factor.weight) for factor in factors)
    return layer.base_layer, HeadAdapter(a, b, float(layer.scaling[active[0]]))


def _saved_module(layer: Any) -> Any:
    """Return the module behind PEFT's ``modules_to_save``, as its active adapter has it."""
    copies = getattr(layer, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return layer
    if layer.disable_adapters or not layer.active_adapters:
        return layer.original_module
    return copies[layer.active_adapters[0]]


def _whole(weight: Tensor) -> Tensor:
    """Return a sharded weight whole; its gradient is averaged over the processes, as FSDP's are."""
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(weight, DTensor):
        return weight
    mesh = weight.device_mesh
    whole = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole


# Hidden states and log-probs


def target_hidden(model: nn.Module, batch: PackedBatch, *, through_wrapper: bool = False) -> Tensor:
    """Return the hidden states, after the final norm, that predict ``batch``'s targets.

    Equivalent to ``model(batch, output_hidden_states=True).hidden_states[-1][target_rows]``.

    Args:
        model: The model, wrapped or not, with packed attention.
        batch: T tokens and N targets, on the model's device.
        through_wrapper: Run the outermost module's own forward pass, as gradients under DDP and
            FSDP need; the head then gets no rows and gives no logits. Otherwise the backbone runs
            alone, with PEFT's adapters in it; under autocast, open the context around the call.

    Returns:
        ``[N, D]`` in the model's dtype.

    Raises:
        ModelError: The model lacks packed attention, ``logits_to_keep`` or a backbone of its own.
    """
    lm = causal_lm(model)
    name = type(lm).__name__
    if not uses_packed_attention(lm):
        raise ModelError(f"{name} has no packed attention: call use_packed_attention(model) first")
    inputs = packed_inputs(batch)
    if through_wrapper or _is_fsdp2(unwrap(model)):
        if not _accepts(lm, "logits_to_keep"):
            raise ModelError(f"{name}'s forward pass has no logits_to_keep argument")
        rows = torch.empty(0, dtype=torch.int64, device=batch.input_ids.device)
        outputs = model(
            **inputs, logits_to_keep=rows, output_hidden_states=_LAST_STATE, return_dict=True
        )
        hidden = outputs.hidden_states[-1]
    else:
        backbone = lm.base_model
        if backbone is lm:
            raise ModelError(f"{name} has no backbone apart from its head")
        hidden = backbone(**inputs, return_dict=True).last_hidden_state
    return hidden[0].index_select(0, batch.target_rows)


def _last_state_selector() -> bool | list[int]:
    """Return what asks for the last hidden state alone, where transformers can do that."""
    try:
        from transformers.utils.output_capturing import selected_hidden_states  # noqa: F401
    except ImportError:
        return True
    return [-1]


_LAST_STATE = _last_state_selector()


def _accepts(lm: nn.Module, argument: str) -> bool:
    # The class's forward: accelerate replaces the instance's by one without a signature.
    return argument in inspect.signature(type(lm).forward).parameters


def _is_fsdp2(model: nn.Module) -> bool:
    # A backbone that runs first on its own would become FSDP2's root.
    return any(base.__name__ == "FSDPModule" for base in type(model).__mro__)


def response_token_logps(
    model: nn.Module,
    batch: PackedBatch,
    *,
    through_wrapper: bool = False,
    temperature: float = 1.0,
    outputs: Sequence[str] = (),
) -> Any:
    """Return the log-prob of every target of ``batch``, float32 ``[N]``.

    Args:
        model: As for ``target_hidden``.
        batch: As for ``target_hidden``.
        through_wrapper: As for ``target_hidden``.
        temperature: Divides the logits.
        outputs: Extras of ``linear_token_logps``; with any, its named tuple is returned.
    """
    hidden = target_hidden(model, batch, through_wrapper=through_wrapper)
    head = head_arguments(read_head(model), hidden)
    return linear_token_logps(
        hidden, targets=batch.targets, temperature=temperature, outputs=outputs, **head
    )


def score(
    model: nn.Module,
    groups: Iterable[Group],
    *,
    max_tokens: int,
    lookahead: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Iterator[list[float]]:
    """Yield each group's response log-probs, summed over tokens, in the order of the groups.

    Streams: ``lookahead`` groups are read, packed into passes of at most ``max_tokens`` tokens, and
    scored without gradients in eval mode; nothing of that outlasts the passes.

    Args:
        model: As for ``target_hidden``.
        groups: G prompts with K responses each, K free to differ.
        max_tokens: Tokens in one forward pass; a longer group makes a pass of its own.
        lookahead: Groups held at a time: more pack more tightly.
        progress: Called with the number of groups that a pass has finished.

    Yields:
        One list of K floats for each group: float32 sums.
    """
    groups = iter(groups)
    while window := list(islice(groups, lookahead)):
        yield from _score_window(model, window, max_tokens, progress)


@torch.no_grad()
def _score_window(
    model: nn.Module,
    groups: list[Group],
    max_tokens: int,
    progress: Callable[[int], None] | None,
) -> list[list[float]]:
    device = causal_lm(model).get_input_embeddings().weight.device
    passes = split_by_tokens([group.num_tokens for group in groups], max_tokens)
    scores: list[list[float]] = [[] for _ in groups]
    with modules_in_eval(model):
        for indices in passes:
            batch = pack([groups[i] for i in indices]).to(device)
            logps = response_token_logps(model, batch)
            sums = iter(sequence_logps(logps, cu_seqlens=batch.cu_targets).sums.tolist())
            for i in indices:
                scores[i] = list(islice(sums, len(groups[i].response_ids)))
            if progress is not None:
                progress(len(indices))
    return scores


@torch.no_grad()
def verify_head(model: nn.Module, *, atol: float | None = None, seed: int = 0) -> float:
    """Check, once at start, that the library reproduces ``model``'s own log-probs.

    Two short sequences of random tokens are scored packed and fused, then one at a time through the
    model's ordinary forward pass and attention. This catches a head that is misread, attention that
    crosses sequences and architectures that cannot be packed. It is the one place that makes logits
    (32 rows of them); windows longer than 16 tokens are beyond it.

    Args:
        model: The model, wrapped or not, with packed attention.
        atol: Largest difference allowed. By default ``8 * eps * max(1, max |logit|)``, and a
            quarter of that in the mean: a logit carries a relative rounding of the computing
            dtype's eps (bfloat16 ``2**-7``, TF32 ``2**-10``), once from the hidden state and once
            from the model's own rounding of it; both paths carry it, and layers add to it.
        seed: Seed of the tokens.

    Returns:
        The largest difference found.

    Raises:
        ModelError: The difference is above the tolerance, or the model refuses packed input.
    """
    lm = causal_lm(model)
    name = type(lm).__name__
    head = read_head(model)
    device = head.weight.device
    vocab = min(head.weight.shape[0], lm.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (32,), generator=generator).tolist()
    groups = [Group(ids[:4], [ids[4:17]]), Group(ids[17:20], [ids[20:]])]
    batch = pack(groups).to(device)
    with modules_in_eval(model):
        try:
            fused = response_token_logps(model, batch)
            hidden = [target_hidden(model, batch, through_wrapper=way) for way in (True, False)]
        except TypeError as error:
            raise ModelError(f"{name} does not take packed input: {first_line(error)}") from error
        own, largest_logit = [], 1.0
        with generation_attention(model):
            for group in groups:
                prompt, response = list(group.prompt_ids), list(group.response_ids[0])
                tokens = torch.tensor([prompt + response], device=device)
                logits = unwrap(model)(input_ids=tokens, use_cache=False).logits[
                    0, len(prompt) - 1 : -1
                ]
                largest_logit = max(largest_logit, logits.abs().max().item())
                logps = torch.log_softmax(logits.to(fused.dtype), dim=-1)
                own.append(logps.gather(1, tokens[0, len(prompt) :, None])[:, 0])
    gaps = [(fused - torch.cat(own)).abs(), (hidden[0] - hidden[1]).abs().float()]
    limit = 8 * _epsilon(hidden[0]) * largest_logit if atol is None else atol
    largest = gaps[0].max().item()
    # Written so that NaN fails.
    if not (largest <= limit and gaps[0].mean().item() <= (limit / 4 if atol is None else limit)):
        raise ModelError(
            f"{name}: packed, fused log-probs differ from the model's own by up to {largest:.3g} "
            f"(allowed: {limit:.3g}), so its head or its attention is not understood"
        )
    if not gaps[1].max().item() <= limit:
        raise ModelError(
            f"{name}: hidden_states[-1] is not what its head receives (difference "
            f"{gaps[1].max().item():.3g})"
        )
    return largest


def _epsilon(tensor: Tensor) -> float:
    """Return the relative rounding of a model that computes in ``tensor``'s dtype."""
    # Whatever the dtype, transformers computes norms and eager softmaxes in float32.
    epsilon = max(torch.finfo(tensor.dtype).eps, torch.finfo(torch.float32).eps)
    if tensor.dtype == torch.float32 and tensor.is_cuda:
        if torch.get_float32_matmul_precision() != "highest":
            return max(epsilon, 2.0**-10)
    return epsilon
