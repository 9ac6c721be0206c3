"""When to measure: every so many steps, or as often as a share of the time pays for."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final

ADVANCE: Final = 30.0  # seconds of training, whose budget is there from the start
_LEAST_PART: Final = 0.2  # of the largest


class Cadence:
    r"""Decides which measures are due at a step.

    With a number, every measure is due at its multiples. With ``"auto"`` what a measure
    cost, and what it would cost again, is a debt that its part of the budget pays off,
    and it is due again when the debt is paid. Parts are as the square roots of costs,
    for of all ways to spend a budget :math:`B` that makes the numbers youngest on
    average: :math:`\sum_i 1 / r_i` with rates :math:`\sum_i r_i c_i = B` is least at
    :math:`r_i \propto c_i^{-1/2}`, which spends :math:`r_i c_i \propto c_i^{1/2}`.
    None is below a fifth of the largest. What time earns beyond the debts of some, as
    an evaluation does, pays those of the others; nothing is saved up without a debt.

    All of them stay within the whole budget, that of the first half minute in advance,
    as far as costs are what they were, or for a first measurement what it is estimated
    at: cheap ones are made at once, dear ones as soon as there are savings for them.
    Since first passes are slow, estimates are looked at again when steps have doubled.
    Where the step's own passes are slower than those at the last look, so are
    measurements.

    Attributes:
        first: Measures that were not taken yet, and their passes.
    """

    def __init__(
        self,
        every: int | str,
        budget: float,
        names: list[str],
        passes: Mapping[str, float] | None = None,
    ) -> None:
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
        self.every, self._steps = steps or every, steps
        self._budget = budget
        self._earning = budget / (1.0 - budget)
        self._debt = dict.fromkeys(names, 0.0)
        self._latest = dict.fromkeys(names, 0.0)  # cost, before the first the estimate
        self.first = {name: (passes or {}).get(name, 0.0) for name in names}
        self._look = sys.maxsize  # step at which to estimate what waits once more
        self._pass = math.inf  # seconds, the least seen
        self._here = 0.0  # seconds of the last one
        self._paced = dict.fromkeys(names, 0.0)  # and of that at the last measurement
        self._parts = dict.fromkeys(names, 1.0)
        self.measured_seconds = 0.0
        self.training_seconds = 0.0
        # Debts are settled where it may matter alone.
        self._unsettled = 0.0
        self._rest = 0.0  # seconds of training until a debt is paid

    def due(self, step: int) -> list[str]:
        """Return the names of the measures to take at ``step``."""
        if isinstance(self.every, int):
            return list(self._debt) if step % self.every == 0 else []
        if self._unsettled < self._rest and step < self._look:
            return []
        self._settle()
        first = self.first if step >= self._look else {}
        return [n for n, debt in self._debt.items() if debt <= 0 or n in first]

    def expect(self, seconds: float) -> None:
        """Estimate first measurements by what a pass of the model has taken."""
        self._here = seconds
        if self.every != "auto" or seconds >= self._pass:
            return
        self._pass = seconds
        for name, passes in self.first.items():
            self._owe(name, passes * seconds - self._latest[name])
            self._latest[name] = passes * seconds
        self._share_out()

    def afford(self, names: Iterable[str], step: int) -> dict[str, float]:
        """Return those of ``names`` that have to wait, with the seconds of each."""
        if self.every != "auto":
            return {}
        self._settle()
        earned = self._earning * max(self.training_seconds, ADVANCE)
        saved = earned - self.measured_seconds
        waiting = {}
        for name in sorted(names, key=lambda n: (self._latest[n], n)):
            cost = self._cost(name)
            if cost <= saved:
                saved -= cost
            else:
                waiting[name] = cost
                self._debt[name] = (cost - saved) * self._parts[name]
        if first := self.first.keys() & set(names):
            again = not first.isdisjoint(waiting)
            self._look = max(1, 2 * step) if again else sys.maxsize
        self._settle()
        return waiting

    def _cost(self, name: str) -> float:
        """What a measurement would cost now: more, where passes have become slower."""
        if name in self.first:
            return max(self._latest[name], self.first[name] * self._here)
        pace = self._paced[name]
        return self._latest[name] * (max(1.0, self._here / pace) if pace else 1.0)

    def trained(self, seconds: float) -> None:
        """Pay off debts with training time."""
        self.training_seconds += seconds
        self._unsettled += seconds

    def stepped(self, seconds: float, step: int) -> bool:
        """Pay off debts with the time of a step; whether anything may now be due."""
        self.training_seconds += seconds
        self._unsettled += seconds
        if self._steps:
            return step % self._steps == 0
        return self._unsettled >= self._rest or step >= self._look

    def _settle(self) -> None:
        earned, self._unsettled = self._earning * self._unsettled, 0.0
        owing = {name: debt for name, debt in self._debt.items() if debt > 0.0}
        while earned > 0.0 and owing:
            whole = sum(self._parts[name] for name in owing)
            # Up to where the first of them owes nothing any more.
            paid = min(earned, *(x * whole / self._parts[n] for n, x in owing.items()))
            for name in owing:
                self._debt[name] -= paid * self._parts[name] / whole
            earned -= paid
            owing = {n: self._debt[n] for n in owing if self._debt[n] > 1e-12}
        rests = (debt / self._parts[name] for name, debt in self._debt.items())
        self._rest = min(rests, default=math.inf) / self._earning

    def _owe(self, name: str, seconds: float) -> None:
        self._settle()
        self._debt[name] += seconds
        self._settle()

    def _share_out(self) -> None:
        """Divide the budget by what measures cost now."""
        self._settle()
        roots = {name: math.sqrt(cost) for name, cost in self._latest.items()}
        least = _LEAST_PART * max(roots.values(), default=0.0) or 1.0
        parts = {name: max(root, least) for name, root in roots.items()}
        self._parts = {name: x / sum(parts.values()) for name, x in parts.items()}
        self._settle()

    def measured(self, name: str, seconds: float) -> None:
        """Enter a measurement, and the next one as if it cost as much."""
        self.measured_seconds += seconds
        self._owe(name, 2 * seconds - self._latest[name])
        self._latest[name], self._paced[name] = seconds, self._here
        self.first.pop(name, None)
        self._share_out()

    def put_off(self, name: str, step: int, seconds: float = 0.0) -> None:
        """Look for what a measure lacks no more often than if it cost a step.

        ``seconds`` is what it took to see that it lacks something, or fails.
        """
        self.measured_seconds += seconds
        self._owe(name, seconds + self.training_seconds / max(1, step))

    def wait(self, step: int) -> int:
        """Return the steps until something may be due, at the pace so far.

        At most as many again as were made, since the pace of the first steps says
        little.
        """
        self._settle()
        pace = self.training_seconds / max(1, step)
        rest = self._rest if self._debt else 0.0
        return max(1, min(step, math.ceil(rest / pace) if pace else 1))

    @property
    def stride(self) -> int:
        """Of how many passes one may be looked at where nothing is measured.

        What is seen of a pass takes some three to four times as long as a small one.
        """
        return self.every if isinstance(self.every, int) else round(4 / self._budget)

    @property
    def setting(self) -> str:
        """What has to be alike where several decide alike, in words."""
        names, first = sorted(self._debt), sorted(self.first)
        return f"every={self.every!r}, {names}, of these not yet taken {first}"

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
        return debts | times | {"pass": self._here}

    def load_numbers(self, numbers: dict[str, float]) -> None:
        """Go on from the :meth:`numbers` of another cadence with the same measures."""
        self._unsettled = 0.0
        self._debt = {name: numbers[f"debt of {name}"] for name in self._debt}
        self._latest = {name: numbers[f"cost of {name}"] for name in self._debt}
        self.measured_seconds = numbers["measured"]
        self.training_seconds = numbers["training"]
        self._here = numbers["pass"]
        self._share_out()

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs to go on."""
        self._settle()
        return {
            "debt": dict(self._debt),
            "cost": dict(self._latest),
            "first": list(self.first),
            "measured_seconds": self.measured_seconds,
            "training_seconds": self.training_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; measures that it does not know start afresh."""
        self._settle()
        for mine, saved in ((self._debt, "debt"), (self._latest, "cost")):
            mine.update({n: s for n, s in state[saved].items() if n in mine})
        for name in state["debt"].keys() - set(state.get("first", ())):
            self.first.pop(name, None)
        self.measured_seconds = state["measured_seconds"]
        self.training_seconds = state["training_seconds"]
        self._look = 0 if self.first else sys.maxsize
        self._share_out()
