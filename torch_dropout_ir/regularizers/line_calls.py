"""A call of an operation, some of whose arguments move along a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree

aten: Final = torch.ops.aten
# First and second derivative; None for zero.
Line: TypeAlias = "tuple[Tensor | None, Tensor | None]"
# What an operation returns, and the line of each tensor of that.
Found: TypeAlias = "tuple[Any, Sequence[Line]]"
STILL: Final[Line] = (None, None)


class NoRuleError(RuntimeError):
    """An operation whose derivatives along a line are not known."""


class Call(NamedTuple):
    """A call of an operation, and where the tensors that it is given move."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    line_of: Callable[[Tensor], Line]

    def line(self, i: int) -> Line:
        """Return the line of an argument; zero for what is no tensor."""
        x = self.args[i] if i < len(self.args) else None
        return self.line_of(x) if isinstance(x, Tensor) else STILL

    def moving(self) -> list[int]:
        """Return which arguments move, -1 for those by keyword."""
        found = [
            i
            for i, x in enumerate(self.args)
            if any(self.line_of(y) is not STILL for y in tensors(x))
        ]
        by_name = any(self.line_of(y) is not STILL for y in tensors([self.kwargs]))
        return [*found, -1] if by_name else found

    def at(self, **new: Any) -> Any:
        """Call it, with other arguments where ``_0``, ``_1`` and so on are given."""
        args = [new.get(f"_{i}", x) for i, x in enumerate(self.args)]
        return self.func(*args, **self.kwargs)


def tensors(found: Any) -> list[Tensor]:
    """Return the tensors among some things."""
    return [x for x in _pytree.tree_leaves(found) if isinstance(x, Tensor)]
