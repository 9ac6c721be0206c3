r"""How lines go through functions that are not linear, a part of the tensor at a time.

Where :math:`x(t)` has derivatives :math:`\dot x` and :math:`\ddot x` at 0, those of
``f(x)`` are :math:`f' \dot x` and :math:`f''[\dot x, \dot x] + f' \ddot x`. Parts hold
little, and where nobody else reads :math:`\dot x` and :math:`\ddot x`, what is found
takes their place.

Of a function with a derivative of its own nothing tells whether it does. What it makes
of a part of the rows is held against what it makes of all, and the slopes of a part
against those in a part twice as large.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.arrivals import uneven
from torch_dropout_ir.exhaustion import raise_if_exhausted
from torch_dropout_ir.regularizers.coupling import nearly_equal
from torch_dropout_ir.regularizers.line_calls import (
    STILL,
    Call,
    Line,
    alike,
    aten,
    can_move,
    room,
    tensors,
)
from torch_dropout_ir.regularizers.line_graphs import along, outside

Function = Callable[..., Any]
# Of some tensors and their lines.
Slab = Callable[[Sequence[Tensor], Sequence[Line]], Line]
# Elements of a part for each thread: what one operation makes of it stays in a cache.
_PART: Final = 2**15
# Parts of a large tensor: some eight tensors of a part are made.
_PARTS: Final = 32


def elementwise(call: Call, moving: list[int], value: Any) -> list[Line] | None:
    """Take a function of single elements by its derivatives, from a graph of a part."""
    first, *others = tensors(value)
    places = [i for i, x in enumerate(call.args) if isinstance(x, Tensor)]
    of = [call.args[i] for i in places]
    real = not any([x.is_complex() for x in of])
    if not real or not {*moving} <= {*places}:
        return None
    function = _function(call, places)
    slab = functools.partial(by_slopes if len(of) == 1 else _twice, function)
    own = _in_slabs(
        call, first, slab, places, rows=False, seen=lambda x: x.expand_as(first)
    )
    return [own, *[STILL] * len(others)]


def softened(call: Call, moving: list[int], value: Tensor) -> list[Line] | None:
    """Take a softmax or its logarithm, by what was found."""
    if moving != [0]:
        return None
    log = call.func.overloadpacket is aten._log_softmax
    dim = call.args[1]

    def slab(of: Sequence[Tensor], lines: Sequence[Line]) -> Line:
        return of_softmax(of[0].exp() if log else of[0], lines[0], log)

    def last(x: Tensor) -> Tensor:
        return x.movedim(dim, -1) if x.ndim > 1 else x.view(1, -1)

    return [_in_slabs(call, value, slab, [0], rows=True, of=[value], seen=last)]


def of_softmax(s: Tensor, line: Line, log: bool = False) -> Line:
    r"""Return the line of a softmax ``s`` of rows, or of its logarithm.

    With :math:`\dot c = \dot x - s^\top \dot x`, the logarithm has :math:`\dot c` and
    :math:`\ddot c - s^\top \dot c^2`.
    """
    c, d = [None if u is None else u - (s * u).sum(-1, True) for u in line]
    if c is not None:
        square = c * c
        less = (s * square).sum(-1, True)
        more = -less if log else square - less
        d = more if d is None else d + more
    if log:
        return c, d
    return None if c is None else s * c, None if d is None else s * d


def group_normalized(call: Call, moving: list[int], value: Any) -> list[Line] | None:
    """Take each sample for itself."""
    if moving != [0]:
        return None
    _, weight, bias, _, *rest = call.args

    def function(x: Tensor) -> Tensor:
        return call.func(x, weight, bias, len(x), *rest)[0]

    slab = functools.partial(_twice, function)
    return [_in_slabs(call, value[0], slab, [0], rows=True), STILL, STILL]


def layer_normalized(call: Call, moving: list[int], value: Any) -> list[Line] | None:
    """Take each row for itself."""
    x, shape, *_ = call.args
    if moving != [0] or x.ndim == len(shape):
        return None
    slab = functools.partial(_twice, _function(call, [0]))
    return [_in_slabs(call, value[0], slab, [0], rows=True), STILL, STILL]


def _function(call: Call, places: Sequence[int]) -> Function:
    """Return the operation as a function of some arguments to its first result."""
    return lambda *of: tensors(call.at(dict(zip(places, of, strict=True))))[0]


def _in_slabs(
    call: Call,
    value: Tensor,
    slab: Slab,
    places: Sequence[int],
    *,
    rows: bool,
    of: Sequence[Tensor] | None = None,
    seen: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Line:
    """Return the line of a result, taken part by part.

    ``slab`` makes that of a part of what it reads (``of``; None: the arguments at
    ``places``) and of the arguments' lines. Parts, of whole ``rows`` or not, are of the
    first dimension of tensors as they are ``seen``.
    """
    if of is None:
        of, taken = [call.args[i] for i in places], [call.take(i, True) for i in places]
    else:
        taken = [call.take(i) for i in places]
    firsts, seconds = (
        [(line[k], alone) for line, alone in taken if line[k] is not None]
        for k in range(2)
    )
    keep, bend = call.wanted
    to1 = _end(value, firsts) if keep and firsts else None
    spare = seconds if seconds or keep else firsts
    to2 = _end(value, spare) if bend else None
    given = *of, *[line[k] for k in range(2) for line, _ in taken], to1, to2
    whole = [None if x is None else seen(x) for x in given]
    n, k = len(of), len(places)

    def run() -> None:
        for part in parts(whole, rows):
            lines = [*zip(part[n : n + k], part[n + k : -2], strict=True)]
            for end, found in zip(part[-2:], slab(part[:n], lines), strict=True):
                if end is not None:
                    end.zero_() if found is None else end.copy_(found)

    outside(run, value)
    return to1, to2


def _end(value: Tensor, spare: list[tuple[Tensor | None, bool]]) -> Tensor:
    """Return where derivatives of a result go: on some that nobody else reads."""
    own = [u for u, alone in spare if u is not None and alone and alike(u, value)]
    return room(own[0], True) if own else torch.empty_like(value)


def parts(of: Sequence[Tensor | None], rows: bool) -> Iterator[list[Any]]:
    """Yield parts of tensors of one shape, some rows or elements; None has none."""
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


def by_slopes(function: Function, of: Sequence[Tensor], lines: Sequence[Line]) -> Line:
    """Of a function of single elements, by its slope and that of its slope."""
    (first, second), x = lines[0], of[0].detach().requires_grad_()
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


def _twice(function: Function, of: Sequence[Tensor], lines: Sequence[Line]) -> Line:
    return along(function, of, lines)[1][0]


def along_rows(
    function: Function, leaves: Sequence[Any], lines: Sequence[Line]
) -> tuple[Any, list[Line]]:
    """Do what :func:`along` does, from a graph of some rows at a time where that is it.

    Args:
        function: The function.
        leaves: What it is given.
        lines: The line of each of these.

    Returns:
        What it makes of all, in its last call, and the line of each tensor of that.
    """
    rows, size = _rows_of(leaves, lines)
    found = None
    try:
        found = _in_rows(function, leaves, lines, rows, size) if rows else None
    except Exception as err:  # of other rows: of all it raises once more
        raise_if_exhausted(err)
    if found is None:
        return along(function, leaves, lines)
    with torch.no_grad():
        return function(*leaves), found


def _rows_of(leaves: Sequence[Any], lines: Sequence[Line]) -> tuple[list[int], int]:
    """Return which arguments have rows, and how many go at a time; none if all do."""
    live = [x for x, line in zip(leaves, lines, strict=True) if line is not STILL]
    given = [(i, x) for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.ndim]
    most = max(live, key=Tensor.numel)
    count = len(most) if most.ndim else 0
    size = part_size(most, most.numel() // max(count, 1))
    own = [i for i, x in given if any([x.shape == y.shape for y in live])]
    alike = all([(len(x) == count) == (i in own) for i, x in given])
    return (own, size) if alike and 2 * size <= count else ([], size)


def _in_rows(
    function: Function,
    leaves: Sequence[Any],
    lines: Sequence[Line],
    rows: Sequence[int],
    size: int,
) -> list[Line] | None:
    """Return the lines of what a function makes; None where rows may meet in it."""

    def part(start: int, stop: int) -> list[Any]:
        return [x[start:stop] if i in rows else x for i, x in enumerate(leaves)]

    with torch.no_grad():
        made = tensors(function(*leaves))
    count = len(leaves[rows[0]])
    if not all([can_move(x) and x.ndim and len(x) == count for x in made]):
        return None
    live = [i for i, line in enumerate(lines) if line is not STILL]
    one, two = (_slopes(function, part(0, k * size), live) for k in (1, 2))
    if not all([nearly_equal(g, h[:size]) for g, h in zip(one, two, strict=True)]):
        return None
    ends: list[list[Tensor | None]] = [[None, None] for _ in made]
    for start in range(0, count, size):
        own = slice(start, start + size)
        moving: list[Line] = [
            (None if u is None else u[own], None if w is None else w[own])
            for u, w in lines
        ]
        value, moved = along(function, part(start, start + size), moving)
        for x, y, line, end in zip(tensors(value), made, moved, ends, strict=True):
            if not nearly_equal(x.detach(), y[own]):
                return None
            for k, u in enumerate(line):
                if u is not None:
                    end[k] = torch.zeros_like(y) if end[k] is None else end[k]
                    end[k][own] = u  # type: ignore[index]
    return [(first, second) for first, second in ends]


def _slopes(function: Function, leaves: list[Any], live: Sequence[int]) -> list[Tensor]:
    """Return the gradients in what moves of some sum of what a function makes."""
    for i in live:
        leaves[i] = leaves[i].detach().requires_grad_()
    ends = [y for y in tensors(function(*leaves)) if y.requires_grad]
    roots, at = [uneven(y.detach()) for y in ends], [leaves[i] for i in live]
    if not ends:
        return []
    found = torch.autograd.grad(ends, at, roots, allow_unused=True)
    return [x.detach() if g is None else g for x, g in zip(at, found, strict=True)]
