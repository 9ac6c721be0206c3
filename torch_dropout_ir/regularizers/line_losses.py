"""How lines go through losses, and what is found along some dimensions.

Terms that are added up and what is found of each row or column are taken a part of the
tensor at a time: of all at once torch's forward mode holds several times what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.regularizers.line_calls import STILL, Call, Line, aten, each
from torch_dropout_ir.regularizers.line_graphs import along, outside
from torch_dropout_ir.regularizers.line_slabs import by_slopes, part_size, parts

_NONE, _MEAN, _SUM = range(3)
# The argument that names the dimensions, and the reduction.
_DIMS: Final = {"linalg_vector_norm": 2, "norm": 2}
_HOW: Final = {"binary_cross_entropy": 3, "binary_cross_entropy_with_logits": 4}


def labelled(call: Call, moving: list[int], _: Any) -> list[Line] | None:
    """Take a loss of labels, linear in log-probabilities."""
    if moving != [0]:
        return None
    return [*each(call, 0, lambda u: call.at({0: u})[0]), STILL]


def added(call: Call, moving: list[int], value: Tensor) -> list[Line] | None:
    """Take a mean or sum of a function of single elements of two tensors."""
    x, y, *rest = call.args
    at = _HOW.get(call.func.overloadpacket.__name__, 2)
    how = call.args[at] if len(call.args) > at else _MEAN
    weighed = any([isinstance(t, Tensor) for t in rest])
    if how == _NONE or weighed or x.shape != y.shape or not set(moving) <= {0, 1}:
        return None
    square = call.func.overloadpacket is aten.mse_loss

    def slab(a: Tensor, b: Tensor, one: Line, other: Line) -> Line:
        if square:
            return _squared(a, b, one, other)
        if moving == [0]:
            found = by_slopes(lambda a: call.at({0: a, 1: b, at: _NONE}), [a], [one])
            first, second = [None if u is None else u.sum() for u in found]
            return first, second
        both = [a, b], [one, other]
        return along(lambda a, b: call.at({0: a, 1: b, at: _SUM}), *both)[1][0]

    def run() -> Line:
        total = [value.new_zeros(()), value.new_zeros(())]
        for a, b, *us in parts([x, y, *call.line(0), *call.line(1)], rows=False):
            found = slab(a, b, (us[0], us[1]), (us[2], us[3]))
            for k, u in enumerate(found):
                total[k] += 0 if u is None else u
        size = x.numel() if how == _MEAN else 1
        return total[0] / size, total[1] / size

    return [outside(run, x)]


def _squared(a: Tensor, b: Tensor, *lines: Line) -> Line:
    pairs = zip(*lines, strict=True)
    u, w = [v if o is None else -o if v is None else v - o for v, o in pairs]
    off = a - b
    first = None if u is None else 2 * (off * u).sum()
    terms = [2 * (x * y).sum() for x, y in ((u, u), (off, w)) if y is not None]
    return first, sum(terms) if terms else None


def reduced(call: Call, moving: list[int], value: Any) -> list[Line] | None:
    """Take what is found along some dimensions, some places of another at a time."""
    x, name = call.args[0], call.func.overloadpacket.__name__
    at = _DIMS.get(name, 1)
    dims = call.args[at] if len(call.args) > at else None
    if isinstance(dims, bool) or not dims:
        dims = range(x.ndim)
    gone = sorted({d % x.ndim for d in dims}) if x.ndim else []
    kept = [d for d in range(x.ndim) if d not in gone]
    if moving != [0] or not kept:
        return None
    dim = max(kept, key=x.shape.__getitem__)
    first = value if isinstance(value, Tensor) else value[0]
    to = dim if first.ndim == x.ndim else dim - sum([d < dim for d in gone])
    size = part_size(x, x.numel() // max(x.shape[dim], 1))
    squares = _squares_of(call, gone, first.ndim == x.ndim)

    def run() -> list[Line]:
        found = []
        for start in range(0, x.shape[dim], size):
            own = dim, start, min(size, x.shape[dim] - start)
            u, w = [None if t is None else t.narrow(*own) for t in call.line(0)]
            part = x.narrow(*own)
            if squares is not None:
                found.append([squares(part, u, w)])
            else:
                found.append(along(lambda x: call.at({0: x}), [part], [(u, w)])[1])
        return [_joined(lines, to) for lines in zip(*found, strict=True)]

    return outside(run, x)


def distances(call: Call, _: list[int], value: Tensor) -> list[Line] | None:
    r"""Return the line of distances between rows; None where one is zero.

    Of :math:`d^2 = \lVert x - y \rVert^2` the derivatives are :math:`\dot d d = \langle
    x - y, \dot x - \dot y \rangle` and :math:`\ddot d d = \lVert \dot x - \dot y
    \rVert^2 + \langle x - y, \ddot x - \ddot y \rangle - \dot d^2`.
    """
    x, y = call.args
    if not bool(value.all()):
        return None
    lines = zip((x, y), (call.line(0), call.line(1)), strict=True)
    (u, w), (v, z) = (
        [torch.zeros_like(a) if t is None else t for t in line] for a, line in lines
    )
    first = _inner(x, y, u, v).div_(value)
    second = _inner(u, v, u, v).addcmul_(first, first, value=-1)
    if any([call.line(i)[1] is not None for i in (0, 1)]):
        second += _inner(x, y, w, z)
    return [(first, second.div_(value))]


def _inner(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    r"""Return :math:`\langle x_i - y_j, u_i - v_j \rangle`."""
    found = torch.cat((u, x), -1) @ torch.cat((y, v), -1).mT
    found.neg_().add_((x * u).sum(-1, True))
    return found.add_((y * v).sum(-1).unsqueeze(-2))


def _squares_of(
    call: Call, dims: list[int], keep: bool
) -> Callable[[Tensor, Tensor | None, Tensor | None], Line] | None:
    r"""Return the line of a sum of squares or its root; None of what is neither.

    Of :math:`s = x^\top x / n` they are :math:`2 \dot x^\top x / n` and :math:`2 (\dot
    x^\top \dot x + x^\top \ddot x) / n`; of a variance ``x`` is less its mean.
    """
    name, x = call.func.overloadpacket.__name__, call.args[0]
    length = name == "linalg_vector_norm" and call.args[1:2] in ([], [2])
    spread = name in ("std", "var") and call.func._overloadname == "correction"
    if not length and not spread:
        return None
    count = 1.0
    if not length:
        correction = call.kwargs.get("correction")
        count = math.prod([x.shape[d] for d in dims])
        count = max(count - (1 if correction is None else correction), 0) or math.nan

    def squares(x: Tensor, u: Tensor | None, w: Tensor | None) -> Line:
        u = torch.zeros_like(x) if u is None else u
        if not length:
            x, u = [y - y.mean(dims, True) for y in (x, u)]
        first = 2 / count * (x * u).sum(dims, keep)
        second = u * u if w is None else u * u + x * w
        second = 2 / count * second.sum(dims, keep)
        if name == "var":
            return first, second
        root = ((x * x).sum(dims, keep) / count).sqrt()
        # At 0 autograd says that a length has none, and of a deviation that it is 0.
        least = root if length else root.masked_fill(root == 0, math.inf)
        first = first / (2 * least)
        return first, second / (2 * least) - first * first / least

    return squares


def _joined(lines: Sequence[Line], dim: int) -> Line:
    first, second = (
        torch.cat(own, dim) if all([u is not None for u in own]) else None
        for own in zip(*lines, strict=True)
    )
    return first, second
