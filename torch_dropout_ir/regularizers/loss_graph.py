"""What the graph of a loss tells of rows: whether it is a sum of terms of one each.

Semantics:

* Rows of the outputs have a place in what is computed of them, as samples have in
  :mod:`~torch_dropout_ir.regularizers.row_graph`, until they are added up. What is
  linear in such sums still is a sum of terms of one row each.
* A graph with any other operation may be of such a sum too: it does not tell.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.arrivals import graph_nodes
from torch_dropout_ir.jet_program import signed
from torch_dropout_ir.loss_terms import (
    ELEMENTWISE,
    LOSSES,
    OF_LABELS,
    Nodes,
    is_end,
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

# Of several rows, which have no place any more: a sum of terms of one each, sums beside
# rows, what is more than such sums, and what is not known.
_SUM, _MIXED, _BENT, _UNKNOWN = (Place(-k, 0) for k in range(1, 5))
_SEVERAL: Final = frozenset((_SUM, _MIXED, _UNKNOWN))
_ORDERS: Final = 2**62  # as many turns and more are rows in an order of their own
_ADDS: Final = frozenset(("SumBackward0", "MeanBackward0"))
_ADDS_SOME: Final = frozenset(("SumBackward1", "MeanBackward1"))
_MATRICES: Final = frozenset(("MmBackward0", "BmmBackward0"))
_PRODUCTS: Final = _MATRICES | {"MulBackward0", "DivBackward0"}
_DIFFERS: Final = frozenset(f"{x}Backward0" for x in ("Add", "Sub", "Rsub"))
_SPLITS: Final = frozenset(("SplitBackward0", "SplitWithSizesBackward0"))
# They bend all that they take, or join it along a dimension.
_JOINS: Final = frozenset(
    f"{x}Backward0"
    for x in (
        "LinalgVectorNorm", "Logcumsumexp", "LogSoftmax", "Logsumexp", "Softmax", "Std",
        "Var",
    )
)  # fmt: skip
_BENDS_ALL: Final = _JOINS | {
    f"{x}Backward0"
    for x in (
        "Exp", "Log", "Log1P", "LogSigmoid", "MseLoss", "Pow", "Reciprocal", "Rsqrt",
        "Sigmoid", "Softplus", "Sqrt", "Tanh",
    )
}  # fmt: skip
# Losses that are linear where residuals are large.
_BENDS: Final = ("HuberLossBackward", "SmoothL1LossBackward")


def bends(value: Tensor) -> bool:
    """Return whether one of torch's losses that bends at small residuals is in it."""
    return any(n.name().startswith(_BENDS) for n in graph_nodes([value.grad_fn]))


def joins_rows(outputs: Tensor, nodes: Nodes) -> bool | None:
    """Return whether a loss is more than a sum of terms of one row each, by its graph.

    False where that shows such a sum; True where something bends what is made of
    several rows, whose second derivative may be 0 where they are all the same, or where
    what is of one row each is chosen of it; None where it does not tell.
    """
    if not nodes or not outputs.ndim:
        return None
    found: dict[Any, Place | None] = {}
    split: dict[tuple[Any, int], Place] = {}  # of rows, by result
    rows, place = outputs.shape[0], None  # to ask a tensor for its length takes longer
    for node, (name, edges) in nodes.items():
        places = [found.get(child) for child, _ in edges]
        if split:
            pairs = zip(edges, places, strict=True)
            places = [split.get(edge, place) for edge, place in pairs]
        if not any(places):
            place = START if is_end(node, outputs) else None
        elif len(edges) == 1 and name in ELEMENTWISE and places[0] not in _SEVERAL:
            place = places[0]
        else:
            place = _place(name, Op(node, edges, places, rows))
            if place is _BENT:
                return True if rows > 1 else None
        found[node] = place
        if name in _SPLITS and places[0] == START and place is _UNKNOWN:
            split |= {(node, k): x for k, x in enumerate(_parted(node, rows))}
    return False if place is _SUM else None


def _place(name: str, op: Op) -> Place:
    """Return where the rows are in what a node makes."""
    if any([place is not None and not place.turns for place in op.places]):
        return _of_several(name, op)
    if name in _ADDS:
        return _SUM
    if name in LOSSES and op.node._saved_reduction:
        places = {(place, *own) for place, own in op.leading()}
        return _SUM if len(places) == 1 else _UNKNOWN
    if name in OF_LABELS and not any(op.places[1:]):
        place = op.places[0]
        if place is None or place.dim == 1:  # the classes
            return _UNKNOWN
        summed = op.node._saved_reduction or not op.shape
        return _SUM if summed else _UNKNOWN if place.dim else place
    if name in _ADDS_SOME:
        ((place, own),) = op.leading()
        dims = op.node._saved_dim
        if dims is None or place.dim in op.dims(dims, len(own)):
            return _SUM
    rule = _RULES.get(name)
    return (rule and rule(op)) or _across(name, op)


def _of_several(name: str, op: Op) -> Place:
    """Of what is made of several rows: added up further, or bent."""
    if _UNKNOWN in op.places:
        return _UNKNOWN
    places, rule = {place for place in op.places if place is not None}, _RULES.get(name)
    if not any([place in _SEVERAL for place in places]):  # in an order of their own
        alone = len(op.leading()) == 1 and rule in (broadcast, within, less)
        alone = alone and len(op.shape) > 0  # else a loss has added them up
        return (rule and rule(op)) or _across(name, op) if alone else _UNKNOWN
    if is_linear(name, [(place, 0) for place in op.places]):
        return _SUM if places == {_SUM} else _MIXED
    bends = name in _BENDS_ALL or (name in _PRODUCTS and len(op.leading()) > 1)
    return _BENT if bends else _UNKNOWN


def _across(name: str, op: Op) -> Place:
    """Where an operation goes from row to row."""
    leading = op.leading()
    dims = [place.dim for place, _ in leading]
    if len(leading) == 1:
        if name == "CumsumBackward0":
            return _MIXED
        return _BENT if name in _JOINS else _UNKNOWN
    summed = [len(op.shape) - 1, len(op.shape) - 2]
    if name in _MATRICES and dims == summed:
        return _SUM if len({place.turns for place, _ in leading}) == 1 else _UNKNOWN
    apart = {place.dim + len(op.shape) - len(own) for place, own in leading}
    orders = {place.turns for place, _ in leading if place.turns >= _ORDERS}
    if len(apart) < 2 and len(orders) < 2:
        return _UNKNOWN
    return _BENT if name in _PRODUCTS else _MIXED if name in _DIFFERS else _UNKNOWN


def _gathered(op: Op) -> Place | None:
    place = within(op)
    ((_, own),) = op.leading()
    return place if place and own[place.dim] == op.shape[place.dim] else None


def _indexed(op: Op) -> Place | None:
    """Entries of each row, or rows by number, which are then in another order."""
    place, (first, *rest) = op.places[0], op.node._saved_indices
    if place is None or any(op.places[1:]) or place.dim:
        return None
    if first is None:
        return place if len(rest) - sum([x is None for x in rest]) == 1 else None
    if first.ndim != 1 or any([x is not None and x.ndim > 1 for x in rest]):
        return None
    return _picked(op, first)


def _picked(op: Op, rows: Tensor) -> Place:
    """Rows by number, or by what they are: in an order of their own if each is once."""
    ((place, own),) = op.leading()
    if place != START or own[0] != op.samples:  # of a sample there may be several
        return Place(0, 0)
    numbers = (
        rows.nonzero().flatten() if rows.dtype == torch.bool else rows % op.samples
    )
    return _ordered(numbers.tolist(), op.samples)


def _parted(node: Any, samples: int) -> list[Place]:
    """Return the places of rows in what a node splits them into."""
    sizes = [made.shape[0] for made in node._input_metadata]
    if sum(sizes) != samples:
        return []
    pairs = zip(itertools.accumulate(sizes), sizes, strict=True)
    return [_ordered(range(end - size, end), samples) for end, size in pairs]


def _ordered(numbers: Sequence[int], samples: int) -> Place:
    """Return the place of rows that have been chosen by number."""
    if len(numbers) == samples and all(map(operator.eq, numbers, range(samples))):
        return START
    if len(set(numbers)) < len(numbers):
        return Place(0, 0)
    return Place(0, _ORDERS + hash(tuple(numbers)) % _ORDERS)


def _selected(op: Op) -> Place | None:
    place = within(op)
    if place is None and op.places[0] and op.node._saved_dim % 2**63 == 0:
        return _picked(op, op.node._saved_index)
    return place


def _cut(op: Op) -> Place | None:
    ((place, own),) = op.leading()
    if own[place.dim] == op.shape[place.dim]:
        return place
    first = max(0, signed(op.node._saved_start, own[place.dim]))
    rows = torch.arange(op.shape[0], device="cpu") * op.node._saved_step + first
    return _picked(op, rows) if place == START else None


def _each(op: Op) -> Place | None:
    """What makes something of each of many matrices."""
    ((place, own),) = op.leading()
    return place if place.dim < len(own) - 2 else None


def _rules() -> dict[str, Callable[[Op], Place | None]]:
    named = dict.fromkeys(ELEMENTWISE | LOSSES, broadcast)
    keep = "Cummax Cumprod Cumsum FftC2C FftC2R FftR2C Flip IndexAdd IndexCopy "
    keep += "Logcumsumexp Roll Scatter ScatterAdd ScatterReduce Sort Topk"
    join = "Amax Amin Kthvalue LinalgVectorNorm Logsumexp Max Min Std Var"
    each = "LinalgCholeskyEx LinalgDet LinalgInvEx LinalgMatrixExp LinalgSlogdet"
    pairs = "ViewAsComplex ViewAsReal"
    for rule, names in (
        (within, keep),
        (less, join),
        (_each, each),
        (lambda op: op.places[0], pairs),
    ):
        named |= {f"{x}Backward0": rule for x in names.split()}
    named |= {"MedianBackward1": less, "ProdBackward1": less}
    named |= {"GatherBackward0": _gathered, "IndexBackward0": _indexed}
    named |= RULES
    return named | {"SliceBackward0": _cut, "IndexSelectBackward0": _selected}


_RULES: Final = _rules()
