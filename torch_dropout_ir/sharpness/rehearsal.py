"""A start for eigenvectors, from products with few of the samples."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from torch_dropout_ir.sharpness.krylov import Space, random_vector

_MOST: Final = (28, 3)  # products on the fewest samples, then on more
_PRICE: Final = 4  # products that those of one level may cost
_NEAR: Final = 0.05  # residual that is enough, over the value
_SETTLED: Final = 0.005  # and error of the value
_LEADING: Final = 4  # Ritz vectors that come along, the first at its length
_ALONG: Final = 0.1  # of the others together
_LEAST: Final = 8  # products below which there is no time to rehearse,
_LEAST_BRIEF: Final = 16  # and of short ones, of which few samples take hardly less
_GATHERING: Final = 0.35  # of a product: forward passes to choose samples, graphs


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
