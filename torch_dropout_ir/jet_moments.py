"""Floor 1: torch's losses, variances, lengths and determinants in a program.

As nodes of a longer formula, and of what they are made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.jet_kinds import Kind
from torch_dropout_ir.jet_program import Program, Rule, Shape, signed, told

Slopes = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
_SINGULAR: Final = 1e8  # a condition number, which loses half of the digits


def _joined(to: Program, a: int, saved: Any) -> tuple[Shape, list[int]]:
    """Return a row's shape, and dimensions joined in it."""
    own = to.row(a)
    dims = [signed(d, len(own) + 1) - 1 for d in saved or ()]
    told(dims and min(dims) >= 0)  # no rows are
    return own, dims


def _bits(dims: Sequence[int]) -> int:
    return sum([1 << d for d in dims])


def _variance(to: Program, node: Any, inputs: list[int]) -> int:
    """The mean of squares of what is off the mean, or the root of it."""
    a, x = inputs[0], node._saved_self
    own, dims = _joined(to, a, node._saved_dim)
    count = math.prod([own[d] for d in dims])
    kept = [1 if d in dims else size for d, size in enumerate(own)]
    mean = to.add(Kind.SUMMED, kept, a, dim=_bits(dims), alpha=1 / max(1, count))
    off = to.add(Kind.LINEAR, own, a, mean, alpha=1.0, beta=-1.0)
    away = x - x.mean([d + 1 for d in dims], keepdim=True)
    squares = to.add(Kind.TIMES, own, off, off, (away, away))
    less = node._saved_correction
    less = count - (1.0 if less is None else float(less))
    told(less > 0)
    sizes = node._input_metadata[0].shape[1:]
    total = to.add(Kind.SUMMED, sizes, squares, dim=_bits(dims), alpha=1 / less)
    if "Std" not in node.name():
        return total
    return to.add(Kind.SQRT, sizes, total, -1, (node._saved_result,))


def _length(to: Program, node: Any, inputs: list[int]) -> int:
    """The root of a sum of powers; at zero torch has its own derivatives."""
    a, x, y = inputs[0], node._saved_self, node._saved_result
    order = float(node._saved_ord if hasattr(node, "_saved_ord") else node._saved_p)
    own, dims = _joined(to, a, node._saved_dim)
    told(0 < order < math.inf and y.all())
    sizes = node._input_metadata[0].shape[1:]
    if order == 2:
        powers = to.add(Kind.TIMES, own, a, a, (x, x))
    else:
        powers = to.add(Kind.ABS, own, a, -1, (x,))
        powers = to.add(Kind.POWER, own, powers, -1, (x.abs(),), alpha=order)
    total = to.add(Kind.SUMMED, sizes, powers, dim=_bits(dims), alpha=1.0)
    if order == 2:
        return to.add(Kind.SQRT, sizes, total, -1, (y,))
    return to.add(Kind.POWER, sizes, total, -1, (y.double() ** order,), alpha=1 / order)


def _modulus(to: Program, node: Any, inputs: list[int]) -> int:
    """The length of a complex number, which is a pair; at zero as above."""
    own, y = to.row(inputs[0]), node._saved_self.abs()
    told(y.all())
    x = torch.view_as_real(node._saved_self)
    squares = to.add(Kind.TIMES, own, inputs[0], inputs[0], (x, x))
    bits = 1 << (len(own) - 1)
    total = to.add(Kind.SUMMED, own[:-1], squares, dim=bits, alpha=1.0)
    return to.add(Kind.SQRT, own[:-1], total, -1, (y,))


def _logarithm(to: Program, matrix: Tensor, a: int) -> int:
    """Return the number of the logarithm of the determinant of a matrix ``A`` a row.

    With ``M = B A`` and ``B`` the inverse at its value, which is a constant, its
    derivatives are those of ``tr M - tr(M M) / 2`` where the factors of that product
    are zero. Not next to a singular matrix, where terms of determinants cancel.
    """
    own, inverse = to.row(a), torch.linalg.inv(matrix)
    told(len(own) == 2 and len(inverse) == to.rows)
    told(not (matrix.norm(dim=(1, 2)) * inverse.norm(dim=(1, 2)) > _SINGULAR).any())
    cube, square, m = (own[0],) * 3, own, own[0]
    turned = to.reshaped((m, m, 1), a)
    by = inverse.mT.unsqueeze(2)  # [n, k, 1, i]
    turned = to.add(Kind.TIMES, cube, turned, -1, (by, by))
    turned = to.add(Kind.SUMMED, square, turned, dim=1, alpha=1.0)
    by = inverse.unsqueeze(3)  # [n, i, k, 1]
    made = to.add(Kind.TIMES, cube, to.reshaped((1, m, m), a), -1, (by, by))
    made = to.add(Kind.SUMMED, square, made, dim=2, alpha=1.0)
    zero = inverse.new_zeros(())
    both = to.add(Kind.TIMES, square, made, turned, (zero, zero))
    places = torch.eye(m, device=inverse.device)
    trace = to.add(Kind.TIMES, square, made, -1, (places, places))
    each = to.add(Kind.LINEAR, square, trace, both, alpha=1.0, beta=-0.5)
    return to.add(Kind.SUMMED, (), each, dim=3, alpha=1.0)


def _sign_and_logarithm(to: Program, node: Any, inputs: list[int]) -> int:
    """Both results, of which the sign is a constant."""
    number = _logarithm(to, node._saved_A.double(), inputs[0])
    to.add(Kind.LINEAR, (), number, alpha=0.0)
    return to.add(Kind.LINEAR, (), number, alpha=1.0)


def _determinant(to: Program, node: Any, inputs: list[int]) -> int:
    matrix = node._saved_A.double()
    y = torch.linalg.det(matrix)
    return to.add(Kind.GIVEN, (), _logarithm(to, matrix, inputs[0]), -1, (y, y))


# Of what is complex: a rule whose input are pairs.
OF_PAIRS: Final[dict[str, Rule]] = {
    "AbsBackward0": _modulus,
    "ViewAsRealBackward0": lambda _, __, inputs: inputs[0],
}
MOMENTS: Final[dict[str, Rule]] = {
    **dict.fromkeys(("VarBackward0", "StdBackward0"), _variance),
    **dict.fromkeys(("LinalgVectorNormBackward0", "NormBackward1"), _length),
    "LinalgSlogdetBackward0": _sign_and_logarithm,
    "LinalgDetBackward0": _determinant,
}


def _by_slopes(slopes: Slopes) -> Rule:
    """Return the rule of a loss of single outputs, by its two derivatives."""

    def rule(to: Program, node: Any, inputs: list[int]) -> int:
        own, x, y = to.row(inputs[0]), node._saved_self, node._saved_target
        told(inputs[1] < 0)
        saved = slopes(node, x, y)
        told(saved[1].shape == x.shape)  # else outputs have been repeated
        number = to.add(Kind.GIVEN, own, inputs[0], -1, saved)
        if not node._saved_reduction:
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


def _likelihood(to: Program, node: Any, inputs: list[int]) -> int:
    """Linear in log-probabilities: minus that of the label, times its weight."""
    labels, weight = node._saved_target, node._saved_weight
    a = inputs[0]
    told(len(to.row(a)) == 1)
    index = (labels.unsqueeze(1),)
    ignored, reduction = signed(node._saved_ignore_index, 0), node._saved_reduction
    number = to.add(Kind.GATHERED, (1,), a, -1, index, start=ignored, step=1)
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
