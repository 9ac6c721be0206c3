"""Largest eigenvalues by Lanczos with full reorthogonalization and thick restart."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.vectors import Params, to_params, to_vector

_BASIS: Final = 32


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

    Stops when every residual is at most ``tol`` times the largest magnitude seen in the
    spectrum, never because a value changed little: residuals bound the error, changes
    do not. Largest means algebraically largest.

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
        ValueError: If ``k`` is out of range or ``max_matvecs`` below ``k``.

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
    basis = min(size, max(_BASIS, 2 * k + 8))
    vector = _start(op, start)
    rows = vector.new_empty(basis, size)
    projected = torch.zeros(basis, basis, dtype=torch.float64)
    rows[0] = vector / vector.norm()
    filled, spent = 1, 0
    while True:
        image = op @ rows[filled - 1]
        spent += 1
        column, rest = _orthogonalize(image, rows[:filled])
        projected[filled - 1, :filled] = projected[:filled, filled - 1] = column
        values, coordinates = torch.linalg.eigh(projected[:filled, :filled])
        found = min(k, filled)
        length = float(rest.norm())
        residuals = length * coordinates[-1, -found:].abs()
        scale = float(values.abs().max())
        small = length <= 1e-12 * max(scale, 1e-300) or filled == size
        converged = found == k and bool((residuals <= tol * scale).all())
        if converged or spent >= max_matvecs or (small and found == k):
            break
        if filled == basis:
            filled = _restart(rows, projected, values, coordinates, k)
        rows[filled] = _next(rest, rows[:filled], small)
        filled += 1
    chosen = coordinates[:, -found:].flip(1)
    vectors = chosen.T.to(rows) @ rows[:filled]
    return Eigen(
        values[-found:].flip(0),
        [_as_given(op, v / v.norm()) for v in vectors],
        residuals.flip(0),
        converged or (small and found == k),
        spent,
    )


def _start(op: Any, start: Tensor | Params | None) -> Tensor:
    if start is None:
        return torch.randn(op.shape[0], dtype=op.dtype, device=op.device)
    vector = start if isinstance(start, Tensor) else to_vector(start)
    return vector.to(op.device, op.dtype)


def _as_given(op: Any, vector: Tensor) -> Any:
    return vector if isinstance(op, Tensor) else to_params(vector, op.params)


def _orthogonalize(image: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates of ``image`` in ``rows`` and what is left, done twice."""
    first = rows @ image
    rest = image - rows.T @ first
    second = rows @ rest
    return (first + second).double().cpu(), rest - rows.T @ second


def _restart(
    rows: Tensor, projected: Tensor, values: Tensor, coordinates: Tensor, k: int
) -> int:
    """Keep the best half of the Ritz vectors; return how many."""
    # Their coupling to the next vector comes out of its own product with the operator,
    # which is orthogonalized against all rows.
    kept = min(rows.shape[0] - 1, k + rows.shape[0] // 2)
    rows[:kept] = coordinates[:, -kept:].T.to(rows) @ rows
    projected.zero_()
    projected[:kept, :kept] = torch.diag(values[-kept:])
    return kept


def _next(rest: Tensor, rows: Tensor, small: bool) -> Tensor:
    """Return the next unit vector; a random one where the space is exhausted."""
    if small:
        _, rest = _orthogonalize(torch.randn_like(rest), rows)
    return rest / rest.norm()
