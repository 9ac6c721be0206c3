"""What a graph that is kept holds, against a training step of the same model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from torch_dropout_ir.arrivals import graph_nodes

_NOTHING_NEW: Final = (
    "AccumulateGrad", "Alias", "Expand", "Permute", "Select", "Slice", "Split",
    "Squeeze", "TBackward", "Transpose", "Unbind", "Unsqueeze", "View",
)  # fmt: skip
# Bytes of a graph that is no matter where time speaks for it: passes that make it again
# take two or three times what one takes.
FEW: Final = 2**22


class Held(NamedTuple):
    """Bytes of what a graph holds: results of its nodes, the largest, its leaves."""

    made: int
    largest: int
    leaves: int

    @classmethod
    def by(cls, starts: Iterable[Any]) -> Held:
        """Look at the graph that begins at some nodes."""
        nodes = list(graph_nodes([node for node in starts if node is not None]))
        new = [made([n]) for n in nodes if makes(n)]
        learning = [x for n in nodes if (x := getattr(n, "variable", None)) is not None]
        return cls(sum(new), max(new, default=0), sum(x.nbytes for x in learning))


def makes(node: Any) -> bool:
    """Whether a node has made what it returned, rather than looked at it otherwise."""
    return not any(word in node.name() for word in _NOTHING_NEW)


def made(nodes: Iterable[Any]) -> int:
    """Return the bytes of what the nodes of a graph have returned."""
    return sum(
        math.prod(x.shape) * x.dtype.itemsize
        for node in nodes
        for x in node._input_metadata
    )


def kept_is_less(above: Held, below: Held, graphs: int = 1) -> bool:
    """Whether a graph above the first site may be kept, in the memory of a step.

    A step holds what is below that site too, and the gradients of all parameters; a
    kept graph, when its last derivative comes, that and what it is made of beside all
    of itself. Of a second derivative the graph is as large again.

    Args:
        above: What the graph holds above the first site.
        below: What a step holds below it.
        graphs: Number of derivatives whose graph is kept.

    Returns:
        Whether it holds less.
    """
    held = (graphs - 1) * above.made + 2 * above.largest
    return held <= below.made + below.leaves + above.leaves
