"""What batch normalization multiplies its weight with, and sums over its channels."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from torch_dropout_ir import tracing

NORMALIZE: Final = torch.ops.aten.native_batch_norm.default
BACKWARD: Final = torch.ops.aten.native_batch_norm_backward.default


class Normal:
    """What the weight of a layer multiplies: ``h = r (x - m)``, not made."""

    def __init__(self, x: Tensor, mean: Tensor, r: Tensor) -> None:
        self._x, self._mean, self._r = x, mean, r

    def along(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``<u, h>`` and ``<u, 1>``."""
        if not tracing.eager():
            apart = self._x - wide(self._mean, u)
            return _summed(u * apart) * self._r, _summed(u)
        mask = [False, True, True]
        held = None, None, self._mean, self._r
        given = plain(u), plain(self._x)
        _, along, total = BACKWARD(*given, None, *held, True, 0.0, mask)
        return along, total

    def combined(
        self, at: tuple[Tensor, Tensor] | None, *terms: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        """``at_0 h + at_1`` and the terms, each with its factor by channel."""
        found = None
        if at is not None:
            found = _affine(self._x, *self._of_x(at))
        for factor, u in terms:
            if u is not None:
                own = wide(factor, u)
                found = u * own if found is None else found.addcmul_(u, own)
        return torch.zeros_like(self._x) if found is None else found

    def added(
        self,
        to: Tensor | None,
        at: tuple[Tensor, Tensor],
        *terms: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        """The same, added to what is there."""
        if to is None:
            return self.combined(at, *terms)
        factor, constant = self._of_x(at)
        for own, u in ((factor, self._x), *terms):
            if u is not None:
                to.addcmul_(u, wide(own, u))
        return to.add_(wide(constant, to))

    def _of_x(self, at: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return factor and constant that make ``at_0 h + at_1`` of ``x``."""
        factor = at[0] * self._r
        return factor, at[1] - factor * self._mean


def plain(x: Tensor) -> Tensor:
    """Return a tensor whose strides torch's kernel reads as they are.

    Of one sample it misreads two tensors in other orders, where the first dimension,
    along which there is no step, has an unusual stride.
    """
    return x.contiguous() if len(x) == 1 else x


def wide(factor: Tensor, like: Tensor) -> Tensor:
    """One number a channel, to be multiplied with all of it."""
    return factor.view(-1, *(1,) * (like.ndim - 2))


def _summed(u: Tensor) -> Tensor:
    return u.sum([0, *range(2, u.ndim)])


def _affine(x: Tensor, factor: Tensor, constant: Tensor) -> Tensor:
    if not tracing.eager():
        return wide(factor, x) * x + wide(constant, x)
    zero = torch.zeros_like(factor)
    found: Tensor = NORMALIZE(x, factor, constant, zero, zero + 1, False, 0.0, 0.0)[0]
    return found
