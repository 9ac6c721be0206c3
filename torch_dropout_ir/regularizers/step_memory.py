"""What a graph that is kept holds, against a training step of the same model.

One question decides whether a pass is taken whole, of whatever size: does its graph, of
first derivatives or of second ones, hold more than a step does? Of a step it is a bound
from below: what the loss makes is not in it, nor what somebody's hooks keep elsewhere.
Of a kept graph it is one from above, as far as operations hold what
:mod:`~torch_dropout_ir.regularizers.graph_memory` takes them to.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from torch_dropout_ir.gradient_factors import address
from torch_dropout_ir.leaves import flatten
from torch_dropout_ir.regularizers.graph_memory import (
    TOLD,
    Graph,
    Held,
    Rows,
    made,
    makes,
    names_of_saved,
)
from torch_dropout_ir.sites import Site

_PRODUCTS: Final = "AddmmBackward0", "MmBackward0"
_RESULTS: Final = {f"_raw_saved_{name}" for name in ("result", "out", "output")}
# Tensors of the size of the outputs: what a root or the loss makes of them.
_OF_OUTPUTS: Final = 4
# Steps whose memory a kept graph may hold: what it holds is told to some 5 %.
SHARE: Final = 0.95
# Bytes beyond that which are no matter: torch itself takes hundreds of times as many,
# and parts of so small a pass would take many times its time.
LEAST: Final = 2**20
# Elements of the sites' inputs beside which calls of ours, and a look at what is below
# and above, take no time.
FEWEST: Final = 2**16
SOME: Final = 2**13


def may_hold_much(size: int, outputs: Any, kept: bool) -> bool:
    """Return whether what a graph holds may matter, by what goes in and comes out.

    Of one that may be ``kept``, little in the inputs of sites, of that ``size``, may
    lead to much.
    """
    if not kept:
        return size >= FEWEST
    given = (x for x in flatten(outputs)[0] if isinstance(x, Tensor))
    return size >= SOME or Held.by([x.grad_fn for x in given]).made > LEAST


class Below(NamedTuple):
    """What a step holds below the first site.

    Attributes:
        saved: Bytes that the graph has saved.
        most: The most that a pass back through it holds.
        learns: Whether there is one.
        there: Storages of tensors that are there without a pass.
        constants: Bytes of matrices that the pass has held constant, by storage.
    """

    saved: int = 0
    most: int = 0
    learns: bool = False
    there: Collection[int] = frozenset()
    constants: Mapping[int, int] = MappingProxyType({})

    @classmethod
    def by(
        cls, h: Tensor, there: Collection[int], constants: Mapping[int, int]
    ) -> Below:
        """Look at the graph of the input of the first site."""
        if h.grad_fn is None:
            learns = h.requires_grad
            return cls(learns=learns, there=there, constants=constants)
        graph = Graph([h.grad_fn], there)
        held, most, _ = graph.step_back(graph.leading_to(graph.leaves), {}, {})
        return cls(held, most, True, there, constants)


class Weighed(NamedTuple):
    """Bytes that passes hold.

    Attributes:
        step: A training step, at least; 0 where torch does not tell.
        kept: Passes back through a graph that is kept, at most.
        curved: Those of second derivatives, whose graph is kept, at most.
    """

    step: int
    kept: int
    curved: int

    @classmethod
    def of(
        cls,
        outputs: Sequence[Tensor],
        below: Below,
        uses: Sequence[tuple[Site, Tensor, GradientEdge]],
        zeros: Sequence[Tensor],
    ) -> Weighed:
        """Look at the graph of a pass without noise, down to the first site."""
        starts = [x.grad_fn for x in outputs if x.grad_fn is not None]
        graph = Graph(starts, below.there)
        rows = constant_rows(graph, below.constants)
        quiet = {id(zero) for zero in zeros}
        learning = [n for n, x in graph.leaves.items() if id(x) not in quiet]
        first = [edge.node for _, _, edge in uses[:1] if below.learns]
        goes = graph.leading_to([*learning, *rows, *first])
        masks = {x.node: mask_bytes(s, h) for s, h, x in uses if x.node in goes}
        _, most, leaves = graph.step_back(goes, masks, rows)
        step = max(below.saved + most, leaves + below.most) if TOLD else 0
        inputs = {address(h): h.nbytes for _, h, _ in uses}
        saved = [inputs, *graph.saved.values()]
        held = sum({x: size for each in saved for x, size in each.items()}.values())
        held += _OF_OUTPUTS * sum(x.nbytes for x in outputs)
        forms = {edge.node: h.nbytes for _, h, edge in uses}
        kept = held + graph.kept_back(graph.leading_to(forms), forms)
        return cls(step, kept, held + 2 * sum(forms.values()) + graph.again())

    def may_keep(self, once: bool = True) -> bool:
        """Whether a graph of first, else of second derivatives, fits into a step."""
        room = SHARE * self.step + LEAST
        return (self.kept if once else self.curved) <= room

    def parts(self, most: int, beside: int) -> int:
        """Return of how many parts of the rows, ``most`` at most, that graph may be.

        ``beside`` is held meanwhile if there are several.
        """
        if self.may_keep(once=False):
            return 1
        left = SHARE * self.step + LEAST - beside
        return min(most, math.ceil(self.curved / left)) if left > 0 else most


def mask_bytes(site: Site, h: Tensor) -> int:
    """Return the bytes of the mask that a step keeps: none where it may be of bits."""
    if type(site.module).__module__ != nn.Dropout.__module__:
        return 0
    return math.prod(site.mask_shape(h.shape)) * (h.itemsize if h.is_cpu else 1)


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
