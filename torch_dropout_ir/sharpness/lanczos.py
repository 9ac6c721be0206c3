"""Largest eigenvalues by Lanczos with full reorthogonalization and thick restart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final, Literal

from torch import Tensor

from torch_dropout_ir.arguments import (
    check_choice,
    check_count,
    check_real,
    check_state,
    check_symmetric,
    in_order,
)
from torch_dropout_ir.sharpness.krylov import (
    Space,
    dtype_of,
    random_vector,
    working_dtype,
)
from torch_dropout_ir.sharpness.search import Search, rehearsed
from torch_dropout_ir.vectors import (
    Params,
    full_precision,
    length,
    to_params,
    to_vector,
)

_BASIS: Final = 32
_FORESEEN: Final = 6.0  # times that a foreseen error may be less than a certain one
_NEAR: Final = 0.15  # residual of a start that is near an eigenvector, over the value
_LOOK: Final = 20  # products in a random direction, where several values are wanted
_LOOK_WARM: Final = 4
_MIXED: Final = 0.1  # share of a random direction in every start
_BASIS_BYTES: Final = 2**29


@dataclasses.dataclass(frozen=True)
class Eigen:
    r"""Eigenpairs with the error of each.

    Attributes:
        values: Eigenvalues, largest first, float64 ``[k]``; units of the loss over
            squared units of the parameters.
        vectors: Unit eigenvectors: dictionaries of parameters, or flat tensors where
            the operator is a matrix.
        residuals: :math:`\lVert A v - \lambda v \rVert` at most, float64 ``[k]``. An
            eigenvalue of the operator lies within that distance of each value.
        errors: Estimated errors of the values, float64 ``[k]``: the squared residual
            over the gap to the next Ritz value and its residual, or the residual. Of
            one value from a start near its vector also what the value would still grow
            if the recurrence went on with its mean coefficients, if that is less; after
            a rehearsal at least a sixth of the former.
        converged: Whether that was reached which was to be stopped on, or all is within
            the rounding of the operator's products.
        num_matvecs: Products spent, rehearsal (rounded up) and resumed runs included.
        state: All that is needed to go on, for ``state=``; it can be saved.
        rehearsal: What the rehearsal cost, in products: each as its share of samples.
    """

    values: Tensor
    vectors: list[Any] = dataclasses.field(repr=False)
    residuals: Tensor
    errors: Tensor
    converged: bool
    num_matvecs: int
    state: dict[str, Any] = dataclasses.field(repr=False)
    rehearsal: float = 0.0


@full_precision()
def top_eigenvalues(
    op: Any,
    k: int = 1,
    tol: float = 1e-3,
    max_matvecs: int = 200,
    start: Any = None,
    *,
    stop: Literal["value", "residual"] = "value",
    state: dict[str, Any] | None = None,
    max_bytes: int = _BASIS_BYTES,
) -> Eigen:
    r"""Return the ``k`` largest eigenvalues of a symmetric operator.

    One value is believed when its estimated error is at most ``tol`` times it: values
    settle with the square of the residual, so that is sooner. The estimate rests on the
    gap to the next Ritz value, and two eigenvalues that have not parted yet look like
    one with a wide gap: so the residual must be within 4 tolerances too (16 after a
    rehearsal whose vector proves to be most of the eigenvector), and the claim must
    hold for three more products (two), in which a larger value would come up. From
    random starts that makes as many false claims as stopping on the residual does, of
    eigenvalues that are a few tolerances apart. ``stop="residual"`` goes on until the
    residual is at most ``tol`` times the value: then an eigenvalue is that near, and
    the vector is as good. Neither stops because a value changed little.

    Several values are believed on their residuals. Larger ones and further copies of
    multiple ones are looked for from another random direction, for 20 products (four
    from a given ``start``), until nothing new is found. Where there is room for all
    ``P`` vectors, all are taken, and with fewer products several have not converged.
    Every start has a random part, from which larger values grow; but one close to an
    eigenvector all the same hides an eigenvalue that is larger by a few percent.

    Without a ``start``, the operator of one large batch rehearses on an eighth of its
    samples, then on a quarter, at most 28 and 3 times, which count as their share of
    the samples: five products at most (in time, up to ten), so not where there are
    fewer than 8, or 16 short ones. They are chosen to have the outputs, loss
    derivatives and products of both that all have on average. Memory: the basis of at
    most 32 vectors (``2 k + 8`` if that is more), within ``max_bytes`` as far as a
    restart allows: of ``2 k + 3`` at least.

    Args:
        op: Operator of :func:`hessian`, or a symmetric matrix ``[P, P]``.
        k: Number of eigenvalues, in ``[1, P]``.
        tol: Relative error to reach.
        max_matvecs: Most products to spend now.
        start: Starting vector in a form that ``op`` takes, for example the last
            eigenvector; random if None. A random vector of a tenth of its norm is
            added; but to stop on residuals one whose residual is within ``tol`` at once
            is kept, and four products look in a random direction: five in all.
        stop: Stop on the estimated error of the value, or on the residual.
        state: ``Eigen.state`` of an earlier run on the same operator, to go on from;
            its ``k`` and ``start`` count.
        max_bytes: Memory for the basis.

    Returns:
        Values, vectors, residuals and whether they converged. Without convergence the
        values are lower bounds of the true ones.

    Raises:
        ValueError: If ``k`` is out of range, ``max_matvecs`` below ``k``, ``tol``
            negative, a matrix not symmetric, ``start`` of another size, zero or not
            finite, ``state`` that of something else, or a product is not finite.
        TypeError: If a number is none, ``k`` or ``max_matvecs`` no integer, or
            ``state`` no dictionary.

    References:
        Wu & Simon, *Thick-restart Lanczos method*, SIAM J. Matrix Anal. 22 (2000).

    Example:
        >>> found = top_eigenvalues(torch.diag(torch.arange(50.0)), k=2, tol=1e-6)
        >>> found.values.round(decimals=3).tolist(), found.converged
        ([49.0, 48.0], True)
    """  # noqa: DOC502 (the checks and the space raise)
    check_symmetric("top_eigenvalues", op)
    _check(op, k, tol, max_matvecs, stop, max_bytes)
    if k > 1:  # what lies between several values is no gap to count on
        stop = "residual"
    search = Search(tol, stop, _look(k, stop, start is not None))
    if state is not None:
        check_state("top_eigenvalues", state, ("k", "rows", "rest", "look"), op)
        room = _capacity(op, state["k"], max_bytes)
        space = Space.resumed(op, state, room)
        if space.loosely_locked(tol):  # the tolerance is tighter now
            space = Space(op, space.vectors().sum(0), room, state["k"])
            space.spent, space.informed = state["spent"], state["informed"]
            space.extend()
        else:
            search.load(state)
    else:
        room = _capacity(op, k, max_bytes)
        space = _begin(op, k, start, max_matvecs, room, search)
    most = max_matvecs + (state["spent"] if state is not None else 0)
    while not search.done(space) and space.spent < most:
        search.next(space)
        space.extend()
    return Eigen(
        space.leading.flip(0),
        [_as_given(op, v.div_(v.norm())) for v in space.vectors()],
        space.residuals().flip(0),
        space.errors().flip(0),
        search.done(space),
        space.spent,
        space.state() | search.state(),
        search.rehearsal,
    )


def _look(k: int, stop: str, warm: bool) -> int:
    """Products of a look in a random direction; 0: the start has a part of that."""
    if k == 1:
        return _LOOK_WARM if warm and stop == "residual" else 0
    return _LOOK_WARM if warm else _LOOK


def _check(
    op: Any, k: int, tol: float, max_matvecs: int, stop: str, max_bytes: float
) -> None:
    size = op.shape[0]
    check_count("top_eigenvalues", "k", k, 1)
    check_count("top_eigenvalues", "max_matvecs", max_matvecs, 1)
    if k > size or max_matvecs < k:
        raise ValueError(
            f"top_eigenvalues: expected 1 <= `k` <= {size} and `max_matvecs` >= `k`, "
            f"got k={k} and max_matvecs={max_matvecs}"
        )
    check_real("top_eigenvalues", "tol", tol, least=0)
    check_real("top_eigenvalues", "max_bytes", max_bytes, least=0, finite=False)
    check_choice("top_eigenvalues", "stop", stop, ("residual", "value"))


def _begin(
    op: Any,
    k: int,
    start: Tensor | Params | None,
    max_matvecs: int,
    room: int,
    search: Search,
) -> Space:
    """Return a space of one product."""
    first, spent = _start(op, start, max_matvecs, room)
    if k == 1 and search.looks:  # maybe it is the eigenvector still
        space = Space(op, first, room, k)
        space.extend()
        if search.converged(space) or max_matvecs == 1:
            return space
        search.looks, spent = 0, 1.0
    mixed = first if start is None and not spent else _mixed(op, first)
    space = Space(op, mixed, room, k)
    space.spent = math.ceil(spent)
    space.extend()
    if start is not None and space.within(_NEAR, space.residuals()):
        space.informed = math.inf
    if start is None and spent:
        space.informed = _FORESEEN
        search.rehearsal = spent
    return space


def _start(
    op: Any, start: Tensor | Params | None, max_matvecs: int, room: int
) -> tuple[Tensor, float]:
    """Return the first vector, and the products that finding it has cost."""
    if start is None:
        return rehearsed(op, max_matvecs, room)
    vector = start if isinstance(start, Tensor) else _joined(op, start)
    sound = not vector.is_complex() and bool(vector.isfinite().all() & vector.any())
    if vector.shape != (op.shape[0],) or not sound:
        raise ValueError(
            f"top_eigenvalues: expected a `start` of {op.shape[0]} real numbers, "
            f"finite and not all zero, got {vector.dtype} {list(vector.shape)}. "
            "Without one it is random."
        )
    return vector.detach().to(getattr(op, "device", "cpu"), dtype_of(op)), 0.0


def _joined(op: Any, start: Any) -> Tensor:
    """Return a start that is given by names as one vector."""
    if not (isinstance(start, Mapping) and hasattr(op, "params")):
        named = ", or tensors by parameter name" if hasattr(op, "params") else ""
        raise TypeError(
            f"top_eigenvalues: expected `start` to be a tensor of {op.shape[0]} "
            f"numbers{named}, got {type(start).__name__}"
        )
    return to_vector(in_order("top_eigenvalues", "start", start, op.params))


def _mixed(op: Any, vector: Tensor) -> Tensor:
    """Add a random vector, so that the start is orthogonal to nothing."""
    other = random_vector(op)
    return other.mul_(_MIXED * length(vector) / other.norm()).add_(vector)


def _capacity(op: Any, k: int, max_bytes: int) -> int:
    """Vectors to hold: no more than memory allows, and enough for a restart."""
    bytes_each = op.shape[0] * working_dtype(dtype_of(op)).itemsize
    room = max(2 * k + 3, min(max(_BASIS, 2 * k + 8), max_bytes // bytes_each))
    return int(min(op.shape[0], room))


def _as_given(op: Any, vector: Tensor) -> Any:
    if hasattr(op, "params"):
        return to_params(vector, op.params)
    return vector.to(dtype_of(op))
