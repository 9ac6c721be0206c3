"""Cosines between neurons, tile by tile: the whole matrix never exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

# Tiles that stay in a core's cache: 1 MB of float32, and the product is still at full
# speed. Twice the side is three times slower in few dimensions.
_BLOCK: Final = 512
_BLOCK_ENTRIES: Final = 3 * 2**19


def check_real(weights: Tensor) -> None:
    """Raise TypeError for weights that have no real values to compare."""
    if weights.is_floating_point() and not weights.is_meta:
        return
    raise TypeError(
        "condensation: expected weights that are real floating-point numbers, got "
        f"{weights.dtype} on the device {weights.device}. Convert integers with "
        "`.float()`, load a model off the meta device, and see complex weights as "
        "real ones with `torch.view_as_real(weights).flatten(1)`."
    )


def unit_rows(weights: Tensor, out: Tensor | None = None) -> Tensor:
    """Return rows over their norms, at least in single precision; 0 stays 0.

    Nothing overflows or underflows on the way, and nothing but the result is made.

    Args:
        weights: Rows, ``[m, d]``.
        out: Where to write them, ``[m, d]``; new memory if None.

    Returns:
        Unit rows, ``[m, d]``.
    """
    check_real(weights)
    if out is None:
        out = torch.empty_like(weights, dtype=work_dtype(weights))
    out.copy_(weights)
    if not out.numel():
        return out
    for order in (torch.inf, 2):
        sizes = torch.linalg.vector_norm(out, order, dim=1, keepdim=True)
        out /= sizes.masked_fill_(sizes == 0, 1.0)
    return out


def work_dtype(weights: Tensor) -> torch.dtype:
    """Double precision for what has it, single for the rest."""
    return torch.float64 if weights.dtype == torch.float64 else torch.float32


def row_norms(weights: Tensor) -> Tensor:
    """Return the norms of the rows in double precision, ``[m]``; copies are small."""
    check_real(weights)
    found = weights.new_zeros(len(weights), dtype=torch.float64)
    if not weights.numel():
        return found
    size = rows_a_block(weights)
    for block, norms in zip(weights.split(size), found.split(size), strict=True):
        wide = block.double()
        largest = torch.linalg.vector_norm(wide, torch.inf, dim=1, keepdim=True)
        scaled = wide / largest.masked_fill(largest == 0, 1.0)
        norms.copy_(largest[:, 0] * torch.linalg.vector_norm(scaled, dim=1))
    return found


def with_orientation(weights: Tensor) -> tuple[Tensor, int]:
    """Return indices of the neurons that have an orientation.

    Args:
        weights: Input weights, ``[m, d]``.

    Returns:
        Indices of rows that are finite and not zero, and the number of those that are
        not finite.
    """
    check_real(weights)
    if not weights.shape[1]:
        return torch.zeros(0, dtype=torch.int64, device=weights.device), 0
    largest = torch.linalg.vector_norm(weights, torch.inf, dim=1)
    sound = torch.isfinite(largest)
    return (sound & (largest > 0)).nonzero().squeeze(1), int((~sound).sum())


def cosine_tiles(
    weights: Tensor, other: Tensor | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Go through the cosines between the rows of one or two matrices.

    Args:
        weights: Rows ``[m, d]``; each is divided by its norm in its turn.
        other: Rows ``[n, d]``; the same again if None, and then the tiles below the
            diagonal are left out.

    Yields:
        First row, first column and tile. The tile may be written on.
    """
    columns = weights if other is None else other
    size, dtype = rows_a_block(weights), work_dtype(weights)
    blocks, sides = (weights.new_empty(size, w.shape[1], dtype=dtype)
                     for w in (weights, columns))  # fmt: skip
    for i in range(0, len(weights), size):
        block = unit_rows(weights[i : i + size], blocks[: len(weights) - i])
        for j in range(i if other is None else 0, len(columns), size):
            if other is None and i == j:
                yield i, j, block @ block.T
                continue
            side = unit_rows(columns[j : j + size], sides[: len(columns) - j])
            yield i, j, block @ side.T


def rows_a_block(weights: Tensor) -> int:
    """Rows that are copied at a time: 6 MB of float32 at most, if more than a few."""
    return max(16, min(_BLOCK, _BLOCK_ENTRIES // max(1, weights.shape[1])))


def near_tiles(
    rows: Tensor, columns: Tensor, threshold: float
) -> Iterator[tuple[int, int, Tensor]]:
    """Go through ``rows @ columns.T > threshold`` in tiles of bounded size.

    Args:
        rows: Unit rows, ``[m, d]``.
        columns: Unit rows, ``[n, d]``; if it is ``rows`` itself, tiles below the
            diagonal are left out and those on it are 0 on and below the diagonal.
        threshold: The threshold.

    Yields:
        First row, first column and tile of 0 and 1, in the dtype of the rows: sums of
        floats are twice as fast as those of booleans.
    """
    same = columns is rows
    for i in range(0, len(rows), _BLOCK):
        block = rows[i : i + _BLOCK]
        for j in range(i if same else 0, len(columns), _BLOCK):
            near = (block @ columns[j : j + _BLOCK].T).gt_(threshold)
            yield i, j, near.triu_(1) if same and i == j else near
