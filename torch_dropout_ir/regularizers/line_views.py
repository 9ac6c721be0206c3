"""The line of each tensor that moves; one memory for those that show the same.

What is written into a view is seen by its base and by all its views, as autograd has
it. From the first such write on, the lines of a base and its views are parts of two
tensors that lie in memory as the base does: each is looked up where its own values are.
A copy of that is handed out, for what is made of it is not to follow later writes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from torch_dropout_ir.regularizers.line_calls import STILL, Line, NoRuleError


class _Memory(NamedTuple):
    """First and second derivatives of what a base shows, from its start on."""

    orders: tuple[Tensor, Tensor]
    start: int

    def at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return those of what a tensor shows.

        Raises:
            NoRuleError: If it shows other numbers than the base.
        """
        first, second = self.orders
        start = int(x.storage_offset()) - self.start
        inside = start >= 0 and start + _extent(x) <= len(first)
        if x.dtype != first.dtype or x.is_conj() or x.is_neg() or not inside:
            raise NoRuleError("a view of other numbers than what is written on")
        size, strides = x.size(), x.stride()
        return (
            first.as_strided(size, strides, start),
            second.as_strided(size, strides, start),
        )


class Lines:
    """The lines of tensors, as long as they are there."""

    def __init__(self) -> None:
        self._own = WeakTensorKeyDictionary()
        self._of_bases = WeakTensorKeyDictionary()

    def moves(self, x: Tensor) -> bool:
        """Whether a tensor has a line."""
        return x in self._own or self._memory(x) is not None

    def get(self, x: Tensor) -> Line:
        """Return the line of a tensor."""
        memory = self._memory(x)
        if memory is None:
            found: Line = self._own.get(x, STILL)
            return found
        first, second = memory.at(x)
        return first.clone(), second.clone()

    def put(self, x: Tensor, line: Line) -> None:
        """Let a new tensor move; a view of what is written on does so already."""
        if self._memory(x) is None and any([u is not None for u in line]):
            self._own[x] = line

    def write(self, x: Tensor, line: Line) -> None:
        """Let what a tensor shows move otherwise."""
        memory = self._memory(x)
        if memory is None:
            self.put(x, line)
            return
        for part, u in zip(memory.at(x), line, strict=True):
            part.zero_() if u is None else part.copy_(u)

    def drop(self, x: Tensor) -> None:
        """Forget the line of a tensor, which none other shows."""
        self._own.pop(x, None)

    def share(self, x: Tensor) -> None:
        """Put the lines of a tensor, its base and all views in one memory."""
        if self._memory(x) is not None:
            return
        base = _base(x)
        room = [base.new_zeros(_extent(base)) for _ in range(2)]
        memory = _Memory((room[0], room[1]), int(base.storage_offset()))
        for part, u in zip(memory.at(base), self._own.get(base, STILL), strict=True):
            if u is not None:
                part.copy_(u)
        for y in [*self._own]:
            if _base(y) is base:
                del self._own[y]
        self._of_bases[base] = memory

    def _memory(self, x: Tensor) -> _Memory | None:
        if not len(self._of_bases):
            return None
        found: _Memory | None = self._of_bases.get(_base(x))
        return found


def _base(x: Tensor) -> Tensor:
    """Return the tensor that another is a view of, as autograd has it."""
    base = x._base
    return x if base is None else base


def _extent(x: Tensor) -> int:
    """Return the number of places from a tensor's first to its last."""
    if not x.numel():
        return 0
    pairs = zip(x.shape, x.stride(), strict=True)
    return 1 + sum([(n - 1) * stride for n, stride in pairs])
