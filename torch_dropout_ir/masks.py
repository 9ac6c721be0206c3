"""Floor 2: statistics of dropout masks that add.

Semantics:

* Everything kept is a sum, so calls, steps and ranks merge by ``+`` and rates are
  taken at the end.
* A unit is a feature (last dimension) of :class:`torch.nn.Dropout` and a channel of the
  channel dropouts. Masks of different numbers of units have no common units: their sum
  keeps the totals and drops the counts per unit.
* A z-score compares a count with the binomial law that the mask claims to follow: it is
  normal with mean 0 and variance 1 where the mask is what it should be.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from typing import Final

import torch
from torch import Tensor

from torch_dropout_ir import ops

MAX_UNITS: Final = 2**16
_WORD: Final = 64
_MAX_WAITING: Final = 256


@dataclasses.dataclass(frozen=True)
class MaskStatistics:
    r"""Sums over dropout masks; they add with ``+``.

    .. math::
        z = \frac{\sum_c k_c - \sum_c n_c q_c}{\sqrt{\sum_c n_c q_c (1 - q_c)}}

    with :math:`k_c` of :math:`n_c` elements kept in call ``c`` at keep probability
    :math:`q_c = 1 - p_c`.

    Attributes:
        num_calls: Number of masks.
        num_elements: Number of mask elements.
        num_kept: Number of elements kept, 0-d int64 tensor on the masks' device.
        expected_kept: Expected number kept, sum of ``n q``.
        variance: Binomial variance of the number kept, sum of ``n q (1 - q)``.
        unit_kept: Times each unit was kept, int64 ``[units]``; empty where there are
            no common units.

    Example:
        >>> a = MaskStatistics.of_mask(torch.tensor([[True, False], [True, True]]), 0.5)
        >>> (a + a).keep_rate, (a + a).num_calls, (a + a).unit_kept.tolist()
        (0.75, 2, [4, 2])
    """

    num_calls: int = 0
    num_elements: int = 0
    num_kept: Tensor = dataclasses.field(
        default_factory=lambda: torch.zeros((), dtype=torch.int64, device="cpu")
    )
    expected_kept: float = 0.0
    variance: float = 0.0
    unit_kept: Tensor = dataclasses.field(
        default_factory=lambda: torch.zeros(0, dtype=torch.int64, device="cpu")
    )

    @classmethod
    def of_units(cls, unit_kept: Tensor, num_elements: int, p: float) -> MaskStatistics:
        """Read one mask from the counts of its units.

        Args:
            unit_kept: Times each unit was kept, int64 ``[units]``.
            num_elements: Number of elements of the mask.
            p: Probability of dropping.

        Returns:
            The statistics of one call.
        """
        return cls(
            num_calls=1,
            num_elements=num_elements,
            num_kept=unit_kept.sum(),
            expected_kept=num_elements * (1 - p),
            variance=num_elements * p * (1 - p),
            unit_kept=unit_kept,
        )

    @classmethod
    def of_mask(cls, mask: Tensor, p: float, unit_dim: int = -1) -> MaskStatistics:
        """Read one mask.

        Args:
            mask: True where kept, any shape.
            p: Probability of dropping.
            unit_dim: Dimension that counts the units.

        Returns:
            The statistics of one call.

        Raises:
            ValueError: If ``p`` is outside ``[0, 1]``.
            TypeError: If ``mask`` is no tensor of booleans.
        """  # noqa: DOC502 (`check_rate` raises)
        p = float(ops.check_rate(p, True))
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                "MaskStatistics: expected `mask` to be a tensor of booleans, got "
                f"{got}. What was kept of numbers, 0 and 1 or scaled, is `mask != 0`."
            )
        units = mask.movedim(unit_dim, -1) if mask.ndim else mask.view(1)
        counts = units[None].flatten(0, -2).sum(0)
        return cls.of_units(counts, mask.numel(), p)

    def __add__(self, other: MaskStatistics) -> MaskStatistics:
        if not isinstance(other, MaskStatistics):
            return NotImplemented
        if not self.num_calls or not other.num_calls:
            return self if self.num_calls else other
        units = self.unit_kept.new_zeros(0)
        if self.unit_kept.shape == other.unit_kept.shape:
            units = self.unit_kept + other.unit_kept.to(self.unit_kept.device)
        return MaskStatistics(
            self.num_calls + other.num_calls,
            self.num_elements + other.num_elements,
            self.num_kept + other.num_kept.to(self.num_kept.device),
            self.expected_kept + other.expected_kept,
            self.variance + other.variance,
            units,
        )

    @property
    def keep_rate(self) -> float:
        """Share of the elements that were kept; NaN before the first."""
        if not self.num_elements:
            return float("nan")
        return int(self.num_kept) / self.num_elements

    @property
    def z_score(self) -> float:
        """Standard deviations between count and expectation; NaN at p = 0 and 1."""
        if self.variance <= 0:
            return float("nan")
        return (int(self.num_kept) - self.expected_kept) / self.variance**0.5

    @property
    def unit_z_scores(self) -> Tensor:
        """The z-score of each unit, float64 ``[units]``."""
        units = max(self.unit_kept.numel(), 1)
        excess = self.unit_kept.double() - self.expected_kept / units
        return (
            excess / (self.variance / units) ** 0.5
            if self.variance > 0
            else (torch.full_like(excess, float("nan")))
        )


class MaskTally:
    """What a layer adds up at every call; read as :class:`MaskStatistics`.

    Nothing is taken off the device. The kernel that draws a mask adds to the counts,
    one for each unit; masks of more than ``MAX_UNITS`` units, or of different numbers
    of units, are counted as a whole. Threads may share a tally.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # To append costs a call least; the sums are taken of many at once.
        self._waiting: deque[tuple[int, float]] = deque()
        self._calls = 0
        self._elements = 0
        self._expected = 0.0
        self._variance = 0.0
        self._kept: Tensor | None = None  # what the last mask was added to
        self._by_unit = True  # else by place in a 64-bit word: no units in common
        # Another thread may still add to counts that no longer fit: all are kept.
        self._counts: dict[tuple[torch.device, bool], Tensor] = {}

    def counts_for(self, units: int, device: torch.device) -> Tensor:
        """Return what a mask's counts are to be added to, int64 ``[units]``.

        It is ``[64]`` for a mask counted as a whole.
        """
        kept = self._kept
        if kept is None or kept.numel() != units or kept.device != device:
            with self._lock:
                kept = self._fit(units, device)
        return kept

    @torch.inference_mode(False)  # what adds up in it could not be added to outside
    def _fit(self, units: int, device: torch.device) -> Tensor:
        kept = self._kept
        if kept is None:
            self._by_unit = units <= MAX_UNITS
        elif kept.numel() != units or kept.device != device:
            self._by_unit = False
        key, width = (device, self._by_unit), units if self._by_unit else _WORD
        if key not in self._counts:
            self._counts[key] = torch.zeros(width, dtype=torch.int64, device=device)
        self._kept = self._counts[key]
        return self._kept

    def add_counted(self, numel: int, p: float) -> None:
        """Add a mask of ``numel`` elements whose units are in the counts already."""
        self._waiting.append((numel, p))
        if len(self._waiting) >= _MAX_WAITING:
            with self._lock:
                self._settle()

    def _settle(self) -> None:
        for _ in range(len(self._waiting)):
            numel, p = self._waiting.popleft()
            self._calls += 1
            self._elements += numel
            self._expected += numel * (1 - p)
            self._variance += numel * p * (1 - p)

    @torch.inference_mode(False)
    def add(self, packed: Tensor, numel: int, units: int, p: float) -> None:
        """Add a packed mask (uint8) of ``numel`` elements in rows of ``units``."""
        counts = self.counts_for(units, packed.device)
        width = counts.numel()
        # Padding bits are zero, so a mask can be counted by whole words.
        rows = numel // width if self._by_unit else packed.numel() * 8 // width
        more = ops.unit_counts(packed, rows, width)
        with self._lock:
            counts += more
        self.add_counted(numel, p)

    def statistics(self) -> MaskStatistics:
        """Return the sums so far."""
        with self._lock:
            if self._kept is None:
                return MaskStatistics()
            self._settle()
            counts = [x.clone() for x in self._counts.values()]  # to them calls add
            totals = [x.sum().to(self._kept.device) for x in counts]
            return MaskStatistics(
                self._calls,
                self._elements,
                torch.stack(totals).sum(),
                self._expected,
                self._variance,
                counts[0] if self._by_unit else self._kept.new_zeros(0),
            )
