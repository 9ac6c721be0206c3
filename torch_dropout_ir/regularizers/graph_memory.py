"""What a graph holds, and a pass back through it, followed from node to node.

Semantics:

* A node holds what it has saved until it has run, and the gradient of what it has
  returned until those of what it was given are there. What only looks at a tensor makes
  nothing, and passes its gradient on.
* What an operation needs while it runs is left out of a step, and is in a pass back
  through a graph that is kept: nothing for products and elementwise functions, twice
  its result for convolutions, once elsewhere.
* A graph of second derivatives makes as much again as an operation has returned, where
  that is of a kind known to; elsewhere up to seven times that, or twice what it has
  saved, as of recurrent layers whose steps are one operation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torch_dropout_ir.arrivals import graph_nodes
from torch_dropout_ir.leaves import numbers

# Whether torch tells what is saved without giving it back. One that does not keeps no
# graph.
TOLD: Final = hasattr(getattr(torch._C._autograd, "SavedTensor", None), "unpack_hook")
_NOTHING_NEW: Final = (
    "AccumulateGrad", "Alias", "Expand", "Permute", "Select", "Slice", "Split",
    "Squeeze", "TBackward", "Transpose", "Unbind", "Unsqueeze", "View",
)  # fmt: skip
# Of these a derivative needs nothing but what it returns.
_PLAIN: Final = frozenset(
    f"{name}Backward{k}"
    for name in (
        "Add", "Addmm", "AvgPool2D", "Bmm", "Clone", "Elu", "Gelu", "Hardswish",
        "LeakyRelu", "MaxPool2DWithIndices", "Mean", "Mm", "Mul", "Relu", "Sigmoid",
        "Softplus", "Sub", "Sum", "Tanh",
    )
    for k in (0, 1)
)  # fmt: skip
# Of these a second derivative makes as much as the operation.
_LEAN: Final = _PLAIN | {
    f"{name}Backward0"
    for name in (
        "Convolution", "LogSoftmax", "NativeBatchNorm", "NativeLayerNorm",
        "PreluKernel", "SafeSoftmax", "Softmax",
    )
}  # fmt: skip
_GELU: Final = "GeluBackward0"  # whose approximation needs more
_CONVOLUTION: Final = "ConvolutionBackward0"
_MORE: Final = 7
_OF_SAVED: Final = 2
# What it needs while it runs, of those, and of others.
_AT_HAND: Final = 8, 16


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
    return _makes(node.name())


@functools.cache
def _makes(name: str) -> bool:
    return not any(word in name for word in _NOTHING_NEW)


def made(nodes: Iterable[Any]) -> int:
    """Return the bytes of what the nodes of a graph have returned."""
    return sum(sum(sizes_of(node)) for node in nodes)


def sizes_of(node: Any) -> list[int]:
    """Return the bytes of each result of a node."""
    return [math.prod(x.shape) * x.dtype.itemsize for x in node._input_metadata]


class Rows(NamedTuple):
    """What a step holds for the derivative in a matrix that a pass takes as constant.

    Attributes:
        made: What tells the rows that are multiplied by it from others.
        held: Their bytes; 0 where they may be held for something else too.
        matrix: Its place in memory.
        size: Its bytes.
    """

    made: int
    held: int
    matrix: int
    size: int


class Graph:
    """The nodes of a graph in the order of a pass back, and what each has made.

    Args:
        starts: The nodes that it begins with.
        there: Storages of tensors that are there without a pass.

    Attributes:
        leaves: Those at its ends, with what is differentiated in them.
        nodes: The others, in their order.
        saved: What nodes have saved, by storage.
    """

    def __init__(self, starts: Iterable[Any], there: Collection[int]) -> None:
        found: list[Any] = list(graph_nodes(starts))
        self.leaves = {n: n.variable for n in found if hasattr(n, "variable")}
        inner = [n for n in found if n not in self.leaves]
        self.nodes = sorted(inner, key=lambda n: -n._sequence_nr())
        self._sizes = {n: sizes_of(n) for n in found}
        self._children = {n: n.next_functions for n in inner}
        self.saved = {n: x for n in inner if (x := saved_by(n, there))}

    def leading_to(self, ends: Iterable[Any]) -> set[Any]:
        """Return the nodes that lead to one of some, and those."""
        found = set(ends)
        for node in reversed(self.nodes):
            for child, _ in self._children[node]:
                if child in found:
                    found.add(node)
                    break
        return found

    def again(self) -> int:
        """Return the bytes that second derivatives add, and need at once."""
        added, at_once = 0, 0
        for node in self.nodes:
            name = node.name()
            if _makes(name):
                lean, size = name in _LEAN, sum(self._sizes[node])
                saved = sum(self.saved.get(node, {}).values())
                added += size if lean else max(_MORE * size, _OF_SAVED * saved)
                at_once = max(at_once, _AT_HAND[not lean or name == _GELU] * size)
        return added + at_once

    def step_back(
        self, goes: set[Any], masks: Mapping[Any, int], rows: Mapping[Any, Rows]
    ) -> tuple[int, int, int]:
        """Return what a training step's pass back holds: at first, at most, leaves.

        In it goes what has been used. Gradients of the nodes ``goes`` are taken;
        ``masks`` are bytes of those of sites, ``rows`` what nodes would have saved for
        derivatives in constants.
        """
        kept = {n: dict(self.saved.get(n, ())) for n in self.nodes if n in goes}
        for i, (node, size) in enumerate(masks.items()):
            kept.setdefault(node, {})[-1 - i] = size
        for node, own in rows.items():
            kept[node][own.made] = own.held
        matrices = set[int]()
        held = {x: size for each in kept.values() for x, size in each.items()}
        last = {x: n for n, each in kept.items() for x in each}
        at_first = now = most = sum(held.values())
        leaves = 0
        for node, beside, grown in self._flights(goes, ()):
            leaves += beside
            if node in rows and rows[node].matrix not in matrices:
                matrices.add(rows[node].matrix)
                leaves += rows[node].size
            most = max(most, now + grown + leaves)
            now -= sum([held[x] for x in kept[node] if last[x] is node])
        return at_first, most, leaves

    def kept_back(self, goes: set[Any], forms: Mapping[Any, int]) -> int:
        """Return the most that is under way in a pass back that ends at sites.

        ``forms`` is what the form of each use takes, which passes its gradient on.
        """
        most = 0
        for node, _, grown in self._flights(goes, forms):
            name, at_hand = node.name(), forms.get(node, 0)
            if node not in forms and name not in _PLAIN and _makes(name):
                # What the derivative of an operation needs while it runs.
                at_hand = (1 + (name == _CONVOLUTION)) * sum(self._sizes[node])
            most = max(most, grown + at_hand)
        return most

    def _flights(
        self, goes: set[Any], passing: Collection[Any]
    ) -> Iterator[tuple[Any, int, int]]:
        """Yield each node, what it adds to leaves, and the gradients under way then."""
        now, flying = 0, dict[tuple[Any, int], int]()
        for node in self.nodes:
            if node not in goes:
                continue
            own = sum([flying.pop((node, k), 0) for k in range(len(self._sizes[node]))])
            view = node in passing or not _makes(node.name())
            now -= own if view else 0
            leaves = 0
            for child, k in self._children[node]:
                if child in goes and (child, k) not in flying:
                    size = own if view else self._sizes[child][k]
                    if child in self.leaves:
                        leaves += size
                    else:
                        flying[child, k] = size
                        now += size
            yield node, leaves, now
            now -= 0 if view else own


def saved_by(node: Any, there: Collection[int]) -> dict[int, int]:
    """Return bytes of what a node has saved, by storage; not what hooks have kept."""
    found = {}
    for one in saved_objects(node):
        x = one.data if TOLD and one.unpack_hook is None else None
        if isinstance(x, Tensor):
            storage = numbers(x).untyped_storage()
            place = storage.data_ptr()
            if place not in there:
                found[place] = storage.nbytes()
    return found


def saved_objects(node: Any) -> Iterator[Any]:
    """Yield each ``SavedTensor`` of a node."""
    kind: Any = type(node)
    for name in names_of_saved(kind):
        raw = getattr(node, name)
        yield from raw if isinstance(raw, tuple) else (raw,)


@functools.cache
def names_of_saved(kind: Any) -> list[str]:
    """Return the attributes of what nodes of a kind save."""
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]
