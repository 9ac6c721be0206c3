"""Traces of operators given as such: Hutchinson, Hutch++ and XTrace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_dropout_ir.sharpness.krylov import random_vector

Estimate = tuple[float, float]


def form(op: Any) -> float:
    """Return ``z' A z`` for a random vector of signs."""
    probe = random_vector(op, "rademacher")
    return float((op @ probe).double() @ probe.double())


def _probes(op: Any, count: int) -> Tensor:
    return torch.stack([random_vector(op, "rademacher") for _ in range(count)], 1)


def hutchpp(op: Any, num_matvecs: int) -> Estimate:
    """Return the trace on the range of a sketch, plus Hutchinson's estimate elsewhere.

    References:
        Meyer, Musco, Musco & Woodruff, *Hutch++: optimal stochastic trace estimation*,
        SOSA 2021.
    """
    sketch = num_matvecs // 3
    basis = torch.linalg.qr(op @ _probes(op, sketch)).Q
    inside = float((basis * (op @ basis)).double().sum())
    probes = _probes(op, num_matvecs - 2 * sketch)
    probes = probes - basis @ (basis.T @ probes)
    forms = (probes * (op @ probes)).double().sum(0)
    return inside + float(forms.mean()), float(forms.std()) / len(forms) ** 0.5


def xtrace(op: Any, num_matvecs: int) -> Estimate:
    """Return the mean of Hutch++ estimates that each leave one probe out of the sketch.

    References:
        Epperly, Tropp & Webber, *XTrace: making the most of every sample in stochastic
        trace estimation*, SIAM J. Matrix Anal. 45 (2024).
    """
    probes = _probes(op, num_matvecs // 2)
    images = op @ probes
    basis, upper = torch.linalg.qr(images)
    inner = (basis.T @ (op @ basis)).double()
    seen = (basis.T @ probes).double()
    upper = upper.double()
    # Without probe i the basis loses one direction: column i of the inverse transpose.
    lost = torch.linalg.pinv(upper).T
    lost = lost / torch.linalg.vector_norm(lost, dim=0).clamp(min=1e-300)
    kept = seen - lost * (lost * seen).sum(0)
    forms = (
        inner.trace()
        - (lost * (inner @ lost)).sum(0)
        + (probes * images).double().sum(0)
        - 2 * (kept * upper).sum(0)
        + (kept * (inner @ kept)).sum(0)
    )
    return float(forms.mean()), float(forms.std()) / len(forms) ** 0.5


SKETCHES: dict[str, Callable[[Any, int], Estimate]] = {
    "hutchpp": hutchpp,
    "xtrace": xtrace,
}
