"""Lanczos by its three-term recurrence: two vectors, whatever the number of steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.sharpness.krylov import (
    NOT_FINITE,
    dtype_of,
    random_vector,
    working_dtype,
)
from torch_dropout_ir.vectors import length

HOLD: Final = 3  # products for which what is claimed from a random start must hold
CLOSE: Final = 4.0  # tolerances that a residual may be, whatever the error is
_ROUNDING: Final = 16  # times the precision: what is no more than that is zero


@dataclasses.dataclass(frozen=True)
class Quadrature:
    r"""What some products say of the spectrum, from one random vector.

    Attributes:
        nodes: Ritz values, ascending, float64 ``[steps]``.
        weights: Squared first entries of their vectors, ``[steps]``, which sum to 1.
        residual: :math:`\lVert A v - \lambda v \rVert` of the largest one: an
            eigenvalue of the operator lies within that distance of it.
        error: Its estimated error: the residual, or its square over the gap to the next
            node and that one's residual, if that is less (Kato-Temple).
    """

    nodes: Tensor
    weights: Tensor
    residual: float
    error: float

    @property
    def top(self) -> float:
        """The largest Ritz value."""
        return float(self.nodes[-1])


def recurrence(
    op: Any, steps: int, enough: Callable[[Quadrature], bool] | None = None
) -> Quadrature:
    r"""Return nodes and weights of a random probe, from two vectors at a time.

    .. math:: \beta_{k+1} v_{k+1} = A v_k - \alpha_k v_k - \beta_k v_{k-1}

    The product is added to the older vector, in its memory. Without a basis nothing is
    orthogonalized again: once a node has converged, it can come a second time, and the
    two share the weight. Neither the largest node nor its residual suffers from that.

    At most ``steps`` products: fewer where they span all that the probe reaches, or
    ``enough``, called after each, returns True.

    Raises:
        ValueError: If a product is not finite.

    References:
        Paige, *Accuracy and effectiveness of the Lanczos algorithm for the symmetric
        eigenproblem*, Linear Algebra Appl. 34 (1980).
    """
    v = random_vector(op)
    given = torch.finfo(v.dtype).eps
    v = v.to(working_dtype(v.dtype))
    v /= v.norm()
    rounding = max(_ROUNDING * torch.finfo(v.dtype).eps, given)
    last = torch.zeros_like(v)
    matrix = torch.zeros(steps, steps, dtype=torch.float64, device="cpu")
    left = 0.0
    for k in range(steps):
        rest = _plus_product(last.mul_(-left), op, v)
        matrix[k, k] = along = float(rest @ v)
        rest.add_(v, alpha=-along)
        left = length(rest)
        if not math.isfinite(left):
            raise ValueError(NOT_FINITE)
        nodes, vectors = torch.linalg.eigh(matrix[: k + 1, : k + 1])
        found = _quadrature(nodes, vectors, left)
        least = rounding * float(matrix.abs().max())
        if k + 1 == steps or left <= least or (enough and enough(found)):
            break
        matrix[k, k + 1] = matrix[k + 1, k] = left
        last, v = v, rest.div_(left)
    return found


def _quadrature(nodes: Tensor, vectors: Tensor, left: float) -> Quadrature:
    residuals = [left * abs(x) for x in vectors[-1].tolist()]
    error = residual = residuals[-1]
    if len(nodes) > 1:
        # What the next node may still hide is no part of the gap.
        gap = float(nodes[-1] - nodes[-2]) - residuals[-2]
        error = min(residual, residual * (residual / gap)) if gap > 0 else residual
    return Quadrature(nodes, vectors[0].square(), residual, error)


def _plus_product(total: Tensor, op: Any, v: Tensor) -> Tensor:
    """Add ``op @ v`` in place."""
    if hasattr(op, "add_product"):
        op.add_product(v, total)
        return total
    return total.add_(op @ v.to(dtype_of(op)))


class Settled:
    """Whether the largest node is an eigenvalue, and has stayed one.

    As :func:`top_eigenvalues` does from a random start: the error must be within the
    tolerance and the residual within four of them, for three more products, and
    ``least`` in all.
    """

    def __init__(self, tol: float, least: int) -> None:
        self._tol, self._least = tol, least
        self._claimed: float | None = None
        self._until = 0

    def __call__(self, found: Quadrature) -> bool:
        """Whether to stop."""
        count, allowed = len(found.nodes), self._tol * abs(found.top)
        if found.error > allowed or found.residual > CLOSE * allowed:
            self._claimed = None
        elif self._claimed is None or found.top - self._claimed > allowed:
            self._claimed, self._until = found.top, count + HOLD
        return self._claimed is not None and count >= max(self._until, self._least)
