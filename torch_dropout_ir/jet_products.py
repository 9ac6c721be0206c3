"""Floor 1: what products of matrices are in a program: sums of products of entries."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.jet_derivatives import mapped
from torch_dropout_ir.jet_kinds import Kind
from torch_dropout_ir.jet_program import Program, Rule, signed, told


def _product(first: str, second: str) -> Rule:
    """Return the rule of a product of matrices, to which something may be added.

    Its node calls them ``first``, of rows of outputs or one a row, and ``second``, a
    constant or one a row.
    """

    def rule(to: Program, node: Any, inputs: list[int]) -> int:
        *added, a, b = inputs
        number = -1
        if a >= 0 or b >= 0:
            x, y = getattr(node, first), getattr(node, second)
            number = _multiplied(to, node, a, b, x, y)
        if not added or added[0] < 0:
            return number
        sizes = to.elementwise(node, number, added[0], False)
        beta = float(node._saved_beta)
        return to.add(Kind.LINEAR, sizes, number, added[0], alpha=1.0, beta=beta)

    return rule


def _multiplied(to: Program, node: Any, a: int, b: int, x: Any, y: Any) -> int:
    """Add entries in three places, of which the one between is added up."""
    shape = node._input_metadata[0].shape
    if lift := a in to.second:
        shape, y = shape[1:], y[0]
    a = to.second.get(a, a)
    by_row, own = len(shape) > 2, to.row(a) if a >= 0 else x.shape[1:]
    told(by_row or (a >= 0 > b and own))  # else it adds up over rows
    more = shape[len(own) :]
    left = a if a < 0 else to.reshaped((*own, *(1 for _ in more)), a)
    right = b if b < 0 else to.reshaped((1, *(to.sizes[b] or ())), b)
    values = [x.unsqueeze(-1)] if b >= 0 else []
    values += [y.unsqueeze(1) if by_row else y] if a >= 0 else []
    both = values[0], values[-1]
    number = to.add(Kind.TIMES, (*own, *more), left, right, both)
    dim, alpha = 1 << (len(own) - 1), float(getattr(node, "_saved_alpha", 1))
    total = to.add(Kind.SUMMED, shape[1:], number, dim=dim, alpha=alpha)
    return to.lifted(shape[1:], total) if lift else total


def _cumulated(to: Program, node: Any, inputs: list[int]) -> int:
    """Sums up to each place, a product with a triangle of ones."""
    (*own,), dim = to.along(inputs[0], node._saved_dim)
    return _added_up(to, inputs[0], own, dim, node._input_metadata[0].device)


def _added_up(
    to: Program, a: int, own: list[int], dim: int, device: torch.device
) -> int:
    n, rest = own[dim], own[dim + 1 :]
    ones = torch.ones(n, n, device=device).triu().view(n, n, *(1 for _ in rest))
    left = to.reshaped((*own[: dim + 1], 1, *rest), a)
    sizes = (*own[: dim + 1], n, *rest)
    number = to.add(Kind.TIMES, sizes, left, -1, (ones, ones))
    return to.add(Kind.SUMMED, own, number, dim=1 << dim, alpha=1.0)


def _log_cumulated(to: Program, node: Any, inputs: list[int]) -> int:
    """Logarithms of sums of exponentials up to each place, in double precision."""
    (*own,), dim = to.along(inputs[0], node._saved_dim)
    x, top = node._saved_self.double(), node._saved_result.double()
    most = x.amax(dim + 1, keepdim=True)
    number = to.add(Kind.EXP, own, inputs[0], -1, ((x - most).exp_(),))
    number = _added_up(to, number, own, dim, x.device)
    return to.add(Kind.LOG, own, number, -1, ((top - most).exp_(),))


def _multiplied_up(to: Program, node: Any, inputs: list[int]) -> int:
    """Products up to each place, or all the way: of twice as many in each round."""
    own, dim = to.along(inputs[0], node._saved_dim)
    x, n = node._saved_self, own[dim]
    number, by = inputs[0], 1
    while by < n:
        index = (torch.arange(n, device=x.device) - by).clamp_min_(-1)  # -1 for none
        index = index.view(-1, *(1 for _ in own[dim + 1 :]))
        index = index.expand(1, *own)
        before = to.add(Kind.GATHERED, own, number, -1, (index,), dim, -1, 1)
        ones = torch.ones_like(x.narrow(dim + 1, 0, by))
        other = torch.cat((ones, x.narrow(dim + 1, 0, n - by)), dim + 1)
        number = to.add(Kind.TIMES, own, number, before, (x, other))
        x, by = x * other, 2 * by
    if "Prod" not in node.name():
        return number
    sizes = node._input_metadata[0].shape[1:]
    return to.add(Kind.CHOSEN, sizes, number, dim=dim, start=n - 1, step=1)


def _crossed(to: Program, node: Any, inputs: list[int]) -> int:
    """Cross products: of the next entry with the one after, less the other way."""
    a, b = inputs
    sizes = to.elementwise(node, a, b, False) or ()
    dim = signed(node._saved_dim, len(sizes) + 1)
    live = [tuple(to.sizes[i] or ()) for i in inputs if i >= 0]
    told(sizes and dim and {tuple(sizes)} == {*live})
    index = torch.arange(3, device=node._input_metadata[0].device)
    index = index.view(-1, *(1 for _ in sizes[dim:])).expand(1, *sizes)
    left, right = node._saved_self, node._saved_other  # None beside a constant

    def turned(i: int, x: Tensor | None, turn: int) -> tuple[int, Tensor | None]:
        if x is not None:
            x = x.expand(to.rows, *sizes).roll(-turn, dim)
        if i < 0:
            return i, x
        at = (index + turn) % 3
        return to.add(Kind.GATHERED, sizes, i, -1, (at,), dim - 1), x

    def product(one: int, other: int) -> int:
        (first, x), (second, y) = turned(a, left, one), turned(b, right, other)
        values: Any = (y if b < 0 else x, x if a < 0 else y)
        return to.add(Kind.TIMES, sizes, first, second, values)

    this, less = product(1, 2), product(2, 1)
    return to.add(Kind.LINEAR, sizes, this, less, alpha=1.0, beta=-1.0)


def _convolved(to: Program, node: Any, inputs: list[int]) -> int:
    """A convolution with a constant kernel: of one entry of a row after the other."""
    own = to.row(inputs[0])
    told(max(inputs[1:]) < 0)
    kernel, sizes = node._saved_weight, node._input_metadata[0].shape[1:]
    width, count = math.prod(own), math.prod(sizes)
    told(width * count <= to.most)
    each = torch.eye(width, dtype=kernel.dtype, device=kernel.device).view(-1, *own)
    names = "stride padding dilation transposed output_padding groups".split()
    how = [getattr(node, f"_saved_{name}") for name in names]
    by = torch.ops.aten.convolution(each, kernel, None, *how).view(width, count).T
    return mapped(to, inputs[0], by, sizes)


PRODUCTS: Final[dict[str, Rule]] = {
    "MmBackward0": _product("_saved_self", "_saved_mat2"),
    "MvBackward0": _product("_saved_self", "_saved_vec"),
    "BmmBackward0": _product("_saved_self", "_saved_mat2"),
    "AddmmBackward0": _product("_saved_mat1", "_saved_mat2"),
    "BaddbmmBackward0": _product("_saved_batch1", "_saved_batch2"),
    "ConvolutionBackward0": _convolved,
    "LinalgCrossBackward0": _crossed,
    "CumsumBackward0": _cumulated,
    "LogcumsumexpBackward0": _log_cumulated,
    "CumprodBackward0": _multiplied_up,
    "ProdBackward1": _multiplied_up,
}
