"""Torch's function modes: one laid under the others, what it sees, and taken away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from torch_dropout_ir.analysis.followed_loss import inside
from torch_dropout_ir.generators import Standing
from torch_dropout_ir.losses import TORCH_LOSSES

# Private names; with a torch that lacks them, loss modules alone are found.
_POP: Final = getattr(torch._C, "_pop_torch_function_stack", None)
_PUSH: Final = getattr(torch._C, "_push_on_torch_function_stack", None)
_LENGTH: Final = getattr(torch._C, "_len_torch_function_stack", None)
_DEFAULT: Final = getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None)  # the lowest of all


def lay_under(mode: TorchFunctionMode) -> bool:
    """Lay a mode under those that are active but a default device's, if it can be."""
    if None in (_POP, _PUSH, _LENGTH):
        return False
    modes = _popped()
    default = getattr(_DEFAULT, "device_context", None)
    lowest = [modes.pop()] if modes and modes[-1] is default else []
    _pushed([*modes, mode, *lowest])
    return True


def take_away(done: Callable[[TorchFunctionMode], bool]) -> None:
    """Take away the modes that are done, wherever they lie.

    Within a call that a mode is handed the mode is not there to be taken, and is there
    again after it: an optimizer that steps in the backward pass leaves it so.
    """
    if _POP is None or _PUSH is None or _LENGTH is None or not _LENGTH():
        return
    _pushed([mode for mode in _popped() if not done(mode)])


@contextlib.contextmanager
def unmoved_modes() -> Iterator[None]:
    """Take away what is left inside: an interrupt may fall into the end of a mode."""
    before = _LENGTH() if _LENGTH else 0
    try:
        yield
    finally:
        while _LENGTH and _POP and _LENGTH() > before:
            _POP()


def called(
    func: Any, args: Any, kwargs: Any, generators: Sequence[torch.Generator]
) -> tuple[Any, bool]:
    """Return the result of a call, and whether it has drawn random numbers.

    ``generators`` are those that it may draw from where it is given none. Another
    thread may draw from them meanwhile.
    """
    own, before = any(inside((args, kwargs), torch.Generator)), Standing(generators)
    return func(*args, **kwargs), own or (before.moved() and _may_draw(func))


def _may_draw(func: Callable[..., Any]) -> bool:
    """Whether a function is not known for one that draws no random numbers."""
    name = getattr(func, "__name__", "")
    if func in TORCH_LOSSES or name.startswith("__"):  # an operator
        return False
    kernels = getattr(torch.ops.aten, name, None)
    if kernels is None:
        return True
    tags = (getattr(kernels, each).tags for each in kernels.overloads())
    return any(torch.Tag.nondeterministic_seeded in found for found in tags)


def _popped() -> list[TorchFunctionMode]:
    """Take all modes away; the innermost comes first."""
    return [_POP() for _ in range(_LENGTH())]  # type: ignore[misc]


def _pushed(modes: list[TorchFunctionMode]) -> None:
    for mode in reversed(modes):
        _PUSH(mode)  # type: ignore[misc]
