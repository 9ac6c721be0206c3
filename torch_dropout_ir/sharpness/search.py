"""A start for eigenvectors, and when to believe those that have converged."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from torch_dropout_ir.sharpness.krylov import Space, random_vector
from torch_dropout_ir.sharpness.recurrence import CLOSE, HOLD

_HOLD: Final = {"residual": 2, "value": HOLD}  # products for which a claim must hold
_HOLD_REHEARSED: Final = 2
_ROOM: Final = 0.1  # of a tolerance: what is kept can become no better
_CLOSE_NEAR: Final = 16.0  # tolerances that a residual may be from a start that is near
_MOST: Final = (28, 3)  # products on the fewest samples, then on more
_PRICE: Final = 4  # products that those of one level may cost
_NEAR: Final = 0.05  # residual that is enough, over the value
_SETTLED: Final = 0.005  # and error of the value
_LEADING: Final = 4  # Ritz vectors that come along, the first at its length
_ALONG: Final = 0.1  # of the others together
_LEAST: Final = 8  # products below which there is no time to rehearse,
_LEAST_BRIEF: Final = 16  # and of short ones, of which few samples take hardly less
_GATHERING: Final = 0.35  # of a product: forward passes to choose samples, graphs


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


def rehearsed(op: Any, max_matvecs: int, room: int) -> tuple[Tensor, float]:
    """Return what an operator of few of the samples has for its first eigenvector.

    On an eighth of the samples until its two largest values have parted, then on a
    quarter, which takes off half of what is the eighth's own. What else is leading on
    the eighth comes along with a tenth of the norm: values change their order with the
    samples, and what the start lacks comes up too late.

    Beside it the products that finding it has cost, each of few samples as their share.
    Where there are no fewer samples it is a random vector, at no cost. ``room`` is the
    number of vectors that there is memory for.
    """
    parts = _thinned(op, max_matvecs) if hasattr(op, "thinned") else []
    vector, spent = random_vector(op), _GATHERING if parts else 0.0
    others: Tensor | None = None
    for (few, share), most in zip(reversed(parts), _MOST, strict=False):
        most = min(most, room, int(_PRICE / share))
        space = _roughly(few, vector, most)
        spent += share * space.spent
        leading = space.vectors(_LEADING)
        vector = leading[0]
        others = leading[1:].sum(0) if others is None else others
    if others is not None and bool(others.any()):
        vector = vector.add(others, alpha=_ALONG / float(others.norm()))
    return vector, spent


def _thinned(op: Any, max_matvecs: int) -> list[tuple[Any, float]]:
    """Return operators of fewer and fewer samples, and their share."""
    if max_matvecs < (_LEAST_BRIEF if op.brief else _LEAST):
        return []
    parts: list[tuple[Any, float]] = []
    for every in (4, 2):
        last, whole = parts[-1] if parts else (op, 1.0)
        if (found := last.thinned(every)) is None:
            break
        parts.append((found[0], whole * found[1]))
    return parts


def _roughly(op: Any, start: Tensor, most: int) -> Space:
    """Go on until the first eigenvector has parted from the second."""
    space = Space(op, start, most, 1, span=2)
    space.extend()
    while space.spent < most and not (
        space.within(_NEAR, space.residuals())
        and space.within(_SETTLED, space.errors())
    ):
        space.advance()
        space.extend()
    return space
