"""Floor 1: hooks around the calls of a module, registered in a tenth of torch's time.

A pass of ours has a pair of them on each module that is no layer of torch's, and small
networks run in less time than torch takes to register and remove two pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

Undo: TypeAlias = list[Callable[[], object]]


def before_call(
    module: nn.Module, hook: Callable[..., Any], undo: Undo | None = None
) -> Callable[[], object]:
    """Return what removes ``hook(module, args)``, which it registers before all others.

    ``undo`` is told before: an interrupt may fall in between.
    """
    hooks: Any = module._forward_pre_hooks
    key = object()
    remove = functools.partial(hooks.pop, key, None)
    if undo is not None:
        undo.append(remove)
    hooks[key] = hook
    hooks.move_to_end(key, last=False)
    return remove


def after_call(
    module: nn.Module,
    hook: Callable[..., Any],
    undo: Undo | None = None,
    *,
    first: bool = False,
    always: bool = False,
) -> Callable[[], object]:
    """Return what removes ``hook(module, args, output)``, which it registers.

    ``first`` calls it before all others, else it is behind those that are there;
    ``always`` after an error too, with an output of None. ``undo`` is told before.
    """
    hooks: Any = module._forward_hooks
    called: Any = module._forward_hooks_always_called
    key = object()

    def remove() -> None:
        hooks.pop(key, None)
        called.pop(key, None)

    if undo is not None:
        undo.append(remove)
    hooks[key] = hook
    if first:
        hooks.move_to_end(key, last=False)
    if always:
        called[key] = True
    return remove


def give_back(undo: Undo) -> None:
    """Undo from the last to the first, and again what an interrupt fell into."""
    try:
        while undo:
            undo[-1]()
            undo.pop()
    except KeyboardInterrupt:
        give_back(undo)
        raise
