"""Floor 1: closed forms: what the Hessian of usual losses is, or is a multiple of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_dropout_ir.losses import Loss, half_squared_error

_FEW_LABELS: Final = 1024


def squared_scale(loss: Loss, shape: torch.Size, targets: Any = None) -> float:
    """Return ``a`` of ``H_i = a * identity`` for a squared loss of outputs ``shape``.

    Targets of another shape make torch count an output as often as it is broadcast.
    """
    if getattr(loss.function, "func", loss.function) is half_squared_error:
        return 1.0 / shape[0]
    if loss.reduction == "mean":
        return 2.0 / shape.numel()
    if not isinstance(targets, Tensor) or targets.shape == shape:
        return 2.0
    counted = torch.broadcast_shapes(shape, targets.shape).numel()
    return 2.0 * counted / shape.numel()


def cross_entropy_scale(loss: Loss, outputs: Tensor, targets: Any) -> Tensor:
    """Return ``a_i`` of ``H_i = a_i (diag(s_i) - s_i s_i')``, 1 in place of classes.

    ``a_i`` is the mass of the target: with class weights ``w`` and label smoothing
    ``e`` it is ``(1 - e) w_y + (e / C) sum w``, and the mean is over the ``w_y``.
    Ignored targets weigh nothing.

    Raises:
        ValueError: If the loss weighs classes and ``targets`` is None.
    """
    classes = 1 if outputs.ndim > 1 else 0
    weight = loss.option("weight", None)
    if not isinstance(targets, Tensor):
        if weight is not None:
            raise ValueError(
                "expected `targets`: the Hessian of a cross-entropy with class weights "
                "depends on them, got None"
            )
        mass = torch.ones_like(outputs.detach().narrow(classes, 0, 1))
        return mass / mass.numel() if loss.reduction == "mean" else mass
    smoothing = loss.option("label_smoothing", 0.0)
    if weight is None and not targets.is_floating_point():  # all weigh one
        mass = (targets != loss.option("ignore_index", -100)).to(outputs)
        mass = mass / mass.sum() if loss.reduction == "mean" else mass
        return mass.unsqueeze(classes)
    if weight is None:
        weight = outputs.new_ones(outputs.shape[classes])
    weight = weight.detach().to(outputs)
    if targets.is_floating_point():
        weighted = targets.detach().movedim(classes, -1) @ weight
        count: float | Tensor = float(weighted.numel())
        known = torch.ones_like(weighted)
    else:
        known = (targets != loss.option("ignore_index", -100)).to(outputs)
        weighted = weight[torch.where(known > 0, targets, 0)] * known
        count = weighted.sum()
    mass = (1 - smoothing) * weighted + smoothing * weight.mean() * known
    mass = mass.unsqueeze(classes)
    return mass / count if loss.reduction == "mean" else mass


def with_root(loss: Loss, targets: Any, outputs: Tensor | None = None) -> Loss:
    """Return a loss, a general one where a cross-entropy may weigh below zero.

    Torch takes such class weights and soft targets; the Hessian then has no real root.
    """
    if loss.kind != "cross_entropy":
        return loss
    told = outputs is None or getattr(targets, "shape", None) == outputs.shape
    below = any([
        isinstance(x, Tensor) and x.is_floating_point() and bool((x < 0).any())
        for x in (loss.option("weight", None), targets if told else None)
    ])
    return dataclasses.replace(loss, kind="general") if below else loss


def is_logistic(loss: Loss) -> bool:
    """Whether a loss is torch's binary cross-entropy of logits."""
    function = getattr(loss.function, "func", loss.function)
    return (
        function is F.binary_cross_entropy_with_logits
        or type(function) is nn.BCEWithLogitsLoss
    )


def is_convex(loss: Loss) -> bool:
    """Whether an elementwise or general loss is known to be convex in the outputs."""
    names = ("weight", "pos_weight")
    return is_logistic(loss) and all([loss.option(x, None) is None for x in names])


def closed_diagonal(loss: Loss) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return what gives second derivatives of a loss of torch's in single outputs.

    It takes outputs and targets, of one shape and dtype; None where the second
    derivatives are not at hand.
    """
    if loss.kind != "elementwise" or loss.option("weight", None) is not None:
        return None
    function = getattr(loss.function, "func", loss.function)
    second = _SECOND.get(function) or _SECOND.get(type(function))
    if second is None:
        return None
    mean = loss.reduction == "mean"

    def diagonal(f: Tensor, y: Tensor) -> Tensor:
        found = second(loss, f, y.detach())
        return found / found.numel() if mean else found

    return diagonal


def alike(outputs: Tensor, targets: Any) -> bool:
    """Whether targets are a tensor of the outputs' shape and dtype."""
    return (
        isinstance(targets, Tensor)
        and targets.shape == outputs.shape
        and targets.dtype == outputs.dtype
    )


def _huber(loss: Loss, f: Tensor, y: Tensor) -> Tensor:
    return ((f - y).abs() < loss.option("delta", 1.0)).to(f.dtype)


def _smooth_l1(loss: Loss, f: Tensor, y: Tensor) -> Tensor:
    beta = loss.option("beta", 1.0)
    inside = ((f - y).abs() < beta).to(f.dtype)
    return inside / beta if beta else inside  # 0, as of an absolute error


def _poisson(loss: Loss, f: Tensor, y: Tensor) -> Tensor:
    if loss.option("log_input", True):
        return f.exp()
    return y / (f + loss.option("eps", 1e-8)).square()


def _soft_margin(_: Loss, f: Tensor, y: Tensor) -> Tensor:
    return y.square() * (y * f).sigmoid() * (-y * f).sigmoid()


_SECOND: Final[dict[Any, Callable[[Loss, Tensor, Tensor], Tensor]]] = {
    F.huber_loss: _huber,
    nn.HuberLoss: _huber,
    F.smooth_l1_loss: _smooth_l1,
    nn.SmoothL1Loss: _smooth_l1,
    F.poisson_nll_loss: _poisson,
    nn.PoissonNLLLoss: _poisson,
    F.soft_margin_loss: _soft_margin,
    nn.SoftMarginLoss: _soft_margin,
}


def logistic_diagonal(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the diagonal Hessian of binary cross-entropy in logits ``f``.

    ``w (1 + (c - 1) y) s (1 - s)`` with ``s`` the sigmoid of ``f``, the weight ``w`` of
    an output and ``c`` of the positive, over the number of outputs where the loss is a
    mean.
    """
    found = outputs.sigmoid() * (-outputs).sigmoid()
    if loss.reduction == "mean":
        found = found / outputs.numel()
    positive = loss.option("pos_weight", None)
    if positive is not None:
        found = found * (1 + (positive.to(found) - 1) * targets)
    weight = loss.option("weight", None)
    return found if weight is None else found * weight.to(found)


def even_scale(loss: Loss, outputs: Tensor, targets: Any) -> float | None:
    """Return :func:`cross_entropy_scale` where a look at few labels shows it is even.

    To look takes less time than the first of several small operations. Half precision
    has no room for roots without their weight.
    """
    if not isinstance(targets, Tensor) or targets.numel() > _FEW_LABELS:
        return None
    wide = outputs.dtype in (torch.float32, torch.float64)
    known = targets.is_cpu and not targets.is_floating_point()
    if not wide or not known or loss.option("weight", None) is not None:
        return None
    labels = (targets if targets.ndim == 1 else targets.flatten()).tolist()
    if loss.option("ignore_index", -100) in labels:
        return None
    return 1.0 / targets.numel() if loss.reduction == "mean" else 1.0
