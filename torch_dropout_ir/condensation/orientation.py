"""Orientations and amplitudes of neurons, and what cosines between them are like."""

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
    check_real,
    check_rows,
    cosine_tiles,
)
from torch_dropout_ir.vectors import balanced, full_precision

_BINS: Final = 80


def orientations(weights: Tensor) -> Tensor:
    r"""Return the rows over their norms; a row of norm zero stays zero.

    A row with an infinite entry or NaN has NaN too.

    Args:
        weights: Input weights, ``[m, d]``.

    Returns:
        Unit rows, ``[m, d]``.

    Raises:
        ValueError: If ``weights`` are no matrix.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 1.

    Example:
        >>> orientations(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """  # noqa: DOC502 (`check_rows` raises)
    check_rows("orientations", weights)
    return _as_given(_units(weights), weights)


def _units(weights: Tensor) -> Tensor:
    """Rows over their norms, in single precision at least."""
    scaled, _ = balanced(weights, 1)
    norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / torch.where(norms == 0, 1.0, norms)


def amplitudes(weights: Tensor, outgoing: Tensor | None = None) -> Tensor:
    r"""Return the amplitude of each neuron.

    .. math:: A_j = \lVert a_j \rVert \, \lVert w_j \rVert

    Args:
        weights: Input weights, ``[m, d]``.
        outgoing: Outgoing weights, ``[outputs, m]`` or ``[m]``; where they are not
            given the amplitude is the norm of the input weight alone.

    Returns:
        Amplitudes, ``[m]``.

    Raises:
        ValueError: If ``weights`` are no matrix, or ``outgoing`` has another number of
            neurons.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 1.

    Example:
        >>> amplitudes(torch.tensor([[3.0, 4.0]]), torch.tensor([-2.0]))
        tensor([10.])
    """
    check_rows("amplitudes", weights)
    norms = _norms(weights, 1)
    if outgoing is None:
        return norms
    if outgoing.shape[-1:] != norms.shape:
        raise ValueError(
            f"amplitudes: expected `outgoing` [..., {weights.shape[0]}], got "
            f"{list(outgoing.shape)}"
        )
    columns = outgoing.reshape(-1, len(norms))
    return norms * _norms(columns, 0)


def _norms(weights: Tensor, dim: int) -> Tensor:
    """Norms along a dimension, of numbers of any size."""
    scaled, largest = balanced(weights, dim)
    norms = torch.linalg.vector_norm(scaled, dim=dim) * largest.squeeze(dim)
    return _as_given(norms, weights)


def _as_given(x: Tensor, weights: Tensor) -> Tensor:
    """Of integers stays single precision, of complex numbers what is real or is not."""
    return x.to(weights.dtype) if weights.is_floating_point() else x


@full_precision()
def cosine_similarity(weights: Tensor, other: Tensor | None = None) -> Tensor:
    r"""Return the cosines between neurons.

    .. math:: D(u, v) = u^\top v / (\lVert u \rVert \lVert v \rVert)

    Args:
        weights: Input weights, ``[m, d]``.
        other: A second set, ``[n, d]``; the first again if None.

    Returns:
        Cosines ``[m, n]`` in ``[-1, 1]``, of the dtype of ``weights``; 0 where a norm
        is zero.

    Raises:
        ValueError: If one is no matrix, or their neurons have other numbers of weights.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 2.

    Example:
        >>> cosine_similarity(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    other = weights if other is None else other
    check_rows("cosine_similarity", weights, other)
    if weights.shape[1] != other.shape[1]:
        raise ValueError(
            "cosine_similarity: expected `other` [neurons, d] with the d of `weights`, "
            f"{weights.shape[1]}, got {list(other.shape)}"
        )
    for given in (weights, other):
        if given.is_complex():
            check_real(given)
    rows = _units(weights)
    columns = rows if other is weights else _units(other).to(rows)
    return _as_given((rows @ columns.T).clamp(-1.0, 1.0), weights)


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
