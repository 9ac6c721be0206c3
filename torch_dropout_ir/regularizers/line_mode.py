"""A mode that carries derivatives along a line beside the tensors that move."""

from __future__ import annotations

from typing import Any

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
    out_of_place,
    tensors,
)
from torch_dropout_ir.regularizers.line_rules import through


class Constants(TorchFunctionMode):
    """Knows what the model runs under ``torch.no_grad``: there nothing moves.

    The forward pass of a function with a derivative of its own runs without autograd
    too, which nobody has asked for.

    Attributes:
        asked: Whether the model has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            on = torch.is_grad_enabled()
            if args[0] and not on and not self.asked:
                raise NoRuleError(
                    "gradients in a function with a derivative of its own"
                )
            self.asked = not args[0] and (on or self.asked)
        elif torch.is_grad_enabled():
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

    Args:
        wanted: Whether first and second derivatives are asked for.

    Attributes:
        constants: The mode that knows what does not move.
        wanted: As given; of each operation it may be another.
    """

    def __init__(self, wanted: Orders = BOTH) -> None:
        super().__init__()
        self.constants = Constants()
        self.wanted = wanted
        self._lines = WeakTensorKeyDictionary()
        self._last: tuple[Call, Any] | None = None
        self._lost = False

    def line(self, x: Tensor) -> Line:
        """Return the first and second derivative of a tensor, None for zero."""
        self._settle()
        return self._line(x)

    def _line(self, x: Tensor) -> Line:
        found: Line = self._lines.get(x, STILL)
        return found

    def move(self, x: Tensor, line: Line) -> None:
        """Let a tensor move.

        Raises:
            NoRuleError: If its derivatives are of another kind than the tensor.
        """
        for u in line:
            if u is not None and (u.shape != x.shape or u.dtype != x.dtype):
                raise NoRuleError(f"{list(x.shape)} moves by {list(u.shape)}")
        if x.is_floating_point() and any([u is not None for u in line]):
            self._lines[x] = line

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._settle()
        moves = any([x in self._lines for x in tensors([args, kwargs])])
        if not moves:
            return func(*args, **kwargs)
        plain = not func._schema.is_mutable
        if not torch.is_grad_enabled():  # what autograd does not see
            if self.constants.asked:  # what is written on moves as before
                return func(*args, **kwargs)
            self._lost = True
            raise NoRuleError(f"{func} without autograd")
        if not plain:
            self._lost = True
            self._write(func, args, kwargs)
            self._lost = False
            return args[0]
        value = func(*args, **kwargs)
        own = Call(func, args, kwargs, self._line, wanted=self.wanted)
        self._last = own, value
        return value

    def _settle(self) -> None:
        """Take the derivatives of what the last operation returned."""
        last, self._last = self._last, None
        if self._lost:
            raise NoRuleError("what follows an operation without a rule")
        if last is not None:
            self._lost = True
            lines = through(*last)
            for x, line in zip(tensors(last[1]), lines, strict=True):
                self.move(x, line)
            self._lost = False

    def _write(self, func: Any, args: Any, kwargs: Any) -> None:
        """Do what an operation does in place, which no other tensor may show."""
        x = args[0]
        instead = out_of_place(func, x)
        call = Call(instead, args, kwargs, self._line, over=x, wanted=self.wanted)
        self._lines.pop(x, None)  # nobody reads how it moved
        (line,) = through(call, x)
        func(*args, **kwargs)
        self.move(x, line)
