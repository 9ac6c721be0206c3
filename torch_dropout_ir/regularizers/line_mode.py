"""A mode that carries derivatives along a line beside the tensors that move."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_dropout_ir.regularizers.line_calls import (
    BOTH,
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
from torch_dropout_ir.regularizers.line_views import Lines

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
    """See that derivatives are of the kind of a tensor."""
    for u in line:
        if u is not None and (u.shape != x.shape or u.dtype != x.dtype):
            raise NoRuleError(f"{list(x.shape)} moves by {list(u.shape)}")
