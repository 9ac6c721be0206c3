r"""A penalty on the gradient of a loss, which is differentiated twice.

The derivative of :math:`\frac{\epsilon}{4} \lVert g \rVert^2` is
:math:`\frac{\epsilon}{2} H g`, a product with the Hessian. Of a large batch it is made
with the value, a part at a time: the graph of both derivatives is that of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from torch_dropout_ir.arrivals import (
    ONCE,
    arrivals,
    graph_nodes,
    last_nodes,
    parts_given,
    root_of,
)
from torch_dropout_ir.functional import Batch, call, parameters
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.checks import check_differentiable
from torch_dropout_ir.regularizers.gradient_norm import learning_rates
from torch_dropout_ir.regularizers.inner_products import compared, weighted_squares
from torch_dropout_ir.regularizers.known_gradient import (
    learns_alone,
    parts_pay,
    with_gradient_beside,
)
from torch_dropout_ir.regularizers.masked_rows import MaskedRows
from torch_dropout_ir.regularizers.penalty_cuts import CutPasses
from torch_dropout_ir.sharpness.derivatives import lean_derivatives
from torch_dropout_ir.sharpness.frozen import twice_differentiable
from torch_dropout_ir.sharpness.linear import added_into
from torch_dropout_ir.tracing import unpacked_by_hooks

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


def with_penalty(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    lr: float | Mapping[str, float],
    *,
    weight: float,
    sign: float,
    move_buffers: bool,
    max_bytes: int | None,
    beside: Callable[[], Tensor] | None = None,
) -> Tensor:
    r"""Return a risk under dropout with a penalty on its gradient, at the same masks.

    .. math::
        w R_{drop} + s \frac{\epsilon}{4} \lVert \nabla R_{drop} \rVert^2 + b

    Args:
        model: The model.
        batch: The batch.
        loss: The loss.
        lr: One coefficient, or one a parameter name.
        weight: :math:`w`.
        sign: :math:`s`.
        move_buffers: Whether running statistics move, as in a step of training.
        max_bytes: Memory of a graph of second derivatives, beyond which it is made of
            parts of the batch, or of the pass if samples meet; None keeps that of all.
        beside: Gives :math:`b`, a loss of another pass, which comes last.

    Returns:
        Scalar, to be differentiated in the parameters.

    Raises:
        ValueError: If ``lr`` lacks a parameter, or the loss depends on none.
        NotImplementedError: If torch cannot differentiate the gradient again.
    """  # noqa: DOC502 (raised by the checks)
    named = parameters(model)
    params = list(named.values())
    rates = learning_rates("modified_loss", lr, list(named))
    rows = MaskedRows(model, batch, loss, move_buffers)
    # With None, a third derivative may be asked for.
    lean = None if max_bytes is None else lean_derivatives()
    with twice_differentiable(lean) as operations:
        outputs = call(model, batch[0], move_buffers=move_buffers)
        risk = loss(outputs, batch[1])
    check_differentiable("modified_loss", risk)
    large = max_bytes is not None and parts_pay(risk, params, max_bytes)
    if large and not operations.again:
        found: Known | None
        if rows.apart(outputs, risk):
            found = _by_rows(rows, risk, params, rates, weight, sign)
        elif unpacked_by_hooks():  # what is saved is somebody's to keep
            found = None
        else:
            del outputs, risk  # their graph
            found = _by_cuts(model, batch, loss, rows, params, rates, weight, sign)
        if found is not None:
            return with_gradient_beside(found[0], params, found[1], beside)
        rows.rewind_buffers()  # which this pass moves as the first did
        with rows.again(), twice_differentiable(lean):
            outputs = call(model, batch[0], move_buffers=move_buffers)
            risk = loss(outputs, batch[1])
    penalty = sign * _penalty(_slopes(risk, params), rates)
    if weight:
        penalty = penalty + weight * risk
    if beside is None:
        return penalty
    if max_bytes is None or not learns_alone(risk, params):
        return penalty + beside()
    # Another pass follows: none of the graph is held through it.
    own: list[Tensor | None] = []
    own += torch.autograd.grad(penalty, params, allow_unused=True)
    return with_gradient_beside(penalty.detach(), params, own, beside)


Known: TypeAlias = "tuple[Tensor, list[Tensor | None]]"


def _by_rows(
    rows: MaskedRows,
    risk: Tensor,
    params: Sequence[Tensor],
    rates: Sequence[float],
    weight: float,
    sign: float,
) -> Known | None:
    """Return the value and its gradient by parts of the batch; None if those meet."""
    slopes = torch.autograd.grad(risk, params, allow_unused=True)
    value = sign * _penalty(slopes, rates) + weight * risk.detach()
    gradient: list[Tensor | None]
    gradient = [None if g is None else g * weight for g in slopes]
    products = _Products(params, slopes, rates, sign, gradient)
    for part in rows.parts():
        if part is None:
            return None
        products.add(part)
        del part  # its graph
    # Else rows meet in derivatives alone.
    return (value, gradient) if products.whole() else None


def _by_cuts(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    rows: MaskedRows,
    params: Sequence[Tensor],
    rates: Sequence[float],
    weight: float,
    sign: float,
) -> Known | None:
    """Return them by parts of passes; None where those cannot be cut, or differ."""

    def run() -> Tensor:
        with rows.again(), twice_differentiable(lean_derivatives()):
            return loss(call(model, batch[0]), batch[1])

    passes = CutPasses(run, params)
    try:
        with rows.unmoved():
            slopes = passes.slopes()
            if slopes is None:
                return None
            value = sign * _penalty(slopes, rates) + weight * passes.value
            gradient = [None if g is None else g * weight for g in slopes]
            products = _Products(params, slopes, rates, sign, gradient)
            del slopes
            passes.products(products.at, products.receive)
    except Exception:  # of a model that is another in each pass
        return None
    return value, gradient


class _Products:
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
            _slopes(risk, self._params)
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


def _slopes(risk: Tensor, params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
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


def _penalty(slopes: Sequence[Tensor | None], rates: Sequence[float]) -> Tensor:
    """Return ``(lr / 4) ||g||^2``."""
    pairs = [(r, g) for r, g in zip(rates, slopes, strict=True) if g is not None]
    own, known = zip(*pairs, strict=True)
    return weighted_squares(own, known)
