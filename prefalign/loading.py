"""Loading a model and its tokenizer from a folder or the hub, with errors of one line."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from .attention import use_packed_attention
from .config import LoraSettings
from .errors import ModelError

_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError)


def load_tokenizer(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer; where it has no pad token, EOS serves, so that no vocabulary grows.

    Args:
        path: A folder or a hub name.
        revision: The hub's branch, tag or commit.
        trust_remote_code: Whether to run code that comes with the tokenizer.

    Raises:
        ModelError: There is none to load, or it has no EOS token.
    """
    name = checked_path(path)
    if Path(name).is_dir() and not any(Path(name).glob("*token*")):
        raise ModelError(f"{name}: the folder holds no tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except _LOAD_ERRORS as error:
        raise ModelError(f"{name}: cannot load a tokenizer: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{name}: the tokenizer has no EOS token, so no response could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str | None = None,
    lora: LoraSettings | Any | None = None,
    adapter: str | os.PathLike[str] | None = None,
    load_in_4bit: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a causal language model, in eval mode and set up for packed batches.

    Args:
        path: A folder or a hub name. A folder that holds a PEFT adapter alone gives its base model
            with that adapter on it, trainable.
        dtype: Dtype of the weights; ``"auto"`` is the checkpoint's own.
        device: Where to put it; left on the CPU by default.
        lora: Put a fresh LoRA adapter on it: our settings (rank 0 is none), or a PEFT config.
        adapter: A saved adapter to put on it instead, trainable.
        load_in_4bit: Keep the weights of linear layers but the head in 4 bits (bitsandbytes' NF4
            with twice-quantised constants); they compute in ``dtype``.
        revision: The hub's branch, tag or commit.
        trust_remote_code: Whether to run code that comes with the model.

    Returns:
        The model, or a ``peft.PeftModel`` around it.

    Raises:
        ModelError: There is no such model, its files are damaged or incomplete, PEFT is missing, or
            the architecture cannot take packed batches.
    """
    name = checked_path(path)
    if adapter is None and (config := adapter_config(name)):
        adapter = name
        name = checked_path(str(config.base_model_name_or_path))
    options: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "dtype": dtype,
    }
    if load_in_4bit:
        options |= {"quantization_config": _four_bits(dtype), "device_map": {"": device or "cpu"}}
        device = None  # placed as it is read
    model = _load_base(name, options)
    if load_in_4bit:
        _keep_differentiable(model)
    if adapter is None:
        model = add_adapter(model, lora, name)
    try:
        if adapter is not None:
            name = os.fspath(adapter)
            model = _import_peft().PeftModel.from_pretrained(model, name, is_trainable=True)
    except _LOAD_ERRORS as error:
        raise ModelError(f"{name}: cannot load the adapter: {first_line(error)}") from error
    use_packed_attention(model)
    return model if device is None else model.to(device)


def adapter_config(folder: str) -> Any | None:
    """Return the configuration of the PEFT adapter that a folder holds, or None.

    Raises:
        ModelError: It is damaged, or PEFT is missing.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        return None
    try:
        return _import_peft().PeftConfig.from_pretrained(folder)
    except _LOAD_ERRORS as error:
        raise ModelError(f"{folder}: cannot load the adapter: {first_line(error)}") from error


def add_adapter(model: nn.Module, lora: LoraSettings | Any | None, name: str) -> nn.Module:
    """Put a fresh LoRA adapter on a model: our settings (rank 0 is none), a PEFT config, or None.

    Raises:
        ModelError: PEFT is missing, or refuses.
    """
    if isinstance(lora, LoraSettings):
        lora = _lora_config(lora)
    if lora is None:
        return model
    try:
        return _import_peft().get_peft_model(model, lora)
    except _LOAD_ERRORS as error:
        raise ModelError(f"{name}: cannot add an adapter: {first_line(error)}") from error


def _lora_config(settings: LoraSettings) -> Any | None:
    if settings.r == 0:
        return None
    return _import_peft().LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )


def _four_bits(dtype: str | torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("4-bit weights need bitsandbytes: pip install 'prefalign[bitsandbytes]'")
    compute = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if compute == "auto" else compute,
    )


def _keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from laying weights out for CPUs with AVX-512 in a pass without gradients.

    It does so for good, and a product with such a weight has no backward: what comes before it in
    the model would train on wrong gradients, with a warning at most.
    """
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _load_base(name: str, options: dict[str, Any]) -> nn.Module:
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(f"{name}: the folder holds no model: there is no config.json")
    options = {**options, "output_loading_info": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, **options)
        model, info = loaded
    except Exception as error:
        # safetensors and huggingface_hub have errors of their own, without a common base.
        raise ModelError(f"{name}: cannot load a causal language model: {first_line(error)}") from (
            error
        )
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{name}: the checkpoint has no weights for {missing[0]}{more}")
    return model.eval()


def checked_path(path: str | os.PathLike[str]) -> str:
    """Return a folder that exists or a hub name; nothing else goes to the hub."""
    name = os.fspath(path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    looks_local = name.count("/") != 1 or name.startswith((".", "~", "/")) or "\\" in name
    if folder.exists():
        raise ModelError(f"{name}: expected a model's folder, found a file")
    if not name or (looks_local and (os.sep in name or name.startswith("."))):
        raise ModelError(f"{name or repr(name)}: there is no such folder")
    return name


def _import_peft():
    try:
        import peft
    except ImportError as error:
        raise ModelError("adapters need PEFT: pip install 'prefalign[peft]'") from error
    return peft


def first_line(error: BaseException) -> str:
    """Return an error's first line, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@torch.no_grad()
def check_finite(model: nn.Module) -> None:
    """Refuse a model with a NaN or an infinity in any weight or buffer.

    Reads every weight once and the device once; needs no memory beyond a number for each tensor.

    Raises:
        ModelError: Naming the first such tensor.
    """
    tensors = [
        (name, tensor)
        for source in (model.named_parameters(), model.named_buffers())
        for name, tensor in source
        if tensor.is_floating_point() and tensor.device.type != "meta"
    ]
    flags = []
    for _, tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        # The extremes carry a NaN or an infinity, without a mask as large as the tensor.
        extremes = torch.stack(local.aminmax()) if local.numel() else local.new_zeros(2)
        flags.append(torch.isfinite(extremes.float()).all().cpu())
    for (name, _), finite in zip(tensors, flags, strict=True):
        if not finite:
            raise ModelError(f"the weight {name} holds a NaN or an infinity")
