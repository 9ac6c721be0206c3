"""The graph of a pass in order, and where all of it goes through one tensor."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge, saved_tensors_hooks

from torch_dropout_ir import tracing
from torch_dropout_ir.arrivals import graph_nodes
from torch_dropout_ir.leaves import numbers
from torch_dropout_ir.regularizers.graph_memory import saved_objects, sizes_of


class Kept:
    """What a node has saved, the ``place``-th of a pass; None where it was let go."""

    def __init__(self, place: int, x: Tensor | None) -> None:
        self.place, self.x = place, x
        self.version = 0 if x is None else x._version


def _given(saved: Kept) -> Tensor:
    """Give a node back what it has saved; raise if that was written on."""
    assert saved.x is not None  # what the part needs is kept
    if saved.x._version != saved.version:  # torch asks that of what it keeps itself
        raise RuntimeError("what a derivative needs was written on in place")
    return saved.x


@contextlib.contextmanager
def saving(
    node_of: Mapping[int, int], part: tuple[int, int] | None
) -> Iterator[Iterator[int]]:
    """Save what the nodes of a part need; all where that is None.

    ``node_of`` tells which node has saved what, by its place; what none is known to
    have saved is kept.

    Yields:
        The places.
    """
    places = itertools.count()

    def save(x: Tensor) -> Kept:
        place = next(places)
        node = None if part is None else node_of.get(place)
        kept = part is None or node is None or part[0] <= node < part[1]
        return Kept(place, x.detach() if kept else None)

    with saved_tensors_hooks(save, _given):
        yield places


class KeptBy(NamedTuple):
    """What a node has saved: bytes by storage, and the places in the pass."""

    storages: dict[int, int]
    places: list[int]


def kept_by(node: Any) -> KeptBy:
    """Return what a node has saved that was not let go of."""
    found = [one.data for one in saved_objects(node) if isinstance(one.data, Kept)]
    own = [numbers(x.x).untyped_storage() for x in found if x.x is not None]
    places = [x.place for x in found if x.x is not None]
    return KeptBy({x.data_ptr(): x.nbytes() for x in own}, places)


def size_at(edge: GradientEdge) -> int:
    """Return the bytes of what is sent to a place in a graph."""
    return sizes_of(edge.node)[edge.output_nr]


class PassNodes:
    """The nodes of a pass as they were made, and which of them read parameters.

    Args:
        value: What is differentiated.
        own: Numbers of the parameters, by identity.

    Attributes:
        nodes: The nodes; a part is that from one number on, below another.
        readers: Of each parameter the nodes that read it.
        narrow: Where the nodes may be cut, by the one result that leads on from there.
        ordered: Whether each node comes behind those that it was given.
    """

    def __init__(self, value: Tensor, own: Mapping[int, int]) -> None:
        with tracing.unasked():
            found = list(graph_nodes([value.grad_fn]))
        inner = [n for n in found if not hasattr(n, "variable")]
        self.nodes = sorted(inner, key=lambda n: n._sequence_nr())
        place = {n: k for k, n in enumerate(self.nodes)}
        self.readers: dict[int, list[int]] = {}
        leads: dict[tuple[int, int], int] = {}  # to the last node that was given it
        for k, node in enumerate(self.nodes):
            for child, output in node.next_functions:
                if child in place:
                    leads[place[child], output] = k
                elif (i := own.get(id(getattr(child, "variable", None)))) is not None:
                    self.readers.setdefault(i, []).append(k)
        spans = [(k, last) for (k, _), last in leads.items()]
        spans += [(own[0], own[-1]) for own in self.readers.values()]
        self.narrow: dict[int, GradientEdge] = {}
        self.ordered = all(first <= last for first, last in spans)
        if not self.ordered:  # another thread's count
            return
        ways = [0] * (len(self.nodes) + 1)
        for first, last in spans:
            ways[first + 1] += 1
            ways[last + 1] -= 1
        for cut in range(1, len(ways)):
            ways[cut] += ways[cut - 1]
        for (k, output), last in sorted(leads.items()):
            edge = GradientEdge(self.nodes[k], output)
            cuts = range(k + 1, last + 1)
            self.narrow.update((cut, edge) for cut in cuts if ways[cut] == 1)

    def read_in(self, first: int, stop: int) -> set[int]:
        """Return the numbers of the parameters that the nodes of a part read."""
        return {i for i, x in self.readers.items() if first <= x[0] < stop}
