"""Torch's hooks of the steps of all optimizers: one pair for all analyses.

Semantics:

* Torch goes through its hooks in each step of any optimizer, and raises where one is
  put in or taken away meanwhile, by another thread or a collection. So there is one
  pair as long as an analysis watches, taken away when no step goes through it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

Before = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], Any]
After = Callable[[Optimizer], None]

_watches: Final[dict[int, tuple[Before, After]]] = {}
_numbers: Final = itertools.count()
_handles: Final[list[RemovableHandle]] = []
_inside: Final[list[Optimizer]] = []  # in which the hooks run now, of all threads


def watch_steps(before: Before, after: After) -> Callable[[], None]:
    """Return what ends calls of functions around steps of all optimizers, when eager.

    ``before`` is as torch's hook: it may return other arguments.
    """
    number = next(_numbers)
    _watches[number] = before, after
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before))
        _handles.append(register_optimizer_step_post_hook(_after))

    def end() -> None:
        _watches.pop(number, None)
        if not (_watches or _inside or _stepping()):
            while _handles:
                _handles.pop().remove()

    return end


def _before(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if torch.compiler.is_dynamo_compiling():
        return None  # a compiled step would take the measures into its graph
    given = None
    _inside.append(optimizer)
    try:
        for number in [*_watches]:
            watch = _watches.get(number)  # it may have ended since
            found = watch and watch[0](optimizer, args, kwargs)
            if found is not None:
                given = args, kwargs = found
    finally:
        _inside.pop()
    return given


def _after(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    _inside.append(optimizer)
    try:
        for number in [*_watches]:
            if (watch := _watches.get(number)) is not None:
                watch[1](optimizer)
    finally:
        _inside.pop()


def _stepping() -> bool:
    """Whether this thread is in the middle of a step."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == Optimizer.__module__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
