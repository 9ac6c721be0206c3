"""A mode that carries derivatives along a line beside the tensors that move.

What is written into a view is seen by its base and by all its views, as autograd has
it. From the first such write on, the lines of a base and its views are parts of two
tensors that lie in memory as the base does: each is looked up where its own values are.
A copy of that is handed out, for what is made of it is not to follow later writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from torch_dropout_ir.regularizers.line_calls import (
    BOTH,
    STILL,
    Call,
    Line,
    NoRuleError,
    Orders,
    can_move,
    out_of_place,
    shared,
    tensors,
)
from torch_dropout_ir.regularizers.line_rules import through

# What may be of somebody else, who hides from autograd what it has derivatives of.
_OPERATIONS: Final = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


class Constants(TorchFunctionMode):
    """Knows what the model runs under ``torch.no_grad``: there nothing moves.

    The forward pass of a function with a derivative of its own runs without autograd
    too, which nobody has asked for.

    Attributes:
        asked: Whether the model has.
        aside: Whether nothing is followed for now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = False
        self.aside = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self.aside:
            return func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            on = torch.is_grad_enabled()
            if args[0] and not on and not self.asked:
                raise NoRuleError(
                    "gradients in a function with a derivative of its own"
                )
            self.asked = not args[0] and (on or self.asked)
        elif torch.is_grad_enabled() and not isinstance(func, _OPERATIONS):
            self.asked = True  # torch's own code does
            try:
                return func(*args, **(kwargs or {}))
            finally:
                self.asked = False
        return func(*args, **(kwargs or {}))


class Moving(TorchDispatchMode):
    """Carries the derivatives along a line beside the tensors that move.

    Those of what an operation returns are taken when the next one begins: until then
    its caller holds what it was given, whose derivatives theirs may then replace. Where
    they cannot be taken, nothing that follows is known, should the model go on.

    Attributes:
        constants: The mode that knows what does not move.
        wanted: As given; of each operation it may be another.
    """

    def __init__(self, wanted: Orders = BOTH) -> None:
        super().__init__()
        self.constants = Constants()
        self.wanted = wanted
        self._lines = Lines()
        self._last: tuple[Call, Any] | None = None
        self._lost = False

    def line(self, x: Tensor) -> Line:
        """Return the first and second derivative of a tensor, None for zero."""
        self._settle()
        return self._lines.get(x)

    def moves(self, given: Any) -> bool:
        """Whether one of some tensors moves."""
        self._settle()
        return any([self._lines.moves(x) for x in given])

    def move(self, x: Tensor, line: Line) -> None:
        """Let a new tensor move."""
        _check_kind(x, line)
        if can_move(x):
            self._lines.put(x, line)

    def overwrite(self, x: Tensor, line: Line) -> None:
        """Let a tensor move otherwise, which others may show."""
        _check_kind(x, line)
        if shared(x):
            self._lines.share(x)
        self._lines.drop(x)
        self._lines.write(x, line)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Follow nothing inside of the context: what is made there is moved by hand."""
        self._settle()
        with self._aside():
            yield

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        self._lost = self.constants.aside = True
        try:
            yield
            self._lost = False
        finally:
            self.constants.aside = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.constants.aside or not self.moves(tensors([args, kwargs])):
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():  # what autograd does not see
            if self.constants.asked:
                return func(*args, **kwargs)
            self._lost = True
            raise NoRuleError(f"{func} without autograd")
        if func._schema.is_mutable:
            with self._aside():
                self._write(func, args, kwargs)
            return args[0]
        value = func(*args, **kwargs)
        own = Call(func, args, kwargs, self._lines.get, wanted=self.wanted)
        self._last = own, value
        return value

    def _settle(self) -> None:
        """Take the derivatives of what the last operation returned."""
        last, self._last = self._last, None
        if self._lost:
            raise NoRuleError("what follows an operation without a rule")
        if last is not None:
            with self._aside():
                lines = through(*last)
            for x, line in zip(tensors(last[1]), lines, strict=True):
                self.move(x, line)

    def _write(self, func: Any, args: Any, kwargs: Any) -> None:
        """Do what an operation does in place, which other tensors may show."""
        x, instead = args[0], out_of_place(func)
        if shared(x):
            self._lines.share(x)
        call = Call(instead, args, kwargs, self._lines.get, x, self.wanted)
        self._lines.drop(x)  # nobody reads how it moved
        (line,) = through(call, x)
        func(*args, **kwargs)
        _check_kind(x, line)
        self._lines.write(x, line)


def _check_kind(x: Tensor, line: Line) -> None:
    for u in line:
        if u is not None and (u.shape != x.shape or u.dtype != x.dtype):
            raise NoRuleError(f"{list(x.shape)} moves by {list(u.shape)}")


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
        """Return a copy of the derivative of some order of what a tensor shows."""
        order = self._orders[k]
        return None if order is None else self._part(order, x).clone()

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
            return self._own.get(x, STILL)
        memory.check(x)
        first, second = [memory.get(k, x) for k in range(2)]
        return first, second

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
        return self._of_bases.get(_base(x))


def _base(x: Tensor) -> Tensor:
    """Return the tensor that another is a view of, as autograd has it."""
    return x if x._base is None else x._base


def _places(x: Tensor) -> tuple[int, int]:
    """Return where in memory a tensor begins, and how far it goes, in real numbers."""
    each, pairs = 1 + x.is_complex(), zip(x.shape, x.stride(), strict=True)
    last = sum([(n - 1) * stride for n, stride in pairs]) if x.numel() else -1
    return each * int(x.storage_offset()), each * (last + 1)
