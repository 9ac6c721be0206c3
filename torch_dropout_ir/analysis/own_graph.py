"""Where a loss comes from, by its graph, and the calls by which a script goes back."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from torch_dropout_ir.analysis.followed_loss import At, inside
from torch_dropout_ir.analysis.sharded import is_sharded
from torch_dropout_ir.arrivals import graph_nodes
from torch_dropout_ir.tracing import frames

# Nodes of the graph that make copies, in order: one tells DDP when the backward pass
# starts (`find_unused_parameters`, `static_graph`), one calls hooks of that pass.
_COPYING: Final = ("_DDPSinkBackward", "BackwardHookFunctionBackward")
_LEAF: Final = "torch::autograd::AccumulateGrad"
_BACKWARD: Final = (Tensor.backward, torch.autograd.backward)
_SCALER: Final = "grad_scaler"  # ends the names of torch's modules that have one


class OwnGraph:
    """What the parameters of a model lead to.

    Where they are sharded, passes use other tensors, and everything that is
    differentiated counts as the model's own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own: set[int] | None = None
        self._sharded = False
        self._found: dict[Any, bool] = {}

    def leads_to(self, x: Tensor) -> bool:
        """Return whether a tensor with a graph may depend on a parameter of the model.

        False only of another leaf, and of what comes of such alone by functions whose
        inputs autograd knows; an ``autograd.Function`` may have more.
        """
        if self._own is None:
            parameters = list(self._model.parameters())
            self._own = {id(p) for p in parameters}
            self._sharded = any(map(is_sharded, parameters))
        if self._sharded:
            return True
        return id(x) in self._own if x.is_leaf else self._reached(x.grad_fn)

    def _reached(self, root: Any) -> bool:
        seen, waiting = {root}, [root]
        while waiting:
            node = waiting.pop()
            if self._found.get(node) or self._is_own(node):
                self._found[root] = True
                return True
            behind = {n for n, _ in node.next_functions if n is not None} - seen
            waiting += [n for n in behind if self._found.get(n, True)]
            seen |= behind
        self._found |= dict.fromkeys(seen, False)
        return False

    def _is_own(self, node: Any) -> bool:
        if isinstance(node, BackwardCFunction):
            return True
        leaf = node.name() == _LEAF
        return leaf and self._own is not None and id(node.variable) in self._own


def comes_of(root: Any, outputs: Collection[tuple[Any, int]]) -> bool:
    """Whether the graph of a root leads back to nodes; no leaf's does, any to none."""
    nodes = {node for node, _ in outputs if node is not None}
    roots = [x.grad_fn for x in inside(root, Tensor) if x.grad_fn]
    return not nodes or not nodes.isdisjoint(graph_nodes(roots))


def copied_from(x: Tensor, nodes: Mapping[tuple[Any, int], At]) -> At | None:
    """Return where a tensor comes from that nodes (with their output) have copied."""
    node, place, found = x.grad_fn, x.output_nr, None
    while found is None and node is not None and node.name() in _COPYING:
        if place >= len(node.next_functions):
            break
        node, place = node.next_functions[place]
        found = nodes.get((node, place))
    return found


def goes_back(
    func: Any, args: Any, kwargs: Any, model: nn.Module
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
