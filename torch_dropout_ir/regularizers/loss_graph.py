"""What the graph of a loss tells: whether it is a sum of terms of outputs apart.

Semantics:

* Rows of the outputs have a place in what is computed of them, as samples have in
  :mod:`~torch_dropout_ir.regularizers.row_graph`, until they are added up. What is
  linear in such sums still is a sum of terms of one row each.
* What is linear in elementwise functions of the outputs is a sum of terms of one output
  each, whatever it adds up.
* A graph with any other operation may be of such a sum too: it does not tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torch_dropout_ir.regularizers.row_graph import (
    LEAF,
    RULES,
    START,
    UNARY,
    Op,
    Place,
    broadcast,
    inputs_first,
    less,
    within,
)

# A sum over rows, which have no place any more.
_SUM: Final = Place(-1, 0)
_LOSSES: Final = frozenset(
    f"{name}Backward0"
    for name in (
        "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "HuberLoss", "MseLoss",
        "SmoothL1Loss", "SoftMarginLoss",
    )
)  # fmt: skip
_OF_ROWS: Final = frozenset(("NllLossBackward0", "NllLoss2DBackward0"))
_ADDS: Final = frozenset(("SumBackward0", "MeanBackward0"))
_ADDS_SOME: Final = frozenset(("SumBackward1", "MeanBackward1"))
_LINEAR: Final = _ADDS | _ADDS_SOME | {
    f"{name}Backward{k}" for k in (0, 1) for name in (
        "Add", "Sub", "Rsub", "Neg", "View", "Squeeze", "Unsqueeze", "Select", "Slice",
        "Stack", "Clone", "ToCopy",
    )
}  # fmt: skip
_ELEMENTWISE: Final = UNARY | {
    f"{name}Backward{k}" for k in (0, 1) for name in (
        "Cosh", "Erf", "Expm1", "Log1P", "Logaddexp", "Maximum", "Minimum",
        "Reciprocal", "Rsub", "Sinh", "Square", "Where", "Xlogy",
    )
}  # fmt: skip


def one_by_one(value: Tensor, outputs: Tensor) -> bool:
    """Whether the graph shows a sum of terms of one output each.

    Args:
        value: The loss, with its graph.
        outputs: The outputs, the leaf of that graph.

    Returns:
        Whether it does; False where it does not tell.
    """
    shape = tuple(outputs.shape)
    left: list[tuple[Any, bool]] = [(value.grad_fn, True)]
    seen = set(left)
    while left:
        node, added = left.pop()
        if node is None or type(node) is LEAF:
            continue
        name, edges = node.name(), node.next_functions
        if added and name in _LOSSES and node._saved_reduction:
            added = False
        elif not (added and _is_linear(name, [c is not None for c, _ in edges])):
            added = False
            alone = name in _ELEMENTWISE or name in _LOSSES
            if not alone or tuple(node._input_metadata[0].shape) != shape:
                return False
        new = [(child, added) for child, _ in edges]
        left += [x for x in new if x not in seen]
        seen.update(new)
    return True


def rows_apart(value: Tensor, outputs: Tensor) -> bool:
    """Whether the graph shows a sum of terms of one row each.

    Args:
        value: The loss, with its graph.
        outputs: The outputs, the leaf of that graph.

    Returns:
        Whether it does; False where it does not tell.
    """
    if value.grad_fn is None or not outputs.ndim:
        return False
    found: dict[Any, Place | None] = {get_gradient_edge(outputs).node: START}
    for node, edges in inputs_first([(value.grad_fn, None)], found):
        places = [found.get(child) for child, _ in edges]
        if not any(places):
            found[node] = None
            continue
        name = node.name()
        if len(edges) == 1 and name in _ELEMENTWISE and places[0] != _SUM:
            found[node] = places[0]
            continue
        found[node] = _place(name, Op(node, edges, places, len(outputs)))
        if found[node] is None:
            return False
    return found[value.grad_fn] == _SUM


def _place(name: str, op: Op) -> Place | None:
    """Return where the rows are in what a node makes; None where it is not known."""
    if _SUM in op.places:
        sums = {None, _SUM}.issuperset(op.places)
        linear = sums and _is_linear(name, [place is not None for place in op.places])
        return _SUM if linear else None
    if name in _ADDS:
        return _SUM
    if name in _LOSSES and op.node._saved_reduction:
        return (
            _SUM if len({(place, *own) for place, own in op.leading()}) == 1 else None
        )
    if name in _OF_ROWS and op.node._saved_reduction and not any(op.places[1:]):
        place = op.places[0]
        return _SUM if place is not None and place.dim != 1 else None
    if name in _ADDS_SOME:
        ((place, own),) = op.leading()
        dims = op.node._saved_dim
        if dims is None or place.dim in op.dims(dims, len(own)):
            return _SUM
    rule = _RULES.get(name)
    return None if rule is None else rule(op)


def _is_linear(name: str, leading: list[bool]) -> bool:
    """Whether a node is linear in those of its inputs that lead to the outputs."""
    if name == "MulBackward0":
        return leading.count(True) == 1
    if name == "DivBackward0":
        return not any(leading[1:])
    return name in _LINEAR


def _gathered(op: Op) -> Place | None:
    place = within(op)
    ((_, own),) = op.leading()
    return place if place and own[place.dim] == op.shape[place.dim] else None


def _rules() -> dict[str, Callable[[Op], Place | None]]:
    named = dict.fromkeys(_ELEMENTWISE | _LOSSES, broadcast)
    named |= {f"{x}Backward0": less for x in ("LinalgVectorNorm", "Logsumexp", "Var")}
    named |= {"CumsumBackward0": within, "GatherBackward0": _gathered}
    return named | RULES


_RULES: Final = _rules()
