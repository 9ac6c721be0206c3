"""Layers that are affine in their parameters, in one form: rows times weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d)
NORMS: Final = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)


@dataclasses.dataclass(frozen=True)
class Part:
    """How one parameter of a layer acts on samples.

    Attributes:
        rows: From a slice of the samples to what the parameter meets,
            ``[n, G, T, d]``.
        split: From a tensor shaped as the layer's output to ``[n, G, T, o]``.
        join: Its inverse.
        size: ``d``.
    """

    rows: Callable[[slice], Tensor]
    split: Callable[[Tensor], Tensor]
    join: Callable[[Tensor], Tensor]
    size: int


Found = Iterator[tuple[Tensor | None, Part]]


def parts(module: nn.Module, x: Tensor, output: Any, samples: int) -> Found:
    """Yield the parameters of a layer of a known kind, with how they act.

    ``x`` is its input, without graph, with the samples of the batch in front.
    """  # noqa: DOC201
    if not isinstance(output, Tensor) or x.ndim < 2 or not x.shape[0]:
        return
    if x.shape[0] != samples:
        return
    if type(module) in CONVOLUTIONS and x.ndim == module.weight.ndim:
        yield from _convolution(cast("nn.Conv2d", module), x, output)
    elif isinstance(module, NORMS):
        if type(module).__module__.startswith("torch.nn.modules"):
            yield from _norm(module, x, output)


def linear_parts(
    x: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, samples: int
) -> Found:
    """Yield the parameters of a call of ``linear``, once for each way to see it.

    The samples may come first, alone or with the positions of a sample behind them,
    or along a dimension of their own. ``weight`` is ``[o, d]``.
    """
    lead = list(output.shape[:-1])
    ways = [(lead, k) for k, size in enumerate(lead) if size == samples]
    if lead[0] > samples and lead[0] % samples == 0:
        behind = [lead[0] // samples, *lead[1:]]
        ways += [([samples, *behind], 0), ([behind[0], samples, *lead[1:]], 1)]
    for sizes, place in ways:
        yield from _linear(x, weight, bias, output, (sizes, place))


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    way: tuple[list[int], int],
) -> Found:
    sizes, place = way
    shape, samples = output.shape, sizes[place]
    moved = torch.Size([samples, *sizes[:place], *sizes[place + 1 :], shape[-1]])

    def split(a: Tensor) -> Tensor:
        apart = a.reshape(*sizes, a.shape[-1]).movedim(place, 0)
        return apart.reshape(samples, 1, apart.shape[1:-1].numel(), a.shape[-1])

    def join(a: Tensor) -> Tensor:
        return a.reshape(moved).movedim(0, place).reshape(shape)

    h = split(x)
    yield weight, Part(lambda c: h[c], split, join, x.shape[-1])
    yield bias, Part(lambda c: h.new_ones(()).expand(*h[c].shape[:3], 1),
                     split, join, 1)  # fmt: skip


def _convolution(module: nn.Conv2d, x: Tensor, output: Tensor) -> Found:
    padding = _padding(module)
    if padding is None or module.padding_mode != "zeros":
        return
    n, shape, groups = x.shape[0], output.shape, module.groups
    size = module.weight[0].numel()
    planes = x if x.ndim == 4 else x.unsqueeze(2)

    def wide(values: Any, missing: int) -> tuple[int, int]:
        return tuple(values) if len(values) == 2 else (missing, *values)

    def rows(c: slice) -> Tensor:
        patches = F.unfold(
            planes[c],
            wide(module.kernel_size, 1),
            wide(module.dilation, 1),
            wide(padding, 0),
            wide(module.stride, 1),
        )
        return patches.reshape(patches.shape[0], groups, size, -1).mT

    def splitter(g: int) -> Callable[[Tensor], Tensor]:
        return lambda a: a.reshape(n, g, shape[1] // g, -1).mT

    def join(a: Tensor) -> Tensor:
        return a.mT.reshape(shape)

    positions = shape[2:].numel()
    yield module.weight, Part(rows, splitter(groups), join, size)
    yield (
        module.bias,
        Part(
            lambda c: x.new_ones(()).expand(x[c].shape[0], 1, positions, 1),
            splitter(1),
            join,
            1,
        ),
    )


def _padding(module: nn.Conv2d) -> tuple[int, ...] | None:
    """Zeros on either side; None where the two sides differ."""
    if not isinstance(module.padding, str):
        return tuple(module.padding)
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    total = [
        d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)
    ]
    return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)


def _norm(module: Any, x: Tensor, output: Tensor) -> Found:
    if module.weight is None:
        return
    n, features, shape = x.shape[0], module.weight.numel(), output.shape
    last = isinstance(module, nn.LayerNorm)

    def split(a: Tensor) -> Tensor:
        if last:
            return a.reshape(n, -1, features).mT.unsqueeze(-1)
        return a.reshape(n, features, -1, 1)

    def join(a: Tensor) -> Tensor:
        return (a.squeeze(-1).mT if last else a).reshape(shape)

    h = split(_normalized(module, x))
    yield module.weight, Part(lambda c: h[c], split, join, 1)
    yield module.bias, Part(lambda c: h.new_ones(()).expand(h[c].shape), split, join, 1)


def _normalized(module: Any, x: Tensor) -> Tensor:
    """What the weight of a normalization layer multiplies."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    live = module.training or module.running_mean is None
    mean, var = (None, None) if live else (module.running_mean, module.running_var)
    return F.batch_norm(x, mean, var, training=live, eps=module.eps)
