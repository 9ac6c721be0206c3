"""Greedy covers and packings of unit vectors, without their matrix of cosines.

Where few pairs are parallel they are listed, and the cover is taken on the list; where
many are, so is some neuron to many, and each choice strikes out many pairs: choices are
made on counts, until the pairs that are left can be listed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor

from torch_dropout_ir.condensation.rows import UnitRows, cosine_tiles

_PAIRS_A_ROW: Final = 64


def greedy_cover(rows: UnitRows, threshold: float) -> Tensor:
    """Return caps that cover unit rows ``[m, d]``, around some of them, fullest first.

    Number of the cap of each row, int64 ``[m]``, by falling number of rows in it. A
    row is in the cap around another where their cosine is above the threshold.
    """
    threshold = _resolvable(rows, threshold)
    labels = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
    most = _PAIRS_A_ROW * len(rows)
    counts, pairs = _count_near(rows, threshold, most)
    if pairs is None:
        _cover_by_counts(rows, threshold, labels, counts, most)
        left = (labels < 0).nonzero().squeeze(1)
        pairs = _list_pairs(rows, left, threshold)
    return _by_falling_size(_cover_by_pairs(labels, pairs))


def num_far_apart(rows: UnitRows, threshold: float) -> int:
    """Return a number of unit rows ``[m, d]`` no two of which fit into one cap.

    A cap around any direction holds what has a cosine above ``threshold`` with it: two
    rows in it are less than twice its angle apart.
    """
    if threshold < 0 or not len(rows):
        return min(1, len(rows))
    widest = _twice(rows, _resolvable(rows, threshold))
    chosen = torch.zeros(0, dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), size := rows.side):
        part = slice(start, min(start + size, len(rows)))
        free = torch.ones(part.stop - start, dtype=torch.bool, device=rows.device)
        for j in range(0, start, size):
            piece = chosen[(chosen >= j) & (chosen < j + size)]
            if 2 * len(piece) > size:
                tile = rows.tile(part, slice(j, j + size))[:, piece - j]
            else:
                tile = rows[part] @ rows[piece].T
            free &= (tile <= widest).all(1)
        places = free.nonzero().squeeze(1)
        left = rows.tile(part, part)[places][:, places]
        far = (left <= widest).cpu().numpy()
        picked, open_ = [], np.ones(len(left), dtype=bool)
        while open_.any():
            first = int(open_.argmax())
            picked.append(first)
            open_ &= far[first]
            open_[first] = False
        chosen = torch.cat((chosen, places[picked] + start))
    return len(chosen)


def _rounding(rows: UnitRows) -> float:
    """Bound on the error of a cosine of equal directions."""
    return 16 * torch.finfo(rows.dtype).eps


def _resolvable(rows: UnitRows, threshold: float) -> float:
    """The threshold, or what rounding can tell from 1."""
    return min(threshold, 1 - _rounding(rows))


def _twice(rows: UnitRows, threshold: float) -> float:
    """Cosine of twice the angle, less what rounding may add."""
    return 2 * threshold**2 - 1 - _rounding(rows)


def _count_near(
    rows: UnitRows, threshold: float, most: int
) -> tuple[Tensor, Tensor | None]:
    """Rows near each, with itself; and the pairs ``[2, k]`` unless above ``most``."""
    counts = torch.ones(len(rows), dtype=torch.int64, device=rows.device)
    listed: list[Tensor] | None = [counts.new_empty(2, 0)]
    held = 0
    for i, j, near in _near_tiles(rows, rows, threshold):
        across = near.sum(1)
        counts[i : i + near.shape[0]] += across.long()
        counts[j : j + near.shape[1]] += near.sum(0).long()
        if listed is not None:
            listed.append(_places(near, across, i, j))
            held += listed[-1].shape[1]
            listed = listed if held <= most else None
    return counts, None if listed is None else torch.cat(listed, 1)


def _places(near: Tensor, across: Tensor, i: int, j: int) -> Tensor:
    """Rows and columns ``[2, k]`` of a tile's ones; few rows have any, mostly."""
    busy = across.nonzero().squeeze(1)
    found = near[busy].nonzero().T
    return torch.stack((busy[found[0]] + i, found[1] + j))


def _cover_by_counts(
    rows: UnitRows, threshold: float, labels: Tensor, counts: Tensor, most: int
) -> None:
    """Choose caps until at most ``most`` pairs with an uncovered row are left."""
    cluster = 0
    while int(counts.sum()) > most:
        best = int(counts.argmax())
        cosines = (rows @ rows[best : best + 1].T)[:, 0]
        near = cosines > threshold
        near[best] = True  # whatever rounding says of its norm
        members = (near & (labels < 0)).nonzero().squeeze(1)
        if len(members) < counts[best]:  # rounding, in a product of another shape
            counts[best] = len(members)
            continue
        labels[members] = cluster
        cluster += 1
        # Those covered may still be the centre of others. What is near a member is
        # within twice the cap's angle.
        widest = _twice(rows, threshold) if threshold > 0 else -2.0
        around = (cosines > widest).nonzero().squeeze(1)
        lost = torch.zeros_like(around)
        for i, _, tile in _near_tiles(rows.at(around), rows.at(members), threshold):
            lost[i : i + len(tile)] += tile.sum(1).long()
        counts[around] = (counts[around] - lost).clamp_(min=0)
        counts[best] = 0


def _list_pairs(rows: UnitRows, left: Tensor, threshold: float) -> Tensor:
    """Pairs ``[2, k]`` of any row and one of ``left``, each once."""
    listed = [left.new_empty(2, 0)]
    for i, j, near in _near_tiles(rows, rows.at(left), threshold):
        found = _places(near, near.sum(1), i, j)
        listed.append(torch.stack((found[0], left[found[1]])))
    pairs = torch.cat(listed, 1)
    is_left = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    is_left[left] = True
    # Of two that are both left the pair was seen from either side.
    keep = (pairs[0] < pairs[1]) | ~is_left[pairs[0]]
    return pairs[:, keep & (pairs[0] != pairs[1])]


def _cover_by_pairs(labels: Tensor, pairs: Tensor) -> Tensor:
    """Go on covering what has no label yet, on a list of the near pairs."""
    found = labels.cpu().numpy()
    size = len(found)
    both = torch.cat((pairs, pairs.flip(0)), 1).cpu().numpy()
    order = np.argsort(both[0], kind="stable")
    neighbours = both[1][order]
    ends = np.cumsum(np.bincount(both[0], minlength=size))
    starts = ends - np.bincount(both[0], minlength=size)
    counts = (found < 0).astype(np.int64)
    np.add.at(counts, both[0], found[both[1]] < 0)
    heap = [(-counts[row], row) for row in np.flatnonzero(counts > 1).tolist()]
    heapq.heapify(heap)
    cluster = int(found.max(initial=-1)) + 1
    while heap:
        claimed, row = heapq.heappop(heap)
        if counts[row] < -claimed:  # counts only fall: what is stale is too high
            if counts[row] > 1:
                heapq.heappush(heap, (-counts[row], row))
            continue
        near = np.append(neighbours[starts[row] : ends[row]], row)
        members = near[found[near] < 0]
        found[members] = cluster
        cluster += 1
        counts[members] -= 1
        for member in members.tolist():
            counts[neighbours[starts[member] : ends[member]]] -= 1
    alone = np.flatnonzero(found < 0)
    found[alone] = np.arange(cluster, cluster + len(alone))
    return torch.from_numpy(found).to(labels.device)


def _by_falling_size(labels: Tensor) -> Tensor:
    """Number clusters by falling size; of equal ones the earlier first."""
    if not len(labels):
        return labels
    order = torch.bincount(labels).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=labels.device)
    return rank[labels]


def _near_tiles(
    rows: UnitRows, columns: UnitRows, threshold: float
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield first row, first column and tile of where cosines are above a threshold.

    A tile has 0 and 1 in the dtype of the rows: sums of floats are twice as fast as
    those of booleans. If ``columns`` is ``rows`` itself, tiles below the diagonal are
    left out and those on it are 0 on and below the diagonal.
    """
    same = columns is rows
    for i, j, tile in cosine_tiles(rows, None if same else columns):
        near = tile.gt_(threshold)
        yield i, j, near.triu_(1) if same and i == j else near
