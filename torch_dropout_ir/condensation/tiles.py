"""Cosines between neurons, tile by tile: the whole matrix never exists."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torch_dropout_ir.condensation.rows import (
    UnitRows,
    Weights,
    blocks,
    check_real,
)


def with_orientation(weights: Weights) -> tuple[Tensor, int]:
    """Return indices of rows, finite and not zero, and how many are not finite."""
    check_real(weights)
    if not weights.numel():
        return torch.zeros(0, dtype=torch.int64, device=weights.device), 0
    largest = torch.cat([
        torch.linalg.vector_norm(block, torch.inf, dim=1)
        for _, block in blocks(weights)
    ])
    sound = torch.isfinite(largest)
    return (sound & (largest > 0)).nonzero().squeeze(1), int((~sound).sum())


def cosine_tiles(
    rows: UnitRows, other: UnitRows | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield first row, first column and tile of the cosines between rows of two sets.

    Without ``other`` it is the same again, and the tiles below the diagonal are left
    out. A tile may be written on.
    """
    columns = rows if other is None else other
    high, wide = rows.side, columns.side
    for i in range(0, len(rows), high):
        part = slice(i, i + high)
        for j in range(i if other is None else 0, len(columns), wide):
            yield i, j, rows.tile(part, slice(j, j + wide), columns)


def near_tiles(
    rows: UnitRows, columns: UnitRows, threshold: float
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield first row, first column and tile of where cosines are above a threshold.

    A tile has 0 and 1 in the dtype of the rows: sums of floats are twice as fast as
    those of booleans. If ``columns`` is ``rows`` itself, tiles below the diagonal are
    left out and those on it are 0 on and below the diagonal.
    """
    same = columns is rows
    for i, j, tile in cosine_tiles(rows, None if same else columns):
        near = tile.gt_(threshold)
        yield i, j, near.triu_(1) if same and i == j else near
