"""The Hessian of a loss in each sample's outputs, by jets in plain torch.

What the kernel of ``csrc/jets.cpp`` does, slowly: jets are the last dimension, ``K``
first derivatives and ``K^2`` second ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_dropout_ir.jet_kinds import SLOPES, Kind, Node, read_program


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
