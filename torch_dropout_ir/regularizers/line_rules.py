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
from torch.utils import _pytree

from torch_dropout_ir.regularizers.line_calls import (
    STILL,
    Call,
    Line,
    Rule,
    alike,
    aten,
    can_move,
    divided,
    each,
    multiplied,
    product,
    room,
    tensors,
)
from torch_dropout_ir.regularizers.line_graphs import by_graph
from torch_dropout_ir.regularizers.line_losses import (
    added,
    distances,
    labelled,
    reduced,
)
from torch_dropout_ir.regularizers.line_slabs import (
    elementwise,
    group_normalized,
    layer_normalized,
    softened,
)
from torch_dropout_ir.sharpness.normalization import normalized_along

# Linear in some arguments at once where no other moves, by their numbers.
LINEAR: Final[dict[str, tuple[tuple[int, ...], ...]]] = {
    "t transpose permute expand unsqueeze squeeze slice select unbind split unfold "
    "split_with_sizes unsafe_split unsafe_split_with_sizes alias mean sum neg diagonal "
    "avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d repeat "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
    "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d "
    "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d im2col "
    "col2im pixel_shuffle pixel_unshuffle channel_shuffle index_select index gather "
    "take flip roll cumsum trace tril triu _to_copy cat stack div": ((0,),),
    "lerp slice_scatter select_scatter": ((0, 1),),
    "masked_fill constant_pad_nd index_put": ((0, 2),),
    "index_add scatter_add scatter": ((0, 3),),
    "where": ((1, 2),),
    "mm bmm mv dot mul": ((0,), (1,)),
    "addmm baddbmm": ((0, 1), (0, 2)),
    "convolution": ((0, 2), (1, 2)),
}
# Of single elements, though torch has no tag that says so.
SINGLE: Final = "hardswish log_sigmoid_forward _prelu_kernel"
# Of what lies along a dimension, which the second argument names.
ROWS: Final = "_log_softmax _safe_softmax _softmax"
# What does not move whatever it is given.
CONSTANT: Final = (
    "bernoulli ceil detach empty_like floor full_like new_empty new_full new_ones "
    "new_zeros ones_like rand_like randn_like round sign trunc zeros_like"
)
# Functions of single elements of two tensors, added up.
ADDED: Final = (
    "binary_cross_entropy binary_cross_entropy_with_logits huber_loss mse_loss "
    "smooth_l1_loss soft_margin_loss"
)
# What is found along some dimensions, which the second argument names.
REDUCED: Final = "linalg_vector_norm logsumexp norm std std_mean var var_mean"
# Of straight pieces.
STRAIGHT: Final = (
    "abs add adaptive_max_pool2d adaptive_max_pool3d amax amin clamp clamp_max "
    "clamp_min clone copy hardshrink hardsigmoid hardtanh leaky_relu max "
    "max_pool2d_with_indices max_pool3d_with_indices maximum min minimum "
    "nll_loss2d_forward nll_loss_forward relu softshrink sort sub threshold topk view "
    "_unsafe_view"
)


def through(call: Call, value: Any) -> list[Line]:
    """Return the lines of what an operation made; raise if they are not known."""
    moving, packet = call.moving(), call.func.overloadpacket
    if packet in _CONSTANT or not any([can_move(x) for x in tensors(value)]):
        found: list[Line] | None = [STILL] * len(tensors(value))
    elif places := _together(call.func, moving):
        found = _linear(call, moving, places)
    else:
        single = torch.Tag.pointwise in call.func.tags
        rule = _RULES.get(packet, elementwise if single else by_graph)
        found = rule(call, moving, value)
    if found is None:
        found = by_graph(call, moving, value)
    first, second = call.wanted
    return [(u if first else None, w if second else None) for u, w in found]


def bends(func: Any, moving: list[int], given: Any) -> bool:
    """Whether second derivatives take first ones, as far as its name tells."""
    real = not any([x.is_complex() for x in tensors(given)])
    straight = func.overloadpacket in _STRAIGHT and real
    return not straight and not _together(func, moving)


def _together(func: Any, moving: list[int]) -> tuple[int, ...]:
    """Return arguments, those that move among them, in which it is linear at once."""
    if func._overloadname.endswith(("_mode", "reduce")):
        return ()
    known = _LINEAR.get(func.overloadpacket, ())
    return next((own for own in known if {*moving} <= {*own}), ())


def _linear(call: Call, moving: list[int], places: tuple[int, ...]) -> list[Line]:
    """Give it derivatives of what moves, and zero for the rest of some arguments."""
    given = {i: call.args[i] for i in places if i < len(call.args)}
    i = moving[0]
    if len(moving) == 1 and isinstance(given[i], Tensor):
        rest = {j: _nothing(x) for j, x in given.items() if j != i}
        return each(call, i, lambda u: call.at({**rest, i: u}))

    def order(k: int) -> Tensor | None:
        if all([call.line_of(x)[k] is None for x in tensors([*given.values()])]):
            return None

        def own(x: Any) -> Any:
            u = call.line_of(x)[k]
            return _nothing(x) if u is None else u

        return call.at(_pytree.tree_map(own, given))

    return [(order(0), order(1))]


def _nothing(x: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.zeros_like(x)
    return x if x is None else 0.0


def _assigned(call: Call, _: list[int], value: Tensor) -> list[Line]:
    """What is written over another tensor; of that nothing is left."""
    first, second = (
        None if u is None else u.to(value.dtype).expand(value.shape)
        for u in call.line(1)
    )
    return [(first, second)]


def _summed(call: Call, moving: list[int], value: Tensor) -> list[Line] | None:
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


def _pooled(dims: int) -> Rule:
    """Return the rule of what takes the largest entry of each window."""

    def rule(call: Call, _: list[int], found: Any) -> list[Line]:
        value, places = found
        flat = places.flatten(-dims)

        def take(u: Tensor) -> Tensor:
            return u.flatten(-dims).gather(-1, flat).view_as(value)

        return [*each(call, 0, take), STILL]

    return rule


def _chosen(call: Call, __: list[int], found: Any) -> list[Line] | None:
    """Values along a dimension, from the places where they were."""
    if isinstance(found, Tensor) or not call.args[0].ndim:
        return None
    (at, default), *_ = [
        (i, x.default_value)
        for i, x in enumerate(call.func._schema.arguments)
        if x.name == "dim"
    ]
    dim = call.args[at] if len(call.args) > at else call.kwargs.get("dim", default)
    value, places = found
    gone = value.ndim < call.args[0].ndim
    places = places.unsqueeze(dim) if gone else places

    def take(u: Tensor) -> Tensor:
        taken = u.gather(dim, places)
        return taken.squeeze(dim) if gone else taken

    return [*each(call, 0, take), STILL]


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
    kinds: tuple[tuple[str, Rule], ...] = (
        (SINGLE, elementwise), (ROWS, softened), (ADDED, added), (REDUCED, reduced),
        ("_euclidean_dist", distances),  # of many rows, which torch takes by products
        ("nll_loss_forward nll_loss2d_forward", labelled),
        ("add sub", _summed), ("mul", multiplied), ("div", divided),
        # A line may lie otherwise in memory than what it is of.
        ("view _unsafe_view", lambda c, _, y: each(c, 0, lambda u: u.reshape(y.shape))),
        ("copy", _assigned), ("relu", _rectified),
        ("clone", lambda call, _, __: each(call, 0, Tensor.detach)),  # a tensor apart
        ("max min sort topk", _chosen), ("hardsigmoid", _slanted),
        ("max_pool2d_with_indices adaptive_max_pool2d", _pooled(2)),
        ("max_pool3d_with_indices adaptive_max_pool3d", _pooled(3)),
        ("mm bmm mv dot", product(0, 1)), ("convolution", product(0, 1, 2)),
        ("addmm", product(1, 2, 0)), ("native_batch_norm", _normalized),
        ("native_layer_norm", layer_normalized),
        ("native_group_norm", group_normalized),
    )  # fmt: skip
    return {x: rule for names, rule in kinds for x in _named(names)}


def _named(names: str) -> frozenset[Any]:
    return frozenset(getattr(aten, name) for name in names.split())


_RULES: Final = _rules()
_CONSTANT: Final = _named(CONSTANT)
_STRAIGHT: Final = _named(STRAIGHT)
_LINEAR: Final = {x: own for names, own in LINEAR.items() for x in _named(names)}
