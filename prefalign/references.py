"""Reference policies: what a policy is compared with, and how its forward pass is reached.

Three kinds stand behind one small type: a second, frozen model; the base model of a PEFT policy,
with the adapter switched off; and a second adapter of that same base model. Using one leaves the
policy exactly as it was: active adapter, ``requires_grad`` flags, train or eval mode.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import unwrap
from .errors import ModelError

REFERENCE_ADAPTER = "reference"
"""The name of the adapter that holds a PEFT policy's snapshot."""


def is_peft(model: nn.Module) -> bool:
    """Return whether ``model``, wrapped or not, is a PEFT model."""
    return hasattr(unwrap(model), "peft_config") and hasattr(unwrap(model), "get_base_model")


@contextmanager
def modules_in_eval(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode inside the block; each module's own mode is restored after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@dataclass(frozen=True)
class Reference:
    """A reference policy.

    Attributes:
        model: The module that holds its weights: a frozen model, or the PEFT policy itself.
        adapter: The adapter that makes ``model`` the reference, or None for ``model`` as it is.
        adapter_off: Whether the reference is ``model`` without any adapter.
    """

    model: nn.Module
    adapter: str | None = None
    adapter_off: bool = False

    @contextmanager
    def use(self) -> Iterator[nn.Module]:
        """Yield the module to run as the reference, in eval mode.

        Run it without gradients. For an adapter that is the policy itself, which is restored
        exactly afterwards: run the policy's own forward pass outside the block.
        """
        with ExitStack() as stack:
            stack.enter_context(modules_in_eval(self.model))
            if self.adapter_off:
                stack.enter_context(_flags_kept(self.model))
                stack.enter_context(unwrap(self.model).disable_adapter())
            elif self.adapter is not None:
                stack.enter_context(_flags_kept(self.model))
                stack.enter_context(_adapter_active(self.model, self.adapter))
            yield self.model


def reference_of(
    model: nn.Module, *, frozen: nn.Module | None = None, adapter: str | None = None
) -> Reference:
    """Return the reference policy for ``model``.

    Args:
        model: The policy.
        frozen: A second model to be the reference; it is frozen and put in eval mode.
        adapter: The adapter of the PEFT policy that is the reference. With neither, the reference
            is the PEFT policy's base model.

    Raises:
        ModelError: ``model`` has no such adapter, or is no PEFT model and ``frozen`` is missing.
    """
    if frozen is not None:
        if adapter is not None:
            raise ModelError("a reference is either a frozen model or an adapter, not both")
        return Reference(frozen.requires_grad_(False).eval())
    if not is_peft(model):
        raise ModelError(
            f"{type(unwrap(model)).__name__} has no adapter to switch off: pass a frozen model as "
            "the reference"
        )
    if adapter is None:
        return Reference(model, adapter_off=True)
    if adapter not in unwrap(model).peft_config:
        known = ", ".join(unwrap(model).peft_config)
        raise ModelError(f"the model has no adapter {adapter!r}; it has: {known}")
    return Reference(model, adapter=adapter)


@torch.no_grad()
def snapshot_reference(model: nn.Module, previous: Reference | None = None) -> Reference:
    """Return a reference that holds ``model``'s present weights.

    A PEFT policy gets a second, frozen adapter with the active one's weights; a full model is
    copied whole.

    Args:
        model: The policy.
        previous: An earlier snapshot of the same policy, whose memory is used again.

    Raises:
        ModelError: The policy's active adapter is not one single adapter.
    """
    if not is_peft(model):
        policy = unwrap(model)
        if previous is None:
            return reference_of(policy, frozen=copy.deepcopy(policy))
        previous.model.load_state_dict(policy.state_dict())
        return previous

    peft_model = unwrap(model)
    active = _active_adapters(peft_model)
    if len(active) != 1 or active[0] == REFERENCE_ADAPTER:
        raise ModelError(f"expected one active adapter to copy, got {', '.join(active) or 'none'}")
    if REFERENCE_ADAPTER not in peft_model.peft_config:
        config = copy.deepcopy(peft_model.peft_config[active[0]])
        config.inference_mode = True
        if hasattr(config, "init_lora_weights"):
            # Some initialisations alter the base weights; what is set here is overwritten below.
            config.init_lora_weights = True
        devices = {p.device for p in peft_model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices), _flags_kept(peft_model), modules_in_eval(peft_model):
            peft_model.add_adapter(REFERENCE_ADAPTER, config)
    sources: dict[str, Tensor] = dict(peft_model.named_parameters(remove_duplicate=False))
    sources.update(peft_model.named_buffers(remove_duplicate=False))
    for name, target in list(sources.items()):
        parts = name.split(".")
        if REFERENCE_ADAPTER not in parts:
            continue
        source = sources[".".join(active[0] if p == REFERENCE_ADAPTER else p for p in parts)]
        # The same dtype and device as well: else the two would compute differently.
        target.data = source.detach().clone()
        if isinstance(target, nn.Parameter):
            target.requires_grad_(False)
    return Reference(model, adapter=REFERENCE_ADAPTER)


def _active_adapters(peft_model: Any) -> list[str]:
    active = peft_model.active_adapter
    return [active] if isinstance(active, str) else list(active)


@contextmanager
def _adapter_active(model: nn.Module, adapter: str) -> Iterator[None]:
    peft_model = unwrap(model)
    before = peft_model.active_adapter
    peft_model.set_adapter(adapter)
    try:
        yield
    finally:
        peft_model.set_adapter(before)


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """Restore every parameter's ``requires_grad``; PEFT sets it when it switches adapters."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, requires_grad in flags.items():
            parameter.requires_grad_(requires_grad)
