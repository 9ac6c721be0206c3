"""What the cosines between neurons are like, without their matrix."""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import torch
from torch import Tensor

from torch_dropout_ir.arguments import check_count
from torch_dropout_ir.condensation.rows import (
    UnitRows,
    Weights,
    check_rows,
    cosine_tiles,
)
from torch_dropout_ir.vectors import full_precision

_BINS: Final = 80


@dataclasses.dataclass(frozen=True)
class CosineStatistics:
    """Sums over pairs of neurons, which add: layers, ranks and blocks merge by ``+``.

    Attributes:
        num_pairs: Pairs of neurons that have an orientation.
        total: Sum of their cosines, float64 0-d.
        total_squares: Sum of the squared cosines, float64 0-d.
        counts: Pairs in bins of equal width from -1 to 1, int64 ``[bins]``.
    """

    num_pairs: int
    total: Tensor
    total_squares: Tensor
    counts: Tensor

    def __add__(self, other: CosineStatistics) -> CosineStatistics:
        return CosineStatistics(
            self.num_pairs + other.num_pairs,
            self.total + other.total,
            self.total_squares + other.total_squares,
            self.counts + other.counts,
        )

    @property
    def mean(self) -> float:
        """Mean cosine; NaN without a pair."""
        return float(self.total) / self.num_pairs if self.num_pairs else math.nan

    @property
    def standard_deviation(self) -> float:
        """Standard deviation of the cosines; NaN without a pair."""
        if not self.num_pairs:
            return math.nan
        square = float(self.total_squares) / self.num_pairs
        return math.sqrt(max(0.0, square - self.mean**2))


@torch.no_grad()
@full_precision()
def cosine_statistics(
    weights: Weights, other: Weights | None = None, *, bins: int = _BINS
) -> CosineStatistics:
    r"""Return mean, spread and histogram of the cosines between neurons.

    Each pair of different neurons counts once; with ``other``, each pair of a neuron
    with one of the other set: another layer on the same inputs, or the same layer at
    another step. Neurons that are zero or not finite are in no pair.

    Tiles of the matrix of cosines are made and summed; of the weights two blocks of
    rows are copied, at most a quarter of them.

    Args:
        weights: Input weights, ``[m, d]``.
        other: A second set, ``[n, d]``.
        bins: Bins of the histogram.

    Returns:
        The statistics, on the device of ``weights``.

    Raises:
        ValueError: If shapes do not fit, or ``bins`` is below 1.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 2.

    Example:
        >>> w = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, -1.0]])
        >>> found = cosine_statistics(w, bins=4)
        >>> found.num_pairs, round(found.mean, 4), found.counts.tolist()
        (3, 0.3333, [0, 0, 2, 1])
    """  # noqa: DOC502 (raised by `_check`)
    _check(weights, other, bins)
    rows = _sound(weights)
    columns = None if other is None else _sound(other)
    total = torch.zeros((), dtype=torch.float64, device=weights.device)
    squares, counts = total.clone(), total.new_zeros(bins)
    for i, j, tile in cosine_tiles(rows, columns):
        tile.clamp_(-1.0, 1.0)
        if other is None and i == j:
            above = torch.ones_like(tile, dtype=torch.bool).triu_(1)
            tile = tile[above]
        counts += torch.histc(tile, bins=bins, min=-1, max=1)
        total += tile.sum(dtype=torch.float64)
        squares += torch.linalg.vector_norm(tile).double().square()
    m = len(rows)
    num_pairs = m * (m - 1) // 2 if columns is None else m * len(columns)
    return CosineStatistics(num_pairs, total, squares, counts.long())


def _sound(weights: Weights) -> UnitRows:
    """The rows that have an orientation."""
    rows = UnitRows(weights)
    return rows.at(rows.sound)


def _check(weights: Weights, other: Weights | None, bins: int) -> None:
    given = [w for w in (weights, other) if w is not None]
    check_rows("cosine_statistics", *given)
    shapes = [list(w.shape) for w in given]
    if len({s[1] for s in shapes}) != 1:
        raise ValueError(
            "cosine_statistics: expected `weights` [m, d] and `other` [n, d], got "
            f"{' and '.join(map(str, shapes))}"
        )
    check_count("cosine_statistics", "bins", bins, 1)
