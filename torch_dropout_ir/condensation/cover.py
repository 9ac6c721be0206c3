"""How many directions cover the neurons of a layer."""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import Tensor

from torch_dropout_ir.condensation.orientation import orientations

_BLOCK_BYTES: Final = 2**25


@dataclasses.dataclass(frozen=True)
class EffectiveNeurons:
    """How many directions a layer's neurons have.

    Attributes:
        count: Number of directions found.
        ratio: ``count`` over the number of neurons that are not dead; NaN if all are.
        labels: Cluster of each neuron, int64 ``[m]``, numbered by falling size; -1 for
            the dead.
        num_dead: Number of dead neurons.
    """

    count: int
    ratio: float
    labels: Tensor
    num_dead: int


@torch.no_grad()
def effective_neurons(
    weights: Tensor, threshold: float = 0.95, min_amplitude: float = 0.0
) -> EffectiveNeurons:
    r"""Count the directions that a layer's neurons have.

    :math:`m_{eff}` is the smallest number of directions such that each neuron has a
    cosine above ``threshold`` with one of them. The minimum is a covering problem and
    NP-hard; this is the greedy cover with the neurons themselves as candidates: again
    and again the neuron that is parallel to most of those left. It errs upward: the
    count is never below the minimum, and at most ``1 + ln m`` times the smallest cover
    by neurons.

    Nothing of size ``m x m`` is held; about ``4 m^2 d`` operations.

    Args:
        weights: Input weights, ``[m, d]``.
        threshold: Cosine above which neurons are parallel, in ``[-1, 1]``.
        min_amplitude: Share of the largest norm up to which a neuron is dead; neurons
            of norm zero always are.

    Returns:
        The count, its ratio, the clusters and the number of dead neurons.

    Raises:
        ValueError: If ``weights`` is no matrix or not finite, or a share or threshold
            is out of range.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 3. Chvatal, *A
        greedy heuristic for the set-covering problem*, 1979 (the bound).

    Example:
        >>> w = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.0, 0.0]])
        >>> found = effective_neurons(w)
        >>> found.count, round(found.ratio, 3), found.labels.tolist(), found.num_dead
        (2, 0.667, [0, 0, 1, -1], 1)
    """  # noqa: DOC502 (raised by `_check`)
    _check(weights, threshold, min_amplitude)
    norms = torch.linalg.vector_norm(orientations(weights), dim=1)
    lengths = torch.linalg.vector_norm(weights.double(), dim=1)
    floor = min_amplitude * lengths.amax() if lengths.numel() else 0.0
    alive = ((norms > 0) & (lengths >= floor)).nonzero().squeeze(1)
    labels = torch.full(
        (weights.shape[0],), -1, dtype=torch.int64, device=weights.device
    )
    labels[alive] = _greedy_cover(orientations(weights[alive]), threshold)
    count = int(labels.max()) + 1 if labels.numel() else 0
    ratio = count / alive.numel() if alive.numel() else float("nan")
    return EffectiveNeurons(count, ratio, labels, weights.shape[0] - alive.numel())


def _check(weights: Tensor, threshold: float, min_amplitude: float) -> None:
    if weights.ndim != 2:
        raise ValueError(
            "effective_neurons: expected `weights` [neurons, d], got shape "
            f"{list(weights.shape)}. `input_weights(module)` gives it for a layer."
        )
    if not -1.0 <= threshold <= 1.0 or not 0.0 <= min_amplitude <= 1.0:
        raise ValueError(
            "effective_neurons: expected `threshold` in [-1, 1] and `min_amplitude` in "
            f"[0, 1], got {threshold} and {min_amplitude}"
        )
    if not bool(torch.isfinite(weights).all()):
        raise ValueError("effective_neurons: expected finite `weights`, got inf or nan")


def _greedy_cover(rows: Tensor, threshold: float) -> Tensor:
    """Cluster number of each unit row, by falling size of the greedy choice."""
    labels = torch.full((rows.shape[0],), -1, dtype=torch.int64, device=rows.device)
    counts = _parallel_counts(rows, rows, threshold)
    for cluster in range(rows.shape[0]):
        best = int(counts.argmax())
        if counts[best] <= 1:
            break
        near = rows @ rows[best] > threshold
        near[best] = True  # whatever rounding says of its norm
        members = (near & (labels < 0)).nonzero().squeeze(1)
        labels[members] = cluster
        # Those covered may still be the centre of others.
        counts -= _parallel_counts(rows, rows[members], threshold)
        counts[best] = 0
    alone = (labels < 0).nonzero().squeeze(1)
    found = int(labels.max()) + 1 if labels.numel() else 0
    labels[alone] = torch.arange(found, found + alone.numel(), device=rows.device)
    return labels


def _parallel_counts(rows: Tensor, others: Tensor, threshold: float) -> Tensor:
    """For each row the number of ``others`` parallel to it, in bounded blocks."""
    block = max(1, _BLOCK_BYTES // (rows.element_size() * max(1, others.shape[0])))
    pieces = [
        (piece @ others.T > threshold).sum(1)
        for piece in rows.split(min(block, max(1, rows.shape[0])))
    ]
    return torch.cat(pieces) if pieces else rows.new_zeros(0, dtype=torch.int64)
