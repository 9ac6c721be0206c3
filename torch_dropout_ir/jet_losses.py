"""Floor 1: what torch's losses are in a program, as nodes of a longer formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.jet_kernels import Kind
from torch_dropout_ir.jet_program import Program, Rule, signed

Slopes = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


def _by_slopes(slopes: Slopes) -> Rule:
    """Return the rule of a loss of single outputs, by its two derivatives."""

    def rule(to: Program, node: Any, inputs: list[int]) -> int | None:
        own, x, y = to.sizes[inputs[0]], node._saved_self, node._saved_target
        if inputs[1] >= 0 or own is None:
            return None
        saved = slopes(node, x, y)
        if saved[1].shape != x.shape:  # outputs that have been repeated
            return None
        number = to.add(Kind.GIVEN, own, inputs[0], -1, saved)
        if number is None or not node._saved_reduction:
            return number
        return to.total(number, 1 / x.numel() if node._saved_reduction == 1 else 1.0)

    return rule


def _squared(_: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * (x - y), torch.full_like(x, 2.0)


def _huber(node: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    off, delta = x - y, node._saved_delta
    return off.clamp(-delta, delta), off.abs() < delta


def _smooth(node: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    off, beta = x - y, node._saved_beta
    return (off / beta).clamp(-1, 1), (off.abs() < beta).to(x) / beta


def _logistic(node: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    s, weight, positive = x.sigmoid(), node._saved_weight, node._saved_pos_weight
    positive = 1.0 if positive is None else positive
    factor = 1 + (positive - 1) * y
    one, two = factor * s - positive * y, factor * s * (1 - s)
    return (one, two) if weight is None else (one * weight, two * weight)


def _likelihood(to: Program, node: Any, inputs: list[int]) -> int | None:
    """Linear in log-probabilities: minus that of the label, times its weight."""
    labels, weight = node._saved_target, node._saved_weight
    if to.sizes[inputs[0]] is None or node._saved_self.ndim != 2:
        return None
    ignored, reduction = signed(node._saved_ignore_index, 0), node._saved_reduction
    number = to.add(
        Kind.GATHERED,
        (1,),
        inputs[0],
        -1,
        (labels.unsqueeze(1),),
        start=ignored,
        step=1,
    )
    number = to.add(Kind.LINEAR, (), number, alpha=-1.0)
    if weight is not None:
        each = weight[labels.where(labels != ignored, 0)]
        number = to.add(Kind.TIMES, (), number, -1, (each, each))
    total = float(node._saved_total_weight) if reduction == 1 else 1.0
    # Of no label at all it is 0 / 0.
    return to.total(number, 1 / total if total else 0.0) if reduction else number


LOSSES: Final[dict[str, Rule]] = {
    "MseLossBackward0": _by_slopes(_squared),
    "HuberLossBackward0": _by_slopes(_huber),
    "SmoothL1LossBackward0": _by_slopes(_smooth),
    "BinaryCrossEntropyWithLogitsBackward0": _by_slopes(_logistic),
    "NllLossBackward0": _likelihood,
}
