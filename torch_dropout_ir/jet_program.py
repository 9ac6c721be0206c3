"""Floor 1: the graph of a loss as ``loss_blocks`` is told of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torch_dropout_ir.jet_kinds import Kind

Shape: TypeAlias = "Sequence[int]"
# Adds a node to a program, of inputs by number, and returns its own; None where rows
# may meet in what it makes.
Rule: TypeAlias = "Callable[[Program, Any, list[int]], int | None]"
_DTYPES: Final = {torch.float32, torch.float64, torch.int64, torch.bool}
# Of all rows, and of their jets: above that products take less time, and memory.
_ENTRIES: Final = 2**12
_NUMBERS: Final = 2**16
_MOST: Final = 2**63  # dimensions and places are saved without a sign


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
        self, kind: Kind, sizes: Shape | None, a: int | None = -1, b: int | None = -1,
        values: Sequence[Tensor] = (), dim: int = 0, start: int = 0, step: int = 0,
        alpha: float = 0.0, beta: float = 0.0,
    ) -> int | None:  # fmt: skip
        """Add a node; return its number, None where the kernel is not to make it."""
        first, own = len(self.values), () if sizes is None else sizes
        if a is None or b is None or a in self.second or b in self.second:
            return None
        if self._whole * math.prod(own) > self.most:
            return None
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

    def begin(self, inputs: Sequence[int]) -> bool:
        """Read nodes in the order that their rows are in; whether it is one."""
        if not self._picks:
            return True
        live = [i for i in inputs if i >= 0 and self.sizes[i] is not None]
        found = {id(self.orders[i]): self.orders[i] for i in live}
        self.order = next(iter(found.values()), None)
        self.rows = self._whole if self.order is None else len(self.order.rows)
        return len(found) < 2

    def picked(self, a: int, rows: Tensor) -> int | None:
        """Add rows of a node by number; None where one is chosen twice."""
        own, count = self.sizes[a], len(rows)
        if own is None or self.order is not None or not count:
            return None
        rows = torch.where(rows < 0, rows + self.rows, rows)
        places = torch.full((self.rows,), -1, device=rows.device)
        places[rows] = torch.arange(count, device=rows.device)
        there = places >= 0
        if int(there.sum()) < count:
            return None
        there = there.view(-1, *(1 for _ in own))
        number = self.add(Kind.TIMES, own, a, -1, (there, there))
        if number is not None:
            self._picks = True
            found = [x for x in self.orders if x and torch.equal(x.rows, rows)]
            self.orders[number] = (found or [Order(rows, places.clamp_(min=0))])[0]
        return number

    def _by_row(self, x: Tensor, dims: int) -> Tensor:
        """Return what has been saved of chosen rows in the places of all."""
        assert self.order is not None
        return x[self.order.places] if x.ndim == dims and len(x) > 1 else x

    def reshaped(self, sizes: Shape, a: int | None) -> int | None:
        """Add the same entries in a row of another shape, if it is another."""
        own = None if a is None or a in self.second else self.sizes[a]
        if own is not None and tuple(own) == tuple(sizes):
            return a
        return self.add(Kind.LINEAR, sizes, a, alpha=1.0)

    def lifted(self, sizes: Shape, a: int | None) -> int | None:
        """Add the same entries with a dimension of size 1 before that of the rows."""
        a = self.reshaped(sizes, a) if self.order is None else None
        number = self.add(Kind.LINEAR, sizes, a, alpha=1.0)
        if a is not None and number is not None:
            self.second[number], self.sizes[number] = a, None
        return number

    def along(self, a: int, saved: int) -> tuple[Shape, int] | None:
        """Return the shape of a row of a node, and a dimension of it that was saved.

        None of the dimension of the rows themselves, and of a sum over rows.
        """
        own = self.sizes[a]
        if own is None:
            return None
        dim = signed(saved, len(own) + 1) - 1
        return (own, dim) if dim >= 0 else None

    def elementwise(
        self, node: Any, a: int, b: int, sums: bool
    ) -> Shape | Literal[False] | None:
        """Return the shape of a row of what is made of entries in the same place.

        None of a sum, False where rows may meet. With ``sums`` it is linear in sums
        over rows: what bends them couples rows, and their derivatives in one row are
        those of its own part.
        """
        own = [self.sizes[i] for i in (a, b) if i >= 0]
        shape: Shape = node._input_metadata[0].shape
        if None in own:
            if shape or set(own) != {None}:
                return None if sums and not shape else False
            self.couples |= not sums
            return None
        dims = {len(x) + 1 for x in own if x is not None}
        return shape[1:] if dims == {len(shape)} and shape[0] == self.rows else False

    def total(self, a: int | None, alpha: float) -> int | None:
        """Add the sum of all entries, times a number."""
        own = None if a is None else self.sizes[a]
        if own is None:
            return None
        return self.add(Kind.SUMMED, None, a, dim=(1 << len(own)) - 1, alpha=alpha)


def signed(saved: int, size: int) -> int:
    """Return a dimension or place counted from the first, from what has been saved."""
    saved = saved - 2 * _MOST if saved >= _MOST else saved
    return saved + size if saved < 0 else saved
