"""Input weights whose rows are put together, and made unit vectors, when taken."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

# Tiles of cosines that stay in a core's cache: 1 MB of float32, and the product is
# still at full speed. Twice the side is three times slower in few dimensions.
_BLOCK: Final = 512
_LARGEST: Final = 3 * 2**19  # entries of a block
_SMALLEST: Final = 2**15
_SHARE: Final = 8  # of a layer: two blocks are a quarter of it
# Unit rows are made once where they are small, or short: tiles then cost as much to
# scale as to make, and lists of near pairs are larger.
_HELD, _SHORT = 2**16, 64
_SAFE: Final = 1e12  # norms whose squares and inverses are far from any overflow


class Rows:
    """Weights ``[m, d - 1]`` with biases ``[m]`` as the last column, without a copy."""

    ndim = 2

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias = weight, bias
        self.shape = torch.Size((len(weight), weight.shape[1] + 1))
        self.dtype, self.device = weight.dtype, weight.device
        self.is_meta = weight.is_meta

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        if isinstance(index, slice):
            return torch.cat((self._weight[index], self._bias[index][:, None]), 1)
        found = self._weight.new_empty(len(index), self.shape[1])
        torch.index_select(self._weight, 0, index, out=found[:, :-1])
        found[:, -1] = self._bias[index]
        return found

    def __matmul__(self, columns: Tensor) -> Tensor:
        last = torch.outer(self._bias, columns[-1])
        return last.addmm_(self._weight, columns[:-1])

    @property
    def mT(self) -> _Transposed:
        """The transpose, for products."""
        return _Transposed(self._weight, self._bias)

    def products(self, high: slice, wide: slice, other: Weights) -> Tensor:
        """Return the products of some rows with some of another matrix of the kind."""
        if not isinstance(other, Rows):
            return self[high] @ other[wide].T
        tile = torch.outer(self._bias[high], other._bias[wide])
        return tile.addmm_(self._weight[high], other._weight[wide].T)

    def is_floating_point(self) -> bool:
        """Whether the entries are real floating-point numbers."""
        return self._weight.is_floating_point()

    def numel(self) -> int:
        """Number of entries."""
        return self.shape.numel()

    def detach(self) -> Rows:
        """The same without graph."""
        return Rows(self._weight.detach(), self._bias.detach())

    def whole(self) -> Tensor:
        """The matrix, in memory of its own."""
        return self[:]


class _Transposed:
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias = weight, bias

    def __matmul__(self, rows: Tensor) -> Tensor:
        return torch.cat((self._weight.mT @ rows, (self._bias @ rows)[None]))


Weights = Tensor | Rows


def check_real(weights: Weights) -> None:
    """Raise TypeError for weights that have no real values to compare."""
    if weights.is_floating_point() and not weights.is_meta:
        return
    raise TypeError(
        "condensation: expected weights that are real floating-point numbers, got "
        f"{weights.dtype} on the device {weights.device}. Convert integers with "
        "`.float()`, load a model off the meta device, and see complex weights as "
        "real ones with `torch.view_as_real(weights).flatten(1)`."
    )


def check_rows(function: str, *given: Weights) -> None:
    """Raise a ValueError unless weights are matrices."""
    for weights in given:
        known = isinstance(weights, (Tensor, Rows))
        if known and len(weights.shape) == 2:
            continue
        got = f"shape {list(weights.shape)}" if known else type(weights).__name__
        raise ValueError(
            f"{function}: expected weights [neurons, d], got {got}. "
            "`input_weights(module)` gives them for a layer."
        )


def work_dtype(weights: Weights) -> torch.dtype:
    """Double precision for what has it, single for the rest."""
    return torch.float64 if weights.dtype == torch.float64 else torch.float32


def rows_a_block(weights: Any) -> int:
    """Rows that are copied at a time: 6 MB of float32 at most, if more than a few."""
    dims = max(1, weights.shape[1])
    most = max(-(-len(weights) // _SHARE), _SMALLEST // dims)
    return max(16, min(_BLOCK, _LARGEST // dims, most))


def unit_rows(weights: Tensor) -> Tensor:
    """Return rows ``[m, d]`` over their norms, at least in single precision; 0 stays 0.

    Nothing overflows or underflows on the way, and nothing but the result is made.
    """
    check_real(weights)
    out = torch.empty_like(weights, dtype=work_dtype(weights)).copy_(weights)
    if not out.numel():
        return out
    for order in (torch.inf, 2):
        sizes = torch.linalg.vector_norm(out, order, dim=1, keepdim=True)
        out /= sizes.masked_fill_(sizes == 0, 1.0)
    return out


def row_norms(weights: Weights) -> Tensor:
    """Return the norms of the rows in double precision, ``[m]``; copies are small."""
    check_real(weights)
    found = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
    if not weights.numel():
        return found
    size = max(1, _SMALLEST // (2 * weights.shape[1]))
    for i in range(0, len(weights), size):
        wide = weights[i : i + size].double()
        largest = torch.linalg.vector_norm(wide, torch.inf, dim=1, keepdim=True)
        scaled = wide / largest.masked_fill(largest == 0, 1.0)
        found[i : i + size] = largest[:, 0] * torch.linalg.vector_norm(scaled, dim=1)
    return found


class UnitRows:
    """Rows over their norms; 0 stays 0, and what is not finite is NaN.

    Where they are many nothing of their size is made: products are taken of the weights
    as they are, and blocks of rows are copied and scaled where only some count.

    Attributes:
        shape: ``(m, d)``.
        dtype: Single precision at least.
        norms: Their norms, float64 ``[m]``.
    """

    def __init__(self, weights: Weights) -> None:
        held = weights.numel() <= _HELD or weights.shape[1] <= _SHORT
        if held and isinstance(weights, Rows):
            weights = weights.whole()
        weights = weights.detach()
        rows = unit_rows(weights[:]) if held else None
        self._set(weights, None, row_norms(weights), rows)

    def _set(
        self,
        weights: Weights,
        places: Tensor | None,
        norms: Tensor,
        held: Tensor | None,
    ) -> None:
        self._weights, self._places, self._held = weights, places, held
        self.norms = norms
        self.dtype, self.device = work_dtype(weights), weights.device
        self.shape = torch.Size((len(norms), weights.shape[1]))
        sound = norms[self.sound]
        self._safe = bool(((sound > 1 / _SAFE) & (sound < _SAFE)).all())
        inverse = (1 / norms).masked_fill_(norms == 0, 0.0)
        self._scale = inverse.to(self.dtype)[:, None]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def sound(self) -> Tensor:
        """Which of them have an orientation: are neither zero nor not finite."""
        return (self.norms > 0) & self.norms.isfinite()

    def at(self, places: Tensor) -> UnitRows:
        """Return those at some places, by mask or index; few rows are copied."""
        if places.dtype == torch.bool:
            if bool(places.all()):
                return self
            places = places.nonzero().squeeze(1)
        found = UnitRows.__new__(UnitRows)
        held = None if self._held is None else self._held[places]
        own = places if self._places is None else self._places[places]
        found._set(self._weights, own, self.norms[places], held)
        return found

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        if self._held is not None:
            return self._held[index]
        own = index if self._places is None else self._places[index]
        rows, scale = self._weights[own], self._scale[index]
        if not self._safe:
            return unit_rows(rows)
        if isinstance(own, slice) and isinstance(self._weights, Tensor):
            if rows.dtype == self.dtype:
                return rows * scale  # a view of the weights themselves
        return rows.to(self.dtype).mul_(scale)

    def tile(self, high: slice, wide: slice, other: UnitRows | None = None) -> Tensor:
        """Return cosines of some rows with some of the same or another set."""
        other = self if other is None else other
        direct = self._direct and other._direct and self.dtype == other.dtype
        if self._held is not None or not direct:
            return self[high] @ other[wide].T.to(self.dtype)
        mine, theirs = self._weights, other._weights
        if isinstance(mine, Rows):
            tile = mine.products(high, wide, theirs)
        else:
            tile = mine[high] @ theirs[wide].T
        return tile.mul_(self._scale[high]).mul_(other._scale[wide].T)

    @property
    def side(self) -> int:
        """Rows of a tile: where none is copied, the tile is what takes memory."""
        if self._held is not None:
            return _BLOCK
        if not self._direct:
            return rows_a_block(self)
        side = max(math.isqrt(self.shape.numel()) // 4, len(self) // 16)
        return max(_BLOCK // 4, min(_BLOCK, side))

    @property
    def _direct(self) -> bool:
        every = self._places is None and self._safe
        return every and self._weights.dtype == self.dtype

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        size = max(1, _SMALLEST // self.shape[1])
        for i in range(0, len(self), size):
            part = slice(i, min(i + size, len(self)))
            yield part, self[part]

    def __matmul__(self, columns: Tensor) -> Tensor:
        """Products with columns ``[d, k]``."""
        if self._held is not None:
            return self._held @ columns
        if self._direct:
            return (self._weights @ columns).mul_(self._scale)
        found = columns.new_empty(len(self), columns.shape[1])
        for part, rows in self._blocks():
            found[part] = rows @ columns
        return found

    def sums(self, coefficients: Tensor) -> Tensor:
        """Weighted sums of the rows, ``[d, k]``, by coefficients ``[m, k]``."""
        if self._held is not None:
            return self._held.mT @ coefficients
        if self._direct:
            return self._weights.mT @ (self._scale * coefficients)
        found = coefficients.new_zeros(self.shape[1], coefficients.shape[1])
        for part, rows in self._blocks():
            found.addmm_(rows.mT, coefficients[part])
        return found


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
