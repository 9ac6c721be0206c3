"""Inner products of gradients, weighted by learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.weight_parts import Factors, row_blocks

# Elements of a gradient that are looked at together.
_BLOCK: Final = 2**15


def wide_dtype(x: Tensor) -> torch.dtype:
    """Precision of sums: squares of half precision vanish."""
    return torch.promote_types(x.dtype, torch.float32)


def products(g: Tensor, h: Tensor) -> Tensor:
    """Return the square of the first vector, the inner product, the squared distance.

    A block at a time, so that nothing of the vectors' size is made.
    """
    wide = wide_dtype(g)
    total = torch.zeros(3, dtype=wide.to_real(), device=g.device)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (x * y.conj()).sum().real

    for parts in zip(*(x.reshape(-1).split(_BLOCK) for x in (g, h)), strict=True):
        x, y = (part.to(wide) for part in parts)
        away = x - y
        total += torch.stack((inner(x, x), inner(x, y), inner(away, away)))
    return total


def compared(
    a: Tensor | Factors | None, b: Tensor | Factors | None, like: Tensor
) -> Tensor:
    r"""Return what a pair of gradients of one parameter says, some rows at a time.

    Args:
        a: The first gradient, as such or as factors; None for zero.
        b: The second.
        like: The parameter.

    Returns:
        :math:`(\lVert a \rVert^2 + \lVert b \rVert^2)/2`, :math:`\langle a, b \rangle`
        and :math:`\lVert a - b \rVert^2 / 2`.
    """
    zero = like.new_zeros(()).expand(like.shape)
    a, b = zero if a is None else a, zero if b is None else b
    total = torch.zeros(3, dtype=wide_dtype(like).to_real(), device=like.device)
    a, b = (g[None] if isinstance(g, Tensor) and not g.ndim else g for g in (a, b))
    for part in row_blocks(like):
        x, y = a[part], b[part]
        square, inner, away = products(x, y)
        total += torch.stack(((square + products(y, x)[0]) / 2, inner, away / 2))
    return total


def weighted_squares(rates: Sequence[float], vectors: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`\sum \frac{\epsilon}{4} \lVert g \rVert^2`.

    Of complex parameters the real and the imaginary part are two. In float32 at least:
    squares of half precision vanish.
    """
    terms = [
        rate / 4 * _Square.apply(x) for rate, x in zip(rates, vectors, strict=True)
    ]
    return torch.stack(terms).sum()


class _Square(torch.autograd.Function):
    """A squared norm, whose derivative is one tensor; that of ``x * x`` makes two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.linalg.vector_norm(x.to(wide_dtype(x))).square()

    @staticmethod
    def backward(ctx: Any, root: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        wide: Tensor = x.to(wide_dtype(x)) * (2 * root)
        return wide.to(x.dtype)
