"""Condensation of each layer in a training run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_dropout_ir import condensation
from torch_dropout_ir.analysis.measures.start import Start
from torch_dropout_ir.analysis.records import Histogram, Image, Record
from torch_dropout_ir.analysis.snapshot import Need, Snapshot
from torch_dropout_ir.arguments import check_count, check_real
from torch_dropout_ir.condensation.cover import check_cover
from torch_dropout_ir.condensation.graph import norms_read, readers
from torch_dropout_ir.condensation.layers import named_rows
from torch_dropout_ir.condensation.rows import (
    UnitRows,
    Weights,
    row_norms,
    rows_a_block,
)
from torch_dropout_ir.vectors import full_precision

_ROWS, _COLUMNS = 32, 96
_FAINTEST = 0.35  # the colour of a single neuron, of 1


class Condensation:
    """Effective neurons of every layer that has neurons, and how far they have moved.

    The input weights at the first measurement are kept, on the CPU and of large layers
    in half precision or 8 bits, and what comes later is compared with them. One
    measurement is bounded: it goes on with the layers that it has not come to the next
    time.

    Args:
        threshold: Cosine above which neurons are parallel.
        min_amplitude: Share of the largest norm below which a neuron is dead.
        max_operations: Multiplications that one measurement may take, about ten seconds
            of a core by default; a layer beyond that by itself is left out.
        max_image: Largest side of the cosine image.
    """

    name = "condensation"
    needs: frozenset[Need] = frozenset()
    passes = 4.0  # about, in batches of practice

    def __init__(
        self,
        threshold: float = 0.95,
        min_amplitude: float = 0.0,
        max_operations: float = 5e11,
        max_image: int = 256,
    ) -> None:
        check_cover("Condensation", threshold, min_amplitude)
        check_real(
            "Condensation", "max_operations", max_operations, least=0, finite=False
        )
        check_count("Condensation", "max_image", max_image, 1)
        self.threshold = threshold
        self.min_amplitude = min_amplitude
        self.max_operations = max_operations
        self.max_image = max_image
        self._start: dict[str, Start] = {}
        self._outgoing: dict[str, condensation.Outgoing] = {}
        self._traced: dict[str, type[nn.Module]] = {}  # modules that it was found in
        self._next = ""

    @torch.no_grad()
    @full_precision()
    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``condensation/...`` of each layer."""
        records: dict[str, Record] = {}
        modules = dict(snapshot.model.named_modules())
        left = self.max_operations
        for place, (name, weights) in enumerate(self._layers(snapshot)):
            left -= _operations(weights)
            if place and left < 0:
                self._next = name
                break
            (consumers, norm), note = self._readers(snapshot.model, name)
            size = row_norms(weights)
            if consumers:
                size *= norms_read(modules, name, consumers, norm)
            snapshot.notes[f"condensation/orientation_amplitude/{name}"] = note
            records |= self._layer(name, weights, size, snapshot.notes)
        return records

    def state_dict(self) -> dict[str, Any]:
        """Return where each layer started, and where to go on."""
        starts = {name: start.state_dict() for name, start in self._start.items()}
        return {"start": starts, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        saved = state["start"].items()
        self._start = {name: Start.of_state(start) for name, start in saved}
        self._next = state["next"]

    def _readers(
        self, model: nn.Module, name: str
    ) -> tuple[tuple[tuple[str, ...], str], str]:
        """What reads a layer, traced once for all modules, and what amplitudes are."""
        modules = {n: type(m) for n, m in model.named_modules()}
        if modules != self._traced:
            self._traced = modules
            self._outgoing = readers(model, run_own_code=False)
        out = self._outgoing.get(name)
        if out is not None and out.consumers:
            named = (*out.consumers, *((out.norm,) if out.norm else ()))
            quoted = ", ".join(f"`{one}`" for one in named)
            said = f"amplitudes count the outgoing weights, of {quoted}"
            return (out.consumers, out.norm), said
        reason = out.reason if out else "it is no linear layer or convolution"
        return ((), ""), f"amplitudes are norms of the input weights alone: {reason}"

    def _layers(self, snapshot: Snapshot) -> Iterator[tuple[str, Weights]]:
        """Yield names and weights of layers, from where the last measurement ended."""
        names = []
        for name, weights in named_rows(snapshot.model):
            if _operations(weights) > self.max_operations:
                snapshot.absent[f"condensation/effective_neurons/{name}"] = (
                    f"{weights.shape[0]} neurons of {weights.shape[1]} weights are "
                    "beyond `max_operations` of the measure"
                )
            elif weights.shape[0] >= 2:
                names.append(name)
        first = names.index(self._next) if self._next in names else 0
        self._next = ""
        for part in (names[first:], names[:first]):
            for name, weights in named_rows(snapshot.model):
                if name in part:
                    yield name, weights.detach()

    def _layer(
        self, name: str, weights: Weights, size: Tensor, notes: dict[str, str]
    ) -> dict[str, Record]:
        found = condensation.effective_neurons(
            weights, self.threshold, self.min_amplitude
        )
        broken = found.num_nonfinite
        said = f"{broken} of them hold NaN or infinity" if broken else ""
        notes[f"condensation/dead_neurons/{name}"] = said
        start = self._start.get(name)
        if start is None or start.shape != weights.shape:
            start = self._start[name] = Start(weights, size)
        counts = condensation.cosine_statistics(weights).counts
        records: dict[str, Record] = {
            f"condensation/effective_ratio/{name}": found.ratio,
            f"condensation/effective_neurons/{name}": float(found.count),
            f"condensation/dead_neurons/{name}": float(found.num_dead),
            f"condensation/movement/{name}": start.relative_distance(weights),
            f"condensation/cosine_to_start/{name}": start.mean_cosine(weights),
            f"condensation/cosines/{name}": Histogram(counts.cpu(), -1.0, 1.0),
            f"condensation/cosine/{name}": self._heat_map(weights, found.labels),
        }
        # Of a layer that starts at zero nothing can be said relative to its start.
        if not broken:
            records = {t: r for t, r in records.items() if not _is_undefined(r)}
        if weights.shape[1] >= 2:
            tag = f"condensation/orientation_amplitude/{name}"
            records[tag] = _orientation_amplitude(weights, size, start)
        return records

    def _heat_map(self, weights: Weights, labels: Tensor) -> Image:
        order = condensation.cluster_order(weights, labels)
        # A stride through the sorted neurons keeps the shares of the clusters.
        kept = order[:: -(-len(order) // (4 * self.max_image))]
        field = _mean_cosines(UnitRows(weights).at(kept), self.max_image)
        return Image(field.float().cpu(), -1.0, 1.0, kept.cpu())


def _mean_cosines(rows: UnitRows, most: int) -> Tensor:
    """Cosines of rows, averaged down to ``most`` a side as by adaptive pooling."""
    # Means of cosines are cosines of means: the matrix itself is not made.
    side, count = min(most, len(rows)), len(rows)
    field = torch.empty(side, side, dtype=rows.dtype, device=rows.device)
    step = max(1, rows_a_block(rows) * side // (2 * count))

    def means(first: int) -> Tensor:
        bins = range(first, min(first + step, side))
        ends = [(k * count // side, -(-(k + 1) * count // side)) for k in bins]
        block = rows[ends[0][0] : ends[-1][1]]
        return torch.stack([
            block[i - ends[0][0] : j - ends[0][0]].mean(0) for i, j in ends
        ])

    for i in range(0, side, step):
        high = means(i)
        for j in range(i, side, step):
            tile = high @ (high if i == j else means(j)).T
            field[i : i + step, j : j + step] = tile
            field[j : j + step, i : i + step] = tile.T
    return field.clamp_(-1.0, 1.0)


def _is_undefined(record: Record) -> bool:
    return isinstance(record, float) and not math.isfinite(record)


def _operations(weights: Weights) -> float:
    """Multiplications of one layer: cover, bound, order and histogram."""
    neurons, dims = weights.shape
    return 6.0 * neurons**2 * (dims + 16)


def _orientation_amplitude(weights: Weights, size: Tensor, start: Start) -> Image:
    """How many neurons are where, from the middle up now and down at the start."""
    # Across: the angle in the plane of the leading directions of now; from the middle
    # outwards: the amplitude over the largest; red and blue.
    plane = condensation.principal_plane(weights)
    now = _places(condensation.orientation_angles(weights, plane), size)
    # They stay where they are kept: no copy goes to the device of the weights.
    then = _places(start.angles(plane.cpu()), start.size)
    return Image(torch.cat((now.flip(0).cpu(), -then)).float(), -1.0, 1.0)


def _places(angles: Tensor, size: Tensor) -> Tensor:
    """Logarithmic counts in ``[amplitude, angle]`` bins, 1 for the fullest."""
    sound = torch.isfinite(angles) & torch.isfinite(size)
    angles, size = angles[sound], size[sound]
    columns = ((angles / torch.pi + 1) / 2 * _COLUMNS).long().clamp_(0, _COLUMNS - 1)
    largest = size.max() if len(size) else size.new_ones(())
    heights = size / torch.where(largest > 0, largest, 1.0)
    rows = (heights * _ROWS).long().clamp_(0, _ROWS - 1)
    counts = torch.bincount(rows * _COLUMNS + columns, minlength=_ROWS * _COLUMNS)
    field = torch.log1p(counts.view(_ROWS, _COLUMNS).double())
    shade = _FAINTEST + (1 - _FAINTEST) * field / field.max().clamp(min=1e-9)
    return torch.where(field > 0, shade, 0.0)
