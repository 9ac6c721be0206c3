"""When to measure: every so many steps, or as often as a share of the time pays for."""

from __future__ import annotations

from typing import Any


class Cadence:
    """Decides which measures are due at a step.

    With a number, every measure is due at its multiples. With ``"auto"`` each measure
    has an equal part of the budget: training time earns it credit, measuring spends it,
    and it is due when it can pay what it cost the last time. What the first
    measurement costs is a debt like any other, so the share of the analysis falls to
    the budget and stays there. Idle time earns no more than one measurement.

    Args:
        every: Optimizer steps between measurements, or ``"auto"``.
        budget: Share of the whole time that measuring may take, in ``(0, 1)``.
        names: Names of the measures.

    Raises:
        ValueError: If ``every`` or ``budget`` is out of range.
    """

    def __init__(self, every: int | str, budget: float, names: list[str]) -> None:
        counted = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        if every != "auto" and not counted:
            raise ValueError(
                "attach_analysis: expected `every` to be 'auto' or a number of steps "
                f">= 1, got {every!r}"
            )
        if not 0.0 < budget < 1.0:
            raise ValueError(
                f"attach_analysis: expected `budget` in (0, 1), got {budget}"
            )
        self.every = every
        self._earning = budget / (1.0 - budget) / max(1, len(names))
        self._credit = dict.fromkeys(names, 0.0)
        self._price: dict[str, float] = {}
        self.measured_seconds = 0.0
        self.training_seconds = 0.0

    def due(self, step: int) -> list[str]:
        """Return the names of the measures to take at ``step``."""
        if isinstance(self.every, int):
            return list(self._credit) if step % self.every == 0 else []
        return [n for n, c in self._credit.items() if c >= self._price.get(n, -1.0)]

    def trained(self, seconds: float) -> None:
        """Earn credit for training time."""
        self.training_seconds += seconds
        for name, credit in self._credit.items():
            earned = credit + self._earning * seconds
            self._credit[name] = min(earned, self._price.get(name, 0.0))

    def measured(self, name: str, seconds: float) -> None:
        """Spend credit on a measurement."""
        self.measured_seconds += seconds
        if name in self._credit:
            self._credit[name] -= seconds
            self._price[name] = seconds

    @property
    def share(self) -> float:
        """Share of the analysis in the whole time so far."""
        whole = self.measured_seconds + self.training_seconds
        return self.measured_seconds / whole if whole > 0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs to go on."""
        return {
            "credit": dict(self._credit),
            "price": dict(self._price),
            "measured_seconds": self.measured_seconds,
            "training_seconds": self.training_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; measures that it does not know start afresh."""
        known = {n: c for n, c in state["credit"].items() if n in self._credit}
        self._credit.update(known)
        self._price.update({n: c for n, c in state["price"].items() if n in known})
        self.measured_seconds = state["measured_seconds"]
        self.training_seconds = state["training_seconds"]
