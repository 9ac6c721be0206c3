"""What a collective leaves behind: nothing that its threads still hold."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Final

from torch import Tensor

_LONGEST: Final = 1.0  # seconds


@contextlib.contextmanager
def released(*tensors: Tensor) -> Iterator[None]:
    """Return from a collective only when its threads have let go of what it takes.

    A thread of gloo's tells that a collective is done, and drops the tensors after
    that. Where it is late, and the last to hold one, the tensor's Python object dies in
    it; if the interpreter ends meanwhile, the process aborts ("terminate called without
    an active exception"). The wait is microseconds, one second at most.

    Args:
        tensors: What the collective inside takes.

    Yields:
        Nothing.
    """
    ours = [x for x in tensors if x.device.type == "cpu"]
    held = [x._use_count() for x in ours]  # type: ignore[attr-defined]
    yield
    end = time.monotonic() + _LONGEST
    for x, count in zip(ours, held, strict=True):
        while x._use_count() > count and time.monotonic() < end:  # type: ignore[attr-defined]
            time.sleep(0)
