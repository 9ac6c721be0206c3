"""What ranks decide together, and what a collective leaves behind.

Semantics:

* A pass of a model may be a collective (synchronized batch normalization, forward and
  backward): ranks that make unlike numbers of passes wait for each other for ever. What
  a rank would decide on passes by its own batch is asked of all that measure together.
* Before each pass all say that they are well: one that could not go on, as where its
  loss raises, has left by then, and the others leave in its place, not in the pass.
* Of a collective nothing is left behind that its threads still hold.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Final, Literal

from torch import Tensor

_LONGEST: Final = 1.0  # seconds
# A private name; with a torch that lacks it, nothing is waited for.
_USES: Final[Callable[[Tensor], int]] = getattr(Tensor, "_use_count", lambda _: 0)
Ask = Callable[[int, str], int]
Add = Callable[[Tensor], Tensor]
_ASKED: ContextVar[Ask | None] = ContextVar("asked", default=None)
_ADDED: ContextVar[Add | None] = ContextVar("added", default=None)


@contextlib.contextmanager
def together(ask: Ask, add: Add | None = None) -> Iterator[None]:
    """Let ranks decide together inside.

    ``ask`` returns the largest of their numbers, and is told what it is of, as all
    must be; ``add`` the mean over the joined batch, of what are means over theirs.
    """
    asked, added = _ASKED.set(ask), _ADDED.set(add)
    try:
        yield
    finally:
        _ASKED.reset(asked)
        _ADDED.reset(added)


def joined(x: Tensor) -> Tensor:
    """Return what is a mean over a batch as that over the batches of all ranks."""
    add = _ADDED.get()
    return x if add is None else add(x)


def most(count: int, of: str) -> int:
    """Return the largest of a number over the ranks that measure together."""
    ask = _ASKED.get()
    return count if ask is None else ask(count, of)


def go_on(way: Literal["forward", "backward"]) -> None:
    """Begin a pass of the model, on all ranks that measure together or on none."""
    most(0, way)


def alone() -> bool:
    """Whether this process measures by itself."""
    return _ASKED.get() is None


def some(flag: bool, of: str) -> bool:
    """Whether something is so on any rank."""
    ask = _ASKED.get()
    return flag if ask is None else ask(flag, of) > 0


def every(flag: bool, of: str) -> bool:
    """Whether something is so on all ranks."""
    ask = _ASKED.get()
    return flag if ask is None else ask(not flag, of) <= 0


@contextlib.contextmanager
def released(*tensors: Tensor) -> Iterator[None]:
    """Return from a collective only when its threads have let go of what it takes.

    A thread of gloo's tells that a collective is done, and drops the tensors after
    that. Where it is late, and the last to hold one, the tensor's Python object dies in
    it; if the interpreter ends meanwhile, the process aborts ("terminate called without
    an active exception"). The wait is microseconds, one second at most.
    """
    ours = [x for x in tensors if x.device.type == "cpu"]
    held = [_USES(x) for x in ours]
    yield
    end = time.monotonic() + _LONGEST
    for x, count in zip(ours, held, strict=True):
        while _USES(x) > count and time.monotonic() < end:
            time.sleep(0)
