"""Floor 1: threads of one process measure one after the other.

Semantics:

* A measurement changes a model for its time (modes, hooks, buffers, weights), and seeds
  generators that belong to the process: others wait for its end, of other models too.
* A thread that calls the model meanwhile waits at its door. One that is in a pass when
  a change is about to be made is waited for.
* What else another thread does to a model at that time is not seen here.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn

TURN: Final = threading.RLock()
_LONGEST: Final = 300.0  # seconds of a pass of another thread's
_CALL: Final = nn.Module.__call__.__code__
_at_door: Final = set[int]()  # threads that wait for a turn to be over


def in_turn() -> contextlib.AbstractContextManager[Any]:
    """Return the context of a measurement: no other thread is in one meanwhile."""
    # A compiled function is not to hold a lock.
    return contextlib.nullcontext() if torch.compiler.is_compiling() else TURN


def alone_with(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a change of a model, which no other thread runs meanwhile.

    Args:
        model: The model, inside of what compiles it.

    Raises:
        RuntimeError: If a pass of another thread does not end.
    """  # noqa: DOC502 (raised by the wait)
    if torch.compiler.is_compiling() or threading.active_count() == 1:
        return in_turn()
    return _alone_with(model)


@contextlib.contextmanager
def _alone_with(model: nn.Module) -> Iterator[None]:
    with TURN:
        door = model.register_forward_pre_hook(_Door(model), prepend=True)
        try:
            _wait_for_passes(model)
            yield
        finally:
            door.remove()


class _Door:
    """A hook at which other threads wait before they run a model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own = threading.get_ident()

    def __call__(self, module: nn.Module, _: Any) -> None:
        here = threading.get_ident()
        if here == self._own or module is not self._model:  # a replica is another one
            return
        if torch.compiler.is_compiling():
            return
        _at_door.add(here)
        with TURN:
            _at_door.discard(here)


def _wait_for_passes(model: nn.Module) -> None:
    """Wait until no other thread is in a pass of a model, but at its door."""
    end = time.monotonic() + _LONGEST
    while _runs(model):
        if time.monotonic() > end:
            raise RuntimeError(
                f"expected passes of {type(model).__name__} in other threads to end, "
                f"got one that takes more than {_LONGEST:.0f} s: it cannot be measured "
                "meanwhile. Measure a copy (`copy.deepcopy`)."
            )
        time.sleep(1e-3)


def _runs(model: nn.Module) -> bool:
    """Whether another thread is in a pass of a model."""
    own = threading.get_ident()
    for thread, frame in sys._current_frames().items():
        while frame is not None and thread != own and thread not in _at_door:
            if frame.f_code is _CALL and _is(frame.f_locals.get("self"), model):
                return True
            frame = frame.f_back  # type: ignore[assignment]
    return False


def _is(called: Any, model: nn.Module) -> bool:
    """Whether a module that is called is a model, or the wrapper that compiles it."""
    return called is model or vars(called)["_modules"].get("_orig_mod") is model
