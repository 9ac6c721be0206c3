"""Curvature of the loss in a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torch_dropout_ir import sharpness
from torch_dropout_ir.analysis.measures.regularizer import terms
from torch_dropout_ir.analysis.records import Record
from torch_dropout_ir.analysis.snapshot import Need, Snapshot
from torch_dropout_ir.functional import as_batches


class Sharpness:
    """Top eigenvalue, warm-started from the last one, and trace of the Hessian of R_S.

    Args:
        tol: Relative residual of the eigenvalue.
        max_matvecs: Most products for the eigenvalue.
        trace_matvecs: Products for the trace.
        max_parameters: Larger models are left out.
    """

    name = "sharpness"
    needs: frozenset[Need] = frozenset({"loss", "batches"})

    def __init__(
        self,
        tol: float = 1e-3,
        max_matvecs: int = 40,
        trace_matvecs: int = 16,
        max_parameters: int = 20_000_000,
    ) -> None:
        self.max_parameters = max_parameters
        self.tol = tol
        self.max_matvecs = max_matvecs
        self.trace_matvecs = trace_matvecs
        self._last: Any = None

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``sharpness/top_eigenvalue`` and ``sharpness/trace`` with errors."""
        op: Any = sharpness.hessian(snapshot.model, snapshot.loss, snapshot.batches)
        if op.shape[0] > self.max_parameters:
            reason = f"more than {self.max_parameters} parameters: set `max_parameters`"
            snapshot.absent["sharpness/top_eigenvalue"] = reason
            return {}
        if snapshot.ranks.size > 1:
            op = _Joined(op, snapshot)
        top = sharpness.top_eigenvalues(
            op, tol=self.tol, max_matvecs=self.max_matvecs, start=self._start(op)
        )
        self._last = top.vectors[0]
        found = sharpness.trace(op, num_matvecs=self.trace_matvecs)
        return {
            "sharpness/top_eigenvalue": float(top.values[0]),
            "sharpness/top_eigenvalue_residual": float(top.residuals[0]),
            "sharpness/trace": float(found.value),
            "sharpness/trace_standard_error": float(found.standard_error),
        }

    def _start(self, op: Any) -> Any:
        """The last eigenvector, if its parameters are still those of the operator."""
        if self._last is None:
            return None
        now = {name: x.shape for name, x in op.params.items()}
        last = {name: x.shape for name, x in self._last.items()}
        return self._last if now == last else None


class _Joined:
    """The Hessian on the batches of all ranks as one: each product is summed over them.

    All ranks draw the same vectors, since a measure starts them at the same seed.
    """

    def __init__(self, op: Any, snapshot: Snapshot) -> None:
        assert snapshot.loss is not None  # by `needs`
        self._op = op
        self._ranks = snapshot.ranks
        self.params = op.params
        self.shape, self.dtype, self.device = op.shape, op.dtype, op.device
        self._share = 1.0
        if snapshot.loss.reduction == "mean":
            pairs = as_batches(snapshot.batches)
            own = sum(terms(snapshot.loss, batch) for batch in pairs)
            self._share = own / snapshot.ranks.sum({"terms": own})["terms"]

    def __matmul__(self, v: Tensor) -> Tensor:
        return self._ranks.sum_of(self._share * (self._op @ v))
