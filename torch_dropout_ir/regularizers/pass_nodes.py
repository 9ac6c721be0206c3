"""The graph of a pass in order, and where all of it goes through one tensor."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_dropout_ir import tracing
from torch_dropout_ir.arrivals import graph_nodes


class PassNodes:
    """The nodes of a pass as they were made, and which of them read parameters.

    Args:
        value: What is differentiated.
        own: Numbers of the parameters, by identity.

    Attributes:
        nodes: The nodes; a part is that from one number on, below another.
        readers: Of each parameter the nodes that read it.
        narrow: Where the nodes may be cut, by the one result that leads on from there.
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
        if any(first > last for first, last in spans):  # another thread's count
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
