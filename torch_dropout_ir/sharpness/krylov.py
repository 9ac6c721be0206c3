"""An orthonormal basis that grows by products, and the operator seen through it."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.vectors import length, random_like

NOT_FINITE: Final = (
    "expected an operator with finite products, got one that is not. Look for what "
    "overflows at these parameters."
)
_AHEAD, _RECENT = 12, 8  # steps that are foreseen, and how many tell of them
_MOSTLY: Final = 0.5  # share of the start in the first Ritz vector
_WIDE: Final = 2**16  # columns that a restart turns at once: no second basis


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a basis: half precision would not stay orthogonal."""
    return torch.promote_types(dtype, torch.float32)


def dtype_of(op: Any) -> torch.dtype:
    """Return the dtype of what an operator multiplies."""
    return getattr(op, "dtype", torch.float32)


def random_vector(op: Any, distribution: str = "normal") -> Tensor:
    """Draw a vector for ``op``: the same on all ranks that it is spread over."""
    like = torch.empty(
        op.shape[0],
        dtype=dtype_of(op),
        device=getattr(op, "device", "cpu"),
    )
    drawn = random_like({"": like}, distribution)[""]
    surface = getattr(op, "surface", None)
    return drawn if surface is None else surface.ranks.broadcast(drawn)


class Space:
    """A growing orthonormal basis, and the operator seen through it.

    Every image is orthogonalized against all of the basis, so the projection is exact
    whatever vector comes next: the remainder of the last image (Lanczos), a restart's
    leading Ritz vectors, or a random vector that looks for what was missed. With
    ``span``, against so many newest vectors alone: the three of the recurrence do, in
    less time, until a pair has nearly converged. It holds ``capacity`` vectors, for
    ``k`` leading pairs.
    """

    def __init__(
        self, op: Any, start: Tensor, capacity: int, k: int, span: int | None = None
    ) -> None:
        self.k = k
        self.spent = 0
        self._span = capacity if span is None else span
        self._op = op
        dtype = working_dtype(start.dtype)
        self._rows = start.new_empty(capacity, start.numel(), dtype=dtype)
        given = torch.finfo(dtype_of(op)).eps
        self._rounding = max(16 * torch.finfo(dtype).eps, given)
        torch.div(start, length(start), out=self._rows[0])
        self._filled = 1
        float64: Any = {"dtype": torch.float64, "device": "cpu"}
        self._projected = torch.zeros(capacity, capacity, **float64)
        self._rest, self._left = self._rows[0], 0.0  # of the last image, and its norm
        # From a start near an eigenvector: times that an error may be foreseen to be
        # less than it is sure to be; 0 from others.
        self.informed = 0.0
        # By lock, what it left out of the images of the first vectors of the basis.
        self._left_out = self._coordinates = torch.zeros(0, 0, **float64)
        self.values = torch.zeros(0, **float64)

    def state(self) -> dict[str, Any]:
        """Return all that is needed to go on, for :meth:`resumed`."""
        n = self._filled
        return {
            "k": self.k,
            "spent": self.spent,
            "rows": self._rows[:n],
            "projected": self._projected[:n, :n].clone(),
            "rest": self._rest,
            "left_out": self._left_out,
            "informed": self.informed,
        }

    @classmethod
    def resumed(cls, op: Any, state: dict[str, Any], capacity: int) -> Space:
        """Go on from a state, which is not changed."""
        rows, rest = state["rows"], state["rest"]
        n = rows.shape[0]
        space = cls(op, rest, max(capacity, n), state["k"])
        space._rows[:n] = rows.to(space._rows)
        space._rest, space._left = rest.to(space._rows), length(rest)
        space._projected[:n, :n] = state["projected"]
        space._filled, space._left_out = n, state["left_out"]
        space.spent, space.informed = state["spent"], state["informed"]
        space._solve()
        return space

    @property
    def found(self) -> int:
        """Number of leading pairs that there are."""
        return min(self.k, self._filled)

    @property
    def scale(self) -> float:
        """Largest magnitude among the Ritz values."""
        return float(self.values.abs().max())

    @property
    def leading(self) -> Tensor:
        """The largest Ritz values, ascending."""
        return self.values[-self.found :]

    @property
    def near(self) -> bool:
        """Whether the start was near the first Ritz vector, as it was meant to be."""
        mostly = float(self._coordinates[0, -1]) ** 2 >= _MOSTLY
        return self.informed > 0.0 and mostly

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans everything."""
        return self._filled == self._rows.shape[1]

    @property
    def whole(self) -> bool:
        """Whether several pairs are wanted, and there is room for all vectors."""
        return self.k > 1 and self._rows.shape[0] == self._rows.shape[1]

    @property
    def closed(self) -> bool:
        """Whether the last image has left the basis no further than rounding."""
        return self._left <= self._rounding * max(self.scale, 1e-300)

    def first_entries(self) -> Tensor:
        """First entries of the Ritz vectors in the basis, float64 ``[filled]``."""
        return self._coordinates[0]

    def within(self, tol: float, of: Tensor) -> bool:
        """Whether errors are within ``tol`` of their values, or of rounding."""
        return bool((of <= self._allowed(tol)).all())

    def grew(self, seen: Tensor, tol: float) -> bool:
        """Whether a leading value exceeds what was seen by more than ``tol``."""
        return bool((self.leading - seen > self._allowed(tol)).any())

    def _allowed(self, tol: float) -> Tensor:
        least = self._rounding * self.scale
        return (tol * self.leading.abs()).clamp(min=least)

    def extend(self) -> None:
        """Take the image of the newest vector."""
        n = self._filled
        newest = self._rows[n - 1]
        image: Tensor = self._op @ newest.to(dtype_of(self._op))
        self.spent += 1
        first = max(0, n - self._span)
        column, self._rest = orthogonalize(
            image.detach().to(newest.dtype), self._rows[first:n]
        )
        del image
        self._left = length(self._rest)
        if not math.isfinite(self._left):  # as soon as one entry of the image is not
            raise ValueError(NOT_FINITE)
        self._projected[n - 1, first:n] = self._projected[first:n, n - 1] = column
        self._solve()

    def _solve(self) -> None:
        n = self._filled
        self.values, self._coordinates = torch.linalg.eigh(self._projected[:n, :n])

    def residuals(self) -> Tensor:
        """Bounds on the residuals of the leading Ritz pairs, ascending by value."""
        return self._residuals_of(slice(-self.found, None))

    def _residuals_of(self, pairs: slice) -> Tensor:
        return self._parts(pairs).abs().sum(0)

    def _parts(self, pairs: slice) -> Tensor:
        """Parts of the residuals: what each lock left out, and what the basis does."""
        coordinates = self._coordinates[:, pairs]
        earlier = self._left_out @ coordinates[: self._left_out.shape[1]]
        return torch.cat((earlier, self._left * coordinates[-1:]))

    def errors(self) -> Tensor:
        """Return squared residuals over the gap to the rest, if less (Kato-Temple).

        From a start near an eigenvector, what the value may still grow, if less; after
        a rehearsal not much less, as that of two close values is not foreseen.
        """
        found = self._kato_temple()
        if self.near and self.k == 1:
            least = found / self.informed
            found = found.clamp(max=self._growth()).maximum(least)
        return found

    def _growth(self) -> float:
        """Return what the largest value gains if the recurrence goes on as it did.

        The coefficients of Lanczos settle: the matrix is continued by their means.
        """
        n, ahead = self._filled, self._filled + _AHEAD
        steps = torch.cat((
            self._projected[:n, :n].diagonal(1),
            torch.tensor([self._left], dtype=torch.float64, device="cpu"),
        ))
        recent = max(1, min(n - 1, _RECENT))
        matrix = torch.zeros(ahead, ahead, dtype=torch.float64, device="cpu")
        matrix.diagonal()[:] = self._projected.diagonal()[n - recent : n].mean()
        for side in (1, -1):
            matrix.diagonal(side)[:] = steps[-recent:].mean()
        matrix[:n, :n] = self._projected[:n, :n]
        matrix[n - 1, n] = matrix[n, n - 1] = self._left
        return float(torch.linalg.eigvalsh(matrix)[-1] - self.leading[0])

    def _kato_temple(self) -> Tensor:
        residuals = self.residuals()
        if self._filled == self.found:
            return residuals
        rest = slice(-self.found - 1, -self.found)
        # What the next Ritz value may still hide is no part of the gap.
        below = float(self.values[rest] + self._residuals_of(rest))
        gap = float(self.leading[0]) - below
        if gap <= 0.0:
            return residuals
        whole = length(residuals)
        return residuals.clamp(max=whole * (whole / gap))

    def vectors(self, count: int | None = None) -> Tensor:
        """Leading Ritz vectors, largest value first: all that are wanted if None."""
        chosen = self._coordinates[:, -(count or self.found) :].flip(1)
        return chosen.T.to(self._rows) @ self._rows[: self._filled]

    def loosely_locked(self, tol: float) -> bool:
        """Whether what was locked is known no better than a looser tolerance asked."""
        parts = self._parts(slice(-self.found, None))
        return not self.within(tol, parts[:-1].abs().sum(0))

    def _keep(self, count: int) -> None:
        self._left_out = self._parts(slice(-count, None))[:-1]
        turn = self._coordinates[:, -count:].T.to(self._rows)
        for piece in self._rows[: self._filled].split(_WIDE, dim=1):
            piece[:count] = turn @ piece
        self._projected.zero_()
        self._projected[:count, :count] = torch.diag(self.values[-count:])
        self._filled, self.informed = count, 0.0  # the start is no row any more

    def advance(self) -> None:
        """Go on with the remainder of the last image; restart where it is full."""
        if self._filled == self._rows.shape[0]:
            self._keep(min(self._filled - 1, self.k + self._filled // 2))
        self._append(self._rest)

    def share(self, tol: float) -> float:
        """What locking leaves out of any leading vector at most, over what may be."""
        # Vectors of close values mix later: what counts is all of them together.
        parts = self._parts(slice(-self.found, None))
        return float((parts / self._allowed(tol).clamp(min=1e-300)).norm(dim=1).sum())

    def lock(self) -> None:
        """Keep what converged alone, and look for more in a random direction."""
        parts = self._parts(slice(-self.k, None))
        self._keep(self.k)
        self._left_out = parts
        self._append(None)

    def _append(self, vector: Tensor | None) -> None:
        rows = self._rows[: self._filled]
        if vector is None or self._left <= 1e-12 * max(self.scale, 1e-300):
            _, vector = orthogonalize(random_vector(self._op).to(rows), rows)
        newest = self._rows[self._filled]
        torch.div(vector, length(vector), out=newest)
        self._rest = newest  # one vector less while the next product is computed
        self._filled += 1


def orthogonalize(image: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates of ``image`` in ``rows``, float64, and what is left.

    Lanczos leaves rounding in all rows but the last two. These go first, so one pass
    over all of them does; where they held more, it is repeated.
    """
    near = rows[-2:]
    coordinates = near @ image
    rest = torch.addmv(image, near.T, coordinates, alpha=-1)
    column = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
    column[-2:] = coordinates.double().cpu()
    for _ in range(3):
        coordinates = rows @ rest
        rest.addmv_(rows.T, coordinates, alpha=-1)
        column += coordinates.double().cpu()
        if length(coordinates) <= 0.1 * length(rest):
            break
    return column, rest
