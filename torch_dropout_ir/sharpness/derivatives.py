r"""Second derivatives that cost what is asked of them: convolutions and ReLU.

A convolution ``y = x * W + b`` is bilinear, so three of its kinds make up all of its
derivatives: with ``g`` the derivative in ``y``,

.. math:: \bar x = g \star W, \quad \bar W = g \star x, \qquad
    \dot g = \dot x * W + x * \dot W + \dot b, \quad
    \dot x' = g \star \dot W, \quad \dot W' = g \star \dot x

Torch's own double backward also computes what leads nowhere, such as the derivative in
the network's input, and takes the one in the weight by a convolution with roles
exchanged, for which CPUs have no fast kernel. That of ReLU makes zeros and adds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_dropout_ir import tracing
from torch_dropout_ir.sharpness.linear import linear
from torch_dropout_ir.weight_parts import Geometry, geometry_of

_forward: Final = torch.ops.aten.convolution.default
_backward: Final = torch.ops.aten.convolution_backward.default
_mask: Final = torch.ops.aten.threshold_backward.default


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


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        found: Tensor = _Masked.apply(g, y.detach())
        return found


class _Masked(torch.autograd.Function):
    """What passes where ``y`` is positive: linear, and constant in ``y``."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return _mask(g, y, 0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return _mask(g, y, 0), None


class LeanDerivatives(TorchFunctionMode):
    """What is called inside the context takes its second derivative from here.

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
        own = _OWN.get(func) if tracing.eager() else None
        found = None if own is None else own(*args, **kwargs)
        return func(*args, **kwargs) if found is None else found


def _ours(*tensors: Tensor) -> bool:
    plain = all(type(x) in (Tensor, nn.Parameter) for x in tensors)
    return plain and not torch.is_autocast_enabled(tensors[0].device.type)


def _relu(input: Tensor, inplace: bool = False) -> Tensor | None:
    return None if inplace or not _ours(input) else _Relu.apply(input)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if not _ours(input, weight) or input.ndim < 2 or weight.ndim != 2:
        return None
    return None if tracing.checkpointed() else linear(input, weight, bias)


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
    if not _ours(x, weight) or x.ndim != weight.ndim:
        return None
    geometry = geometry_of(x.ndim - 2, sizes, groups, transposed)
    return _Convolution.apply(x, weight, bias, geometry)


_OWN: Final[dict[Callable[..., Any], Callable[..., Tensor | None]]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    F.linear: _linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _plain),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed
    ),
}
