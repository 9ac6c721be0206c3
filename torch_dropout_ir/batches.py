"""Floor 1: batches to measure on, of what a user has for data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from torch_dropout_ir.functional import Batch


def as_batches(batches: Any) -> Iterable[Batch]:
    """Read one batch ``(inputs, targets)`` or an iterable of batches.

    Args:
        batches: A pair whose first element is a tensor or mapping, any 2-tuple, or a
            list or loader of such pairs that can be iterated more than once.

    Returns:
        An iterable of batches.

    Raises:
        TypeError: If ``batches`` is neither, or can be iterated only once.
    """
    if isinstance(batches, tuple) and len(batches) == 2:
        return [batches]
    if isinstance(batches, list) and len(batches) == 2:
        if isinstance(batches[0], (Tensor, Mapping)):
            return [(batches[0], batches[1])]
    if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, Tensor)):
        raise TypeError(
            "expected a batch `(inputs, targets)` or an iterable of batches, got "
            f"{type(batches).__name__}. A dictionary goes where the inputs are, a "
            "dataset of single samples into a DataLoader."
        )
    if isinstance(batches, Iterator):
        raise TypeError(
            "expected batches that can be iterated more than once, got a one-pass "
            f"{type(batches).__name__}. Pass a list or a DataLoader."
        )
    return batches


def fixed_batches(data: Any, most: int = 8) -> list[Batch]:
    """Return ``data`` read once, as a list; of a loader at most 8 batches."""
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
