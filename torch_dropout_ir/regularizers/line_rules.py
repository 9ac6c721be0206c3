r"""How the first two derivatives along a line go through an operation.

Where :math:`x(t)` has derivatives :math:`\dot x` and :math:`\ddot x` at 0, what is
linear in ``x`` takes each for itself, and a product of two has :math:`\dot a b + a \dot
b` and :math:`\ddot a b + 2 \dot a \dot b + a \ddot b`. Nothing is kept for a way back:
of two derivatives that were read, one is let go of before the next is made, or what is
made takes its place.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.regularizers.line_calls import (
    STILL,
    Call,
    Line,
    Rule,
    alike,
    aten,
    can_move,
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
from torch_dropout_ir.regularizers.line_graphs import by_graph
from torch_dropout_ir.regularizers.line_losses import added, labelled, reduced
from torch_dropout_ir.regularizers.line_names import (
    ADDED,
    CHOSEN,
    CONSTANT,
    EXTREME,
    LABELS,
    LARGER,
    LINEAR,
    NORMALIZED,
    PRODUCTS,
    REDUCED,
    ROWS,
    SINGLE,
    SMOOTH,
    STRAIGHT,
)
from torch_dropout_ir.regularizers.line_products import divided, multiplied, product
from torch_dropout_ir.regularizers.line_slabs import (
    elementwise,
    group_normalized,
    layer_normalized,
    softened,
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
    """  # noqa: DOC502 (a graph of it may be none)
    rule = _RULES.get(call.func.overloadpacket)
    if rule is None and not any([can_move(x) for x in tensors(value)]):
        rule = still  # a comparison, a count
    found = None if rule is None else rule(call, call.moving(), value)
    if found is None:
        found = by_graph(call, call.moving(), value)
    first, second = call.wanted
    return [(u if first else None, w if second else None) for u, w in found]


def known(func: Any, made: list[Tensor]) -> bool:
    """Whether lines go through an operation, as far as its name tells.

    Args:
        func: The operation.
        made: What it returned.

    Returns:
        Whether they do.
    """
    return func.overloadpacket in _RULES or not any([can_move(x) for x in made])


def bends(func: Any, moving: list[int]) -> bool:
    """Whether second derivatives of what an operation returns take first ones.

    Args:
        func: The operation.
        moving: Which arguments move.

    Returns:
        Whether they do.
    """
    packet = func.overloadpacket
    if packet in _PRODUCTS:
        return len(moving) > 1
    return packet in _BENT or (packet is aten.div and moving != [0])


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


def _assigned(call: Call, _: list[int], value: Tensor) -> list[Line]:
    """What is written over another tensor; of that nothing is left."""
    first, second = (
        None if u is None else u.to(value.dtype).expand(value.shape)
        for u in call.line(1)
    )
    return [(first, second)]


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
        if not alike(a, value):
            return torch.add(a, b, alpha=factor)
        return torch.add(a, b, alpha=factor, out=room(a, alone))

    found = [order(left.pop(0), right.pop(0)) for _ in range(2)]
    return [(found[0], found[1])]


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


def _rules() -> dict[Any, Rule]:
    """Return the rule of each operation that is known to be right."""
    kinds: tuple[tuple[str, Rule], ...] = (
        (LINEAR, _linear), (SINGLE, elementwise), (ROWS, softened), (SMOOTH, by_graph),
        (LABELS, labelled), (ADDED, added), (REDUCED, reduced),
        (CONSTANT, still), (EXTREME, extreme), (CHOSEN, chosen), (LARGER, larger),
        ("add sub", _summed), ("mul", multiplied), ("div", divided),
        ("view _unsafe_view", _viewed), ("clone", _copied), ("copy", _assigned),
        ("cat stack", _joined), ("constant_pad_nd", _padded), ("relu", _rectified),
        ("mm bmm mv dot", product(0, 1)), ("convolution", product(0, 1, 2)),
        ("addmm", product(1, 2, 0)), ("native_batch_norm", _normalized),
        ("native_layer_norm", layer_normalized),
        ("native_group_norm", group_normalized),
        ("max_pool2d_with_indices adaptive_max_pool2d", pooled(2)),
        ("max_pool3d_with_indices adaptive_max_pool3d", pooled(3)),
        ("masked_fill", filled(2)), ("hardsigmoid", _slanted),
        ("where", together(1, 2)), ("index_add scatter_add scatter", together(0, 3)),
        ("lerp slice_scatter select_scatter", together(0, 1)),
        ("index_put", together(0, 2)),
    )  # fmt: skip
    return {
        getattr(aten, name): rule for names, rule in kinds for name in names.split()
    }


def _named(*names: str) -> frozenset[Any]:
    return frozenset(getattr(aten, x) for each in names for x in each.split())


_RULES: Final = _rules()
_PRODUCTS: Final = _named(PRODUCTS)
_BENT: Final = _named(SINGLE, ROWS, SMOOTH, ADDED, REDUCED, NORMALIZED) - _named(
    STRAIGHT
)
