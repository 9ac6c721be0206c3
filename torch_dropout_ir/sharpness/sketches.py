"""Traces of operators given as such: Hutchinson, Hutch++ and XTrace."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.sharpness.krylov import NOT_FINITE, dtype_of, random_vector

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


class _Images:
    """Images under an operator, over the largest entry of the first ones.

    So nothing that is made of them over- or underflows; estimates are times ``unit``.
    """

    def __init__(self, op: Any) -> None:
        self._op, self.unit = op, 0.0

    def __call__(self, columns: Tensor) -> Tensor:
        found: Tensor = (self._op @ columns.to(dtype_of(self._op))).to(columns)
        largest = float(torch.linalg.vector_norm(found, torch.inf))
        if not math.isfinite(largest):
            raise ValueError(f"trace: {NOT_FINITE}")
        self.unit = self.unit or largest or 1.0
        return found / self.unit

    def estimate(self, value: Tensor, error: float, inner: Tensor) -> Estimate:
        """Add what rounding alone makes of an estimate that is exact otherwise."""
        eps = torch.finfo(dtype_of(self._op)).eps
        error = math.hypot(error, eps * float(inner.diagonal().abs().sum()))
        return float(value) * self.unit, error * self.unit


def hutchpp(op: Any, num_matvecs: int) -> Estimate:
    """Return the trace on the range of a sketch, plus Hutchinson's estimate elsewhere.

    References:
        Meyer, Musco, Musco & Woodruff, *Hutch++: optimal stochastic trace estimation*,
        SOSA 2021.
    """
    sketch, images = num_matvecs // 3, _Images(op)
    basis = torch.linalg.qr(images(_probes(op, sketch))).Q
    inner = (basis.T @ images(basis)).double()
    probes = _probes(op, num_matvecs - 2 * sketch)
    probes = probes - basis @ (basis.T @ probes)
    forms = (probes * images(probes)).double().sum(0)
    error = float(forms.std()) / len(forms) ** 0.5
    return images.estimate(inner.trace() + forms.mean(), error, inner)


def xtrace(op: Any, num_matvecs: int) -> Estimate:
    """Return the mean of Hutch++ estimates that each leave one probe out of the sketch.

    They share most of their sketch, so their spread would understate the error; that of
    the jackknife is above it on average.

    References:
        Epperly, Tropp & Webber, *XTrace: making the most of every sample in stochastic
        trace estimation*, SIAM J. Matrix Anal. 45 (2024).
    """
    probes, images = _probes(op, num_matvecs // 2), _Images(op)
    seen = images(probes)
    basis, upper = torch.linalg.qr(seen)
    sketch = _Sketch(
        upper.double(),
        (basis.T @ images(basis)).double(),
        (basis.T @ probes).double(),
        (probes * seen).double().sum(0),
    )
    return images.estimate(sketch.forms().mean(), sketch.error(), sketch.inner)


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
        keep = torch.ones(len(self.own), dtype=torch.bool, device="cpu")
        keep[left_out] = False
        turn, upper = torch.linalg.qr(self.upper[:, keep])
        inner = turn.T @ self.inner @ turn
        return _Sketch(upper, inner, turn.T @ self.seen[:, keep], self.own[keep])

    def error(self) -> float:
        """Standard error by the jackknife: the estimates share most of their sketch."""
        groups = torch.arange(len(self.own), device="cpu").chunk(_GROUPS)
        means = torch.stack([self.without(group).forms().mean() for group in groups])
        return float(means.std(correction=0)) * (len(groups) - 1) ** 0.5


SKETCHES: dict[str, Callable[[Any, int], Estimate]] = {
    "hutchpp": hutchpp,
    "xtrace": xtrace,
}
