"""Trace of a curvature operator by Hutchinson's method."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class TraceEstimate:
    """A trace with its error.

    Attributes:
        value: The estimate, 0-d float64.
        standard_error: Its standard error, 0-d float64; 0 where the trace is exact.
        num_matvecs: Products spent.
        converged: Whether ``rtol`` was reached; True where none was asked for.
    """

    value: Tensor
    standard_error: Tensor
    num_matvecs: int
    converged: bool


def trace(op: Any, num_matvecs: int = 100, rtol: float | None = None) -> TraceEstimate:
    r"""Return the trace of a symmetric operator.

    .. math:: \mathrm{tr} A \approx \frac{1}{K} \sum_k z_k^\top A z_k, \qquad
        z_k \in \{-1, 1\}^P

    Unbiased. The standard error is that of the mean of the ``K`` forms. An operator of
    at most ``num_matvecs`` dimensions is traced exactly, column by column.

    Args:
        op: Operator of :func:`hessian`, or a symmetric matrix ``[P, P]``.
        num_matvecs: Most products to spend, at least 2.
        rtol: If given, stop as soon as the standard error is at most this share of the
            magnitude of the estimate, after 8 products at least.

    Returns:
        The estimate with its standard error.

    Raises:
        ValueError: If ``num_matvecs`` is below 2.

    References:
        Hutchinson, *A stochastic estimator of the trace of the influence matrix*,
        1989; Zhang & Xu, *Implicit regularization of dropout*, section VII.

    Example:
        >>> trace(torch.diag(torch.arange(5.0))).value.item()
        10.0
    """
    if num_matvecs < 2:
        raise ValueError(f"trace: expected `num_matvecs` >= 2, got {num_matvecs}")
    size = op.shape[0]
    if size <= num_matvecs:
        return _exact(op, size)
    forms: list[float] = []
    value = error = torch.tensor(float("nan"), dtype=torch.float64)
    reached = False
    while len(forms) < num_matvecs and not reached:
        probe = torch.empty(size, dtype=op.dtype, device=op.device)
        probe.bernoulli_(0.5).mul_(2).sub_(1)
        forms.append(float((op @ probe).double() @ probe.double()))
        if len(forms) > 1:
            seen = torch.tensor(forms, dtype=torch.float64)
            value, error = seen.mean(), seen.std() / len(forms) ** 0.5
        reached = (
            rtol is not None and len(forms) >= 8 and bool(error <= rtol * value.abs())
        )
    return TraceEstimate(value, error, len(forms), reached or rtol is None)


def _exact(op: Any, size: int) -> TraceEstimate:
    total = torch.zeros((), dtype=torch.float64)
    for i in range(size):
        place = torch.zeros(size, dtype=op.dtype, device=op.device)
        place[i] = 1
        total += (op @ place)[i].double().cpu()
    return TraceEstimate(total, torch.zeros_like(total), size, True)
