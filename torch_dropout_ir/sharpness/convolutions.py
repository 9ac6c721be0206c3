r"""Convolutions whose second derivative costs what is asked of it.

A convolution ``y = x * W + b`` is bilinear, so three of its kinds make up all of its
derivatives: with ``g`` the derivative in ``y``,

.. math:: \bar x = g \star W, \quad \bar W = g \star x, \qquad
    \dot g = \dot x * W + x * \dot W + \dot b, \quad
    \dot x' = g \star \dot W, \quad \dot W' = g \star \dot x

Torch's own double backward also computes what leads nowhere, such as the derivative in
the network's input, and takes the one in the weight by a convolution with roles
exchanged, for which CPUs have no fast kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch_dropout_ir import tracing

_forward: Final = torch.ops.aten.convolution.default
_backward: Final = torch.ops.aten.convolution_backward.default
_PLAIN: Final = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: Final = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.bias = geometry, bias is not None
        return _forward(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        found = _Derivative.apply(g, x, weight, ctx.geometry, needed)
        return *found, None


class _Derivative(torch.autograd.Function):
    """The derivatives in input, weight and bias, themselves to be differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        needed: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return tuple(_backward(g, x, weight, [g.shape[1]], *geometry, [*needed]))

    @staticmethod
    def backward(
        ctx: Any, x_dot: Tensor | None, weight_dot: Tensor | None, b_dot: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g, x, weight = ctx.saved_tensors
        in_g, in_x, in_weight = ctx.needs_input_grad[:3]
        geometry = ctx.geometry
        found: list[Tensor | None] = [None] * 5
        if in_g:
            terms = []
            if weight_dot is not None:
                terms.append(_forward(x, weight_dot, b_dot, *geometry))
            elif b_dot is not None:
                terms.append(b_dot.view(-1, *(1,) * (g.ndim - 2)).expand_as(g))
            if x_dot is not None:
                terms.append(_forward(x_dot, weight, None, *geometry))
            found[0] = terms[0] + terms[1] if len(terms) > 1 else (terms or [None])[0]
        if in_x and weight_dot is not None:
            mask = [True, False, False]
            found[1] = _backward(g, x, weight_dot, None, *geometry, mask)[0]
        if in_weight and x_dot is not None:
            mask = [False, True, False]
            found[2] = _backward(g, x_dot, weight, None, *geometry, mask)[1]
        return tuple(found)


class LeanConvolutions(TorchFunctionMode):
    """Convolutions called inside the context take their second derivative from here.

    Left to torch where arguments or surroundings (autocast, transforms, compilers,
    tensors of other types) are none of those that the formulas hold for.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PLAIN and tracing.eager():
            found = _plain(*args, **kwargs)
        elif func in _TRANSPOSED and tracing.eager():
            found = _transposed(*args, **kwargs)
        else:
            found = None
        return func(*args, **kwargs) if found is None else found


def _plain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    if isinstance(padding, str):
        return None
    sizes = (stride, padding, dilation, 0)
    return _convolved(input, weight, bias, sizes, groups, False)


def _transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor | None:
    sizes = (stride, padding, dilation, output_padding)
    return _convolved(input, weight, bias, sizes, groups, True)


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: tuple[Any, Any, Any, Any],
    groups: int,
    transposed: bool,
) -> Tensor | None:
    ours = all(type(t) in (Tensor, torch.nn.Parameter) for t in (x, weight))
    if not ours or x.ndim != weight.ndim or torch.is_autocast_enabled(x.device.type):
        return None
    spatial = x.ndim - 2
    stride, padding, dilation, more = (
        [s] * spatial if isinstance(s, int) else [*s] * (spatial // len(s))
        for s in sizes
    )
    geometry = (stride, padding, dilation, transposed, more, groups)
    return _Convolution.apply(x, weight, bias, geometry)
