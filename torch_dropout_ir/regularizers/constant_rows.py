"""What a step holds for derivatives in matrices that a pass takes as constant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch.autograd.function import BackwardCFunction

from torch_dropout_ir.gradient_factors import address
from torch_dropout_ir.regularizers.graph_memory import (
    Graph,
    Rows,
    made,
    makes,
    names_of_saved,
)

_PRODUCTS: Final = "AddmmBackward0", "MmBackward0"
_RESULTS: Final = {f"_raw_saved_{name}" for name in ("result", "out", "output")}


def constant_rows(graph: Graph, constants: Mapping[int, int]) -> dict[Any, Rows]:
    """Return the rows of products with constant matrices that nodes would have saved.

    A bound from below: what might be held for something else too is not counted.
    ``constants`` are bytes of the matrices, by storage.
    """
    if not constants:
        return {}
    held: dict[Any, set[int]] = {}  # sizes of what may be a node's result
    for node, saved in graph.saved.items():
        kind: Any = type(node)
        own = [node] if _RESULTS.intersection(names_of_saved(kind)) else []
        for maker in [*own, *[_maker(x) for x, _ in node.next_functions]]:
            held.setdefault(maker, set()).update(saved.values())
    found = {}
    for node in graph.nodes:
        if node.name() in _PRODUCTS and node.next_functions[-1][0] is None:
            matrix = node._saved_mat2
            size = 0 if matrix is None else constants.get(address(matrix), 0)
            if size:
                maker = _maker(node.next_functions[-2][0])
                rows = made([node]) // matrix.shape[1] * matrix.shape[0]
                rows = 0 if rows in held.get(maker, ()) else rows
                found[node] = Rows(-id(maker), rows, address(matrix), size)
    return found


def _maker(node: Any) -> Any:
    """Return the node that made what a node looks at, itself if it made it."""
    # One of a derivative of its own may return what it was given.
    while node is not None and (isinstance(node, BackwardCFunction) or not makes(node)):
        node = next((x for x, _ in node.next_functions), None)
    return node
