"""Floor 1: hooks around the calls of a module, registered in a tenth of torch's time.

A pass of ours has a pair of them on each module that is no layer of torch's, and small
networks run in less time than torch takes to register and remove two pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def before_call(module: nn.Module, hook: Callable[..., Any]) -> Callable[[], object]:
    """Register ``hook(module, args)`` before all others; return what removes it."""
    hooks: Any = module._forward_pre_hooks
    key = object()
    hooks[key] = hook
    hooks.move_to_end(key, last=False)
    return functools.partial(hooks.pop, key, None)


def after_call(
    module: nn.Module,
    hook: Callable[..., Any],
    *,
    first: bool = False,
    always: bool = False,
) -> Callable[[], object]:
    """Return what removes ``hook(module, args, output)``, which it registers.

    ``first`` calls it before all others, else it is behind those that are there;
    ``always`` after an error too, with an output of None.
    """
    hooks: Any = module._forward_hooks
    called: Any = module._forward_hooks_always_called
    key = object()
    hooks[key] = hook
    if first:
        hooks.move_to_end(key, last=False)
    if always:
        called[key] = True
    return lambda: (hooks.pop(key, None), called.pop(key, None))
