"""What the graph of a loss tells of rows: whether it is a sum of terms of one each.

Semantics:

* Rows of the outputs have a place in what is computed of them, as samples have in
  :mod:`~torch_dropout_ir.regularizers.row_graph`, until they are added up. What is
  linear in such sums still is a sum of terms of one row each.
* A graph with any other operation may be of such a sum too: it does not tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor

from torch_dropout_ir.arrivals import graph_nodes
from torch_dropout_ir.loss_terms import (
    ELEMENTWISE,
    LEAF,
    LOSSES,
    OF_LABELS,
    Nodes,
    is_linear,
)
from torch_dropout_ir.regularizers.row_graph import (
    RULES,
    START,
    Op,
    Place,
    broadcast,
    less,
    within,
)

# A sum over rows, which have no place any more.
_SUM: Final = Place(-1, 0)
_ADDS: Final = frozenset(("SumBackward0", "MeanBackward0"))
_ADDS_SOME: Final = frozenset(("SumBackward1", "MeanBackward1"))
# Losses that are linear where residuals are large.
_BENDS: Final = ("HuberLossBackward", "SmoothL1LossBackward")


def bends(value: Tensor) -> bool:
    """Return whether one of torch's losses that bends at small residuals is in it."""
    return any(n.name().startswith(_BENDS) for n in graph_nodes([value.grad_fn]))


def rows_apart(outputs: Tensor, nodes: Nodes) -> bool:
    """Whether the graph shows a sum of terms of one row each.

    Args:
        outputs: The outputs, the leaf of the graph of the loss.
        nodes: The nodes of that.

    Returns:
        Whether it does; False where it does not tell.
    """
    if not nodes or not outputs.ndim:
        return False
    found: dict[Any, Place | None] = {}
    rows, place = outputs.shape[0], None  # to ask a tensor for its length takes longer
    for node, (name, edges) in nodes.items():
        places = [found.get(child) for child, _ in edges]
        if not any(places):
            own = type(node) is LEAF and getattr(node, "variable", None) is outputs
            place = START if own else None
        elif len(edges) == 1 and name in ELEMENTWISE and places[0] is not _SUM:
            place = places[0]
        else:
            place = _place(name, Op(node, edges, places, rows))
            if place is None:
                return False
        found[node] = place
    return place is _SUM


def _place(name: str, op: Op) -> Place | None:
    """Return where the rows are in what a node makes; None where it is not known."""
    if any([place is _SUM for place in op.places]):
        sums = all([place is None or place is _SUM for place in op.places])
        linear = sums and is_linear(name, [(place, 0) for place in op.places])
        return _SUM if linear else None
    if name in _ADDS:
        return _SUM
    if name in LOSSES and op.node._saved_reduction:
        return (
            _SUM if len({(place, *own) for place, own in op.leading()}) == 1 else None
        )
    if name in OF_LABELS and not any(op.places[1:]):
        place = op.places[0]
        if place is None or place.dim == 1:  # the classes
            return None
        return _SUM if op.node._saved_reduction else place if not place.dim else None
    if name in _ADDS_SOME:
        ((place, own),) = op.leading()
        dims = op.node._saved_dim
        if dims is None or place.dim in op.dims(dims, len(own)):
            return _SUM
    rule = _RULES.get(name)
    return None if rule is None else rule(op)


def _gathered(op: Op) -> Place | None:
    place = within(op)
    ((_, own),) = op.leading()
    return place if place and own[place.dim] == op.shape[place.dim] else None


def _rules() -> dict[str, Callable[[Op], Place | None]]:
    named = dict.fromkeys(ELEMENTWISE | LOSSES, broadcast)
    named |= {f"{x}Backward0": less for x in ("LinalgVectorNorm", "Logsumexp", "Var")}
    named |= {"CumsumBackward0": within, "GatherBackward0": _gathered}
    return named | RULES


_RULES: Final = _rules()
