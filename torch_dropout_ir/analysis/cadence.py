"""When to measure: every so many steps, or as often as a share of the time pays for."""

from __future__ import annotations

import math
import numbers
from typing import Any


class Cadence:
    """Decides which measures are due at a step.

    With a number, every measure is due at its multiples. With ``"auto"`` each measure
    has an equal part of the budget: what it cost, and what it would cost again, is a
    debt that training time pays off, and it is due again when the debt is paid. Only
    the first measurement, whose cost nobody knows, is on credit: from the second on
    the share of the analysis is within the budget, unless a measurement costs more
    than the last one did. Idle time saves nothing up.

    Args:
        every: Optimizer steps between measurements, or ``"auto"``.
        budget: Share of the whole time that measuring may take, in ``(0, 1)``.
        names: Names of the measures.

    Raises:
        ValueError: If ``every`` or ``budget`` is out of range.
    """

    def __init__(self, every: int | str, budget: float, names: list[str]) -> None:
        counted = isinstance(every, numbers.Integral) and not isinstance(every, bool)
        steps = int(every) if counted else 0
        if every != "auto" and steps < 1:
            raise ValueError(
                "attach_analysis: expected `every` to be 'auto' or a number of steps "
                f">= 1, got {every!r}"
            )
        real = isinstance(budget, numbers.Real)
        if not (real and 0.0 < budget < 1.0):
            raise ValueError(
                f"attach_analysis: expected `budget` in (0, 1), got {budget!r}"
            )
        self.every = steps or every
        self._earning = budget / (1.0 - budget) / max(1, len(names))
        self._debt = dict.fromkeys(names, 0.0)
        self._latest = dict.fromkeys(names, 0.0)
        self.measured_seconds = 0.0
        self.training_seconds = 0.0
        # Every step comes by here: debts are settled where it may matter alone.
        self._unsettled = 0.0
        self._least = 0.0

    def due(self, step: int) -> list[str]:
        """Return the names of the measures to take at ``step``."""
        if isinstance(self.every, int):
            return list(self._debt) if step % self.every == 0 else []
        if self._earning * self._unsettled < self._least:
            return []
        self._settle()
        return [name for name, debt in self._debt.items() if debt <= 0]

    def trained(self, seconds: float) -> None:
        """Pay off debts with training time."""
        self.training_seconds += seconds
        self._unsettled += seconds

    def _settle(self) -> None:
        earned, self._unsettled = self._earning * self._unsettled, 0.0
        for name, debt in self._debt.items():
            self._debt[name] = max(0.0, debt - earned)
        self._least = min(self._debt.values(), default=math.inf)

    def _owe(self, name: str, seconds: float) -> None:
        self._settle()
        self._debt[name] += seconds
        self._least = min(self._debt.values())

    def measured(self, name: str, seconds: float) -> None:
        """Enter a measurement, and the next one as if it cost as much."""
        self.measured_seconds += seconds
        self._owe(name, 2 * seconds - self._latest[name])
        self._latest[name] = seconds

    def put_off(self, name: str, step: int) -> None:
        """Look for what a measure lacks no more often than if it cost a step."""
        self._owe(name, self.training_seconds / max(1, step))

    def wait(self, step: int) -> int:
        """Return the steps until something may be due, at the pace so far.

        At most as many again as were made, since the pace of the first steps says
        little.
        """
        self._settle()
        earned = self._earning * self.training_seconds / max(1, step)
        owed = self._least if self._debt else 0.0
        return max(1, min(step, math.ceil(owed / earned) if earned else 1))

    @property
    def share(self) -> float:
        """Share of the analysis in the whole time so far."""
        whole = self.measured_seconds + self.training_seconds
        return self.measured_seconds / whole if whole > 0 else 0.0

    def numbers(self) -> dict[str, float]:
        """Return what decides when a measure is due."""
        self._settle()
        debts = {f"debt of {name}": debt for name, debt in self._debt.items()}
        debts |= {f"cost of {name}": cost for name, cost in self._latest.items()}
        times = {"measured": self.measured_seconds, "training": self.training_seconds}
        return debts | times

    def load_numbers(self, numbers: dict[str, float]) -> None:
        """Go on from the :meth:`numbers` of another cadence with the same measures."""
        self._unsettled = 0.0
        self._debt = {name: numbers[f"debt of {name}"] for name in self._debt}
        self._latest = {name: numbers[f"cost of {name}"] for name in self._debt}
        self.measured_seconds = numbers["measured"]
        self.training_seconds = numbers["training"]
        self._settle()

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs to go on."""
        self._settle()
        return {
            "debt": dict(self._debt),
            "cost": dict(self._latest),
            "measured_seconds": self.measured_seconds,
            "training_seconds": self.training_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; measures that it does not know start afresh."""
        self._settle()
        for mine, saved in ((self._debt, "debt"), (self._latest, "cost")):
            mine.update({n: s for n, s in state[saved].items() if n in mine})
        self.measured_seconds = state["measured_seconds"]
        self.training_seconds = state["training_seconds"]
        self._settle()
