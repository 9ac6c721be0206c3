"""Floor 1: batches to measure on, of what a user has for data."""

from __future__ import annotations

import itertools
from typing import Any

from torch_dropout_ir.functional import Batch, as_batches


def fixed_batches(data: Any, most: int = 8) -> list[Batch]:
    """Read the user's ``data`` once: a batch, a list of batches, or a loader.

    Args:
        data: What :func:`as_batches` takes.
        most: Batches to take of a loader.

    Returns:
        A list of batches.

    Raises:
        TypeError: If ``data`` is none of them, or its batches are no pairs.
    """
    batches = as_batches(data)
    if not isinstance(batches, (list, tuple)):
        batches = list(itertools.islice(batches, most))
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            sequence = isinstance(batch, (tuple, list))
            size = f" of {len(batch)}" if sequence else ""
            raise TypeError(
                "expected `data` to be a batch `(inputs, targets)` or batches of that "
                f"form, got a {type(batch).__name__}{size}. Make pairs of them, as in "
                "`[(batch, batch['labels']) for batch in loader]`."
            )
    return [(inputs, targets) for inputs, targets in batches]
