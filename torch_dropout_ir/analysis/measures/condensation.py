"""Condensation of each layer in a training run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torch_dropout_ir import condensation
from torch_dropout_ir.analysis.records import Histogram, Image, Record
from torch_dropout_ir.analysis.snapshot import Need, Snapshot

_BINS = 80


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
            f"condensation/cosine/{name}": Image(
                field.cpu(), -1.0, 1.0, order[::stride].cpu()
            ),
        }
