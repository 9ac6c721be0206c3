"""How lines go through functions that keep rows apart: some rows at a time.

Of a function with a derivative of its own nothing tells whether it does. What it makes
of a part of the rows is held against what it makes of all, and the slopes of a part
against those in a part twice as large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_dropout_ir.arrivals import uneven
from torch_dropout_ir.exhaustion import raise_if_exhausted
from torch_dropout_ir.regularizers.coupling import nearly_equal
from torch_dropout_ir.regularizers.line_calls import STILL, Line, can_move, tensors
from torch_dropout_ir.regularizers.line_graphs import along
from torch_dropout_ir.regularizers.line_slabs import part_size

Function: TypeAlias = "Callable[..., Any]"


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
