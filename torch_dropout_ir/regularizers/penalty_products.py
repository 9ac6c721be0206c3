"""A gradient with its graph, the product with a Hessian, and values with gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torch_dropout_ir import tracing
from torch_dropout_ir.arrivals import (
    ONCE,
    arrivals,
    graph_nodes,
    last_nodes,
    parts_given,
    root_of,
)
from torch_dropout_ir.regularizers.graph_memory import made, makes
from torch_dropout_ir.sharpness.linear import added_into, in_roots_alone

_TAKEN: Final = (
    "modified_loss: expected a loss whose gradient has been taken with it to be "
    "differentiated once, got create_graph=True. Pass `max_bytes=None`, which keeps "
    "its graph for that."
)
_EXACT: Final = (torch.float32, torch.float64)
# A graph that is let go of as its derivative runs, over what the pass made.
_GRAPH: Final = 3
_ONCE: Final = (
    "modified_loss: expected a model and a loss that torch can differentiate twice, "
    "got an operator whose derivative has none ({}), as those of "
    "`torch.segment_reduce` and of gamma noise. Write it in others, or use "
    "`kind='L1'` or 'L4' with `r1='monte_carlo'`."
)
# Nodes of a gradient's graph that raise when the penalty is differentiated, if they are
# reached: a derivative in the parameters alone goes past them.
_ABSENT: Final = (
    "NotImplemented", "EmbeddingBagBackwardBackward", "StandardGammaGrad", ONCE
)  # fmt: skip
_KNOWN: Final = ("EmbeddingBag", "SegmentReduce", "StandardGamma", "Dirichlet")


def _lacking(risk: Tensor) -> str:
    """Say which operators of a loss, by the names of their derivatives, it may be."""
    names = {
        node.name() for node in graph_nodes([risk.grad_fn] if risk.grad_fn else [])
    }
    known = {name for name in names if any(word in name for word in _KNOWN)}
    found = known or {name for name in names if "AccumulateGrad" not in name}
    return " or ".join(sorted(found))


class Products:
    r"""Adds :math:`s \frac{\epsilon}{2} H g` to a gradient, part by part.

    A gradient is linear in the root :math:`r` that is sent back, :math:`u^\top g = r
    \frac{d}{dr} u^\top g`: so do parts tell, at next to no cost, what theirs are, of
    weights too whose gradient nobody makes. Of each parameter there are the ``slopes``
    :math:`g`, the ``rates`` :math:`\epsilon` and the ``total`` that is added to;
    ``sign`` is :math:`s`.
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
        self._beside = {
            i: g for i, g in enumerate(slopes) if g is not None and i not in self.at
        }
        # What each adds to the product of both, or, where its rate is 0, with itself.
        self._expected = {
            i: torch.linalg.vector_norm(g.detach()).double().square() * share
            for i, g in enumerate(slopes)
            if g is not None
            for share in [rates[i] / most if i in self.at else 1.0]
        }
        self._asked = {*self.at}
        self._along: list[Tensor] = []
        pairs = enumerate(zip(params, total, strict=True))
        self._sums = {i: (x, s) for i, (x, s) in pairs if s is not None}

    def receive(self, i: int, g: Tensor) -> None:
        """Add a part of the product of parameter ``i``."""
        self._sums[i][1].add_(g.detach(), alpha=self._scale)

    def add(self, risk: Tensor) -> None:
        """Add the product with the Hessian of a part's risk."""
        found: dict[int, GradientEdge] = {}

        def note(i: int, g: Tensor) -> None:  # its value is let go of
            if g.requires_grad:
                found[i] = get_gradient_edge(g)

        root = root_of(risk, learns=True)
        assert root is not None
        with arrivals(self._params, note):
            slopes_of(risk, self._params, root)
        self._asked |= self._beside.keys()
        with in_roots_alone(self._params):
            self._back(found, self._beside, [root], keep=True)
        edges = [found[i] for i in self.at if i in found]
        last = last_nodes(graph_nodes([edge.node for edge in edges]), self._params)
        own, sums = zip(*self._sums.values(), strict=True)
        with parts_given(last, self.receive), added_into(own, sums, self._scale):
            rest = self._back(found, self.at, [root, *self._params])
        for i, g in enumerate(rest):
            if g is not None:
                self.receive(i, g)

    def _back(
        self,
        found: Mapping[int, GradientEdge],
        at: Mapping[int, Tensor],
        ends: Sequence[Tensor],
        keep: bool = False,
    ) -> Sequence[Tensor | None]:
        """Differentiate a part's gradient along a vector, first in its root."""
        edges = {i: edge for i, edge in found.items() if i in at}
        if not edges:
            return ()
        own, *rest = torch.autograd.grad(
            [*edges.values()], ends, [at[i] for i in edges], retain_graph=keep,
            allow_unused=True,
        )  # fmt: skip
        self.note(own)
        return rest

    def note(self, along: Tensor | None) -> None:
        r"""Take note of the derivative of :math:`u^\top g` in what a part sent back."""
        if along is not None:
            self._along.append(along.detach().double().sum())

    def whole(self) -> bool:
        """Return whether gradients of the parts add up to that of the whole.

        Hooks and straight-through derivatives may look at all rows that come.
        """
        known = [self._expected[i] for i in self._asked]
        if not known:
            return True
        expected = torch.stack(known).sum()
        parts = torch.stack([expected.new_zeros(()), *self._along])
        eps = max(torch.finfo(x.dtype).eps for x in self._params)
        off = (parts.sum() - expected).abs()
        return bool(off <= eps ** (2 / 3) * parts.abs().sum())


def slopes_of(
    risk: Tensor, params: Sequence[Tensor], root: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradient with its graph."""
    try:
        found = torch.autograd.grad(
            risk, params, root, create_graph=True, allow_unused=True
        )
    except NotImplementedError as err:
        raise NotImplementedError(_ONCE.format(err)) from err
    ends = [g.grad_fn for g in found if g is not None and g.grad_fn]
    for node in graph_nodes(ends):
        if any(part in node.name() for part in _ABSENT):  # raises when it is run
            raise NotImplementedError(_ONCE.format(_lacking(risk)))
    return found


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradient: Sequence[Tensor | None], *params: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, root: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_TAKEN)
        found = ctx.saved_tensors
        if root != 1:  # else it is given away, and nothing of its size is made
            found = [None if g is None else g * root for g in found]
        return None, None, *found


def learns_alone(risk: Tensor, params: Sequence[Tensor]) -> bool:
    """Return whether a derivative in parameters may be taken before anybody asks.

    Not where something else depends on it, where its factor is to come first, as of
    half precision, and where hooks or transforms look on.
    """
    if not tracing.eager() or risk.grad_fn is None:
        return False
    if any(torch.is_autocast_enabled(kind) for kind in {x.device.type for x in params}):
        return False
    if any(x.dtype not in _EXACT or x._backward_hooks for x in params):
        return False
    own = {id(x) for x in params}
    for node in graph_nodes([risk.grad_fn]):
        if id(getattr(node, "variable", params[0])) not in own:
            return False
        made = (x.dtype for x in node._input_metadata)
        if any(dtype.is_floating_point and dtype not in _EXACT for dtype in made):
            return False
    return True


def parts_pay(risk: Tensor, params: Sequence[Tensor], max_bytes: int) -> bool:
    """Return whether a second derivative's graph is better made of parts of the batch.

    Not where there is more in the parameters, where a derivative is not to be taken
    now, and where each pass may be a collective of several processes.
    """
    nodes = list(graph_nodes([risk.grad_fn] if risk.grad_fn else []))
    if _GRAPH * made(nodes) <= max_bytes or not learns_alone(risk, params):
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    new = made(n for n in nodes if makes(n))
    return _GRAPH * new > max_bytes and new >= sum(x.nbytes for x in params)


def with_gradient(
    value: Tensor, params: Sequence[Tensor], gradient: Sequence[Tensor | None]
) -> Tensor:
    """Return a scalar, differentiable once, whose gradient is known."""
    return _Known.apply(value, gradient, *params)


def with_gradient_beside(
    value: Tensor,
    params: Sequence[Tensor],
    gradient: list[Tensor | None],
    beside: Callable[[], Tensor] | None,
) -> Tensor:
    """Return what :func:`with_gradient` does, and ``beside()`` added to it.

    The other loss's gradient is added as it comes to ``gradient``, which is used up:
    there is no second one.
    """
    if beside is None:
        return with_gradient(value, params, gradient)
    risk = beside()
    if not learns_alone(risk, params):
        return with_gradient(value, params, gradient) + risk

    def add(i: int, g: Tensor) -> None:
        own = gradient[i]
        gradient[i] = g if own is None else own + g  # either may be elsewhere too

    with arrivals(params, add):
        torch.autograd.grad(risk, params, allow_unused=True)
    return with_gradient(value + risk.detach(), params, gradient)
