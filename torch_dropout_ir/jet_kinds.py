"""Floor 1: what the nodes of a program are, of which ``loss_blocks`` makes a Hessian.

Each entry of what the graph of a loss makes has a jet, its first and second derivatives
in the outputs of its row, made by the chain rule of those that it is computed of: a
sweep from the outputs to the loss, and no pass of autograd. ``csrc/jets.cpp`` is the
kernel of that.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor


class Kind(enum.IntEnum):
    """What a node makes; the kernel has the same numbers."""

    OUTPUTS = 0
    LINEAR = 1  # alpha a + beta b
    TIMES = 2  # of both values
    OVER = 3  # of the values of b and a
    CHOSEN = 4  # from `start` by `step` along a dimension
    PLACED = 5  # so in zeros of its shape, and b
    SUMMED = 6  # alpha times the sum over the dimensions that have a bit in `dim`
    GATHERED = 7  # by the indices that are its value; with `step`, none at `start`
    LOG_SOFTMAX = 8
    SOFTMAX = 9
    LOG_SUM_EXP = 10
    EXP = 11  # a function of one number each from here on
    EXPM1 = 12
    LOG = 13
    LOG1P = 14
    SQRT = 15
    RSQRT = 16
    RECIPROCAL = 17
    SIGMOID = 18
    TANH = 19
    COSH = 20
    SINH = 21
    SIN = 22
    COS = 23
    ABS = 24
    RELU = 25
    CLAMP = 26  # to [alpha, beta]
    LOG_SIGMOID = 27
    SOFTPLUS = 28  # of alpha x, linear above beta
    POWER = 29  # alpha
    GIVEN = 30  # its values are the first and second derivative


class Node(NamedTuple):
    """A node of a program: a kind, its inputs and what else it is told.

    ``a`` and ``b`` are inputs by number, -1 for constants, ``dim`` is a dimension of a
    row, ``values`` are what it has saved, by number, and ``sizes`` the shape of a row
    of what it makes. For the rest see the kinds.
    """

    kind: int
    a: int
    b: int
    dim: int
    start: int
    step: int
    values: Sequence[int]
    sizes: Sequence[int]
    alpha: float
    beta: float


def read_program(program: Sequence[int], numbers: Sequence[float]) -> Iterator[Node]:
    """Yield the nodes of a program."""
    left, pairs = iter(program), iter(numbers)
    for kind in left:
        a, b, dim, start, step = (next(left) for _ in range(5))
        values = [next(left) for _ in range(next(left))]
        sizes = [next(left) for _ in range(next(left))]
        alpha, beta = next(pairs), next(pairs)
        yield Node(kind, a, b, dim, start, step, values, sizes, alpha, beta)


def _softplus(x: Tensor, beta: float, most: float) -> tuple[Tensor, Tensor]:
    z = beta * x
    s = z.sigmoid().masked_fill_(z > most, 1)
    return s, (beta * s * (1 - s)).masked_fill_(z == most, 0)  # as by torch


def _power(x: Tensor, p: float, _: float) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(x)
    first = p * x ** (p - 1) if p else zero
    return first, zero if p in (0, 1) else p * (p - 1) * x ** (p - 2)


# First and second derivative, of what has been saved: the result or what it is of.
SLOPES: Final[dict[int, Callable[[Tensor, float, float], tuple[Tensor, Tensor]]]] = {
    Kind.EXP: lambda y, *_: (y, y),
    Kind.EXPM1: lambda y, *_: (y + 1, y + 1),
    Kind.LOG: lambda x, *_: (1 / x, -1 / x**2),
    Kind.LOG1P: lambda x, *_: (1 / (1 + x), -1 / (1 + x) ** 2),
    Kind.SQRT: lambda y, *_: (0.5 / y, -0.25 / y**3),
    Kind.RSQRT: lambda y, *_: (-0.5 * y**3, 0.75 * y**5),
    Kind.RECIPROCAL: lambda y, *_: (-(y**2), 2 * y**3),
    Kind.SIGMOID: lambda y, *_: (y * (1 - y), y * (1 - y) * (1 - 2 * y)),
    Kind.TANH: lambda y, *_: (1 - y**2, -2 * y * (1 - y**2)),
    Kind.COSH: lambda x, *_: (x.sinh(), x.cosh()),
    Kind.SINH: lambda x, *_: (x.cosh(), x.sinh()),
    Kind.SIN: lambda x, *_: (x.cos(), -x.sin()),
    Kind.COS: lambda x, *_: (-x.sin(), -x.cos()),
    Kind.ABS: lambda x, *_: (x.sign(), torch.zeros_like(x)),
    Kind.RELU: lambda y, *_: ((y > 0).to(y), torch.zeros_like(y)),
    Kind.CLAMP: lambda x, a, b: (((x >= a) & (x <= b)).to(x), torch.zeros_like(x)),
    Kind.LOG_SIGMOID: lambda x, *_: ((-x).sigmoid(), -x.sigmoid() * (-x).sigmoid()),
    Kind.SOFTPLUS: _softplus,
    Kind.POWER: _power,
}  # fmt: skip
