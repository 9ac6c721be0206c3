"""Neurons of two layers, or of one layer at two steps, side by side."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from torch_dropout_ir.condensation.rows import (
    UnitRows,
    Weights,
    check_rows,
    cosine_tiles,
    row_norms,
    rows_a_block,
    unit_rows,
    work_dtype,
)
from torch_dropout_ir.vectors import full_precision

_STEPS, _WIDTH = 16, 8  # of subspace iteration: two vectors alone would take many more


@torch.no_grad()
@full_precision()
def closest(weights: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each neuron the most parallel one of another set.

    The other set may be another layer on the same inputs, the same layer at another
    step, or directions of a teacher.

    Args:
        weights: Input weights, ``[m, d]``.
        other: A second set, ``[n, d]``, ``n >= 1``.

    Returns:
        Largest cosines ``[m]`` and the indices ``[m]`` of the neurons of ``other`` that
        have them; cosine 0 and index -1 for a neuron of norm zero, NaN for one that is
        not finite.

    Raises:
        ValueError: If shapes do not fit, or ``other`` has a row without orientation.

    Example:
        >>> teacher = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> cosines, places = closest(torch.tensor([[3.0, 4.0], [2.0, 0.0]]), teacher)
        >>> cosines, places
        (tensor([0.8000, 1.0000]), tensor([0, 1]))
    """
    check_rows("closest", weights, other)
    if weights.shape[1] != other.shape[1]:
        raise ValueError(
            "closest: expected `weights` [m, d] and `other` [n, d], got "
            f"{list(weights.shape)} and {list(other.shape)}"
        )
    mine, theirs = UnitRows(weights), UnitRows(other)
    if not len(theirs) or not bool(theirs.sound.all()):
        raise ValueError(
            "closest: expected `other` to hold at least one row, each finite and not "
            "zero: the others have no direction to be close to"
        )
    best = weights.new_full((len(mine),), -2.0, dtype=mine.dtype)
    place = torch.full_like(best, -1, dtype=torch.int64)
    for i, j, tile in cosine_tiles(mine, theirs):
        values, columns = tile.clamp_(-1.0, 1.0).max(1)
        part = slice(i, i + len(tile))
        better = ~(values <= best[part])
        place[part] = torch.where(better, columns + j, place[part])
        best[part] = torch.where(better, values, best[part])
    return best, place.masked_fill_(~mine.sound, -1)


@dataclasses.dataclass(frozen=True)
class Movement:
    """How far a layer's neurons have moved.

    Attributes:
        relative: Distance of all weights from where they were, over their norm there.
        neurons: The same for each neuron, ``[m]``; infinite where it was zero and
            moved.
        cosines: Cosine of each neuron with what it was, ``[m]``; 0 where either is
            zero.
    """

    relative: float
    neurons: Tensor
    cosines: Tensor


@torch.no_grad()
@full_precision()
def movement(weights: Tensor, start: Tensor) -> Movement:
    r"""Return how far neurons have moved from an earlier state.

    .. math:: \lVert W - W_0 \rVert_F / \lVert W_0 \rVert_F

    Args:
        weights: Input weights now, ``[m, d]``.
        start: The same neurons' before, ``[m, d]``.

    Returns:
        The movement, of all and of each, and how far they turned.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> moved = movement(torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 0.0]]))
        >>> round(moved.relative, 4), moved.cosines
        (1.4142, tensor([0.]))
    """
    check_rows("movement", weights, start)
    if weights.shape != start.shape:
        raise ValueError(
            "movement: expected `weights` and `start` of one shape [m, d], got "
            f"{list(weights.shape)} and {list(start.shape)}"
        )
    dtype = work_dtype(weights)
    size = max(1, rows_a_block(weights) // 4)  # some copies are in double precision
    pairs = zip(weights.detach().split(size), start.detach().split(size), strict=True)
    found = [_moved(now.to(dtype), old.to(now.device, dtype)) for now, old in pairs]
    distances, norms, cosines = (torch.cat(x) for x in zip(*found, strict=True))
    each = torch.where(distances == 0, distances, distances / norms)
    whole = [torch.linalg.vector_norm(x) for x in (distances, norms)]
    relative = 0.0 if float(whole[0]) == 0 else float(whole[0] / whole[1])
    return Movement(relative, each.to(dtype), cosines.clamp_(-1.0, 1.0))


def _moved(now: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distances, norms before and cosines of some rows."""
    cosines = torch.linalg.vecdot(unit_rows(now), unit_rows(before))
    return row_norms(now - before), row_norms(before), cosines


def leading_plane(rows: UnitRows) -> Tensor:
    """Return two leading principal directions of the rows, orthonormal ``[d, 2]``.

    Of the matrix ``U'U`` with its mean in it, by subspace iteration from a fixed start:
    nothing is drawn. For two dimensions it is the plane as it stands; of one, one.
    """
    dims = rows.shape[1]
    if dims <= 2:
        return torch.eye(dims, dtype=rows.dtype, device=rows.device)
    phase = torch.arange(dims, device=rows.device, dtype=rows.dtype)[:, None]
    shift = torch.arange(min(_WIDTH, dims), device=rows.device, dtype=rows.dtype)
    start = space = torch.cos(phase * (1 + 0.35 * shift) + shift)
    for _ in range(_STEPS):
        space, _ = torch.linalg.qr(rows.sums(rows @ space))
    _, vectors = torch.linalg.eigh(space.T @ rows.sums(rows @ space))
    plane = space @ vectors[:, -2:].flip(1)
    side = (plane * start[:, :2]).sum(0)  # pictures of two steps are not mirrored
    return torch.where(side < 0, -plane, plane)


@torch.no_grad()
def orientation_angles(weights: Weights, plane: Tensor | None = None) -> Tensor:
    """Return the angle of each neuron in a plane, in ``[-pi, pi)``.

    For neurons of two weights (one input and a bias) it is the orientation itself. For
    more it is that of the orientation's projection onto a plane.

    Args:
        weights: Input weights, ``[m, d]``, ``d >= 2``.
        plane: Orthonormal columns ``[d, 2]``; the two leading principal directions of
            the orientations if None.

    Returns:
        Angles ``[m]``; NaN for a neuron that is zero or not finite.

    Raises:
        ValueError: If the shapes do not fit.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Fig. 4.

    Example:
        >>> orientation_angles(torch.tensor([[0.0, 2.0], [-1.0, 0.0], [0.0, 0.0]]))
        tensor([ 1.5708, -3.1416,     nan])
    """  # noqa: DOC502 (raised by `project_orientations`)
    points = project_orientations(weights, plane)
    zero = row_norms(weights) == 0
    angles = torch.atan2(points[:, 1], points[:, 0])
    none = zero | torch.isnan(points).any(1)
    return torch.where(angles >= torch.pi, -torch.pi, angles).masked_fill_(
        none, torch.nan
    )


@torch.no_grad()
@full_precision()
def project_orientations(weights: Weights, plane: Tensor | None = None) -> Tensor:
    """Return the orientations' coordinates in a plane: points of the unit disc.

    Args:
        weights: Input weights, ``[m, d]``, ``d >= 2``.
        plane: Orthonormal columns ``[d, 2]``; the two leading principal directions of
            the orientations if None.

    Returns:
        Points ``[m, 2]``; the origin for a neuron of norm zero, NaN for one that is not
        finite.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> project_orientations(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    check_rows("project_orientations", weights)
    dims = weights.shape[1]
    if dims < 2 or (plane is not None and plane.shape != (dims, 2)):
        raise ValueError(
            "expected `weights` [m, d] with d >= 2 and `plane` [d, 2], got "
            f"{list(weights.shape)} and {None if plane is None else list(plane.shape)}"
        )
    rows = UnitRows(weights)
    if plane is None:
        plane = _plane(rows)
    points = rows @ plane.to(rows.device, rows.dtype)
    return points.masked_fill_(~rows.norms.isfinite()[:, None], torch.nan)


@torch.no_grad()
@full_precision()
def principal_plane(weights: Weights) -> Tensor:
    """Return the plane of the orientations' two leading principal directions.

    Neurons without orientation do not count; for two weights it is the plane as it
    stands. To compare two steps in one picture, project both onto one plane.

    Args:
        weights: Input weights, ``[m, d]``, ``d >= 2``.

    Returns:
        Orthonormal columns ``[d, 2]``.

    Raises:
        ValueError: If ``weights`` are no matrix, or ``d < 2``.

    Example:
        >>> principal_plane(torch.randn(5, 2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    check_rows("principal_plane", weights)
    if weights.shape[1] < 2:
        raise ValueError(
            f"principal_plane: expected weights [neurons, d >= 2], got d = "
            f"{weights.shape[1]}: a line has no plane"
        )
    return _plane(UnitRows(weights))


def _plane(rows: UnitRows) -> Tensor:
    return leading_plane(rows.at(rows.norms.isfinite()))
