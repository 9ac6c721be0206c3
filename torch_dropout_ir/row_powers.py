"""Floor 1: powers of two, one a sample, which tell whether rows are kept apart."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

POWERS = 16  # that there are
_HELD = 2**10  # rows whose powers are kept for the next call, at most


def by_powers(root: Tensor, dims: int = 1, count: int | None = None) -> Tensor:
    """Return a tensor with each sample times a power of two, which is exact.

    Sixteen samples in a row have sixteen powers from ``2^-8`` to ``2^7``. Each sixteen
    have them in another order, lest samples that meet in pairs, half a batch apart,
    have the same. The first ``dims`` dimensions count the rows, of which each of
    ``count`` samples has as many, one after the other; None: one.
    """
    rows = root.shape[:dims].numel()
    weights = (_kept if rows <= _HELD else _weights)(rows, count or rows)
    shape = (*root.shape[:dims], *(1,) * (root.ndim - dims))
    return root * torch.from_numpy(weights).to(root).view(shape)


def _weights(rows: int, count: int) -> np.ndarray[Any, Any]:
    """Return the power of two of each row, free of torch's modes and devices."""
    blocks = -(-count // POWERS)
    order = np.random.default_rng(0).random((blocks, POWERS)).argsort(1).ravel()
    samples = np.arange(rows) // (rows // (count or 1))
    return np.ldexp(1.0, order[samples] - POWERS // 2)


_kept = functools.lru_cache(maxsize=8)(_weights)


def weighs_alike(
    plain: Tensor, weighed: Tensor, dims: int = 1, count: int | None = None
) -> bool:
    """Return whether a derivative at weighed roots is the plain one, weighed."""
    expected = by_powers(plain, dims, count)
    if torch.equal(expected, weighed):
        return True
    # Not-a-number stays where it is: that is no coupling.
    return torch.equal(expected.nan_to_num(), weighed.nan_to_num())
