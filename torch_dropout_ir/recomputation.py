"""Floor 1: checkpointed blocks run again as they have run.

Semantics:

* Activation checkpointing runs a block again in a backward pass. Where that comes when
  the context of the block's first run is over, as the ``backward()`` of a script does,
  other kernels would run: torch refuses what they keep, or takes it for the same.
* Not seen: the older kind, which runs a block without autograd first, and blocks of a
  torch that keeps elsewhere how they run again, which refuses what they keep.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

from torch_dropout_ir.tracing import checkpointed, checkpointed_block

Context = Callable[[], contextlib.AbstractContextManager[Any]]


class Blocks:
    """Sees to it that blocks of a pass run again in its context, made for each run."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._seen = weakref.WeakSet[Any]()

    def look(self, *_: Any) -> bool:
        """Return whether a call is in a block; to be called before each that may be."""
        if not checkpointed():
            return False
        block = checkpointed_block()
        if block is not None and block not in self._seen:
            self._seen.add(block)
            block.recompute_fn = _inside(self._context, block.recompute_fn)
        return True


def _inside(context: Context, call: Callable[..., None]) -> Callable[..., None]:
    def run(*args: Any) -> None:
        with context():
            call(*args)

    return run
