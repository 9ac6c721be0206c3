r"""Floor 1: second derivatives of a loss of single entries, read off its graph.

Semantics:

* A loss that is linear in elementwise functions :math:`b_j` of entries :math:`x` has
  the second derivatives :math:`\sum_j (\partial L / \partial b_j) \, b_j''`. The first
  factor takes a pass of autograd through what adds up; the second the chain rule along
  one number, of some rows at a time, by the rules of
  :mod:`~torch_dropout_ir.jet_rules`. Beside what the graph has saved, the result is all
  that is held.
* Where entries have been chosen before, what chooses sends the result back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_dropout_ir.jet_kinds import SLOPES, Kind, Node, read_program
from torch_dropout_ir.jet_program import NotToldError, Program, told
from torch_dropout_ir.jet_rules import RULES
from torch_dropout_ir.loss_terms import ELEMENTWISE, OF_LABELS, Nodes, Terms
from torch_dropout_ir.tracing import derivatives

# A first or a second derivative; None where it is 0.
Slope: TypeAlias = "Tensor | float | None"
Jet: TypeAlias = "tuple[Slope, Slope]"
_SHIFTS: Final = ("AddBackward0", "SubBackward0")  # of what is first
# Entries of a part at least, below which its operations take as long; parts at most.
_AT_ONCE: Final = 2**15
_PARTS: Final = 32


class EntryCurvature(NamedTuple):
    """Second derivatives in the entries that a loss has terms of.

    Attributes:
        chosen: Those in the entries that have been chosen.
        back: What sends them to the places of all; None where all are taken.
    """

    chosen: Tensor
    back: Callable[[Tensor], Tensor] | None

    def all(self) -> Tensor:
        """Return those in all entries."""
        return self.chosen if self.back is None else self.back(self.chosen)


def entry_curvature(
    value: Tensor, at: GradientEdge, terms: Terms, nodes: Nodes
) -> EntryCurvature | None:
    """Return the second derivatives of a loss in the entries of which it has terms.

    ``at`` is where those are in its graph, which is kept, and whose ``nodes`` come each
    after those it leads to. None where the graph does not tell.
    """
    end, tops = terms.end, [*terms.tops]
    if end is None or not tops:  # only a penalty on parameters bends, or nothing does
        return None
    sign = _sign(end, at.node, nodes)
    if not sign:
        return None
    edges = [GradientEdge(node, 0) for node in tops]
    slopes = derivatives(value, edges, torch.ones_like(value), True)
    with torch.no_grad():
        try:
            found = _curvature(end, _between(terms, nodes), tops, slopes)
        # A torch that names otherwise what a node has saved; a complex exponent.
        except (NotToldError, AttributeError, TypeError):
            return None
    # 0 times infinity: where constants lead on autograd does not multiply.
    if not math.isfinite(found.sum()):
        return None
    back = functools.partial(_back, GradientEdge(end, 0), at)
    return EntryCurvature(found.mul_(sign), None if end is at.node else back)


def _back(end: GradientEdge, at: GradientEdge, chosen: Tensor) -> Tensor:
    (found,) = torch.autograd.grad([end], [at], [chosen], retain_graph=True)
    return found


def _sign(end: Any, base: Any, nodes: Nodes) -> float:
    """Return what chosen entries have been multiplied by: 1 or -1; 0 if not known."""
    sign, node = 1.0, end
    while node is not base:
        name, edges = nodes[node]
        if name in OF_LABELS:
            sign = -sign if node._saved_weight is None else 0.0
        elif name in ELEMENTWISE and (name not in _SHIFTS or edges[0][0] is None):
            return 0.0
        (node,) = [child for child, _ in edges if child is not None]
    return sign


def _between(terms: Terms, nodes: Nodes) -> Nodes:
    """Return the nodes from what makes the entries to what is added up."""
    left, found = [*terms.tops], set()
    while left:
        node = left.pop()
        if node is not terms.end and node not in found:
            found.add(node)
            left += [child for child, _ in nodes[node][1] if child is not None]
    return {node: known for node, known in nodes.items() if node in found}


def _curvature(
    end: Any, between: Nodes, tops: list[Any], slopes: Sequence[Tensor | None]
) -> Tensor:
    """Return the second derivatives in the entries that a node makes."""
    (made,) = end._input_metadata
    told(made.shape)
    n, *sizes = made.shape
    found = _room(made, slopes)
    count = max(1, n // _PARTS, _AT_ONCE // max(1, math.prod(sizes)))
    for first in range(0, n, count):
        rows = slice(first, min(first + count, n))
        own, jets = found[rows], _jets(end, between, rows)
        parts = []
        for node, slope in zip(tops, slopes, strict=True):
            if node not in jets:  # of a penalty on parameters
                continue
            assert slope is not None
            # A mean takes those that there are for all.
            mean = getattr(node, "_saved_reduction", 0) == 1
            slope = slope[rows] if slope.ndim else slope * (len(own) / n if mean else 1)
            parts.append(_times(slope, jets[node][1]))
        total = _sum(*parts)
        if isinstance(total, Tensor):
            many = total.numel() > own.numel()
            own.copy_(total.sum_to_size(own.shape) if many else total)
        else:
            own.zero_()
    return found


def _room(made: Any, slopes: Sequence[Tensor | None]) -> Tensor:
    """Return room for the result: a slope, whose rows go as they are used."""
    one = slopes[0]
    assert one is not None
    own = len(slopes) == 1 and one.shape == tuple(made.shape) and one.is_contiguous()
    if own and one.dtype == made.dtype:
        return one
    return torch.empty(made.shape, dtype=made.dtype, device=made.device)


class _Part:
    """A node as it would be of some rows; ``like`` is the shape of all entries."""

    def __init__(self, node: Any, rows: slice, like: Sequence[int]) -> None:
        self._node, self._rows, self._like = node, rows, like
        count, shapes = rows.stop - rows.start, [x.shape for x in node._input_metadata]
        self._input_metadata = [  # a single row may have been repeated for several
            _Made((count, *x[1:]) if x[:1] == like[:1] else tuple(x)) for x in shapes
        ]

    def __getattr__(self, name: str) -> Any:
        x = getattr(self._node, name)
        if not isinstance(x, Tensor) or x.ndim != len(self._like):
            return x
        return x[self._rows] if len(x) == self._like[0] else x


class _Made(NamedTuple):
    shape: tuple[int, ...]


def _jets(end: Any, between: Nodes, rows: slice) -> dict[Any, Jet]:
    """Return the derivatives of what nodes make of some rows.

    The entries that ``end`` makes have the derivative 1; ``between`` lead to it, each
    after those that they are made of.
    """
    like, kind = end._input_metadata[0].shape, end._input_metadata[0].dtype
    program = Program((rows.stop - rows.start, *like[1:]), math.inf)
    found: dict[Any, int] = {end: 0}
    for node, (name, edges) in between.items():
        inputs = [found.get(child, -1) for child, _ in edges]
        if max(inputs, default=-1) < 0:  # a constant
            continue
        told(name in RULES)
        found[node] = RULES[name](program, _Part(node, rows, like), inputs)
    told(not any([x.is_complex() for x in program.values]))
    made: list[Jet] = []
    nodes = [*read_program(program.steps, program.numbers)]
    last = {i: k for k, own in enumerate(nodes) for i in (own.a, own.b)}
    for k, own in enumerate(nodes):
        a, b = (made[i] if i >= 0 else (None, None) for i in (own.a, own.b))
        saved = [program.values[i] for i in own.values]
        made.append(_jet(own, a, b, [_wide(x, kind) for x in saved]))
        for i in {own.a, own.b}:  # what no other reads goes
            if i >= 0 and last[i] == k:
                made[i] = None, None
    return {node: made[number] for node, number in found.items()}


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what has been saved as real numbers; a single one as exactly as it is."""
    if not x.ndim:
        return x.double()
    return x if x.is_floating_point() else x.to(dtype)


def _jet(node: Node, a: Jet, b: Jet, saved: Sequence[Tensor]) -> Jet:
    """Return the derivatives of what a node makes of those of its inputs."""
    (u, uu), (v, vv) = a, b
    if node.kind == Kind.OUTPUTS:
        return 1.0, None
    if node.kind in (Kind.LINEAR, Kind.SUMMED):  # entries of a sum stay apart
        alpha, beta = node.alpha, node.beta
        return (
            _sum(_times(alpha, u), _times(beta, v)),
            _sum(_times(alpha, uu), _times(beta, vv)),
        )
    if node.kind == Kind.TIMES:
        x, y = saved
        first = _sum(_times(y, u), _times(x, v))
        return first, _sum(_times(y, uu), _times(x, vv), _times(2.0, u, v))
    if node.kind == Kind.OVER:
        y = 1 / saved[0]
        first, both = _times(y, u), _times(-2 * y * y, u, v)
        if v is None:
            return first, _times(y, uu)
        x = -saved[1] * y * y
        first = _sum(first, _times(x, v))
        return first, _sum(_times(y, uu), both, _times(x, vv), _times(-2 * x * y, v, v))
    slopes = SLOPES.get(node.kind)
    one, two = slopes(saved[0], node.alpha, node.beta) if slopes else saved
    return _times(one, u), _sum(_times(one, uu), _times(two, u, u))


def _times(*factors: Slope) -> Slope:
    if any([x is None for x in factors]):
        return None
    number = math.prod([x for x in factors if isinstance(x, float)])
    found: Slope = None
    for x in factors:
        if isinstance(x, Tensor):
            found = x if found is None else found * x
    if found is None:
        return number
    return found if number == 1 else found * number


def _sum(*parts: Slope) -> Slope:
    found: Slope = None
    for x in parts:
        found = x if found is None else found if x is None else found + x
    return found
