r"""Where the neurons of a layer were at the first measurement, in less memory.

Large layers are kept in half precision, the largest in 8 bits, each row over its
largest entry. The norm of what rounding has taken, ``e``, is known: with
``K = W_0 - e`` for what is kept,

.. math:: \lVert W - K \rVert^2 - \lVert e \rVert^2 = \lVert W - W_0 \rVert^2
    + 2 \langle W - W_0, e \rangle

Rounding does not know where weights will go, so the last term is small, and the less
of the whole the more entries there are. It moves a distance of 1 % by some 10^-4 of
itself where a layer of 2^16 entries is in half precision (which takes a few parts in
10^4), and by 10^-3 where one of 2^18 is in 8 bits (4 parts in 10^3 of uniform weights,
twice that of normal ones). Cosines are over that of each row with what is kept of it.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.condensation.compare import orientation_angles
from torch_dropout_ir.condensation.rows import Weights, row_norms, unit_rows

_LARGE, _LARGEST = 2**16, 2**18  # entries from which a layer is rounded
_STEPS: Final = 127.0  # of 8 bits, from zero to the largest entry
_ROWS: Final = 32  # that are looked at together


class Start:
    """Input weights ``[m, d]`` and amplitudes ``[m]`` of the first measurement, on CPU.

    Attributes:
        size: The amplitudes.
        shape: That of the weights.
        nbytes: Memory of what is kept of them.
    """

    def __init__(self, weights: Weights, size: Tensor) -> None:
        self.size = size.cpu().clone()
        self.shape = weights.shape
        self._scale: Tensor | None = None
        if weights.dtype == torch.float32 and weights.numel() >= _LARGE:
            self._round(weights)
        else:
            self._rows = weights[:].cpu().clone()
        self.nbytes = self._rows.nbytes
        norms = row_norms(weights)
        # Cosines of rows with what is kept of them; 0 of those that are zero.
        self._own = (norms != 0).float().cpu()
        if self._scale is not None:
            self._own = self._cosines(weights)
        self._norm = float(torch.linalg.vector_norm(norms))
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

    def _round(self, weights: Weights) -> None:
        """Keep rows over their largest entries, times the steps of what keeps them."""
        short = weights.numel() >= _LARGEST
        dtype, steps = (torch.int8, _STEPS) if short else (torch.float16, 1.0)
        self._rows = torch.empty(weights.shape, dtype=dtype, device="cpu")
        self._scale = torch.empty(len(weights), 1, dtype=torch.float32, device="cpu")
        for part in _parts(weights):
            rows = weights[part]
            scale = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True)
            scale.masked_fill_((scale == 0) | ~scale.isfinite(), 1.0)
            rows = rows / scale * steps
            self._rows[part] = (rows.round_() if short else rows).cpu()
            self._scale[part] = scale.cpu() / steps

    def _kept(self, part: slice, like: Weights) -> Tensor:
        rows = self._rows[part].to(like.device, like.dtype)
        return rows if self._scale is None else rows.mul_(self._scale[part].to(rows))

    def angles(self, plane: Tensor) -> Tensor:
        """Return the angles of the rows in a plane ``[d, 2]``, on the CPU, ``[m]``."""
        parts = map(self._directions, _parts(self._rows))
        return torch.cat([orientation_angles(x, plane) for x in parts])

    def _directions(self, part: slice) -> Tensor:
        rows = self._rows[part]
        return rows if rows.is_floating_point() else rows.float()

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

        Those that started at zero do not count; NaN where all did.
        """
        had = self._own != 0
        cosines = (self._cosines(weights)[had] / self._own[had]).clamp_(-1.0, 1.0)
        return float(cosines.double().mean())

    def _cosines(self, weights: Weights) -> Tensor:
        """Cosines of rows with what is kept, on the CPU, ``[m]``."""
        found = [torch.zeros(0, dtype=torch.float32, device="cpu")]
        for part in _parts(weights):
            before = unit_rows(self._directions(part).to(weights.device))
            now = unit_rows(weights[part])
            found.append(torch.linalg.vecdot(now, before.to(now)).cpu())
        return torch.cat(found)


def _parts(weights: Weights) -> list[slice]:
    return [slice(k, k + _ROWS) for k in range(0, len(weights), _ROWS)]
