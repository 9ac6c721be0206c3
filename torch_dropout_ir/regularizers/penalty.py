r"""A penalty on the gradient of a loss, which is differentiated twice.

The derivative of :math:`\frac{\epsilon}{4} \lVert g \rVert^2` is
:math:`\frac{\epsilon}{2} H g`, a product with the Hessian. Of a large batch it is made
with the value, a part at a time: the graph of both derivatives is that of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_dropout_ir.arguments import check_differentiable
from torch_dropout_ir.arrivals import root_of
from torch_dropout_ir.exhaustion import raise_if_exhausted
from torch_dropout_ir.functional import Batch, call, parameters
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.gradient_norm import learning_rates
from torch_dropout_ir.regularizers.gradient_pairs import wide_dtype
from torch_dropout_ir.regularizers.masked import MaskedRows
from torch_dropout_ir.regularizers.penalty_cuts import CutPasses
from torch_dropout_ir.regularizers.penalty_products import (
    Products,
    learns_alone,
    parts_pay,
    slopes_of,
    with_gradient_beside,
)
from torch_dropout_ir.sharpness.derivatives import lean_derivatives
from torch_dropout_ir.sharpness.frozen import twice_differentiable
from torch_dropout_ir.tracing import unpacked_by_hooks


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

    with :math:`\epsilon` the ``lr``, one or one a parameter name; ``beside`` gives
    :math:`b`, a loss of another pass, which comes last. A graph of second derivatives
    beyond ``max_bytes`` is made of parts of the batch, or of the pass if samples meet;
    None keeps that of all.
    """
    named = parameters(model)
    params = list(named.values())
    rates = learning_rates("modified_loss", lr, list(named))
    rows = MaskedRows(model, batch, loss, move_buffers)
    # With None, a third derivative may be asked for.
    lean = None if max_bytes is None else lean_derivatives()
    with twice_differentiable(lean) as operations:
        outputs = call(model, batch[0], move_buffers=move_buffers)
        risk = loss(outputs, batch[1])
    check_differentiable(risk, "parameters", "modified_loss")
    large = max_bytes is not None and parts_pay(risk, params, max_bytes)
    if large and operations.plain and not operations.again:
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
    penalty = sign * _penalty(slopes_of(risk, params, root_of(risk)), rates)
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
    gradient: list[Tensor | None] = [None if g is None else g * weight for g in slopes]
    products = Products(params, slopes, rates, sign, gradient)
    try:
        for part in rows.parts():
            if part is None:
                return None
            products.add(part)
            del part  # its graph
    except NotImplementedError:  # of what has no second derivative: said of the whole
        return None
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
            products = Products(params, slopes, rates, sign, gradient)
            del slopes
            products.note(passes.products(products.at, products.receive))
    except Exception as err:  # of a model that is another in each pass
        raise_if_exhausted(err)
        return None
    return (value, gradient) if products.whole() else None


def _penalty(slopes: Sequence[Tensor | None], rates: Sequence[float]) -> Tensor:
    """Return ``(lr / 4) ||g||^2``; of complex parameters both parts count.

    In float32 at least: squares of half precision vanish.
    """
    pairs = [(r, g) for r, g in zip(rates, slopes, strict=True) if g is not None]
    return torch.stack([r / 4 * _Square.apply(g) for r, g in pairs]).sum()


class _Square(torch.autograd.Function):
    """A squared norm, whose derivative is one tensor; that of ``x * x`` makes two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.linalg.vector_norm(x.to(wide_dtype(x))).square()

    @staticmethod
    def backward(ctx: Any, root: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        wide: Tensor = x.to(wide_dtype(x)) * (2 * root)
        return wide.to(x.dtype)
