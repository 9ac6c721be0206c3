"""Floor 1: the graph of a loss as ``loss_blocks`` is told of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor

from torch_dropout_ir.jet_kernels import Kind

Shape: TypeAlias = "Sequence[int]"
# Adds a node to a program, of inputs by number, and returns its own; None where rows
# may meet in what it makes.
Rule: TypeAlias = "Callable[[Program, Any, list[int]], int | None]"
_DTYPES: Final = {torch.float32, torch.float64, torch.int64, torch.bool}
_ENTRIES: Final = 2**12  # of all rows: above that products take less time, and memory
_MOST: Final = 2**63  # dimensions and places are saved without a sign


class Program:
    """What :func:`~torch_dropout_ir.registration.loss_blocks` is given.

    Args:
        shape: The shape of the outputs, which are node 0.
        most: Entries of what a node makes of all rows, at most.

    Attributes:
        rows: Their number.
        sizes: The shape of a row of what each node makes; None of a sum over rows, and
            where rows are in dimension 1.
        steps: See ``program`` of the op.
        numbers: See there.
        values: See there.
        second: Nodes whose rows are in dimension 1, behind one of size 1, and those of
            the same entries with rows in dimension 0.
    """

    def __init__(self, shape: Shape, most: float = _ENTRIES) -> None:
        self.rows = shape[0]
        self._most = most
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
        if self.rows * math.prod(own) > self._most:
            return None
        self.values += values
        self.steps += (
            kind, a, b, dim, start, step,
            len(values), *range(first, len(self.values)), len(own), *own,
        )  # fmt: skip
        self.numbers += (alpha, beta)
        self.sizes.append(sizes)
        return len(self.sizes) - 1

    def reshaped(self, sizes: Shape, a: int | None) -> int | None:
        """Add the same entries in a row of another shape, if it is another."""
        own = None if a is None or a in self.second else self.sizes[a]
        if own is not None and tuple(own) == tuple(sizes):
            return a
        return self.add(Kind.LINEAR, sizes, a, alpha=1.0)

    def lifted(self, sizes: Shape, a: int | None) -> int | None:
        """Add the same entries with a dimension of size 1 before that of the rows."""
        a = self.reshaped(sizes, a)
        number = self.add(Kind.LINEAR, sizes, a, alpha=1.0)
        if a is not None and number is not None:
            self.second[number], self.sizes[number] = a, None
        return number

    def along(self, a: int, saved: int) -> tuple[Shape, int] | None:
        """Return the shape of a row of a node, and a dimension of it.

        Args:
            a: The node, by number.
            saved: The dimension of a tensor that has been saved.

        Returns:
            Both; None of the dimension of the rows themselves, and of a sum over rows.
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

        Args:
            node: The node.
            a: Its first input by number, -1 where that is a constant.
            b: Its second.
            sums: Whether these may be sums over rows.

        Returns:
            The shape; None of a sum, False where rows may meet.
        """
        own = [self.sizes[i] for i in (a, b) if i >= 0]
        shape: Shape = node._input_metadata[0].shape
        if None in own:
            return None if sums and not shape else False
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
