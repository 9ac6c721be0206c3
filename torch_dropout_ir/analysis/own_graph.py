"""What the graph tells of a tensor that a loss reads: where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from torch_dropout_ir.analysis.followed_loss import At, inside
from torch_dropout_ir.analysis.sharded import is_sharded
from torch_dropout_ir.arrivals import graph_nodes

# Nodes of the graph that make copies, in order: one tells DDP when the backward pass
# starts (`find_unused_parameters`, `static_graph`), one calls hooks of that pass.
_COPYING: Final = ("_DDPSinkBackward", "BackwardHookFunctionBackward")
_LEAF: Final = "torch::autograd::AccumulateGrad"


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

    def learns_by(
        self,
        root: Any,
        outputs: Collection[tuple[Any, int]],
        unknown: Callable[[Tensor], bool],
    ) -> bool:
        """Return whether the model may learn where a script goes back from here.

        A loss of the outputs after `detach`, as of a discriminator or a second network,
        is another model's. ``outputs`` are nodes; where there are none, all that is
        made of the outputs counts. ``unknown`` tells what is not followed from them.
        """
        return any(
            self.leads_to(x) if unknown(x) else comes_of(x, outputs)
            for x in inside(root, Tensor)
        )

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
