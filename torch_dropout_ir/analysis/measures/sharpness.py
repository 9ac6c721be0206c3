"""Curvature of the loss in a training run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_dropout_ir import collectives, sharpness
from torch_dropout_ir.analysis.measures.regularizer import weight
from torch_dropout_ir.analysis.measures.sample_parts import Coupling, Parts, fitting
from torch_dropout_ir.analysis.records import Histogram, Record
from torch_dropout_ir.analysis.snapshot import Need, Snapshot
from torch_dropout_ir.arguments import check_choice, check_count, check_real
from torch_dropout_ir.batches import as_batches
from torch_dropout_ir.sharpness.curvature import CurvatureOperator
from torch_dropout_ir.sharpness.density import smoothed
from torch_dropout_ir.sharpness.landscape import used_up_slice
from torch_dropout_ir.sharpness.operators import BLOCK_BYTES, used_by
from torch_dropout_ir.sharpness.recurrence import Quadrature, Settled, recurrence
from torch_dropout_ir.sharpness.surface import Surface

_KINDS: Final = {
    "exact": "exact: nothing in it is sampled",
    "gauss_newton": "the Gauss-Newton part, and probes of what it leaves out",
    "hutchinson": "Hutchinson's estimate on random signs",
}
_BINS: Final = 64
_FEW: Final = 64  # parameters, whose trace takes a product each
_MET: Final = "of all samples at once, for passes of ranks meet"
_READ_ELSEWHERE: Final = (
    "the loss depends on no parameter that is put in the place of the model's own: its "
    "outputs do not depend on them, or its layers keep them elsewhere than torch's "
    "modules do, as those of Keras"
)
_NO_LINE: Final = (
    "its direction has the norms of the weights: all that are trained are zero, or "
    "biases and parameters of norms, which it leaves alone"
)
_NO_HEIGHTS: Final = (
    "a loss on the line is negative or not finite, and cannot be drawn as a height"
)


class Sharpness:
    """Top eigenvalue, trace, density of eigenvalues and a slice of the loss ``R_S``.

    Two vectors of all parameters are held. Eigenvalue and density come from the same
    products, of a random vector that is new each time: the curve cannot stay with an
    eigenvector that is no longer the leading one. A start from the last eigenvector
    would be dearer, as it says nothing of the density: of an MLP of 270 000 weights on
    MNIST, measured every 10 steps, both took 17.5 products by SGD and 12.9 by Adam;
    the eigenvalue alone takes 13.6 and 11.0 from the last eigenvector, the density 10
    more. No value of either was off by more than 5e-6. The slice goes along one
    direction for the whole run, from -1 to 1 of the weights' norms.

    Args:
        tol: Relative error of the eigenvalue.
        max_matvecs: Most products for eigenvalue and density.
        trace_matvecs: Most products and backward passes for the trace.
        density_steps: Least products for the density; 0 leaves it out.
        slice_points: Points of the slice; 0 leaves it out.
        max_parameters: Larger models are left out.
        max_bytes: Memory for the graph of the second derivative, beyond which the batch
            is cut into parts; None: such that the peak is that of training by plain
            gradient descent, or nearly, where activations are most of it. Where a
            pass is itself a collective (synchronized batch normalization) the batch of
            a rank stays whole, and the trace is sampled.
        coupling: With batch normalization in training mode samples see each other, and
            cannot be taken apart. ``"batch"``: the curvature of the loss as it is
            trained, from the whole batch at once, whatever memory that takes;
            ``"fixed"``: means and variances of the whole batch are held; ``"auto"``:
            so where the whole batch does not fit. The notes say which it was. The
            slice of the loss is always that of the loss as it is trained.
    """

    name = "sharpness"
    needs: frozenset[Need] = frozenset({"loss", "batches"})

    def __init__(
        self,
        tol: float = 1e-3,
        max_matvecs: int = 40,
        trace_matvecs: int = 24,
        density_steps: int = 10,
        slice_points: int = 11,
        max_parameters: int = 20_000_000,
        max_bytes: int | None = None,
        coupling: Coupling = "auto",
    ) -> None:
        check_choice("Sharpness", "coupling", coupling, ("auto", "batch", "fixed"))
        check_real("Sharpness", "tol", tol, least=0)
        for name, count, least in (
            ("max_matvecs", max_matvecs, 1), ("trace_matvecs", trace_matvecs, 2),
            ("density_steps", density_steps, 0), ("slice_points", slice_points, 0),
        ):  # fmt: skip
            check_count("Sharpness", name, count, least)
        most = {"max_parameters": max_parameters, "max_bytes": max_bytes}
        for name, size in most.items():
            if size is not None or name == "max_parameters":
                check_real("Sharpness", name, size, least=0, finite=False)
        self.coupling: Coupling = coupling
        self.max_bytes = max_bytes
        self.max_parameters = max_parameters
        self.tol = tol
        self.max_matvecs = max_matvecs
        self.trace_matvecs = trace_matvecs
        self.density_steps = density_steps
        self.slice_points = slice_points
        # A product is worth some four passes, and twenty of them usually do.
        self.passes = 4.0 * min(max_matvecs, 20) + trace_matvecs + slice_points / 2

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return the records ``sharpness/...`` with their errors."""
        trained = (x.numel() for x in snapshot.model.parameters() if x.requires_grad)
        if sum(trained) > self.max_parameters:
            reason = f"more than {self.max_parameters} parameters: set `max_parameters`"
            snapshot.absent["sharpness/top_eigenvalue"] = reason
            return {}
        assert snapshot.loss is not None  # by `needs`
        parts = Parts(snapshot.batches, said=_MET)
        met = snapshot.ranks.size > 1 and _passes_meet(snapshot)
        ranks = collectives.together(snapshot.ranks.most)
        with ranks if met else contextlib.nullcontext():
            return self._records(snapshot, parts, met)

    def _records(
        self, snapshot: Snapshot, parts: Parts, met: bool
    ) -> Mapping[str, Record]:
        assert snapshot.loss is not None  # by `needs`
        if not met:
            parts = fitting(
                snapshot.model, snapshot.loss, snapshot.batches, self.max_bytes,
                self.coupling,
            )  # fmt: skip
        if snapshot.ranks.most(bool(parts.lacking), "lacks"):
            why = parts.lacking or "another rank"
            snapshot.absent["sharpness/top_eigenvalue"] = why
            return self._slice(snapshot)
        cut = dataclasses.replace(snapshot, batches=parts.batches)
        records = self._of(cut, parts, met)
        for tag in records:
            how = snapshot.notes[tag] if tag == "sharpness/trace" else ""
            snapshot.notes[tag] = "; ".join(filter(None, (how, parts.said)))
        return records | self._slice(snapshot)

    def _of(self, snapshot: Snapshot, parts: Parts, met: bool) -> dict[str, Record]:
        assert snapshot.loss is not None
        used = self._used(snapshot, parts)
        surface = parts.surface(snapshot.model, snapshot.loss, used)
        own = CurvatureOperator("hessian", surface, BLOCK_BYTES)
        op: Any = own if snapshot.ranks.size == 1 else _Joined(own, snapshot)
        settled = Settled(self.tol, self.density_steps)
        found = recurrence(op, self.max_matvecs, settled)
        records: dict[str, Record] = {
            "sharpness/top_eigenvalue": found.top,
            "sharpness/top_eigenvalue_residual": found.residual,
        }
        if parts.finer is not None:
            surface = parts.surface(snapshot.model, snapshot.loss, used, fine=True)
            own = CurvatureOperator("hessian", surface, BLOCK_BYTES)
        traced = self._trace(op if met else own, snapshot, met)
        return records | self._density(found) | traced

    def _trace(self, op: Any, snapshot: Snapshot, met: bool) -> dict[str, Record]:
        """Return the trace; of ranks, the mean of theirs, each from draws of its own.

        Where passes meet, it is of as many products on each, with the same vectors.
        Else, of few parameters, draws can agree by chance, and all are gone through.
        """
        size = op.shape[0]
        few = size if size <= _FEW and not met else 0
        most = max(self.trace_matvecs, few)
        apart = contextlib.nullcontext()
        with apart if met else snapshot.ranks.own_draws(snapshot.model):
            found = sharpness.trace(op, num_matvecs=most)
        snapshot.notes["sharpness/trace"] = _KINDS[found.method]
        value, error = float(found.value), float(found.standard_error)
        if not met:
            own = weight(snapshot, as_batches(snapshot.batches))
            mean, squared = snapshot.ranks.join(own, {"": value}, {"": error**2})
            value, error = mean[""], squared[""] ** 0.5
        return {"sharpness/trace": value, "sharpness/trace_standard_error": error}

    def _used(self, snapshot: Snapshot, parts: Parts) -> list[str]:
        """Parameters that the loss depends on: by branches, others at each step."""
        assert snapshot.loss is not None
        used = used_by(parts.surface(snapshot.model, snapshot.loss))
        if not used:
            raise ValueError(_READ_ELSEWHERE)
        counts = snapshot.ranks.sum(dict.fromkeys(used, 1.0))
        if apart := [n for n, k in counts.items() if k < snapshot.ranks.size]:
            raise ValueError(
                "sharpness: expected a loss that depends on the same parameters on "
                f"every rank, got one that does on {apart} on some alone"
            )
        return used

    def _density(self, probe: Quadrature) -> dict[str, Record]:
        if not self.density_steps:
            return {}
        found = smoothed([(probe.nodes, probe.weights)], len(probe.nodes))
        low, high = float(found.grid[0]), float(found.grid[-1])
        step = found.grid[1] - found.grid[0]
        places = (found.grid - low) / (high - low) * _BINS
        shares = torch.zeros(_BINS, dtype=torch.float64, device="cpu")
        shares.index_add_(0, places.long().clamp(max=_BINS - 1), found.density * step)
        return {"sharpness/spectral_density": Histogram(shares, low, high)}

    def _slice(self, snapshot: Snapshot) -> dict[str, Record]:
        """Losses as heights over the step, where there is a line and they are some."""
        if not self.slice_points:
            return {}
        device = next(snapshot.model.parameters()).device
        surface = Surface(
            "sharpness", snapshot.model, snapshot.loss, snapshot.batches, copied=False
        )
        line = sharpness.filter_normalized_direction(
            snapshot.model, torch.Generator(device).manual_seed(0)
        )
        named = snapshot.model.named_parameters()
        if not any(x.requires_grad and bool(line[name].any()) for name, x in named):
            snapshot.absent["sharpness/loss_slice"] = _NO_LINE
            return {}
        last = self.slice_points - 1
        half = 1 / max(1, last)
        # Not `linspace`, which misses 0 in the middle by rounding.
        steps = [(2 * k - last) * half for k in range(self.slice_points)]
        losses = used_up_slice(surface, steps, line)
        heights = {str(k): float(x) for k, x in enumerate(losses)}
        heights, _ = snapshot.ranks.join(
            weight(snapshot, as_batches(snapshot.batches)), heights
        )
        losses = torch.tensor(list(heights.values()), dtype=torch.float64, device="cpu")
        if not bool((losses.isfinite() & (losses >= 0)).all()):
            snapshot.absent["sharpness/loss_slice"] = _NO_HEIGHTS
            return {}
        return {"sharpness/loss_slice": Histogram(losses, -1 - half, 1 + half)}


class _Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen |= "c10d" in func.namespace
        return func(*args, **(kwargs or {}))


def _passes_meet(snapshot: Snapshot) -> bool:
    """Whether a pass is a collective: then ranks have to make as many of them."""
    assert snapshot.loss is not None
    surface = Parts(snapshot.batches).surface(snapshot.model, snapshot.loss)
    with _Collectives() as looking:
        surface.value(surface.params)
    return snapshot.ranks.most(looking.seen, "collectives") > 0


class _Joined:
    """The Hessian on the batches of all ranks as one: each product is summed over them.

    All ranks draw the same vectors, since a measure starts them at the same seed.
    """

    def __init__(self, op: Any, snapshot: Snapshot) -> None:
        self._op = op
        self._ranks = snapshot.ranks
        self.params = op.params
        self.shape, self.dtype, self.device = op.shape, op.dtype, op.device
        own = weight(snapshot, as_batches(snapshot.batches))
        self._share = snapshot.ranks.share(own)

    def __matmul__(self, v: Tensor) -> Tensor:
        return self._ranks.sum_of(self._share * (self._op @ v))
