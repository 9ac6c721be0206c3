r"""How the first two derivatives along a line go through an operation.

Where :math:`x(t)` has derivatives :math:`\dot x` and :math:`\ddot x` at 0, what is
linear in ``x`` takes each for itself, and a product of two has :math:`\dot a b + a \dot
b` and :math:`\ddot a b + 2 \dot a \dot b + a \ddot b`. Nothing is kept for a way back:
of two derivatives that were read, one is let go of before the next is made, or what is
made takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.regularizers.line_calls import (
    STILL,
    Call,
    Line,
    NoRuleError,
    Rule,
    aten,
    each,
    room,
    tensors,
)
from torch_dropout_ir.regularizers.line_choices import (
    chosen,
    extreme,
    filled,
    larger,
    pooled,
    still,
    together,
)
from torch_dropout_ir.regularizers.line_names import (
    CHOSEN,
    CONSTANT,
    EXTREME,
    LARGER,
    LINEAR,
    ROWS,
    SINGLE,
    SMOOTH,
)
from torch_dropout_ir.regularizers.line_slabs import (
    along_rows,
    elementwise,
    gated,
    group_normalized,
    layer_normalized,
    smooth,
)
from torch_dropout_ir.sharpness.normalization import normalized_along


def through(call: Call, value: Any) -> list[Line]:
    """Take derivatives through an operation that has run.

    Args:
        call: The call.
        value: What it returned.

    Returns:
        The line of each tensor of that.

    Raises:
        NoRuleError: If they are not known.
    """
    rule = _RULES.get(call.func.overloadpacket)
    if rule is None and not any([_real(x) for x in tensors(value)]):
        rule = still  # a comparison, a count
    found = None if rule is None else rule(call, call.moving(), value)
    if found is None:
        raise NoRuleError(str(call.func))
    return found


def _real(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _linear(call: Call, moving: list[int], _: Any) -> list[Line] | None:
    """Linear in its first argument, where no other moves."""
    if moving != [0] or "rounding_mode" in call.kwargs:
        return None
    return each(call, 0, lambda u: call.at({0: u}))


def _viewed(call: Call, _: list[int], value: Tensor) -> list[Line]:
    """A line may lie otherwise in memory than what it is of."""
    return each(call, 0, lambda u: u.reshape(value.shape))


def _copied(call: Call, _: list[int], __: Any) -> list[Line]:
    return each(call, 0, lambda u: u.detach())  # its own tensor, the same numbers


def _padded(call: Call, _: list[int], __: Any) -> list[Line]:
    return each(call, 0, lambda u: aten.constant_pad_nd(u, call.args[1]))


def _joined(call: Call, moving: list[int], _: Any) -> list[Line] | None:
    """Tensors that are put together."""
    if moving != [0]:
        return None
    parts = call.args[0]

    def order(k: int) -> Tensor | None:
        own = [call.line_of(x)[k] for x in parts]
        if all([x is None for x in own]):
            return None
        pairs = zip(own, parts, strict=True)
        whole = [torch.zeros_like(p) if x is None else x for x, p in pairs]
        found: Tensor = call.at({0: whole})
        return found

    return [(order(0), order(1))]


def _summed(call: Call, moving: list[int], value: Tensor) -> list[Line] | None:
    """Sums and differences."""
    if any([i not in (0, 1) for i in moving]):
        return None
    factor = call.kwargs.get("alpha", 1)
    factor = -factor if call.func.overloadpacket is aten.sub else factor
    (left, alone), (right, _) = call.take(0), call.take(1)

    def order(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            own = a if b is None else (b if factor == 1 else b * factor)
            return None if own is None else own.expand(value.shape)
        if not _alike(a, value):
            return torch.add(a, b, alpha=factor)
        return torch.add(a, b, alpha=factor, out=room(a, alone))

    found = [order(left.pop(0), right.pop(0)) for _ in range(2)]
    return [(found[0], found[1])]


def _product(first: int, second: int, drop: int | None = None) -> Rule:
    """Linear in each of two arguments; a third is added, and does not move."""

    def rule(call: Call, moving: list[int], _: Any) -> list[Line] | None:
        if any([i not in (first, second) for i in moving]):
            return None
        still = {} if drop is None else {drop: None}

        def times(u: Any, v: Any) -> Tensor:
            if drop == 0:
                found: Tensor = aten.mm(u, v).mul_(call.kwargs.get("alpha", 1))
            else:
                found = call.at({first: u, second: v, **still})
            return found

        if moving == [first]:
            other = call.args[second]
            return each(call, first, lambda u: times(u, other))
        if moving == [second]:
            other = call.args[first]
            return each(call, second, lambda u: times(other, u))
        return [_both(call, first, second, times)]

    return rule


def _both(call: Call, i: int, j: int, times: Callable[[Any, Any], Tensor]) -> Line:
    """Both arguments of a product move."""
    x, y = call.args[i], call.args[j]
    a, b = call.line(i), call.line(j)

    def total(*pairs: tuple[Any, Any, int]) -> Tensor | None:
        found = None
        for u, v, factor in pairs:
            if u is not None and v is not None:
                term = times(u, v)
                term = term if factor == 1 else term.mul_(factor)
                found = term if found is None else found.add_(term)
        return found

    first = total((a[0], y, 1), (x, b[0], 1))
    return first, total((a[1], y, 1), (a[0], b[0], 2), (x, b[1], 1))


def _multiplied(call: Call, moving: list[int], value: Tensor) -> list[Line] | None:
    """Products of single elements, of which a term takes no place of its own."""
    if moving in ([0], [1]):
        i = moving[0]
        other = call.args[1 - i]
        return each(call, i, lambda u: u * other)
    x, y = call.args
    (a, alone), (b, _) = call.take(0, value=True), call.take(1, value=True)

    def total(u: Tensor | None, *terms: tuple[Any, Any, int]) -> Tensor | None:
        """``u y``, on ``u`` where nobody else reads it, and more."""
        found = None
        if u is not None and _alike(u, value):
            found = torch.mul(u, y, out=room(u, alone))
        elif u is not None:
            found = u * y
        for v, w, factor in terms:
            if v is None or w is None:
                continue
            found = torch.zeros_like(value) if found is None else found
            found.addcmul_(v, w, value=factor)
        return found

    second = total(a.pop(), (a[0], b[0], 2), (x, b[1], 1))
    return [(total(a.pop(), (x, b[0], 1)), second)]


def _divided(call: Call, moving: list[int], value: Tensor) -> list[Line] | None:
    """Quotients: of ``q y = x`` the derivatives give those of ``q``."""
    if call.kwargs.get("rounding_mode") is not None:
        return [STILL]
    if moving == [0]:
        return each(call, 0, lambda u: u / call.args[1])
    if -1 in moving:
        return None
    x, y = call.args
    a, (b1, b2) = call.line(0), call.line(1)
    q = x / y  # `value` is ``x`` where it is written on

    def order(u: Tensor | None, *less: tuple[Tensor | None, Tensor | None, int]) -> Any:
        found = torch.zeros_like(q) if u is None else u.expand(q.shape).clone()
        for v, w, factor in less:
            if v is not None and w is not None:
                found.addcmul_(v, w, value=-factor)
        return found.div_(y)

    first = order(a[0], (q, b1, 1))
    return [(first, order(a[1], (first, b1, 2), (q, b2, 1)))]


def _rectified(call: Call, _: list[int], value: Tensor) -> list[Line]:
    line, alone = call.take(0)
    first, second = (
        None if u is None
        else aten.threshold_backward.grad_input(u, value, 0, grad_input=room(u, alone))
        for u in line
    )  # fmt: skip
    return [(first, second)]


def _slanted(call: Call, _: list[int], __: Any) -> list[Line]:
    """A step of straight pieces, whose slope torch does not differentiate."""
    x = call.args[0]
    return each(call, 0, lambda u: aten.hardsigmoid_backward(u, x))


def _normalized(call: Call, moving: list[int], found: Any) -> list[Line] | None:
    x, weight, _, mean, variance, training, _, eps = call.args
    if moving != [0] or not x.is_cpu:
        return None
    _, m, r = found
    if not training:
        m, r = mean, (variance + eps).rsqrt()
    (first, second), alone = call.take(0, value=True)
    ends = [None if u is None else room(u, alone) for u in (first, second)]
    moved = normalized_along(
        x, (first, second), (ends[0], ends[1]), weight, m, r, training
    )
    return [moved, STILL, STILL]


def _alike(u: Tensor, value: Tensor) -> bool:
    """Whether a derivative can be written over by one of what an operation returns."""
    return u.shape == value.shape and u.dtype == value.dtype


def _rules() -> dict[Any, Rule]:
    """Return the rule of each operation that is known to be right."""
    kinds: tuple[tuple[str, Rule], ...] = (
        (LINEAR, _linear), (SINGLE, elementwise), (ROWS, along_rows), (SMOOTH, smooth),
        (CONSTANT, still), (EXTREME, extreme), (CHOSEN, chosen), (LARGER, larger),
        ("add sub", _summed), ("mul", _multiplied), ("div", _divided),
        ("view _unsafe_view", _viewed), ("clone", _copied), ("relu", _rectified),
        ("cat stack", _joined), ("constant_pad_nd", _padded),
        ("mm bmm mv dot", _product(0, 1)), ("convolution", _product(0, 1, 2)),
        ("addmm", _product(1, 2, 0)), ("native_batch_norm", _normalized),
        ("native_layer_norm", layer_normalized),
        ("native_group_norm", group_normalized),
        ("max_pool2d_with_indices adaptive_max_pool2d", pooled(2)),
        ("max_pool3d_with_indices adaptive_max_pool3d", pooled(3)),
        ("masked_fill", filled(2)), ("hardsigmoid", _slanted), ("glu", gated),
        ("where", together(1, 2)), ("index_add scatter_add scatter", together(0, 3)),
        ("lerp slice_scatter select_scatter", together(0, 1)),
        ("index_put", together(0, 2)),
    )  # fmt: skip
    return {
        getattr(aten, name): rule for names, rule in kinds for name in names.split()
    }


_RULES: Final = _rules()
