"""How many directions cover the neurons of a layer, and an order that shows it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from torch_dropout_ir.arguments import check_real
from torch_dropout_ir.condensation.compare import leading_plane
from torch_dropout_ir.condensation.greedy import greedy_cover, num_far_apart
from torch_dropout_ir.condensation.rows import UnitRows, Weights, check_rows
from torch_dropout_ir.vectors import full_precision


@dataclasses.dataclass(frozen=True)
class EffectiveNeurons:
    """How many directions a layer's neurons have.

    Attributes:
        count: Number of directions found; never below the smallest number possible.
        ratio: ``count`` over the number of neurons that are not dead; NaN if all are.
        labels: Cluster of each neuron, int64 ``[m]``, numbered by falling size; -1 for
            the dead.
        num_dead: Number of dead neurons: zero, weak, or not finite.
        num_nonfinite: How many of them have an entry that is infinite or NaN.
        lower_bound: The smallest number possible is not below this.
    """

    count: int
    ratio: float
    labels: Tensor
    num_dead: int
    num_nonfinite: int
    lower_bound: int


@torch.no_grad()
@full_precision()
def effective_neurons(
    weights: Weights,
    threshold: float = 0.95,
    min_amplitude: float = 0.0,
    *,
    amplitude: Tensor | None = None,
) -> EffectiveNeurons:
    r"""Count the directions that a layer's neurons have.

    :math:`m_{eff}` is the smallest number of directions such that each neuron has a
    cosine above ``threshold`` with one of them. The minimum is a covering problem and
    NP-hard; this is the greedy cover with the neurons themselves as candidates: again
    and again the neuron that is parallel to most of those left. It errs upward: the
    count is never below the minimum, and at most ``1 + ln m`` times the smallest cover
    by neurons. From below, two neurons whose cosine is at most ``2 threshold^2 - 1``
    (twice the angle) have no direction in common: ``lower_bound`` is a number of
    neurons that are so pairwise, found greedily too.

    A threshold nearer to 1 than the rounding of the cosines is taken as that: equal
    directions are always one.

    Tiles of the matrix of cosines are seen, and at most 64 pairs a neuron are held;
    ``m^2 d`` operations, thrice that where most neurons are parallel.

    Args:
        weights: Input weights, ``[m, d]``.
        threshold: Cosine above which neurons are parallel, in ``[-1, 1]``.
        min_amplitude: Share of the largest finite amplitude below which a neuron is
            dead; neurons of norm zero and those that are not finite always are.
        amplitude: Amplitudes ``[m]``, as :func:`amplitudes` gives them; the norms if
            None.

    Returns:
        The count, its ratio, the clusters, the dead, and a bound from below.

    Raises:
        ValueError: If shapes do not fit, or a share or threshold is out of range.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 3. Chvatal, *A
        greedy heuristic for the set-covering problem*, 1979 (the bound).

    Example:
        >>> w = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.0, 0.0]])
        >>> found = effective_neurons(w)
        >>> found.count, round(found.ratio, 3), found.labels.tolist(), found.num_dead
        (2, 0.667, [0, 0, 1, -1], 1)
        >>> found.lower_bound
        2
    """  # noqa: DOC502 (raised by `_check`)
    check_cover("effective_neurons", threshold, min_amplitude)
    _check(weights, amplitude)
    rows = UnitRows(weights)
    alive = rows.sound.nonzero().squeeze(1)
    if min_amplitude > 0 and len(alive):
        size = rows.norms if amplitude is None else amplitude.detach().abs()
        size = torch.nan_to_num(size[alive], nan=-1.0, posinf=-1.0)  # dead
        alive = alive[(size >= 0) & (size >= min_amplitude * size.amax())]
    total, nonfinite = len(rows), int((~rows.norms.isfinite()).sum())
    rows = rows if len(alive) == total else rows.at(alive)
    labels = torch.full((total,), -1, dtype=torch.int64, device=weights.device)
    labels[alive] = greedy_cover(rows, threshold)
    count = int(labels.max()) + 1 if total else 0
    return EffectiveNeurons(
        count,
        count / len(alive) if len(alive) else float("nan"),
        labels,
        total - len(alive),
        nonfinite,
        num_far_apart(rows, threshold),
    )


def check_cover(function: str, threshold: float, min_amplitude: float) -> None:
    """Raise a ValueError if a threshold or a share is out of range."""
    named = (("threshold", threshold, -1), ("min_amplitude", min_amplitude, 0))
    for name, value, least in named:
        check_real(function, name, value, least=least)
        if value > 1:
            raise ValueError(
                f"{function}: expected `{name}` in [{least}, 1], got {value}"
            )


def _check(weights: Weights, amplitude: Tensor | None) -> None:
    check_rows("effective_neurons", weights)
    if amplitude is not None and amplitude.shape != weights.shape[:1]:
        raise ValueError(
            f"effective_neurons: expected `amplitude` [{weights.shape[0]}], got "
            f"{list(amplitude.shape)}"
        )


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
