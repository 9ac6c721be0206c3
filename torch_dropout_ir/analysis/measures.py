"""The measures that an analysis takes, and the protocol for one of the user's own.

A measure sees a :class:`Snapshot` and returns records by tag. It may draw from torch's
generators and run the model through :mod:`torch_dropout_ir.functional`; the analysis
gives back generators, and the model's modes and buffers are never moved by those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_dropout_ir import condensation, sharpness
from torch_dropout_ir.analysis.records import Histogram, Image, Record
from torch_dropout_ir.analysis.snapshot import NO_SITE, Measure, Need, Snapshot
from torch_dropout_ir.regularizers import Estimate, gradient_norm
from torch_dropout_ir.regularizers.online import online

_BINS = 80


class Regularizer:
    """R_1 with its error and its parts, and R_S on the same batch.

    Args:
        num_masks: Masks to average over where R_1 has no closed form.
    """

    name = "regularizer"
    needs: frozenset[Need] = frozenset({"inputs", "loss"})

    def __init__(self, num_masks: int = 8) -> None:
        self.num_masks = num_masks

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``regularizer/R1``, its sites and error, ``loss/R_S`` and modified."""
        assert snapshot.loss is not None  # by `needs`
        found, how, outputs = online(
            snapshot.model, snapshot.batch, snapshot.loss, num_masks=self.num_masks
        )
        records: dict[str, Record] = {}
        if snapshot.sites:
            records = _r1_records(found)
            snapshot.notes["regularizer/R1"] = how
        else:
            snapshot.absent["regularizer/R1"] = NO_SITE
        if snapshot.targets is not None:
            risk = float(snapshot.loss(outputs, snapshot.targets))
            records["loss/R_S"] = risk
            records |= _modified_loss(snapshot, risk + float(found.value))
        return records


def _r1_records(found: Estimate) -> dict[str, Record]:
    parts = {f"regularizer/R1/{site}": float(x) for site, x in found.per_site.items()}
    return {
        "regularizer/R1": float(found.value),
        "regularizer/R1_standard_error": float(found.standard_error),
        **parts,
    }


def _modified_loss(snapshot: Snapshot, risk: float) -> dict[str, Record]:
    if snapshot.gradients is None or snapshot.lr is None:
        return {}
    batch = "`data`" if snapshot.on_data else "this step's batch"
    said = f"R_S + R_1 of {batch}, R_2 of this step's batch"
    snapshot.notes["loss/modified"] = said
    return {"loss/modified": risk + received_r2(snapshot.gradients, snapshot.lr)}


def received_r2(gradients: Mapping[str, Tensor], lr: Mapping[str, float]) -> float:
    r"""Return :math:`\frac{\epsilon}{4} \lVert g \rVert^2` of a gradient.

    Args:
        gradients: Gradient by parameter name.
        lr: Learning rate by parameter name.

    Returns:
        The sum over parameters, each with its own learning rate.
    """
    terms = [lr[n] / 4 * g.double().square().sum() for n, g in gradients.items()]
    return float(torch.stack([t.cpu() for t in terms]).sum()) if terms else 0.0


class ReceivedGradient:
    """R_2 from the gradient that the optimizer receives: no pass of its own."""

    name = "gradient"
    needs: frozenset[Need] = frozenset({"gradients"})

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``regularizer/R2``."""
        assert snapshot.gradients is not None and snapshot.lr is not None  # by `needs`
        snapshot.notes["regularizer/R2"] = (
            "(lr/4) ||g||^2 of the gradient that the optimizer receives, clipped where "
            "the script clips: one unbiased sample in full-batch training; in "
            "mini-batches it holds their noise too"
        )
        return {"regularizer/R2": received_r2(snapshot.gradients, snapshot.lr)}


class DropoutNoise:
    """The part of R_2 that masks add, from two masks on one batch."""

    name = "dropout_noise"
    needs: frozenset[Need] = frozenset({
        "sites",
        "inputs",
        "loss",
        "targets",
        "gradients",
    })

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``regularizer/R2_dropout_noise``."""
        assert snapshot.lr is not None  # by `needs`
        found = gradient_norm(
            snapshot.model, snapshot.batch, snapshot.loss, lr=snapshot.lr
        )
        snapshot.notes["regularizer/R2_dropout_noise"] = (
            "of two masks on one batch, never clipped"
        )
        return {"regularizer/R2_dropout_noise": float(found.dropout_noise)}


class Masks:
    """Keep rates and z-scores of the masks seen so far."""

    name = "masks"
    needs: frozenset[Need] = frozenset({"sites", "masks"})

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``mask/keep_rate/<site>`` and ``mask/z_score/<site>``."""
        records: dict[str, Record] = {}
        for site, seen in snapshot.statistics.items():
            if not seen.num_elements:
                continue
            records[f"mask/keep_rate/{site}"] = seen.keep_rate
            if seen.variance > 0:
                records[f"mask/z_score/{site}"] = seen.z_score
        return records


class Condensation:
    """Effective neurons of every linear and convolutional layer.

    Args:
        threshold: Cosine above which neurons are parallel.
        min_amplitude: Share of the largest norm up to which a neuron is dead.
        max_neurons: Layers with more are left out.
        max_image: Largest side of the cosine image.
    """

    name = "condensation"
    needs: frozenset[Need] = frozenset()

    def __init__(
        self,
        threshold: float = 0.95,
        min_amplitude: float = 0.0,
        max_neurons: int = 4096,
        max_image: int = 256,
    ) -> None:
        self.threshold = threshold
        self.min_amplitude = min_amplitude
        self.max_neurons = max_neurons
        self.max_image = max_image

    @torch.no_grad()
    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``condensation/...`` of each layer."""
        records: dict[str, Record] = {}
        for name, module in snapshot.model.named_modules():
            if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                continue
            weights = condensation.input_weights(module).detach()
            if not 2 <= weights.shape[0] <= self.max_neurons:
                continue
            found = condensation.effective_neurons(
                weights, self.threshold, self.min_amplitude
            )
            records[f"condensation/effective_ratio/{name}"] = found.ratio
            records[f"condensation/effective_neurons/{name}"] = float(found.count)
            records |= self._pictures(name, weights)
        return records

    def _pictures(self, name: str, weights: Tensor) -> dict[str, Record]:
        order = condensation.cluster_order(weights)
        # A stride through the sorted neurons keeps the shares of the clusters.
        stride = -(-len(order) // (4 * self.max_image))
        cosines = condensation.cosine_similarity(weights[order[::stride]]).float()
        above = torch.ones_like(cosines).triu(1).bool()
        counts = torch.histc(cosines[above], bins=_BINS, min=-1, max=1)
        side = min(self.max_image, cosines.shape[0])
        field = nn.functional.adaptive_avg_pool2d(cosines[None, None], side)[0, 0]
        return {
            f"condensation/cosines/{name}": Histogram(counts.cpu(), -1.0, 1.0),
            f"condensation/cosine/{name}": Image(field.cpu(), -1.0, 1.0),
        }


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
        op = sharpness.hessian(snapshot.model, snapshot.loss, snapshot.batches)
        if op.shape[0] > self.max_parameters:
            reason = f"more than {self.max_parameters} parameters: set `max_parameters`"
            snapshot.absent["sharpness/top_eigenvalue"] = reason
            return {}
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


def default_measures() -> list[Measure]:
    """Return one of each measure."""
    return [
        ReceivedGradient(),
        Regularizer(),
        DropoutNoise(),
        Masks(),
        Condensation(),
        Sharpness(),
    ]
