"""Floor 1: the graph of a loss as ``loss_blocks`` is told of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torch_dropout_ir.jet_kinds import Kind

Shape: TypeAlias = "Sequence[int]"
# Adds a node to a program, of inputs by number, and returns its own.
Rule: TypeAlias = "Callable[[Program, Any, list[int]], int]"
_DTYPES: Final = {torch.float32, torch.float64, torch.int64, torch.bool}
# Of all rows, and of their jets: above that products take less time, and memory.
_ENTRIES: Final = 2**12
_NUMBERS: Final = 2**16
_MOST: Final = 2**63  # dimensions and places are saved without a sign


class NotToldError(Exception):
    """A graph that is no program: rows may meet, or the kernel is not to make it."""


class Order(NamedTuple):
    """Rows that have been chosen by number, each at most once.

    Attributes:
        rows: Their numbers.
        places: By row of the outputs, which of them it is; 0 where it is none.
    """

    rows: Tensor
    places: Tensor


class Program:
    """What :func:`~torch_dropout_ir.registration.loss_blocks` is given.

    Args:
        shape: The shape of the outputs, which are node 0.
        most: Entries of what a node makes of all rows, at most; None for as many as
            blocks take little time of.

    Attributes:
        rows: Their number; of what has been chosen of them while that is read.
        most: As given, or found.
        order: What rows those are; None where they are all, as they were.
        orders: The order of what each node makes.
        couples: Whether what is bent is a sum over rows.
        sizes: The shape of a row of what each node makes; None of a sum over rows, and
            where rows are in dimension 1.
        steps: See ``program`` of the op.
        numbers: See there.
        values: See there.
        second: Nodes whose rows are in dimension 1, behind one of size 1, and those of
            the same entries with rows in dimension 0.
    """

    def __init__(self, shape: Shape, most: float | None = None) -> None:
        width = math.prod(shape[1:])
        few = min(_ENTRIES, 2 * _NUMBERS // ((width + 1) * (width + 2)))
        self._whole = self.rows = shape[0]
        self.order: Order | None = None
        self.orders: list[Order | None] = []
        self._picks = False  # whether there is one
        self.couples = False
        self.most = few if most is None else most
        self.sizes: list[Shape | None] = []
        self.steps: list[int] = []
        self.numbers: list[float] = []
        self.values: list[Tensor] = []
        self.second: dict[int, int] = {}
        self.add(Kind.OUTPUTS, shape[1:])

    @property
    def readable(self) -> bool:
        """Whether the kernel can read all that has been saved."""
        return {x.dtype for x in self.values} <= _DTYPES

    def add(
        self, kind: Kind, sizes: Shape | None, a: int = -1, b: int = -1,
        values: Sequence[Tensor] = (), dim: int = 0, start: int = 0, step: int = 0,
        alpha: float = 0.0, beta: float = 0.0,
    ) -> int:  # fmt: skip
        """Add a node; return its number."""
        first, own = len(self.values), () if sizes is None else sizes
        if a in self.second or b in self.second:
            raise NotToldError
        told(self._whole * math.prod(own) <= self.most)
        if self.order is not None:
            joined = self.sizes[a] if kind == Kind.LOG_SUM_EXP else own
            shapes = zip(values, (joined or (), own), strict=False)
            values = [self._by_row(x, len(shape) + 1) for x, shape in shapes]
        self.values += values
        self.steps += (
            kind, a, b, dim, start, step,
            len(values), *range(first, len(self.values)), len(own), *own,
        )  # fmt: skip
        self.numbers += (alpha, beta)
        self.sizes.append(sizes)
        self.orders.append(None if sizes is None else self.order)
        return len(self.sizes) - 1

    def begin(self, inputs: Sequence[int]) -> None:
        """Read nodes in the order that their rows are in, which must be one."""
        if not self._picks:
            return
        live = [i for i in inputs if i >= 0 and self.sizes[i] is not None]
        found = {id(self.orders[i]): self.orders[i] for i in live}
        self.order = next(iter(found.values()), None)
        self.rows = self._whole if self.order is None else len(self.order.rows)
        told(len(found) < 2)

    def picked(self, a: int, rows: Tensor) -> int:
        """Add rows of a node by number, none of them twice."""
        own, count = self.row(a), len(rows)
        told(self.order is None and count)
        rows = torch.where(rows < 0, rows + self.rows, rows)
        places = torch.full((self.rows,), -1, device=rows.device)
        places[rows] = torch.arange(count, device=rows.device)
        there = places >= 0
        told(int(there.sum()) == count)
        there = there.view(-1, *(1 for _ in own))
        number = self.add(Kind.TIMES, own, a, -1, (there, there))
        self._picks = True
        found = [x for x in self.orders if x and torch.equal(x.rows, rows)]
        self.orders[number] = (found or [Order(rows, places.clamp_(min=0))])[0]
        return number

    def _by_row(self, x: Tensor, dims: int) -> Tensor:
        """Return what has been saved of chosen rows in the places of all."""
        assert self.order is not None
        return x[self.order.places] if x.ndim == dims and len(x) > 1 else x

    def reshaped(self, sizes: Shape, a: int) -> int:
        """Add the same entries in a row of another shape, if it is another."""
        own = self.sizes[a]
        if own is not None and tuple(own) == tuple(sizes):
            return a
        return self.add(Kind.LINEAR, sizes, a, alpha=1.0)

    def lifted(self, sizes: Shape, a: int) -> int:
        """Add the same entries with a dimension of size 1 before that of the rows."""
        told(self.order is None)
        a = self.reshaped(sizes, a)
        number = self.add(Kind.LINEAR, sizes, a, alpha=1.0)
        self.second[number], self.sizes[number] = a, None
        return number

    def row(self, a: int) -> Shape:
        """Return the shape of a row of what a node makes."""
        own = self.sizes[a]
        if own is None:
            raise NotToldError
        return own

    def along(self, a: int, saved: int) -> tuple[Shape, int]:
        """Return the shape of a row of a node, and a dimension of it that was saved."""
        own = self.row(a)
        dim = signed(saved, len(own) + 1) - 1
        told(dim >= 0)  # not that of the rows themselves
        return own, dim

    def elementwise(self, node: Any, a: int, b: int, sums: bool) -> Shape | None:
        """Return the shape of a row of what is made of entries in the same place.

        None of a sum. With ``sums`` it is linear in sums over rows: what bends them
        couples rows, and their derivatives in one row are those of its own part.
        """
        own = [self.sizes[i] for i in (a, b) if i >= 0]
        shape: Shape = node._input_metadata[0].shape
        if None in own:
            told(not shape and (sums or set(own) == {None}))
            self.couples |= not sums
            return None
        dims = {len(x) + 1 for x in own if x is not None}
        told(dims == {len(shape)} and shape[0] == self.rows)
        return shape[1:]

    def total(self, a: int, alpha: float) -> int:
        """Add the sum of all entries, times a number."""
        dims = (1 << len(self.row(a))) - 1
        return self.add(Kind.SUMMED, None, a, dim=dims, alpha=alpha)


def told(known: Any) -> None:
    """Raise a NotToldError where this is not known of a graph."""
    if not known:
        raise NotToldError


def signed(saved: int, size: int) -> int:
    """Return a dimension or place counted from the first, from what has been saved."""
    saved = saved - 2 * _MOST if saved >= _MOST else saved
    return saved + size if saved < 0 else saved
