"""Floor 1: checkpointed blocks run again as they have run.

Semantics:

* Activation checkpointing runs a block again in a backward pass. Where that comes when
  the context of the block's first run is over, as the ``backward()`` of a script does,
  other kernels would run: torch refuses what they keep, or takes it for the same.
* The older kind, which runs a block without autograd first, is not seen here.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch.overrides import TorchFunctionMode

from torch_dropout_ir.tracing import checkpointed_block

T = TypeVar("T")
Context = Callable[[], contextlib.AbstractContextManager[T]]


@contextlib.contextmanager
def as_before(context: Context[T]) -> Iterator[T]:
    """Enter a context that blocks inside are in when they run again, too.

    Args:
        context: Makes it, once for each run.

    Yields:
        What it does.
    """
    with context() as found, _Blocks(context):
        yield found


class _Blocks(TorchFunctionMode):
    """Sees to it that the blocks of a pass run again in a context."""

    def __init__(self, context: Context[Any]) -> None:
        super().__init__()
        self._context = context
        self._seen = weakref.WeakSet[Any]()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        block = checkpointed_block()
        if block is not None and block not in self._seen:
            self._seen.add(block)
            block.recompute_fn = _inside(self._context, block.recompute_fn)
        return func(*args, **(kwargs or {}))


def _inside(context: Context[Any], call: Callable[..., None]) -> Callable[..., None]:
    def run(*args: Any) -> None:
        with context():
            call(*args)

    return run
