r"""How the first two derivatives along a line go through an operation.

Where :math:`x(t)` has derivatives :math:`\dot x` and :math:`\ddot x` at 0, what is
linear in ``x`` takes each for itself, a product of two has :math:`\dot a b + a \dot b`
and :math:`\ddot a b + 2 \dot a \dot b + a \ddot b`, and of any other ``f`` they are
:math:`f' \dot x` and :math:`f''[\dot x, \dot x] + f' \ddot x`, by torch's forward mode
twice. Nothing is kept for a way back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torch_dropout_ir.normalization import layer_norm
from torch_dropout_ir.regularizers.line_calls import (
    STILL,
    Call,
    Found,
    Line,
    NoRuleError,
    aten,
    tensors,
)
from torch_dropout_ir.sharpness.normalization import normalized_along


def through(call: Call) -> Found:
    """Run an operation, and take the derivatives of what it returns.

    Args:
        call: The call.

    Returns:
        What it returns, and the line of each tensor of that.

    Raises:
        NoRuleError: If they are not known.
    """
    packet = call.func.overloadpacket
    rule = _RULES.get(packet)
    found = None if rule is None else rule(call, call.moving())
    if found is None and packet in _SMOOTH:
        found = _smooth(call)
    if found is None:
        raise NoRuleError(str(call.func))
    return found


def _linear(call: Call, moving: list[int]) -> Found | None:
    """Linear in its first argument, where no other moves."""
    if moving != [0] or "rounding_mode" in call.kwargs:
        return None
    value = call.at()
    first, second = (
        [None] * len(tensors(value)) if x is None else tensors(call.at(_0=x))
        for x in call.line(0)
    )
    return value, list(zip(first, second, strict=True))


def _viewed(call: Call, _: list[int]) -> Found:
    """A line may lie otherwise in memory than what it is of."""
    value = call.at()
    first, second = (
        None if x is None else x.reshape(value.shape) for x in call.line(0)
    )
    return value, [(first, second)]


def _copied(call: Call, _: list[int]) -> Found:
    return call.at(), [call.line(0)]  # which nobody writes on


def _held(call: Call, _: list[int]) -> Found:
    value = call.at()
    return value, [STILL] * len(tensors(value))


def _padded(call: Call, _: list[int]) -> Found:
    sizes = call.args[1]
    first, second = (
        None if x is None else aten.constant_pad_nd(x, sizes) for x in call.line(0)
    )
    return call.at(), [(first, second)]


def _joined(call: Call, moving: list[int]) -> Found | None:
    """Tensors that are put together."""
    if moving != [0]:
        return None
    parts = call.args[0]

    def order(k: int) -> Tensor | None:
        own = [call.line_of(x)[k] for x in parts]
        if all([x is None for x in own]):
            return None
        pairs = zip(own, parts, strict=True)
        found: Tensor = call.at(_0=[torch.zeros_like(p) if x is None else x
                                    for x, p in pairs])  # fmt: skip
        return found

    return call.at(), [(order(0), order(1))]


def _summed(call: Call, moving: list[int]) -> Found | None:
    """Sums and differences."""
    if any([i not in (0, 1) for i in moving]):
        return None
    value = call.at()
    factor = call.kwargs.get("alpha", 1)
    factor = -factor if call.func.overloadpacket is aten.sub else factor

    def order(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is not None and b is not None:
            found: Tensor = call.at(_0=a, _1=b)
            return found
        own = a if b is None else (b if factor == 1 else b * factor)
        return None if own is None else own.expand(value.shape)

    a, b = call.line(0), call.line(1)
    return value, [(order(a[0], b[0]), order(a[1], b[1]))]


def _product(first: int, second: int, drop: int | None = None) -> Any:
    """Linear in each of two arguments; a third is added, and does not move."""

    def rule(call: Call, moving: list[int]) -> Found | None:
        if any([i not in (first, second) for i in moving]):
            return None
        value = call.at()
        a, b = call.line(first), call.line(second)
        x, y = call.args[first], call.args[second]

        def times(u: Any, v: Any) -> list[Tensor]:
            if u is None or v is None:
                return []
            if drop == 0:
                return [aten.mm(u, v) * call.kwargs.get("alpha", 1)]
            new = {} if drop is None else {f"_{drop}": None}
            return [call.at(**{f"_{first}": u, f"_{second}": v}, **new)]

        crossed = [2 * z for z in times(a[0], b[0])]
        return value, [
            (
                _total(times(a[0], y) + times(x, b[0])),
                _total(times(a[1], y) + crossed + times(x, b[1])),
            )
        ]

    return rule


def _total(terms: list[Tensor]) -> Tensor | None:
    total = terms.pop(0) if terms else None
    while terms and total is not None:
        total = total + terms.pop(0)
    return total


def _rectified(call: Call, _: list[int]) -> Found:
    value = call.at()
    first, second = (
        None if x is None else aten.threshold_backward(x, value, 0)
        for x in call.line(0)
    )
    return value, [(first, second)]


def _pooled(call: Call, _: list[int]) -> Found:
    """Of each window the entry that was largest."""
    value, places = call.at()
    flat = places.flatten(-2)
    first, second = (
        None if x is None else x.flatten(-2).gather(-1, flat).view_as(value)
        for x in call.line(0)
    )
    return (value, places), [(first, second), STILL]


def _normalized(call: Call, moving: list[int]) -> Found | None:
    x, weight, _, mean, variance, training, _, eps = call.args
    if moving != [0] or not x.is_cpu:
        return None
    value = call.at()
    _, m, r = value
    if not training:
        m, r = mean, (variance + eps).rsqrt()
    found = normalized_along(x, call.line(0), weight, m, r, training)
    return value, [found, STILL, STILL]


class _Passing(TorchDispatchMode):
    """Does nothing: torch's transforms, inside of a mode, want one that is on."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def _smooth(call: Call) -> Found:
    """What forward mode differentiates twice, whatever moves."""
    value = call.at()
    leaves, spec = _pytree.tree_flatten((call.args, dict(call.kwargs)))

    def function(moved: list[Any]) -> Any:
        args, kwargs = _pytree.tree_unflatten(moved, spec)
        return call.func(*args, **kwargs)

    return value, _twice(call, leaves, function)


def _layer_normalized(call: Call, _: list[int]) -> Found:
    """As composed: torch's own holds mean and deviation the second time."""
    line = _twice(call, list(call.args), lambda moved: layer_norm(*moved))
    return call.at(), [*line, STILL, STILL]


def _twice(
    call: Call, leaves: list[Any], function: Callable[[list[Any]], Any]
) -> list[Line]:
    """Return the lines of what a function makes of the arguments of a call."""
    lines = [call.line_of(x) if isinstance(x, Tensor) else STILL for x in leaves]

    def at(t: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(leaves, lines, strict=True)
        return tuple(tensors(function([_moved(x, line, t) for x, line in pairs])))

    like = next(x for line in lines for x in line if x is not None)
    zero, one = like.new_zeros(()), like.new_ones(())
    with enable_reentrant_dispatch(), _Passing():
        found: Any = torch.func.jvp(
            lambda t: torch.func.jvp(at, (t,), (one,))[1], (zero,), (one,)
        )
    return list(zip(*found, strict=True))


def _moved(x: Any, line: Line, t: Tensor) -> Any:
    first, second = line
    x = x if first is None else x + t * first
    return x if second is None else x + t * t / 2 * second


def _rules() -> dict[Any, Callable[[Call, list[int]], Found | None]]:
    linear = (
        "t transpose permute expand unsqueeze squeeze slice select unbind split "
        "split_with_sizes alias mean sum neg avg_pool1d avg_pool2d avg_pool3d "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d diagonal upsample_nearest2d "
        "upsample_bilinear2d index_select index gather flip roll cumsum _to_copy div "
        "reflection_pad1d reflection_pad2d replication_pad2d"
    )
    found = {getattr(aten, name): _linear for name in linear.split()}
    return found | {
        aten.view: _viewed, aten._unsafe_view: _viewed,
        aten.clone: _copied, aten.detach: _held, aten.constant_pad_nd: _padded,
        aten.cat: _joined, aten.stack: _joined,
        aten.add: _summed, aten.sub: _summed,
        aten.mul: _product(0, 1), aten.mm: _product(0, 1), aten.bmm: _product(0, 1),
        aten.convolution: _product(0, 1, 2), aten.addmm: _product(1, 2, 0),
        aten.relu: _rectified, aten.max_pool2d_with_indices: _pooled,
        aten.native_batch_norm: _normalized, aten.native_layer_norm: _layer_normalized,
    }  # fmt: skip


_RULES: Final = _rules()
_SMOOTH: Final = frozenset(
    getattr(aten, name)
    for name in (
        "abs", "clamp", "clamp_min", "cos", "div", "elu", "exp", "expm1", "gelu",
        "hardswish", "hardtanh", "leaky_relu", "log", "log1p",
        "log_sigmoid_forward", "_log_softmax", "mish", "native_group_norm", "pow",
        "reciprocal", "rsqrt", "rsub", "_safe_softmax", "sigmoid", "silu", "sin",
        "_softmax", "softplus", "sqrt", "tanh",
    )
)  # fmt: skip
