"""When to believe eigenvalues that have converged."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from torch_dropout_ir.sharpness.krylov import Space
from torch_dropout_ir.sharpness.recurrence import CLOSE, HOLD

_HOLD: Final = {"residual": 2, "value": HOLD}  # products for which a claim must hold
_HOLD_REHEARSED: Final = 2
_ROOM: Final = 0.1  # of a tolerance: what is kept can become no better
_CLOSE_NEAR: Final = 16.0  # tolerances that a residual may be from a start that is near


class Search:
    """When to believe what has converged: when it holds, and a look finds nothing new.

    One value must stay what it is claimed to be for some more products, or, as several
    must, after ``look`` products in a random direction, which may find further copies.

    An estimated error is the squared residual over a gap, and a gap is what has been
    seen: until they part, two close eigenvalues are one Ritz value, far from the next.
    Its residual is half of what they are apart, at most. So that must be small too.
    """

    def __init__(self, tol: float, stop: str, look: int) -> None:
        self._tol, self._stop, self.looks = tol, stop, look
        self._seen: Tensor | None = None  # what was claimed last
        self._until = 0  # products from which it is believed
        self._room = _ROOM  # that is left to what comes after
        self.rehearsal = 0.0  # products that the start cost

    def state(self) -> dict[str, Any]:
        """Return all that is needed to go on, for :meth:`load`."""
        known = {"seen": self._seen, "until": self._until, "look": self.looks}
        return known | {"rehearsal": self.rehearsal, "room": self._room}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._seen, self._until = state["seen"], state["until"]
        self.looks, self.rehearsal = state["look"], state["rehearsal"]
        self._room = state["room"]

    def converged(self, space: Space) -> bool:
        """Whether all that is wanted is within the tolerance."""
        if space.found < space.k:
            return False
        if self._stop == "residual":
            return space.within(self._tol, space.residuals())
        most = (_CLOSE_NEAR if space.near else CLOSE) * self._tol
        close = space.within(most, space.residuals())
        return close and space.within(self._tol, space.errors())

    def done(self, space: Space) -> bool:
        """Whether nothing is left to do but to believe."""
        if space.exhausted or space.whole:
            return space.exhausted and space.found == space.k
        return self._holds(space) and space.spent >= self._until

    def _holds(self, space: Space) -> bool:
        """Whether what was claimed is still so, and not more than it was."""
        if self._seen is None or not self.converged(space):
            return False
        return not space.grew(self._seen, self._tol)

    def next(self, space: Space) -> None:
        """Choose the next direction: the remainder, or a random one for a look."""
        ready = self.converged(space)
        look = bool(self.looks) and not space.whole
        kept = ready and look and space.spent >= self._until
        if kept and space.share(self._tol) <= 1 - self._room:  # a look adds to it
            self._room /= 2
            self._seen, self._until = space.leading, space.spent + self.looks
            space.lock()
            return
        if not self.looks and not self._holds(space):
            self._seen = space.leading if ready else None
            rehearsed = space.near and bool(self.rehearsal)
            hold = _HOLD_REHEARSED if rehearsed else _HOLD[self._stop]
            self._until = space.spent + hold
        space.advance()
