"""A gradient with its graph, and the product with a Hessian, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torch_dropout_ir.arrivals import (
    ONCE,
    arrivals,
    graph_nodes,
    last_nodes,
    parts_given,
    root_of,
)
from torch_dropout_ir.regularizers.inner_products import compared
from torch_dropout_ir.sharpness.linear import added_into

_ONCE: Final = (
    "modified_loss: expected a model and a loss that torch can differentiate twice, "
    "got an operator whose derivative has none ({}), as those of `nn.EmbeddingBag`, "
    "CTC and the margin losses. Write it in others (`nn.Embedding` and a mean), or "
    "use `kind='L1'` or 'L4' with `r1='monte_carlo'`."
)
# Nodes of a gradient's graph that raise when the penalty is differentiated, if they are
# reached: a derivative in the parameters alone goes past them.
_ABSENT: Final = ("NotImplemented", "EmbeddingBagBackwardBackward", ONCE)
_ENTRIES: Final = 2**16  # of a gradient that are compared at a time
_KNOWN: Final = ("EmbeddingBag", "Ctc", "Margin")


def _lacking(risk: Tensor) -> str:
    """Say which operators of a loss, by the names of their derivatives, it may be."""
    names = {
        node.name() for node in graph_nodes([risk.grad_fn] if risk.grad_fn else [])
    }
    known = {name for name in names if any(word in name for word in _KNOWN)}
    found = known or {name for name in names if "AccumulateGrad" not in name}
    return " or ".join(sorted(found))


class Products:
    r"""Adds :math:`s \frac{\epsilon}{2} H g` to a gradient, part by part of the batch.

    Args:
        params: The parameters.
        slopes: Their gradient :math:`g`, None where there is none.
        rates: :math:`\epsilon` of each.
        sign: :math:`s`.
        total: What is added to.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        slopes: Sequence[Tensor | None],
        rates: Sequence[float],
        sign: float,
        total: Sequence[Tensor | None],
    ) -> None:
        self._params = params
        most = max(rates)
        self._scale = sign * most / 2
        # At one rate for all, the gradient itself: nothing else of its size.
        self.at = {
            i: g if r == most else g * (r / most)
            for i, (g, r) in enumerate(zip(slopes, rates, strict=True))
            if g is not None and r
        }
        self._slopes = slopes
        self._parts: dict[int, list[Tensor]] = {i: [] for i in self.at}
        pairs = enumerate(zip(params, total, strict=True))
        self._sums = {i: (x, s) for i, (x, s) in pairs if s is not None}

    def receive(self, i: int, g: Tensor) -> None:
        """Add a part of the product of parameter ``i``."""
        self._sums[i][1].add_(g.detach(), alpha=self._scale)

    def add(self, risk: Tensor) -> None:
        """Add the product with the Hessian of a part's risk."""
        starts = {}

        def note(i: int, g: Tensor) -> None:  # its value is let go of
            if i in self.at:
                self._note(i, g)
                if g.requires_grad:
                    starts[i] = get_gradient_edge(g)

        with arrivals(self._params, note):
            slopes_of(risk, self._params)
        edges, at = list(starts.values()), [self.at[i] for i in starts]
        last = last_nodes(graph_nodes([edge.node for edge in edges]), self._params)
        receive = self.receive
        own, sums = zip(*self._sums.values(), strict=True)
        with parts_given(last, receive), added_into(own, sums, self._scale):
            rest = torch.autograd.grad(edges, self._params, at, allow_unused=True)
        for i, g in enumerate(rest):
            if g is not None:
                receive(i, g)

    def _note(self, i: int, g: Tensor) -> None:
        """Note a part's gradient in the direction of that of the whole."""
        made = g.is_sparse or g.numel() < 2 or any(g.stride())
        if not made:  # of a matrix
            self._parts.pop(i, None)
        elif i in self._parts:
            self._parts[i].append(self._inner(i, g))

    def _inner(self, i: int, g: Tensor) -> Tensor:
        pair = (x.detach() for x in (g, self.at[i]))
        a, b = (x.to_dense() if x.is_sparse else x for x in pair)
        return compared(a, b, self._params[i].detach(), _ENTRIES)[2].double()

    def whole(self) -> bool:
        """Return whether gradients of the parts that were made add up to the whole's.

        Hooks and straight-through derivatives may look at all rows that come.
        """
        made = {i: torch.stack(x) for i, x in self._parts.items() if x}
        if not made:
            return True
        slopes = {i: self._slopes[i] for i in made}
        along = [self._inner(i, g) for i, g in slopes.items() if g is not None]
        parts = torch.cat([*made.values()])
        eps = max(torch.finfo(x.dtype).eps for x in self._params)
        off = (parts.sum() - torch.stack(along).sum()).abs()
        return bool(off <= eps ** (2 / 3) * parts.abs().sum())


def slopes_of(risk: Tensor, params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradient with its graph."""
    try:
        found = torch.autograd.grad(
            risk, params, root_of(risk), create_graph=True, allow_unused=True
        )
    except NotImplementedError as err:
        raise NotImplementedError(_ONCE.format(err)) from err
    ends = [g.grad_fn for g in found if g is not None and g.grad_fn]
    for node in graph_nodes(ends):
        if any(part in node.name() for part in _ABSENT):  # raises when it is run
            raise NotImplementedError(_ONCE.format(_lacking(risk)))
    return found
