"""Traces of operators given as such: Hutchinson, Hutch++ and XTrace."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.sharpness.krylov import random_vector

Estimate = tuple[float, float]
_EPS: Final = torch.finfo(torch.float64).eps
_SPANNED: Final = 1e-6  # that a column lacks to be apart from the others
_GROUPS: Final = 20  # of probes that the jackknife leaves out in turn


def form(op: Any) -> float:
    """Return ``z' A z`` for a random vector of signs."""
    probe = random_vector(op, "rademacher")
    return float((op @ probe).double() @ probe.double())


def _probes(op: Any, count: int) -> Tensor:
    """Columns of signs; half precision has no QR, and is left for products alone."""
    drawn = torch.stack([random_vector(op, "rademacher") for _ in range(count)], 1)
    return drawn.to(torch.promote_types(drawn.dtype, torch.float32))


def _images(op: Any, columns: Tensor) -> Tensor:
    return (op @ columns.to(getattr(op, "dtype", columns.dtype))).to(columns)


def hutchpp(op: Any, num_matvecs: int) -> Estimate:
    """Return the trace on the range of a sketch, plus Hutchinson's estimate elsewhere.

    References:
        Meyer, Musco, Musco & Woodruff, *Hutch++: optimal stochastic trace estimation*,
        SOSA 2021.
    """
    sketch = num_matvecs // 3
    basis = torch.linalg.qr(_images(op, _probes(op, sketch))).Q
    inner = (basis.T @ _images(op, basis)).double()
    probes = _probes(op, num_matvecs - 2 * sketch)
    probes = probes - basis @ (basis.T @ probes)
    forms = (probes * _images(op, probes)).double().sum(0)
    error = float(forms.std()) / len(forms) ** 0.5
    return float(inner.trace() + forms.mean()), _with_rounding(op, error, inner)


def xtrace(op: Any, num_matvecs: int) -> Estimate:
    """Return the mean of Hutch++ estimates that each leave one probe out of the sketch.

    They share most of their sketch, so their spread would understate the error; that of
    the jackknife is above it on average.

    References:
        Epperly, Tropp & Webber, *XTrace: making the most of every sample in stochastic
        trace estimation*, SIAM J. Matrix Anal. 45 (2024).
    """
    probes = _probes(op, num_matvecs // 2)
    images = _images(op, probes)
    basis, upper = torch.linalg.qr(images)
    sketch = _Sketch(
        upper.double(),
        (basis.T @ _images(op, basis)).double(),
        (basis.T @ probes).double(),
        (probes * images).double().sum(0),
    )
    return float(sketch.forms().mean()), _with_rounding(
        op, sketch.error(), sketch.inner
    )


@dataclasses.dataclass(frozen=True)
class _Sketch:
    """Probes, their images and the operator, in coordinates of the images' basis."""

    upper: Tensor  # images
    inner: Tensor  # the operator
    seen: Tensor  # probes, as far as the basis goes
    own: Tensor  # forms of the probes

    def forms(self) -> Tensor:
        """Estimates that each leave one probe out of the sketch."""
        # Without probe i the basis loses one direction: column i of the inverse
        # transpose; none where the other images span what is that of probe i.
        left, sizes, right = torch.linalg.svd(self.upper)
        rank = int((sizes > len(sizes) * _EPS * sizes[0]).sum())
        right = right[:rank]
        lost = left[:, :rank] / sizes[:rank] @ right
        lost = lost / torch.linalg.vector_norm(lost, dim=0).clamp(min=1e-300)
        lost = lost * (right.square().sum(0) > 1 - _SPANNED)
        kept = self.seen - lost * (lost * self.seen).sum(0)
        return (
            self.inner.trace()
            - (lost * (self.inner @ lost)).sum(0)
            + self.own
            - 2 * (kept * self.upper).sum(0)
            + (kept * (self.inner @ kept)).sum(0)
        )

    def without(self, left_out: Tensor) -> _Sketch:
        keep = torch.ones(len(self.own), dtype=torch.bool)
        keep[left_out] = False
        turn, upper = torch.linalg.qr(self.upper[:, keep])
        inner = turn.T @ self.inner @ turn
        return _Sketch(upper, inner, turn.T @ self.seen[:, keep], self.own[keep])

    def error(self) -> float:
        """Standard error by the jackknife: the estimates share most of their sketch."""
        groups = torch.arange(len(self.own)).chunk(_GROUPS)
        means = torch.stack([self.without(group).forms().mean() for group in groups])
        return float(means.std(correction=0)) * (len(groups) - 1) ** 0.5


def _with_rounding(op: Any, error: float, inner: Tensor) -> float:
    """Add what rounding alone makes of an estimate that is exact otherwise."""
    eps = torch.finfo(getattr(op, "dtype", inner.dtype)).eps
    return math.hypot(error, eps * float(inner.diagonal().abs().sum()))


SKETCHES: dict[str, Callable[[Any, int], Estimate]] = {
    "hutchpp": hutchpp,
    "xtrace": xtrace,
}
