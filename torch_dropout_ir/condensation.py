r"""Floor 2: orientations of neurons, and how few of them there are.

Semantics:

* The input weight of neuron ``j`` is its row of incoming weights with its bias
  appended; its orientation is that vector over its norm.
* Two neurons are parallel when the cosine of their input weights exceeds a threshold,
  0.95 in the paper. The cosine is signed: opposite neurons are not condensed.
* A neuron of norm zero, or below a stated share of the largest norm, is dead: it has
  no orientation, is counted apart and never as a cluster.
* In few dimensions the number of directions says little: weights in the plane (inputs
  of one dimension) cover the circle by about ten whatever they do.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import Tensor, nn

_CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_VIEWS: Final = ("filter", "kernel", "input_channel")
_BLOCK_BYTES: Final = 2**25


def input_weights(module: nn.Module, view: str = "filter") -> Tensor:
    """Return the input weights of a layer's neurons, one a row.

    Args:
        module: ``nn.Linear`` or ``nn.Conv1d/2d/3d``.
        view: For convolutions: ``"filter"``, the kernel of one output channel over all
            its input channels, with its bias; ``"kernel"``, each pair of output and
            input channel by itself (the view of the paper's ResNet-18 figures);
            ``"input_channel"``, all kernels that read one input channel.

    Returns:
        Matrix ``[neurons, d]`` in the graph of the module's parameters.

    Raises:
        NotImplementedError: If the layer is of another kind.
        ValueError: If ``view`` is none of the three, or not ``"filter"`` for a linear
            layer.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 1.

    Example:
        >>> input_weights(nn.Linear(4, 3)).shape
        torch.Size([3, 5])
        >>> input_weights(nn.Conv2d(4, 3, 5), view="kernel").shape
        torch.Size([12, 25])
    """
    if view not in _VIEWS:
        raise ValueError(
            f"input_weights: expected `view` to be one of {_VIEWS}, got {view!r}"
        )
    if not isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        raise NotImplementedError(
            f"input_weights: {type(module).__name__} is not supported. Supported: "
            "Linear, Conv1d, Conv2d, Conv3d. Pass a matrix [neurons, d] of your own to "
            "the functions of this module instead."
        )
    weight, bias = module.weight, module.bias
    if isinstance(module, nn.Linear) and view != "filter":
        raise ValueError(
            f"input_weights: a linear layer has only the view 'filter', got {view!r}"
        )
    if view == "kernel":
        return weight.flatten(2).flatten(0, 1)
    if view == "input_channel":
        return weight.transpose(0, 1).flatten(1)
    rows = weight.flatten(1)
    return rows if bias is None else torch.cat((rows, bias[:, None]), 1)


def orientations(weights: Tensor) -> Tensor:
    r"""Return the rows over their norms; a row of norm zero stays zero.

    Args:
        weights: Input weights, ``[m, d]``.

    Returns:
        Unit rows, ``[m, d]``.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 1.

    Example:
        >>> orientations(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    # Largest entry first: the square of a small float16 or float32 underflows.
    largest = weights.detach().abs().amax(1, keepdim=True)
    scaled = weights / torch.where(largest > 0, largest, 1.0)
    norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / torch.where(norms > 0, norms, 1.0)


def amplitudes(weights: Tensor, outgoing: Tensor | None = None) -> Tensor:
    r"""Return the amplitude of each neuron.

    .. math:: A_j = \lVert a_j \rVert \, \lVert w_j \rVert

    Args:
        weights: Input weights, ``[m, d]``.
        outgoing: Outgoing weights, ``[outputs, m]`` or ``[m]``; where they are not
            given the amplitude is the norm of the input weight alone.

    Returns:
        Amplitudes, ``[m]``.

    Raises:
        ValueError: If ``outgoing`` has another number of neurons.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 1.

    Example:
        >>> amplitudes(torch.tensor([[3.0, 4.0]]), torch.tensor([-2.0]))
        tensor([10.])
    """
    norms = torch.linalg.vector_norm(weights, dim=1)
    if outgoing is None:
        return norms
    columns = outgoing.reshape(-1, outgoing.shape[-1])
    if columns.shape[1] != weights.shape[0]:
        raise ValueError(
            f"amplitudes: expected `outgoing` [..., {weights.shape[0]}], got "
            f"{list(outgoing.shape)}"
        )
    return norms * torch.linalg.vector_norm(columns, dim=0)


def cosine_similarity(weights: Tensor, other: Tensor | None = None) -> Tensor:
    r"""Return the cosines between neurons.

    .. math:: D(u, v) = u^\top v / (\lVert u \rVert \lVert v \rVert)

    Args:
        weights: Input weights, ``[m, d]``.
        other: A second set, ``[n, d]``; the first again if None.

    Returns:
        Cosines ``[m, n]`` in ``[-1, 1]``; 0 where a norm is zero.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 2.

    Example:
        >>> cosine_similarity(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    rows = orientations(weights)
    columns = rows if other is None else orientations(other)
    return (rows @ columns.T).clamp(-1.0, 1.0)


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
        counts -= _parallel_counts(rows, rows[members], threshold)
        counts[members] = 0
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


@torch.no_grad()
def cluster_order(weights: Tensor) -> Tensor:
    """Return an order of the neurons that puts parallel ones side by side.

    Clusters of :func:`effective_neurons` stay together and follow one another by the
    angle of their mean in the plane of the two leading principal directions; inside a
    cluster neurons follow by their own angle. Dead neurons come last.

    Args:
        weights: Input weights, ``[m, d]``.

    Returns:
        A permutation of the neurons, int64 ``[m]``.

    Example:
        >>> w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.01], [0.0, 2.0]])
        >>> cluster_order(w).tolist()
        [2, 0, 1, 3]
    """
    labels = effective_neurons(weights).labels
    rows = orientations(weights)
    plane = _leading_plane(rows)
    clusters = int(labels.max()) + 1 if labels.numel() else 0
    # The extra row gathers the dead.
    sums = rows.new_zeros(clusters + 1, rows.shape[1]).index_add_(
        0, labels % (clusters + 1), rows
    )
    cluster_angle = _angle(sums @ plane)
    cluster_angle[clusters] = torch.inf
    by_angle = _angle(rows @ plane).argsort(stable=True)
    by_cluster = labels[by_angle].argsort(stable=True)
    order = by_angle[by_cluster]
    return order[cluster_angle[labels[order]].argsort(stable=True)]


def _leading_plane(rows: Tensor, steps: int = 30) -> Tensor:
    """Two leading principal directions ``[d, 2]`` by subspace iteration, no draws."""
    phase = torch.arange(rows.shape[1], device=rows.device, dtype=rows.dtype)
    plane = torch.stack((torch.cos(phase), torch.sin(1.7 * phase + 1)), 1)
    for _ in range(steps):
        plane, _ = torch.linalg.qr(rows.T @ (rows @ plane))
    return plane


def _angle(points: Tensor) -> Tensor:
    if points.shape[1] < 2:
        return -points.sum(1)
    return torch.atan2(points[:, 1], points[:, 0])
