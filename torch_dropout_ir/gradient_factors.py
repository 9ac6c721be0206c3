"""Floor 1: gradients in weights as products that are made some rows at a time.

The gradient in the weight of a linear layer is a product of what went in and of the
derivative in what came out, and that of a convolution is much the same. Both are often
smaller than the weight, and norms and inner products need a few rows of the gradient at
a time: the gradient itself is not made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_dropout_ir.leaves import numbers

_convolution: Final = torch.ops.aten.convolution.default
_of_convolution: Final = torch.ops.aten.convolution_backward.default
Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]


def geometry_of(
    spatial: int, sizes: Sequence[Any], groups: int, transposed: bool = False
) -> Geometry:
    """Return what aten's convolution takes behind input, weight and bias.

    ``sizes`` are stride, padding, dilation and output padding, each one number or
    several; ``spatial`` is the number of dimensions beside samples and channels.
    """
    stride, padding, dilation, more = (
        [s] * spatial if isinstance(s, int) else [*s] * (spatial // len(s))
        for s in sizes
    )
    return stride, padding, dilation, transposed, more, groups


def slope_of_rows(g: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """Return ``g W``, the derivative in rows ``x``, laid out in memory as those are.

    So is torch's own. Its kernel for the derivative of batch normalization misreads the
    strides that a single sample of tokens has otherwise.
    """
    turned = x.stride() == (1, len(x))
    return (weight.T @ g.T).T if turned else g @ weight


def mapped(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None
) -> Tensor:
    """Return what a layer makes of ``x``: rows ``[T, d]``, or ``[N, C, ...]``."""
    if geometry is None:
        return F.linear(x, weight, bias)
    return _convolution(x, weight, bias, *geometry)


def slopes(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry | None,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the derivatives in input, weight and bias of a layer as in :func:`mapped`.

    ``g`` is the derivative in what it made; None stands for those not ``needed``.
    """
    if geometry is None:
        return [
            slope_of_rows(g, weight, x) if needed[0] else None,
            g.T @ x if needed[1] else None,
            g.sum(0) if needed[2] else None,
        ]
    return [*_of_convolution(g, x, weight, [g.shape[1]], *geometry, [*needed])]


class Factors:
    """The gradient in one weight ``[o, ...]``, not made yet; its values do not count.

    ``g`` is the derivative in the layer's output, ``x`` its input; of a convolution
    ``geometry`` has stride, padding, dilation, False, zeros, groups.
    """

    def __init__(
        self, g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry | None
    ) -> None:
        self._g, self._x = g.detach(), x.detach()  # without the graph of the pass
        self._geometry = geometry
        self._like = weight.detach()

    def __getitem__(self, part: slice) -> Tensor:
        given = self._g[:, part], self._x, self._like[part], self._geometry
        found = slopes(*given, [False, True, False])[1]
        assert found is not None
        return found

    @property
    def _version(self) -> int:
        """Grows as what it is made of is written on."""
        return self._g._version + self._x._version

    def held(self, beside: Set[int]) -> int:
        """Return the bytes that it holds, but for memory at addresses ``beside``."""
        both = self._g, self._x
        return sum(x.nbytes for x in both if address(x) not in beside)


def address(x: Tensor) -> int:
    """Return where the memory begins that a tensor is in."""
    return numbers(x).untyped_storage().data_ptr()


def row_blocks(weight: Tensor, entries: int) -> Iterator[slice]:
    """Go through the rows of a weight a few at a time, of so many entries."""
    count = len(weight)
    step = max(1, entries * count // max(1, weight.numel()))
    return (slice(i, i + step) for i in range(0, count, step))
