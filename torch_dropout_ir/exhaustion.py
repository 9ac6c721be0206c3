"""Memory that runs out: the error after which nothing is tried that needs more."""

from __future__ import annotations

from typing import Final

import torch

_SAID: Final = ("out of memory", "not enough memory", "allocate memory", "ALLOC_FAILED")


def raise_if_exhausted(err: Exception) -> None:
    """Raise an error once more if it says that memory has run out.

    Example:
        >>> raise_if_exhausted(ValueError("no"))
        >>> raise_if_exhausted(MemoryError("no more"))
        Traceback (most recent call last):
        MemoryError: no more
    """
    said = isinstance(err, RuntimeError) and any(x in str(err) for x in _SAID)
    if said or isinstance(err, (torch.OutOfMemoryError, MemoryError)):
        raise err
