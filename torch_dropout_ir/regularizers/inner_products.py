"""Inner products of gradients, weighted by learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_dropout_ir.gradient_factors import Factors, row_blocks

Gradient: TypeAlias = Tensor | Factors  # gives rows by slices


def wide_dtype(x: Tensor) -> torch.dtype:
    """Precision of sums: squares of half precision vanish."""
    return torch.promote_types(x.dtype, torch.float32)


def compared(
    a: Gradient | None, b: Gradient | None, like: Tensor, entries: int
) -> Tensor:
    r"""Return what two gradients of one parameter say, some rows at a time.

    That is :math:`\lVert a \rVert^2`, :math:`\lVert b \rVert^2`, :math:`\langle a, b
    \rangle` and :math:`\lVert a - b \rVert^2`; None is zero.
    """
    wide = wide_dtype(like)
    total = torch.zeros(4, dtype=wide.to_real(), device=like.device)
    given = [x for x in (a, b) if x is not None]
    # Entries may be taken in any number then, not as rows.
    flat = all(
        isinstance(x, Tensor) and (x.is_contiguous() or not x.ndim) for x in given
    )
    lines = like.reshape(-1) if flat else like
    zero = like.new_zeros(()).expand(lines.shape)
    a, b = (
        zero if x is None else x.reshape(lines.shape) if isinstance(x, Tensor) else x
        for x in (a, b)
    )
    for part in row_blocks(lines, entries):
        total += _of_rows(a, b, part, wide)  # whose rows are gone before the next
    return total


def _of_rows(a: Gradient, b: Gradient, part: slice, wide: torch.dtype) -> Tensor:
    x, y = (each[part].to(wide).reshape(-1) for each in (a, b))
    square, inner, other = torch.vdot(x, x), torch.vdot(y, x), torch.vdot(y, y)
    # In the place of what has just been made, where one of them is.
    made = [
        own
        for own, each in ((x, a), (y, b))
        if not isinstance(each, Tensor) or each.dtype != wide
    ]
    away = torch.sub(x, y, out=made[0] if made else None)
    return torch.stack((square, other, inner, torch.vdot(away, away))).real


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
