"""What a script's signal handlers raise meanwhile is the script's, not a measure's."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

Handler = Callable[[int, Any], Any]


class _Raised(BaseException):
    """Carries what a handler has raised past every ``except Exception``."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _Carrying:
    """Stands in the place of a handler."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self.handler(number, frame)
        except Exception as err:
            raise _Raised(err) from None


@contextlib.contextmanager
def handlers_raise() -> Iterator[None]:
    """Let what handlers raise inside, as a time limit does, get out as it is."""
    put = {n: _Carrying(handler) for n, handler in _handlers()}
    error = None
    try:
        for number, carrying in put.items():
            signal.signal(number, carrying)
        yield
    except _Raised as raised:
        if not put:  # it is for whoever has put others in place
            raise
        error = raised.error
    finally:
        for number, carrying in put.items():
            if signal.getsignal(number) is carrying:  # else it was set anew meanwhile
                signal.signal(number, carrying.handler)
    if error is not None:
        raise error from error.__cause__


def _handlers() -> list[tuple[int, Handler]]:
    """Return the script's handlers, in the one thread in which Python calls them."""
    if threading.current_thread() is not threading.main_thread():
        return []
    given = [(n, signal.getsignal(n)) for n in range(1, signal.NSIG)]
    return [(n, x) for n, x in given if callable(x) and not _passes(x)]


def _passes(handler: Handler) -> bool:
    """Whether what it raises gets out by itself."""
    return handler is signal.default_int_handler or isinstance(handler, _Carrying)
