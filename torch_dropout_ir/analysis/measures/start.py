r"""Where the neurons of a layer were at the first measurement, in half the memory.

Large layers are kept in half precision, each row over its largest entry. The norm of
what rounding has taken, ``e``, is known: with ``K = W_0 - e`` for what is kept,

.. math:: \lVert W - K \rVert^2 - \lVert e \rVert^2 = \lVert W - W_0 \rVert^2
    + 2 \langle W - W_0, e \rangle

Rounding does not know where weights will go, so the last term is small: of a layer of
2^16 entries, rounded by a few parts in 10^4, it moves a distance of 1 % by some 10^-4
of itself.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.condensation.rows import (
    Weights,
    row_norms,
    unit_rows,
)

_LARGE: Final = 2**16  # entries from which a layer is rounded
_ROWS: Final = 32  # that are looked at together


class Start:
    """Input weights and amplitudes at the first measurement, on the CPU.

    Args:
        weights: Input weights, ``[m, d]``.
        size: Amplitudes, ``[m]``.

    Attributes:
        directions: Rows along the input weights, of any length, ``[m, d]``.
        size: The amplitudes.
    """

    def __init__(self, weights: Weights, size: Tensor) -> None:
        self.size = size.cpu().clone()
        self._scale: Tensor | None = None
        if weights.dtype == torch.float32 and weights.numel() >= _LARGE:
            self.directions = torch.empty(weights.shape, dtype=torch.float16)
            self._scale = torch.empty(len(weights), 1)
            for part in _parts(weights):
                rows = weights[part]
                scale = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True)
                scale.masked_fill_((scale == 0) | ~scale.isfinite(), 1.0)
                self.directions[part] = (rows / scale).cpu()
                self._scale[part] = scale.cpu()
        else:
            self.directions = weights[:].cpu().clone()
        self._norm = float(torch.linalg.vector_norm(row_norms(weights)))
        self._rounded = 0.0
        self._rounded = self._squared_distance(weights)

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`of_state` needs; tensors are not copied."""
        return dict(vars(self))

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Start:
        """Return the start that a saved state is of."""
        start = cls.__new__(cls)
        vars(start).update(state)
        return start

    def _kept(self, part: slice, like: Weights) -> Tensor:
        rows = self.directions[part].to(like.device, like.dtype)
        return rows if self._scale is None else rows.mul_(self._scale[part].to(rows))

    def _squared_distance(self, weights: Weights) -> float:
        """Squared distance, where it is more than what rounding has taken."""
        away = [
            row_norms(weights[part] - self._kept(part, weights)).square().sum()
            for part in _parts(weights)
        ]
        found = float(sum(away)) - self._rounded
        return 0.0 if found <= 0 else found  # NaN stays

    def relative_distance(self, weights: Weights) -> float:
        r"""Return :math:`\lVert W - W_0 \rVert / \lVert W_0 \rVert` of all neurons.

        NaN where all started at zero.
        """
        away = math.sqrt(self._squared_distance(weights))
        return away / self._norm if self._norm else math.nan

    def mean_cosine(self, weights: Weights) -> float:
        """Return the mean cosine between each neuron and what it was.

        NaN where all started at zero.
        """
        if not self._norm:
            return math.nan
        total = torch.zeros((), dtype=torch.float64)
        for part in _parts(weights):
            before = unit_rows(self.directions[part].to(weights.device))
            now = unit_rows(weights[part])
            cosines = torch.linalg.vecdot(now, before.to(now)).clamp_(-1.0, 1.0)
            total += cosines.sum(dtype=torch.float64).cpu()
        return float(total) / max(1, len(weights))


def _parts(weights: Weights) -> list[slice]:
    return [slice(k, k + _ROWS) for k in range(0, len(weights), _ROWS)]
