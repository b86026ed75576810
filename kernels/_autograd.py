"""An op's derivative, once, for each way in which PyTorch asks for it.

``torch.library``'s ``register_autograd`` serves ordinary autograd and ``torch.compile``. It leaves
three gaps, which are closed here for every op:

    torch.func (grad, vjp, jacrev, vmap)     refused by torch     an ``autograd.Function`` instead
    forward mode (jvp, jacfwd, dual tensors) zeros, in silence    refused, by the op's name
    a second derivative                      a term short         refused, by the op's name

A second derivative would be short of a term wherever a backward pass keeps what it has computed in
place of the inputs: autograd sees constants in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Op = Callable[..., Any]


def differentiable(op: Any, backward: Callable, setup_context: Callable) -> Op:
    """Register the derivative of a custom op; return the function to call the op by.

    ``backward`` and ``setup_context`` are what ``op.register_autograd`` takes. They may use of
    ``ctx``: ``save_for_backward`` and ``saved_tensors``, ``mark_non_differentiable`` (once),
    ``set_materialize_grads(False)``, ``needs_input_grad``, and attributes of their own.
    """
    name = op._qualname.rpartition("::")[2]

    def once(ctx, *grads):
        if torch.is_grad_enabled():
            raise _no_second_derivative(name)
        return backward(ctx, *grads)

    op.register_autograd(once, setup_context=setup_context)
    transformed = _function(name, op, backward, setup_context)

    def call(*args):
        if torch._C._are_functorch_transforms_active():
            if torch.compiler.is_compiling():
                raise _not_compiled(name)
            return transformed(*args)
        # What is being compiled does not see the tangents that it will be given.
        if forward_ad._current_level >= 0 and (
            torch.compiler.is_compiling() or any(map(_has_tangent, args))
        ):
            raise _no_forward_mode(name)
        return op(*args)

    return call


def wants_grad(x: Tensor | None) -> bool:
    """Say whether ``x`` requires grad, be it outside a vmap, whose slices say that they do not."""
    while x is not None:
        if x.requires_grad:
            return True
        if torch.compiler.is_compiling() or not torch._C._functorch.is_batchedtensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return False


def _has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _no_second_derivative(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name}: expected one derivative, got a second (create_graph=True, or torch.func.grad, "
        "vjp or hessian of a gradient); impl='reference' has every derivative"
    )


def _no_forward_mode(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name}: expected reverse mode (backward, torch.func.grad, vjp, jacrev), got forward mode "
        "(torch.func.jvp, jacfwd, linearize, or dual tensors); impl='reference' has both"
    )


def _not_compiled(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name}: expected torch.func (grad, vjp, vmap and others) outside torch.compile, got one "
        "in a compiled region; compile without fullgraph=True, or use impl='reference'"
    )


class _Context:
    """What an op's own functions see for ``ctx`` under torch.func: no tensors between calls."""

    saved_tensors: tuple[Tensor | None, ...] = ()
    _fixed: tuple[Tensor, ...] = ()
    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self._fixed = tensors

    def set_materialize_grads(self, value: bool) -> None:
        assert not value


def _function(name: str, op: Op, op_backward: Callable, op_setup: Callable) -> Op:
    """Return the op as an ``autograd.Function`` whose backward pass is one too.

    So every level of nested transforms differentiates, or maps over, what is its own.
    """

    class Backward(torch.autograd.Function):
        """Gradients from saved tensors and upstreams; the inputs are there to be connected to."""

        @staticmethod
        def forward(context, saved, inputs, *tensors):
            context = copy.copy(context)
            context.saved_tensors = tensors[:saved]
            return op_backward(context, *tensors[saved + inputs :])

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *grads):
            raise _no_second_derivative(name)

        @staticmethod
        def jvp(ctx, *tangents):
            raise _no_forward_mode(name)

        @staticmethod
        def vmap(info, in_dims, *args):
            return _each(name, Backward.apply, info.batch_size, in_dims, args)

    class Forward(torch.autograd.Function):
        """The op, whose backward pass is ``Backward``."""

        @staticmethod
        def forward(*args):
            return op(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            context = _Context()
            op_setup(context, inputs, output)
            saved, fixed = context.saved_tensors, context._fixed
            context.saved_tensors, context._fixed = (), ()
            ctx.context, ctx.saved = context, len(saved)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*fixed)
            ctx.save_for_backward(*saved, *(x for x in inputs if isinstance(x, Tensor)))

        @staticmethod
        def backward(ctx, *grads):
            context = copy.copy(ctx.context)
            context.needs_input_grad = ctx.needs_input_grad
            tensors = ctx.saved_tensors
            inputs = len(tensors) - ctx.saved
            return Backward.apply(context, ctx.saved, inputs, *tensors, *grads)

        @staticmethod
        def jvp(ctx, *tangents):
            raise _no_forward_mode(name)

        @staticmethod
        def vmap(info, in_dims, *args):
            return _each(name, Forward.apply, info.batch_size, in_dims, args)

    return Forward.apply


@torch.compiler.disable
def _each(
    name: str, apply: Op, count: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[Any, Any]:
    """Return what ``apply`` gives for each of a vmap's elements, stacked, and where it is."""
    if count == 0:
        raise ValueError(f"{name}: expected a vmap over at least one element, got none")
    found = [
        apply(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)))
        for i in range(count)
    ]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    columns = list(zip(*found, strict=True))
    return (
        tuple(None if column[0] is None else torch.stack(column) for column in columns),
        tuple(None if column[0] is None else 0 for column in columns),
    )
