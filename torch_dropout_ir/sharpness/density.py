"""Spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from torch_dropout_ir.arguments import (
    check_count,
    check_real,
    check_state,
    check_symmetric,
)
from torch_dropout_ir.sharpness.krylov import (
    Space,
    dtype_of,
    random_vector,
    working_dtype,
)
from torch_dropout_ir.sharpness.recurrence import recurrence
from torch_dropout_ir.vectors import full_precision

_POINTS = 512
_BASIS_BYTES = 2**29
_MARGIN = 6.0  # widths of the kernel beyond the outermost node: all of its mass


@dataclasses.dataclass(frozen=True)
class Density:
    r"""A spectral density with its error.

    Attributes:
        grid: Eigenvalues, float64 ``[G]``.
        density: Density there, float64 ``[G]``; it integrates to 1.
        standard_error: Its standard error over the probes, NaN with one.
        nodes: Nodes of the quadrature, ``[num_probes, num_steps]``; fewer where
            a probe spans less, then padded with weight 0.
        weights: Their weights, which sum to 1 for each probe.
        bandwidth: Standard deviation of the kernel that each node stands for.
        num_matvecs: Products spent, resumed runs included.
        converged: Whether ``rtol`` was reached; True where none was asked for.
        state: All that is needed to go on, for ``state=``; it can be saved.
    """

    grid: Tensor = dataclasses.field(repr=False)
    density: Tensor = dataclasses.field(repr=False)
    standard_error: Tensor = dataclasses.field(repr=False)
    nodes: Tensor
    weights: Tensor
    bandwidth: float
    num_matvecs: int
    converged: bool
    state: dict[str, Any] = dataclasses.field(repr=False)


@full_precision()
def spectral_density(
    op: Any,
    num_steps: int = 20,
    num_probes: int = 1,
    grid: Tensor | None = None,
    *,
    bandwidth: float | None = None,
    rtol: float | None = None,
    state: dict[str, Any] | None = None,
    max_bytes: int = _BASIS_BYTES,
) -> Density:
    r"""Return the density of the eigenvalues of a symmetric operator.

    .. math:: \phi(t) = \frac{1}{P} \sum_j g_\sigma(t - \lambda_j) \approx
        \frac{1}{m} \sum_k \sum_l \tau_{kl}^2 \, g_\sigma(t - \theta_{kl})

    ``num_steps`` of Lanczos with full reorthogonalization from each random probe give
    nodes ``theta`` and, as squared first entries ``tau`` of the eigenvectors of the
    tridiagonal matrix, their weights: a Gauss quadrature, exact for polynomials up to
    degree ``2 num_steps - 1`` in the probe. The outermost nodes bound the grid: no
    product is spent on bounds. Memory: ``num_steps`` vectors; where these are more than
    ``max_bytes``, two, without reorthogonalization: nodes may then come twice, with
    the weight shared between them.

    Args:
        op: Operator of :func:`hessian`, or a symmetric matrix ``[P, P]``.
        num_steps: Products a probe.
        num_probes: Random probes; with ``rtol`` the most.
        grid: Where to evaluate; 512 points that hold all of the density if None.
        bandwidth: Standard deviation of the kernel; 1 % of the nodes' range if None.
        rtol: If given, stop as soon as the mean absolute standard error, integrated,
            is at most this, after three probes at least.
        state: ``Density.state`` of an earlier run, whose probes count too.
        max_bytes: Memory for the basis.

    Returns:
        Grid, density, nodes and weights.

    Raises:
        ValueError: If a number is below 1, ``bandwidth`` is not positive and finite,
            ``rtol`` negative, ``grid`` is not one row of finite numbers, a matrix is
            not symmetric, or ``state`` that of something else.
        TypeError: If a number is none, of steps or probes no integer, or ``state`` no
            dictionary.

    References:
        Ghorbani, Krishnan & Xiao, *An investigation into neural net optimization via
        Hessian eigenvalue density*, ICML 2019; Golub & Welsch, *Calculation of Gauss
        quadrature rules*, Math. Comp. 23 (1969).

    Example:
        >>> found = spectral_density(torch.diag(torch.arange(9.0)), num_steps=5)
        >>> round(torch.trapezoid(found.density, found.grid).item(), 6)
        1.0
        >>> found.num_matvecs
        5
    """  # noqa: DOC502 (the checks raise)
    check_symmetric("spectral_density", op)
    _check(op, num_steps, num_probes, grid, bandwidth, rtol, max_bytes)
    if state is not None:
        check_state("spectral_density", state, ("probes", "spent"), op)
    probes = [] if state is None else list(state["probes"])
    spent = 0 if state is None else state["spent"]
    for _ in range(num_probes):
        probes.append(_quadrature(op, num_steps, max_bytes))
        spent += probes[-1][0].numel()
        found = smoothed(probes, spent, grid, bandwidth)
        found.state["size"] = op.shape[0]
        if rtol is not None and len(probes) >= 3:
            if float(torch.trapezoid(found.standard_error, found.grid)) <= rtol:
                return found
    return dataclasses.replace(found, converged=rtol is None)


def _check(
    op: Any,
    num_steps: int,
    num_probes: int,
    grid: Tensor | None,
    bandwidth: float | None,
    rtol: float | None,
    max_bytes: float,
) -> None:
    check_count("spectral_density", "num_steps", num_steps, 1)
    check_count("spectral_density", "num_probes", num_probes, 1)
    if not op.shape[0]:
        raise ValueError("spectral_density: expected an operator that is not empty")
    if bandwidth is not None:
        check_real("spectral_density", "bandwidth", bandwidth, above=0)
    if rtol is not None:
        check_real("spectral_density", "rtol", rtol, least=0)
    check_real("spectral_density", "max_bytes", max_bytes, least=0, finite=False)
    if not (grid is None or isinstance(grid, Tensor)):
        raise TypeError(
            f"spectral_density: expected `grid` to be a tensor, got "
            f"{type(grid).__name__}. torch.as_tensor makes one of it."
        )
    if grid is not None and not (grid.ndim == 1 and bool(grid.isfinite().all())):
        raise ValueError(
            "spectral_density: expected `grid` of shape [G] and finite, got shape "
            f"{list(grid.shape)} and {int((~grid.isfinite()).sum())} entries that are "
            "not"
        )


def _quadrature(op: Any, num_steps: int, max_bytes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of one probe: fewer than steps where it spans less."""
    steps = min(num_steps, op.shape[0])
    dtype = working_dtype(dtype_of(op))
    if steps * op.shape[0] * dtype.itemsize > max_bytes:
        found = recurrence(op, steps)
        return found.nodes, found.weights
    space = Space(op, random_vector(op), steps, 1)
    space.extend()
    while space.spent < steps and not space.closed:
        space.advance()
        space.extend()
    return space.values, space.first_entries().square()


def smoothed(
    probes: list[tuple[Tensor, Tensor]],
    spent: int,
    grid: Tensor | None = None,
    bandwidth: float | None = None,
) -> Density:
    """Return the density that nodes and weights of each probe stand for.

    ``grid`` and ``bandwidth`` are those of :func:`spectral_density`.
    """
    longest = max(theta.numel() for theta, _ in probes)
    nodes = torch.stack([_padded(theta, longest, True) for theta, _ in probes])
    weights = torch.stack([_padded(tau, longest, False) for _, tau in probes])
    low, high = float(nodes.min()), float(nodes.max())
    least = 1e-6 * max(abs(low), abs(high)) or 1.0  # of what is one point to rounding
    width = bandwidth or max(0.01 * high - 0.01 * low, least)
    if grid is None:
        first, last = low / width - _MARGIN, high / width + _MARGIN
        points = min(max(_POINTS, math.ceil(4 * (last - first))), 2**16)
        grid = torch.linspace(first, last, points, dtype=torch.float64, device="cpu")
        grid *= width
    t = grid.double().cpu()
    each = torch.zeros(len(probes), t.numel(), dtype=torch.float64, device="cpu")
    for theta, tau in zip(nodes.T, weights.T, strict=True):
        kernel = torch.exp(-0.5 * ((t - theta[:, None]) / width).square())
        each += tau[:, None] * kernel / (width * (2 * math.pi) ** 0.5)
    error = torch.full_like(t, float("nan"))
    if len(probes) > 1:
        error = each.std(0) / len(probes) ** 0.5
    saved = {"probes": probes, "spent": spent}
    return Density(t, each.mean(0), error, nodes, weights, width, spent, True, saved)


def _padded(values: Tensor, length: int, repeat: bool) -> Tensor:
    missing = length - values.numel()
    last = values[-1] if repeat else values.new_zeros(())
    return torch.cat((values, last.expand(missing)))
