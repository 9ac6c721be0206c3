"""Floor 0 in Python: second derivatives of a loss of few outputs, sample by sample.

What the compiled kernel of ``csrc/jets.cpp`` does, for every device, and its oracle.
Each entry of what the graph of a loss makes has a jet, its first and second derivatives
in the outputs of its row, made by the chain rule of those that it is computed of: a
sweep from the outputs to the loss, and no pass of autograd. Here jets are the last
dimension, ``K`` first derivatives and ``K^2`` second ones.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor


class Kind(enum.IntEnum):
    """What a node makes; the compiled kernel has the same numbers."""

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


def loss_blocks(
    outputs: Tensor, program: list[int], numbers: list[float], values: list[Tensor]
) -> Tensor:
    """Return the Hessian of a loss in each sample's outputs.

    Args:
        outputs: The outputs, ``[n, ...]``, ``K`` of a sample.
        program: The nodes of its graph, each after those that it is made of: ``kind, a,
            b, dim, start, step``, how many values it has and which, how many dimensions
            and their sizes.
        numbers: ``alpha`` and ``beta`` of each.
        values: What nodes have saved.

    Returns:
        Column ``c`` of each block at the index ``c``, ``[K, n, K]``.
    """
    n, width = len(outputs), outputs.shape[1:].numel()
    first = torch.eye(width, dtype=torch.float64, device=outputs.device)
    first = torch.cat((first, first.new_zeros(width, width**2)), 1).expand(n, -1, -1)
    made: list[Tensor] = []
    for node in read_program(program, numbers):
        saved = [values[i] for i in node.values]
        if node.kind != Kind.GATHERED:
            saved = [x.double() for x in saved]
        a, b = (made[i] if i >= 0 else None for i in (node.a, node.b))
        shape = (n, *node.sizes, width + width**2)
        outer = node.kind == Kind.OUTPUTS
        found = first if outer else _made(node, a, b, saved, shape)
        made.append(found.reshape(shape))
    blocks = made[-1][:, width:].view(n, width, width)
    return blocks.movedim(1, 0).contiguous().to(outputs.dtype)


def read_program(program: Sequence[int], numbers: Sequence[float]) -> Iterator[Node]:
    """Yield the nodes of a program."""
    left, pairs = iter(program), iter(numbers)
    for kind in left:
        a, b, dim, start, step = (next(left) for _ in range(5))
        values = [next(left) for _ in range(next(left))]
        sizes = [next(left) for _ in range(next(left))]
        alpha, beta = next(pairs), next(pairs)
        yield Node(kind, a, b, dim, start, step, values, sizes, alpha, beta)


def _made(
    node: Node,
    a: Tensor | None,
    b: Tensor | None,
    saved: Sequence[Tensor],
    shape: Sequence[int],
) -> Tensor:
    """Return the jets that a node makes of those of its inputs."""
    width = math.isqrt(4 * shape[-1] + 1) // 2
    if a is None or node.kind in (Kind.LINEAR, Kind.TIMES, Kind.OVER):
        a, b = (None if x is None else _shaped(x, shape) for x in (a, b))
        return _binary(node, a, b, saved, width)
    if node.kind == Kind.PLACED:
        return _put(node, a, b, shape)
    if node.kind in (Kind.CHOSEN, Kind.SUMMED, Kind.GATHERED):
        return _chosen(node, a, saved)
    if node.kind in (Kind.LOG_SOFTMAX, Kind.SOFTMAX, Kind.LOG_SUM_EXP):
        return _softmaxes(node, a, saved, width)
    one, two = (
        saved
        if node.kind == Kind.GIVEN
        else SLOPES[node.kind](saved[0], node.alpha, node.beta)
    )
    return _bent(_shaped(a, shape), one, two, width)


def _shaped(jets: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat jets to a shape, or give them another of as many entries."""
    if jets.shape[1:-1].numel() == math.prod(shape[1:-1]):
        return jets.reshape(*shape[:-1], jets.shape[-1])
    return jets.expand(*shape[:-1], jets.shape[-1])


def _cross(u: Tensor, v: Tensor, width: int) -> Tensor:
    """Second derivatives of a product besides those of its factors; no first ones."""
    first, other = u[..., :width], v[..., :width]
    both = first[..., :, None] * other[..., None, :]
    return torch.cat((torch.zeros_like(first), (both + both.mT).flatten(-2)), -1)


def _bent(jets: Tensor, one: Tensor, two: Tensor, width: int) -> Tensor:
    return one[..., None] * jets + two[..., None] / 2 * _cross(jets, jets, width)


def _binary(
    node: Node, a: Tensor | None, b: Tensor | None, saved: Sequence[Tensor], width: int
) -> Tensor:
    u = 0.0 if a is None else a
    v = 0.0 if b is None else b
    if node.kind == Kind.LINEAR:
        return torch.as_tensor(node.alpha * u + node.beta * v)
    both = 0.0 if a is None or b is None else _cross(a, b, width)
    if node.kind == Kind.TIMES:
        return torch.as_tensor(saved[1][..., None] * u + saved[0][..., None] * v + both)
    y = 1 / saved[0]
    found = y[..., None] * u - (y**2)[..., None] * both
    if b is None:
        return torch.as_tensor(found)
    return found + _bent(b, -saved[1] * y**2, 2 * saved[1] * y**3, width)


def _put(node: Node, jets: Tensor, b: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Put entries into a larger tensor."""
    whole = jets.new_zeros(tuple(shape))
    places = torch.arange(jets[0].numel() * shape[node.dim + 1], device=jets.device)
    places = places[: jets[0].numel() * shape[node.dim + 1] // whole[0].numel()]
    places = node.start + node.step * places
    sizes = *shape[: node.dim + 1], len(places), *shape[node.dim + 2 :]
    whole.index_copy_(node.dim + 1, places, jets.reshape(sizes))
    return whole if b is None else whole + _shaped(b, shape)


def _chosen(node: Node, jets: Tensor, saved: Sequence[Tensor]) -> Tensor:
    """Choose entries, or add them up."""
    dim, sizes = node.dim + 1, jets.shape[1:-1]
    if node.kind == Kind.SUMMED:
        dims = [d + 1 for d in range(len(sizes)) if node.dim >> d & 1]
        return node.alpha * (jets.sum(dims) if dims else jets)
    if node.kind == Kind.GATHERED:
        none = (saved[0] == node.start) & bool(node.step)
        index = saved[0].masked_fill(none, 0)[..., None]
        index = index.expand(len(jets), *node.sizes, jets.shape[-1])
        return jets.gather(dim, index).masked_fill(none[..., None], 0)
    count = math.prod(node.sizes) * sizes[node.dim] // sizes.numel()
    places = torch.arange(count, device=jets.device)
    return jets.index_select(dim, node.start + node.step * places)


def _softmaxes(node: Node, jets: Tensor, saved: Sequence[Tensor], width: int) -> Tensor:
    """By the mean and the covariance of jets under the softmax."""
    dim = node.dim + 1
    if node.kind == Kind.LOG_SUM_EXP:
        logs = saved[1].reshape(jets.sum(dim, keepdim=True).shape[:-1])
        s = (saved[0] - logs).exp()
    else:
        s = saved[0] if node.kind == Kind.SOFTMAX else saved[0].exp()
    mean = _bent(jets, s, s, width).sum(dim, keepdim=True)
    mean = mean - _cross(mean, mean, width) / 2
    if node.kind == Kind.LOG_SUM_EXP:
        return mean
    return (
        jets - mean
        if node.kind == Kind.LOG_SOFTMAX
        else _bent(jets - mean, s, s, width)
    )


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
