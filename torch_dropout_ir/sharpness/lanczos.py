"""Largest eigenvalues by Lanczos with full reorthogonalization and thick restart."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.vectors import Params, to_params, to_vector

_BASIS: Final = 32
_CHECKS: Final = 8
_BASIS_BYTES: Final = 2**29


@dataclasses.dataclass(frozen=True)
class Eigen:
    r"""Eigenpairs with the error of each.

    Attributes:
        values: Eigenvalues, largest first, float64 ``[k]``.
        vectors: Unit eigenvectors: dictionaries of parameters, or flat tensors where
            the operator is a matrix.
        residuals: :math:`\lVert A v - \lambda v \rVert`, float64 ``[k]``. An
            eigenvalue of the operator lies within that distance of each value.
        converged: Whether all residuals are within the tolerance.
        num_matvecs: Products spent.
    """

    values: Tensor
    vectors: list[Any]
    residuals: Tensor
    converged: bool
    num_matvecs: int


def top_eigenvalues(
    op: Any,
    k: int = 1,
    tol: float = 1e-3,
    max_matvecs: int = 200,
    start: Any = None,
) -> Eigen:
    r"""Return the ``k`` largest eigenvalues of a symmetric operator.

    Stops when every residual is at most ``tol`` times its value, never because a value
    changed little. A small residual says that the value is near *an* eigenvalue; so
    before it stops, it looks for larger ones, and for further copies of multiple ones,
    from a random direction for eight products, until nothing new is found. Largest
    means algebraically largest.

    Args:
        op: Operator of :func:`hessian`, or a symmetric matrix ``[P, P]``.
        k: Number of eigenvalues, in ``[1, P]``.
        tol: Relative residual to reach.
        max_matvecs: Most products to spend.
        start: Starting vector in a form that ``op`` takes, for example the last
            eigenvector; random if None.

    Returns:
        Values, vectors, residuals and whether they converged. Without convergence the
        values are lower bounds of the true ones.

    Raises:
        ValueError: If ``k`` is out of range, ``max_matvecs`` below ``k``, or ``start``
            of another size or zero.

    References:
        Wu & Simon, *Thick-restart Lanczos method*, SIAM J. Matrix Anal. 22 (2000).

    Example:
        >>> found = top_eigenvalues(torch.diag(torch.arange(50.0)), k=2, tol=1e-6)
        >>> found.values.round(decimals=3).tolist(), found.converged
        ([49.0, 48.0], True)
    """
    size = op.shape[0]
    if not 1 <= k <= size or max_matvecs < k:
        raise ValueError(
            f"top_eigenvalues: expected 1 <= `k` <= {size} and `max_matvecs` >= `k`, "
            f"got k={k} and max_matvecs={max_matvecs}"
        )
    space = _Space(_start(op, start), _capacity(op, k), k)
    seen: Tensor | None = None  # values that converged before the last look for more
    look_until = 0
    while True:
        space.extend(op @ space.newest)
        found = space.found == k and space.within(tol)
        settled = seen is not None and not space.grew(seen, tol)
        if space.exhausted or space.spent >= max_matvecs:
            break
        if found and space.spent >= look_until:
            if settled:
                break
            seen, look_until = space.leading, space.spent + _CHECKS
            space.lock()
        else:
            space.advance()
    converged = space.found == k and (space.exhausted or (found and settled))
    return Eigen(
        space.leading.flip(0),
        [_as_given(op, v / v.norm()) for v in space.vectors()],
        space.residuals().flip(0),
        converged,
        space.spent,
    )


class _Space:
    """A growing orthonormal basis, and the operator seen through it.

    Every image is orthogonalized against all of the basis, so the projection is exact
    whatever vector comes next: the remainder of the last image (Lanczos), a restart's
    leading Ritz vectors, or a random vector that looks for what was missed.
    """

    def __init__(self, start: Tensor, capacity: int, k: int) -> None:
        self.k = k
        self.spent = 0
        self._rows = start.new_empty(capacity, start.numel())
        self._rows[0] = start / start.norm()
        self._filled = 1
        self._projected = torch.zeros(capacity, capacity, dtype=torch.float64)
        self._rest = start
        self._locked = 0.0  # largest residual of what was locked: a bound from then on
        self.values = torch.zeros(0, dtype=torch.float64)
        self._coordinates = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def newest(self) -> Tensor:
        return self._rows[self._filled - 1]

    @property
    def found(self) -> int:
        return min(self.k, self._filled)

    @property
    def scale(self) -> float:
        return float(self.values.abs().max())

    @property
    def leading(self) -> Tensor:
        """The largest Ritz values, ascending."""
        return self.values[-self.found :]

    @property
    def exhausted(self) -> bool:
        return self._filled == self._rows.shape[1]

    def within(self, tol: float) -> bool:
        """Whether the residuals are within ``tol`` of their values."""
        rounding = 16 * torch.finfo(self._rows.dtype).eps * self.scale
        allowed = (tol * self.leading.abs()).clamp(min=rounding)
        return bool((self.residuals() <= allowed).all())

    def grew(self, seen: Tensor, tol: float) -> bool:
        """Whether a leading value exceeds what was seen by more than ``tol``."""
        return bool((self.leading - seen > tol * self.leading.abs()).any())

    def extend(self, image: Tensor) -> None:
        """Take the image of the newest vector."""
        self.spent += 1
        n = self._filled
        column, self._rest = _orthogonalize(image, self._rows[:n])
        self._projected[n - 1, :n] = self._projected[:n, n - 1] = column
        self.values, self._coordinates = torch.linalg.eigh(self._projected[:n, :n])

    def residuals(self) -> Tensor:
        """Bounds on the residuals of the leading Ritz pairs, ascending by value."""
        last = float(self._rest.norm()) * self._coordinates[-1, -self.found :]
        return (last.square() + self._locked**2).sqrt()

    def vectors(self) -> Tensor:
        """Leading Ritz vectors, largest value first."""
        chosen = self._coordinates[:, -self.found :].flip(1)
        return chosen.T.to(self._rows) @ self._rows[: self._filled]

    def _keep(self, count: int) -> None:
        rows = (
            self._coordinates[:, -count:].T.to(self._rows) @ self._rows[: self._filled]
        )
        self._rows[:count] = rows
        self._projected.zero_()
        self._projected[:count, :count] = torch.diag(self.values[-count:])
        self._filled = count

    def advance(self) -> None:
        """Go on with the remainder of the last image; restart where it is full."""
        if self._filled == self._rows.shape[0]:
            self._keep(min(self._filled - 1, self.k + self._filled // 2))
        self._append(self._rest)

    def lock(self) -> None:
        """Keep what converged alone, and look for more in a random direction."""
        self._locked = float(self.residuals().max())
        self._keep(self.k)
        self._append(torch.randn_like(self._rest))

    def _append(self, vector: Tensor) -> None:
        rows = self._rows[: self._filled]
        if float(vector.norm()) <= 1e-12 * max(self.scale, 1e-300):
            vector = torch.randn_like(vector)
        for _ in range(2):
            _, vector = _orthogonalize(vector / vector.norm(), rows)
        self._rows[self._filled] = vector / vector.norm()
        self._filled += 1


def _start(op: Any, start: Tensor | Params | None) -> Tensor:
    if start is None:
        return torch.randn(op.shape[0], dtype=op.dtype, device=op.device)
    vector = start if isinstance(start, Tensor) else to_vector(start)
    if vector.shape != (op.shape[0],) or not bool(vector.any()):
        raise ValueError(
            f"top_eigenvalues: expected a `start` of {op.shape[0]} numbers that are "
            f"not all zero, got shape {list(vector.shape)}"
        )
    return vector.to(op.device, op.dtype)


def _capacity(op: Any, k: int) -> int:
    """Vectors to hold: no more than memory allows, and enough for a restart."""
    bytes_each = op.shape[0] * torch.finfo(op.dtype).bits // 8
    room = max(2 * k + 6, min(max(_BASIS, 2 * k + 8), _BASIS_BYTES // bytes_each))
    return int(min(op.shape[0], room))


def _as_given(op: Any, vector: Tensor) -> Any:
    return vector if isinstance(op, Tensor) else to_params(vector, op.params)


def _orthogonalize(image: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates of ``image`` in ``rows`` and what is left, done twice."""
    first = rows @ image
    rest = image - rows.T @ first
    second = rows @ rest
    return (first + second).double().cpu(), rest - rows.T @ second
