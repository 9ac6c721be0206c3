"""What is called in a forward pass takes second derivatives of our own.

Those of convolutions, linear layers and batch normalization are in modules of their
own. Torch's of ReLU makes zeros and adds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_dropout_ir import tracing
from torch_dropout_ir.gradient_factors import geometry_of
from torch_dropout_ir.sharpness.linear import convolution, leaf_of, linear
from torch_dropout_ir.sharpness.normalization import normalization

_mask: Final = torch.ops.aten.threshold_backward.default


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        y = torch.relu_(x) if inplace else torch.relu(x)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return _Masked.apply(g, y.detach()), None


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
    tensors of other types) are none of those that the formulas hold for, or the input
    has less than ``least`` elements.

    Args:
        weights_read: Whether gradients in weights are read while their graph is built;
            else linear and convolutional layers make none. Where they are, linear
            layers are left to torch, whose own hold as little.
        least: Elements.
    """

    def __init__(self, *, weights_read: bool = False, least: int = 0) -> None:
        super().__init__()
        self._weights_read = weights_read
        self._least = least

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        found = self.instead_of(func, args, kwargs)
        return func(*args, **kwargs) if found is None else found

    def instead_of(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Return what a call returns, or None where it is left to torch."""
        own = _OWN.get(func)
        if own is None or not tracing.eager():
            return None
        if self._least:
            with tracing.unasked():  # nobody is asked how large it is
                if (args[0] if args else kwargs["input"]).numel() < self._least:
                    return None
        if self._weights_read:
            own = _READ.get(own, own)
        return None if own is None else own(*args, **kwargs)


def _ours(*tensors: Tensor) -> bool:
    plain = all(type(x) in (Tensor, nn.Parameter) for x in tensors)
    return plain and not torch.is_autocast_enabled(tensors[0].device.type)


def _relu(input: Tensor, inplace: bool = False) -> Tensor | None:
    # Torch's own refuses what may not be written on, and knows views.
    whole = not (inplace and (input.is_leaf or input._is_view()))
    return _Relu.apply(input, inplace) if whole and _ours(input) else None


def _relu_(input: Tensor) -> Tensor | None:
    return _relu(input, True)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if not _ours(input, weight) or input.ndim < 2 or weight.ndim != 2:
        return None
    return None if tracing.runs_twice() else linear(input, weight, bias)


def _plain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    read: bool = False,
) -> Tensor | None:
    if isinstance(padding, str):
        return None
    sizes = (stride, padding, dilation, 0)
    return _convolved(input, weight, bias, sizes, groups, False, read)


def _transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    read: bool = False,
) -> Tensor | None:
    sizes = (stride, padding, dilation, output_padding)
    return _convolved(input, weight, bias, sizes, groups, True, read)


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: tuple[Any, Any, Any, Any],
    groups: int,
    transposed: bool,
    read: bool,
) -> Tensor | None:
    if not _ours(x, weight) or x.ndim != weight.ndim:
        return None
    geometry = geometry_of(x.ndim - 2, sizes, groups, transposed)
    return convolution(x, weight, bias, geometry, 0 if read else leaf_of(weight))


def _normalized(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    given = [x for x in (running_mean, running_var, weight, bias) if x is not None]
    held = training or (running_mean is not None and running_var is not None)
    alike = all(x.dtype == input.dtype for x in given) and _ours(input, *given)
    # Of one entry a channel there is no variance: torch says so.
    some = input.ndim > 1 and input[:, :1].numel() > 1
    if not (held and alike and some and input.is_cpu) or tracing.runs_twice():
        return None
    running, rates = (running_mean, running_var), (momentum, eps)
    return normalization(input, running, weight, bias, training, rates)


_OWN: Final[dict[Callable[..., Any], Callable[..., Tensor | None]]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((F.relu_, torch.relu_, Tensor.relu_), _relu_),
    F.linear: _linear,
    F.batch_norm: _normalized,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _plain),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed
    ),
}
# The same where the gradient in a weight is read.
_READ: Final[dict[Callable[..., Any], Callable[..., Tensor | None] | None]] = {
    _linear: None,
    _plain: functools.partial(_plain, read=True),
    _transposed: functools.partial(_transposed, read=True),
}
# Elements of an input below which torch's own take no longer than a call of ours.
_LEAST: Final = 2**15


def lean_derivatives() -> LeanDerivatives:
    """Return them for a graph of a whole batch, whose gradient in weights is read."""
    return LeanDerivatives(weights_read=True, least=_LEAST)
