"""A value that comes with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir import tracing
from torch_dropout_ir.arrivals import arrivals, graph_nodes
from torch_dropout_ir.regularizers.graph_memory import made, makes

_ONCE: Final = (
    "modified_loss: expected a loss whose gradient has been taken with it to be "
    "differentiated once, got create_graph=True. Pass `max_bytes=None`, which keeps "
    "its graph for that."
)
_EXACT: Final = (torch.float32, torch.float64)
# A graph that is let go of as its derivative runs, over what the pass made.
_GRAPH: Final = 3


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradient: Sequence[Tensor | None], *params: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, root: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_ONCE)
        found = ctx.saved_tensors
        if root != 1:  # else it is given away, and nothing of its size is made
            found = [None if g is None else g * root for g in found]
        return None, None, *found


def learns_alone(risk: Tensor, params: Sequence[Tensor]) -> bool:
    """Return whether a derivative in parameters may be taken before anybody asks.

    Not where something else depends on it, where its factor is to come first, as of
    half precision, and where hooks or transforms look on.
    """
    if not tracing.eager() or risk.grad_fn is None:
        return False
    if any(torch.is_autocast_enabled(kind) for kind in {x.device.type for x in params}):
        return False
    if any(x.dtype not in _EXACT or x._backward_hooks for x in params):
        return False
    own = {id(x) for x in params}
    for node in graph_nodes([risk.grad_fn]):
        if id(getattr(node, "variable", params[0])) not in own:
            return False
        made = (x.dtype for x in node._input_metadata)
        if any(dtype.is_floating_point and dtype not in _EXACT for dtype in made):
            return False
    return True


def parts_pay(risk: Tensor, params: Sequence[Tensor], max_bytes: int) -> bool:
    """Return whether a second derivative's graph is better made of parts of the batch.

    Not where there is more in the parameters, where a derivative is not to be taken
    now, and where each pass may be a collective of several processes.
    """
    nodes = list(graph_nodes([risk.grad_fn] if risk.grad_fn else []))
    if _GRAPH * made(nodes) <= max_bytes or not learns_alone(risk, params):
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    new = made(n for n in nodes if makes(n))
    return _GRAPH * new > max_bytes and new >= sum(x.nbytes for x in params)


def with_gradient(
    value: Tensor, params: Sequence[Tensor], gradient: Sequence[Tensor | None]
) -> Tensor:
    """Return a scalar, differentiable once, whose gradient is known."""
    return _Known.apply(value, gradient, *params)


def with_gradient_beside(
    value: Tensor,
    params: Sequence[Tensor],
    gradient: list[Tensor | None],
    beside: Callable[[], Tensor] | None,
) -> Tensor:
    """Return what :func:`with_gradient` does, and ``beside()`` added to it.

    The other loss's gradient is added as it comes to ``gradient``, which is used up:
    there is no second one.
    """
    if beside is None:
        return with_gradient(value, params, gradient)
    risk = beside()
    if not learns_alone(risk, params):
        return with_gradient(value, params, gradient) + risk

    def add(i: int, g: Tensor) -> None:
        own = gradient[i]
        gradient[i] = g if own is None else own + g  # either may be elsewhere too

    with arrivals(params, add):
        torch.autograd.grad(risk, params, allow_unused=True)
    return with_gradient(value + risk.detach(), params, gradient)
