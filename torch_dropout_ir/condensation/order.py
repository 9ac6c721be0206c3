"""An order of the neurons in which a heat map shows its clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_dropout_ir.condensation.compare import leading_plane
from torch_dropout_ir.condensation.cover import effective_neurons
from torch_dropout_ir.condensation.rows import UnitRows, Weights, check_rows
from torch_dropout_ir.vectors import full_precision


@torch.no_grad()
@full_precision()
def cluster_order(weights: Weights, labels: Tensor | None = None) -> Tensor:
    """Return an order of the neurons that puts parallel ones side by side.

    Clusters of :func:`effective_neurons` stay together and follow one another by the
    angle of their mean in the plane of the two leading principal directions; inside a
    cluster neurons follow by their own angle. Dead neurons come last.

    Args:
        weights: Input weights, ``[m, d]``.
        labels: Their clusters ``[m]``, -1 for the dead; those of
            :func:`effective_neurons` if None.

    Returns:
        A permutation of the neurons, int64 ``[m]``.

    Raises:
        ValueError: If ``weights`` are no matrix, or ``labels`` no int64 ``[m]``.

    Example:
        >>> w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.01], [0.0, 2.0]])
        >>> cluster_order(w).tolist()
        [0, 2, 1, 3]
    """
    check_rows("cluster_order", weights)
    if labels is None:
        labels = effective_neurons(weights).labels
    elif labels.shape != weights.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"cluster_order: expected `labels` [{len(weights)}] of int64, got "
            f"{list(labels.shape)} of {labels.dtype}"
        )
    rows = UnitRows(weights).at(alive := labels >= 0)
    points = rows @ leading_plane(rows)
    clusters = int(labels.max()) + 1 if labels.numel() else 0
    # The extra row gathers the dead.
    sums = points.new_zeros(clusters + 1, points.shape[1])
    cluster_angle = _angle(sums.index_add_(0, labels[alive], points))
    cluster_angle[clusters] = torch.inf
    angle = points.new_zeros(len(labels)).masked_scatter_(alive, _angle(points))
    by_angle = angle.argsort(stable=True)
    by_cluster = labels[by_angle].argsort(stable=True)
    order = by_angle[by_cluster]
    return order[cluster_angle[labels[order]].argsort(stable=True)]


def _angle(points: Tensor) -> Tensor:
    if points.shape[1] < 2:
        return -points.sum(1)
    return torch.atan2(points[:, 1], points[:, 0])
