"""The line of each tensor that moves; one memory for those that show the same.

What is written into a view is seen by its base and by all its views, as autograd has
it. From the first such write on, the lines of a base and its views are parts of two
tensors that lie in memory as the base does: each is looked up where its own values are.
A copy of that is handed out, for what is made of it is not to follow later writes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from torch_dropout_ir.regularizers.line_calls import STILL, Line, NoRuleError


class _Memory:
    """First and second derivatives of what a base shows, from its start on.

    They lie there as real numbers, which complex ones are pairs of.
    """

    def __init__(self, base: Tensor) -> None:
        self._orders: list[Tensor | None] = [None, None]  # zero until one is written
        self._dtype = base.dtype.to_real()
        self._start, length = _places(base)
        self._length = length + length % 2  # of pairs

    def get(self, k: int, x: Tensor) -> Tensor | None:
        """Return the derivative of some order of what a tensor shows."""
        order = self._orders[k]
        return None if order is None else self._part(order, x)

    def put(self, k: int, x: Tensor, u: Tensor | None) -> None:
        """Let it be ``u``, None for zero."""
        order = self._orders[k]
        if order is None and u is not None:
            order = self._orders[k] = u.new_zeros(self._length, dtype=self._dtype)
        if order is not None:
            part = self._part(order, x)
            part.zero_() if u is None else part.copy_(u)

    def _part(self, order: Tensor, x: Tensor) -> Tensor:
        first, pair = -self._start, x.is_complex()
        if pair:
            order, first = torch.view_as_complex(order.view(-1, 2)), first // 2
        start = int(x.storage_offset()) + first
        found = order.as_strided(x.size(), x.stride(), start)
        found = found.conj() if x.is_conj() else found
        return torch._neg_view(found) if x.is_neg() else found

    def check(self, x: Tensor) -> None:
        """Raise if a tensor shows other numbers than the base."""
        first, length = _places(x)
        inside = first >= self._start and first + length <= self._start + self._length
        if not inside:
            raise NoRuleError("a view of other numbers than what is written on")


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
        memory.check(x)
        first, second = [memory.get(k, x) for k in range(2)]
        return (
            None if first is None else first.clone(),
            None if second is None else second.clone(),
        )

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
        memory.check(x)
        for k, u in enumerate(line):
            memory.put(k, x, u)

    def drop(self, x: Tensor) -> None:
        """Forget the line of a tensor, which none other shows."""
        self._own.pop(x, None)

    def share(self, x: Tensor) -> None:
        """Put the lines of a tensor, its base and all views in one memory."""
        if self._memory(x) is not None:
            return
        base = _base(x)
        memory = _Memory(base)
        for k, u in enumerate(self._own.get(base, STILL)):
            memory.put(k, base, u)
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


def _places(x: Tensor) -> tuple[int, int]:
    """Return where in memory a tensor begins, and how far it goes, in real numbers."""
    each, pairs = 1 + x.is_complex(), zip(x.shape, x.stride(), strict=True)
    last = sum([(n - 1) * stride for n, stride in pairs]) if x.numel() else -1
    return each * int(x.storage_offset()), each * (last + 1)
