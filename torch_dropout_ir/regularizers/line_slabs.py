r"""How lines go through functions that are not linear, a part of the tensor at a time.

Where :math:`x(t)` has derivatives :math:`\dot x` and :math:`\ddot x` at 0, those of
``f(x)`` are :math:`f' \dot x` and :math:`f''[\dot x, \dot x] + f' \ddot x`. Parts hold
little, and where nobody else reads :math:`\dot x` and :math:`\ddot x`, what is found
takes their place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.regularizers.line_calls import (
    STILL,
    Call,
    Line,
    aten,
    room,
    tensors,
)
from torch_dropout_ir.regularizers.line_graphs import along, by_graph, outside

Function = Callable[[Tensor], Tensor]
Slab = Callable[[Tensor, Line], Line]
# Elements of a part for each thread: what one operation makes of it stays in a cache.
_PART: Final = 2**15
# Parts of a large tensor: some eight tensors of a part are made.
_PARTS: Final = 32


def elementwise(call: Call, moving: list[int], value: Any) -> list[Line]:
    """Take a function of single elements by its derivatives, from a graph of a part."""
    wide = any([x.ndim for x in tensors(call.args[1:])])
    if moving != [0] or wide or call.args[0].is_complex():
        return by_graph(call, moving, value)
    own = _in_slabs(call, functools.partial(by_slopes, _one(call)), rows=False)
    return [own, *[STILL] * (len(tensors(value)) - 1)]


def softened(call: Call, moving: list[int], value: Tensor) -> list[Line] | None:
    r"""Take a softmax or its logarithm, by what was found.

    With :math:`s` the softmax and :math:`\dot c = \dot x - s^\top \dot x`, the
    logarithm has :math:`\dot c` and :math:`\ddot c - s^\top \dot c^2`.

    Args:
        call: The call.
        moving: Which arguments move.
        value: What it returned.

    Returns:
        The line of that.
    """
    if moving != [0]:
        return None
    log = call.func.overloadpacket is aten._log_softmax
    dim = call.args[1]

    def slab(y: Tensor, line: Line) -> Line:
        s = y.exp() if log else y
        c, d = [None if u is None else u - (s * u).sum(-1, True) for u in line]
        if c is not None:
            square = c * c
            less = (s * square).sum(-1, True)
            more = -less if log else square - less
            d = more if d is None else d + more
        if log:
            return c, d
        return None if c is None else s * c, None if d is None else s * d

    def last(x: Tensor) -> Tensor:
        return x.movedim(dim, -1) if x.ndim > 1 else x.view(1, -1)

    return [_in_slabs(call, slab, rows=True, of=value, seen=last)]


def group_normalized(call: Call, moving: list[int], value: Any) -> list[Line]:
    """Take each sample for itself."""
    if moving != [0]:
        return by_graph(call, moving, value)
    _, weight, bias, _, *rest = call.args

    def function(x: Tensor) -> Tensor:
        found: Tensor = call.func(x, weight, bias, len(x), *rest)[0]
        return found

    return [
        _in_slabs(call, functools.partial(_twice, function), rows=True),
        STILL,
        STILL,
    ]


def layer_normalized(call: Call, moving: list[int], value: Any) -> list[Line]:
    """Take each row for itself."""
    x, shape, *_ = call.args
    if moving != [0] or x.ndim == len(shape):
        return by_graph(call, moving, value)
    slab = functools.partial(_twice, _one(call))
    return [_in_slabs(call, slab, rows=True), STILL, STILL]


def _one(call: Call) -> Function:
    """Return the operation as a function of its first argument to its first result."""
    return lambda x: tensors(call.at({0: x}))[0]


def _in_slabs(
    call: Call,
    slab: Slab,
    *,
    rows: bool,
    of: Tensor | None = None,
    seen: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Line:
    """Take a function part by part.

    Args:
        call: The call.
        slab: Makes the line of a part of what it reads and of the argument's line.
        rows: Whether a part is of whole rows.
        of: What it reads, the argument if None.
        seen: How tensors are to be seen, that parts are of their first dimension.

    Returns:
        The line of what is like the argument.
    """
    (first, second), alone = call.take(0, value=of is None)
    of = call.args[0] if of is None else of
    keep, bend = call.wanted
    to1 = room(first, alone) if keep and first is not None else None
    like, own = (second, alone) if second is not None else (first, alone and not keep)
    to2 = room(like, own) if bend and like is not None else None
    each = [None if x is None else seen(x) for x in (of, first, second, to1, to2)]

    def run() -> None:
        for at, u1, u2, *ends in parts(each, rows):
            for end, found in zip(ends, slab(at, (u1, u2)), strict=True):
                if end is not None:
                    end.zero_() if found is None else end.copy_(found)

    outside(run, of)
    return to1, to2


def parts(of: Sequence[Tensor | None], rows: bool) -> Iterator[list[Any]]:
    """Yield parts of tensors of one shape, some rows or some elements of each.

    Args:
        of: The tensors; None has none.
        rows: Whether a part is of whole rows.
    """
    x = next(x for x in of if x is not None)
    if not rows and all([u is None or u.is_contiguous() for u in of]):
        of, length = [None if u is None else u.view(-1) for u in of], 1
    else:
        length = x[0].numel() if len(x) else 1
    step = part_size(x, length)
    total = x.numel() // max(length, 1)
    for start in range(0, total, step):
        yield [None if u is None else u[start : start + step] for u in of]


def part_size(x: Tensor, length: int) -> int:
    """Return how many of some equal lengths of a tensor are in a part of it."""
    most = max(_PART, x.numel() // _PARTS)
    return max(1, min(_PART * torch.get_num_threads(), most) // max(length, 1))


def by_slopes(function: Function, x: Tensor, line: Line) -> Line:
    """Of a function of single elements, by its slope and that of its slope."""
    first, second = line
    x = x.detach().requires_grad_()
    ones = torch.ones_like(x)
    (slope,) = torch.autograd.grad(function(x), x, ones, create_graph=True)
    bend = None
    if slope.requires_grad and first is not None:
        (bend,) = torch.autograd.grad(slope, x, ones, allow_unused=True)
    slope = slope.detach()
    y1 = None if first is None else slope * first
    y2 = None if second is None else slope * second
    if bend is not None and first is not None:
        bent = bend * first * first
        y2 = bent if y2 is None else y2.add_(bent)
    return y1, y2


def _twice(function: Function, x: Tensor, line: Line) -> Line:
    return along(function, [x], [line])[1][0]
