"""Floor 1: threads of one process measure one after the other.

Semantics:

* A measurement changes a model for its time (modes, hooks, buffers, weights), and seeds
  generators that belong to the process: others wait for its end, of other models too.
* A thread that calls the model meanwhile waits at its door. One that is in a pass when
  a change is about to be made is waited for.
* A thread that waits for its turn does nothing meanwhile, in a pass or not.
* Where who measures waits in turn for a thread, as a loss does that calls the model in
  one, that thread goes on.
* What else another thread does to a model at that time is not seen here.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
import types
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn

from torch_dropout_ir.hooks import Undo, before_call, give_back
from torch_dropout_ir.tracing import frames

_LONGEST: Final = 300.0  # seconds of a pass of another thread's
_SOON: Final = 1.0  # seconds of a wait for another thread
_GLANCE: Final = 0.1  # seconds
_CALL: Final = nn.Module.__call__.__code__
_LOCK: Final = threading.RLock()
_holder: Final = [0]  # the thread that had it last
_waiting: Final = set[int]()  # threads that wait for it


def in_turn() -> contextlib.AbstractContextManager[bool]:
    """Return the context of a measurement: no other thread is in one meanwhile.

    It is False inside where another one is, which waits for this thread.
    """
    # A compiled function is not to hold a lock.
    return contextlib.nullcontext(True) if torch.compiler.is_compiling() else _Turn()


class _Turn(contextlib.AbstractContextManager[bool]):
    def __enter__(self) -> bool:
        self._own = _LOCK.acquire(blocking=False) or _wait()
        if self._own:
            _holder[0] = threading.get_ident()
        return self._own

    def __exit__(self, *_: object) -> None:
        if self._own:
            _LOCK.release()


def _wait() -> bool:
    """Wait for the lock; False where who holds it does not move."""
    here, place, since = threading.get_ident(), None, 0.0
    _waiting.add(here)
    try:
        while not _LOCK.acquire(timeout=_GLANCE):
            frame, now = sys._current_frames().get(_holder[0]), time.monotonic()
            if frame is None or (frame, frame.f_lasti) != place:
                place, since = frame and (frame, frame.f_lasti), now
                continue
            joins = frame.f_globals.get("__name__") == threading.__name__
            if now - since > (_SOON if joins else _LONGEST):
                return False
        return True
    finally:
        _waiting.discard(here)


def _after_fork() -> None:
    """Free the lock in a child that has no thread that would."""
    _waiting.clear()
    if _holder[0] != threading.get_ident():
        _LOCK._at_fork_reinit()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):  # where there is a fork
    os.register_at_fork(after_in_child=_after_fork)


def alone_with(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a change that no other thread runs a pass in."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    if threading.active_count() == 1:
        return _Turn()
    return _alone_with(model)


@contextlib.contextmanager
def _alone_with(model: nn.Module) -> Iterator[None]:
    with in_turn():
        undo: Undo = []
        try:
            before_call(model, _Door(model), undo)
            _wait_for_passes(model)
            yield
        finally:
            give_back(undo)


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
        with in_turn():
            pass


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
    """Whether another thread is in a pass of a model, and goes on."""
    idle = {threading.get_ident(), *_waiting}
    collects = gc.isenabled()
    gc.disable()  # a finalizer lets other threads go on, whose frames would be gone
    try:
        now = sys._current_frames().items()
        return any(_calls(frame, model) for thread, frame in now if thread not in idle)
    finally:
        if collects:
            gc.enable()


def inside(model: nn.Module) -> bool:
    """Whether this thread is in a call of a model."""
    return _calls(sys._getframe(1), model)


def _calls(frame: types.FrameType, model: nn.Module) -> bool:
    """Whether a frame is in a call of a model, or of the wrapper that compiles it."""
    called = (x.f_locals.get("self") for x in frames(frame) if x.f_code is _CALL)
    inner = ((x, vars(x)["_modules"].get("_orig_mod")) for x in called)
    return any(model is x for pair in inner for x in pair)
