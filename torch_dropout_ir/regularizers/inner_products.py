"""Inner products of gradients, weighted by learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

# Elements of a gradient that are looked at together.
_BLOCK: Final = 2**18


def wide_dtype(x: Tensor) -> torch.dtype:
    """Precision of sums: squares of half precision vanish."""
    return torch.promote_types(x.dtype, torch.float32)


def pair_products(g: Tensor, h: Tensor, other: Tensor | None) -> Tensor:
    """Return half the sum of squares, the inner product, and half the squared distance.

    And, fourth, the inner product of the mean with a third vector, or 0. A block at a
    time, so that nothing of the vectors' size is made.
    """
    wide = wide_dtype(g)
    total = torch.zeros(4, dtype=wide.to_real(), device=g.device)
    third = g.new_zeros(()).expand(g.numel()) if other is None else other

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (x * y.conj()).sum().real

    blocks = zip(*(x.reshape(-1).split(_BLOCK) for x in (g, h, third)), strict=True)
    for block in blocks:
        x, y, z = (part.to(wide) for part in block)
        away = x - y
        squares = inner(x, x) + inner(y, y)
        mean = inner(x, z) + inner(y, z)
        parts = squares / 2, inner(x, y), inner(away, away) / 2, mean / 2
        total += torch.stack(parts)
    return total


def weighted_inner(
    rates: Sequence[float], a: Sequence[Tensor], b: Sequence[Tensor]
) -> Tensor:
    r"""Return :math:`\sum \frac{\epsilon}{4} \mathrm{Re} \langle a, b \rangle`.

    Of complex parameters the real and the imaginary part are two. In float32 at least:
    squares of half precision vanish.
    """
    terms = []
    for rate, x, y in zip(rates, a, b, strict=True):
        wide = wide_dtype(x)
        terms.append(rate / 4 * (x.to(wide) * y.to(wide).conj()).sum().real)
    return torch.stack(terms).sum()
