"""Calls by which a script goes back to the parameters: what from, and a scaler's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.analysis.followed_loss import inside
from torch_dropout_ir.analysis.sharded import is_sharded
from torch_dropout_ir.tracing import frames

_BACKWARD: Final = (Tensor.backward, torch.autograd.backward)
_SCALER: Final = "grad_scaler"  # ends the names of torch's modules that have one


def goes_back(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    model: nn.Module,
) -> tuple[str, Any, float, bool] | None:
    """Return what a call goes back from, where a script may train on that; else None.

    That is ``"backward"``, or ``"grad"`` where gradients in parameters of the model are
    asked for without a graph, which a script may hand to the optimizer itself; the
    root; the number that its derivative begins with; and whether another call can
    follow. None is of gradients of others alone (``backward(inputs=...)``), too.
    """
    own = {id(x) for x in model.parameters()}
    if func in _BACKWARD:
        asked = list(inside(kwargs.get("inputs"), Tensor))
        if asked and all(x.is_leaf and id(x) not in own for x in asked):
            return None
        first = _first_gradient(args[1:2], kwargs, ("gradient", "grad_tensors"))
        named = kwargs.get("retain_graph") or kwargs.get("create_graph")
        return "backward", _alone(args), first, bool(named or any(args[2:4]))
    if func is not torch.autograd.grad or kwargs.get("create_graph"):
        return None
    trained = any(id(x) in own for x in inside(args[1:2], Tensor))
    first = _first_gradient(args[2:3], kwargs, ("grad_outputs",))
    return ("grad", _alone(args), first, True) if trained else None


def has_gradient(model: nn.Module) -> bool:
    """Whether a backward pass adds to gradients: not where they were set to zero."""
    own = [x.grad for x in model.parameters() if x.grad is not None]
    return any(is_sharded(g) or g.is_sparse or bool(g.any()) for g in own)


def _alone(args: tuple[Any, ...]) -> Any:
    """The root, out of a list of one."""
    root = args[0] if args else None
    return root[0] if isinstance(root, (tuple, list)) and len(root) == 1 else root


def _first_gradient(
    placed: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]
) -> float:
    """What one number's derivative is multiplied by: -1 where a script goes up."""
    given = inside((placed, [kwargs.get(name) for name in names]), Tensor)
    return next((x.item() for x in given if x.numel() == 1), 1.0)


def by_scaler() -> bool:
    """Whether a gradient scaler of torch's makes the call that a mode is handed."""
    names = (x.f_globals.get("__name__", "") for x in frames(sys._getframe(1)))
    return any(name.endswith(_SCALER) for name in names)
