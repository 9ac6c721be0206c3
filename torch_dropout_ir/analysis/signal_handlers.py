"""What a script's signal handlers raise meanwhile is the script's, not a measure's."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from traceback import walk_tb
from typing import Any

Handler = Callable[[int, Any], Any]


class _Raised(BaseException):
    """Carries what a handler has raised past every ``except Exception``."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _Carrying:
    """Stands in the place of a handler; once it is over, calls it as it is.

    What a script puts in its place meanwhile may go on to call it, as torch's handler
    for the workers of a loader does.
    """

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.over = False

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self.handler(number, frame)
        except Exception as err:
            if self.over:
                raise
            raise _Raised(err) from None


@contextlib.contextmanager
def handlers_raise() -> Iterator[None]:
    """Let what handlers raise inside, as a time limit does, get out as it is."""
    put = _stand_ins()
    error = None
    try:
        for number, carrying in put:
            signal.signal(number, carrying)
        yield
    except _Raised as raised:
        if not put:  # it is for whoever has put others in place
            raise
        error = raised.error
    finally:
        for _, carrying in put:  # first, for a signal may arrive in between
            carrying.over = True
        for number, carrying in put:
            now: Any = signal.getsignal(number)
            if now is carrying:  # else the handler has put another in its place
                signal.signal(number, carrying.handler)
    if error is not None:
        raise error from error.__cause__


def _stand_ins() -> list[tuple[int, _Carrying]]:
    """Return what stands in for handlers, in the one thread in which they are called.

    Python's own of an interrupt raises what gets out by itself.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    own = ((n, signal.getsignal(n)) for n in range(1, signal.NSIG))
    return [
        (n, _Carrying(x)) for n, x in own
        if callable(x)
        and x is not signal.default_int_handler
        and (not isinstance(x, _Carrying) or x.over)
    ]  # fmt: skip


def raised_by_handler(err: Exception) -> bool:
    """Whether a signal handler in Python has raised an error, by where it passed."""
    # It is given the frame that it interrupts, and may be none any more by then.
    for frame, _ in walk_tb(err.__traceback__):
        own = tuple(frame.f_locals.values())
        given = chain(own, *(x for x in own if type(x) is tuple))
        if any(x is frame.f_back and x is not None for x in given):
            return True
    return False
