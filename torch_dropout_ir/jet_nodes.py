"""Floor 1: rules of nodes that tell by themselves what they do, in a program.

Called, a node gives what it sends back. Of ones that is the slope of a function of
single numbers. Of a node that chooses entries it is differentiated in what was sent,
which leads forward again: numbers of all entries go where those have gone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_dropout_ir.arrivals import graph_nodes
from torch_dropout_ir.jet_kinds import Kind
from torch_dropout_ir.jet_program import Program, Rule, told


def _bent(to: Program, node: Any, inputs: list[int]) -> int:
    """A function of entries in the same place, or a loss that adds such up."""
    made, leads = node._input_metadata[0], [k for k, i in enumerate(inputs) if i >= 0]
    own, edges = to.row(inputs[leads[0]]), [node.next_functions[k] for k in leads]
    alike = all([[*to.row(inputs[k])] == [*own] for k in leads])
    placed = tuple(made.shape) in ((to.rows, *own), ())
    told(alike and placed and not _meet(edges))
    ones = torch.ones(made.shape, dtype=made.dtype, device=made.device)
    slopes, left = _sent(node, ones), list(leads)
    number = -1
    while left:
        k = left[0]
        seconds = _slopes(slopes[k], [node.next_functions[i] for i in left])
        zero = torch.zeros_like(slopes[k])
        one, two, *mixed = [zero if x is None else x for x in (slopes[k], *seconds)]
        parts = [to.add(Kind.GIVEN, own, inputs[k], -1, (one.detach(), two))]
        left.remove(k)
        for i, both in zip(left, mixed, strict=True):
            # Second derivatives of a product whose factors are zero.
            a = to.add(Kind.TIMES, own, inputs[k], -1, (both, both))
            parts.append(to.add(Kind.TIMES, own, a, inputs[i], (zero, zero)))
        for part in parts:
            number = to.add(Kind.LINEAR, own, part, number, alpha=1.0, beta=1.0)
    return number if made.shape else to.total(number, 1.0)


def _of_gamma(order: int) -> Rule:
    """Return the rule of a derivative of the logarithm of the gamma function.

    Asked, its node takes longer than the rest of a likelihood.
    """

    def rule(to: Program, node: Any, inputs: list[int]) -> int:
        sizes = to.elementwise(node, inputs[0], -1, False)
        slopes = [torch.polygamma(k, node._saved_self) for k in (order, order + 1)]
        return to.add(Kind.GIVEN, sizes, inputs[0], -1, slopes)

    return rule


def _power(to: Program, node: Any, inputs: list[int]) -> int:
    """``exp(b log a)``, which takes less time than to ask it; of what is positive."""
    a, b = inputs
    x, y = node._saved_self, node._saved_exponent
    sizes = to.elementwise(node, a, b, False)
    if not (x > 0).all():
        return _bent(to, node, inputs)
    log = x.double().log()
    first = a if a < 0 else to.add(Kind.LOG, to.sizes[a], a, -1, (x,))
    values = (y if b < 0 else log, log if a < 0 else y)
    number = to.add(Kind.TIMES, sizes, first, b, values)
    return to.add(Kind.EXP, sizes, number, -1, (node._saved_result,))


def _meet(edges: list[Any]) -> bool:
    """Whether an input is made of another: derivatives in that go through both."""
    if len(edges) == 1:
        return False
    below = [child for top, _ in edges for child, _ in top.next_functions if child]
    twice = len(set(edges)) < len(edges)
    return twice or not {top for top, _ in edges}.isdisjoint(graph_nodes(below))


def _slopes(of: Tensor, edges: list[Any]) -> Sequence[Tensor | None]:
    """Return the derivatives of what a node has sent back, in its inputs."""
    if not of.requires_grad:
        return [None] * len(edges)
    ends: Any = [GradientEdge(*edge) for edge in edges]
    return torch.autograd.grad(
        of, ends, torch.ones_like(of), retain_graph=True, allow_unused=True
    )


def chosen(to: Program, node: Any, inputs: list[int]) -> int:
    """Entries in other places of their rows: each is one of them, or a constant."""
    made = node._input_metadata[0]
    to.row(inputs[0])  # of a sum there are none
    g = torch.zeros(made.shape, dtype=made.dtype, device=made.device)
    sent = _sent(node, g.requires_grad_())[0]
    numbers = torch.arange(1, sent.numel() + 1, device=g.device).view_as(sent)
    numbers, squares = (
        torch.autograd.grad(sent, g, x.to(sent), retain_graph=True)[0].double()
        for x in (numbers, numbers.square())
    )
    # Of several entries, added up or averaged, the squares are others.
    alone = torch.equal(numbers.square(), squares)
    told(alone)
    return _by_number(to, inputs[0], numbers.long())


def _indexed(to: Program, node: Any, inputs: list[int]) -> int:
    """The same of entries by number, which are at hand."""
    own = to.row(inputs[0])
    first, *rest = node._saved_indices
    if first is not None and first.ndim == 1 and not any([x is not None for x in rest]):
        rows = first.nonzero().flatten() if first.dtype == torch.bool else first
        return to.picked(inputs[0], rows)
    device = node._input_metadata[0].device
    numbers = torch.arange(1, to.rows * math.prod(own) + 1, device=device)
    at = [slice(None) if x is None else x for x in node._saved_indices]
    return _by_number(to, inputs[0], numbers.view(to.rows, *own)[tuple(at)])


def _selected(to: Program, node: Any, inputs: list[int]) -> int:
    """Entries along a dimension by number, or rows."""
    if node._saved_dim or node._saved_index.ndim != 1:
        return chosen(to, node, inputs)
    return to.picked(inputs[0], node._saved_index)


def _by_number(to: Program, a: int, numbers: Tensor) -> int:
    """Add entries of a node, by their numbers among those of all rows; 0 for none."""
    own, sizes = to.row(a), numbers.shape[1:]
    told(numbers.ndim and len(numbers) == to.rows)
    width, count = math.prod(own), math.prod(sizes)
    first = torch.arange(to.rows, device=numbers.device)[:, None] * width
    numbers = numbers.reshape(to.rows, count)
    index, none = numbers - 1 - first, numbers == 0
    told((none | ((index >= 0) & (index < width))).all())  # none of other rows
    index = index.masked_fill(none, -1)
    flat = to.reshaped((width,), a)
    number = to.add(Kind.GATHERED, (count,), flat, -1, (index,), start=-1, step=1)
    return to.reshaped(sizes, number)


def _sent(node: Any, g: Tensor) -> Sequence[Tensor]:
    """Return what a node sends back to each input, with its graph."""
    with torch.enable_grad():
        found = node(g, *[None] * (len(node._input_metadata) - 1))
    return (found,) if isinstance(found, Tensor) else found


_BEND: Final = (
    "Acos Addcmul Asin Atan Atan2 BinaryCrossEntropy Elu Erf Erfc Gelu "
    "Hardtanh LeakyRelu Lerp Logaddexp Mish Polygamma Silu SoftMarginLoss "
    "SpecialI0E SpecialLogNdtr Tan"
)
_CHOOSE: Final = (
    "Amax Amin ConstantPadNd Diagonal DiagEmbed MaxPool2DWithIndices Repeat Roll Tril "
    "Triu Unfold"
)
NODES: Final[dict[str, Rule]] = {
    **{f"{name}Backward0": _bent for name in _BEND.split()},
    **{f"{name}Backward0": chosen for name in _CHOOSE.split()},
    "DigammaBackward0": _of_gamma(1),
    "LgammaBackward0": _of_gamma(0),
    "IndexBackward0": _indexed,
    "IndexSelectBackward0": _selected,
    **dict.fromkeys(("LerpBackward1", "PowBackward2"), _bent),
    "PowBackward1": _power,
}
