"""How lines go through choices and assignments of elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_dropout_ir.regularizers.line_calls import (
    STILL,
    Call,
    Line,
    Rule,
    aten,
    each,
    tensors,
)


def still(_: Call, __: list[int], value: Any) -> list[Line]:
    """Take what does not move whatever it is given."""
    return [STILL] * len(tensors(value))


def together(*places: int) -> Rule:
    """Return the rule of what is linear in some arguments at once.

    Args:
        places: Their numbers.
    """

    def rule(call: Call, moving: list[int], _: Any) -> list[Line] | None:
        given = [i for i in places if isinstance(call.args[i], Tensor)]
        if not set(moving) <= set(given) or "reduce" in call.kwargs:
            return None

        def order(k: int) -> Tensor | None:
            own = {i: call.line(i)[k] for i in given}
            if all([u is None for u in own.values()]):
                return None
            zeros: dict[int, Any] = {
                i: torch.zeros_like(x) if isinstance(x := call.args[i], Tensor) else 0.0
                for i in places
            }
            zeros |= {i: u for i, u in own.items() if u is not None}
            found: Tensor = call.at(zeros)
            return found

        return [(order(0), order(1))]

    return rule


def filled(value: int) -> Rule:
    """Return the rule of what puts a number that does not move in some places.

    Args:
        value: Which argument is the number.
    """

    def rule(call: Call, moving: list[int], _: Any) -> list[Line] | None:
        if moving != [0]:
            return None
        number = call.args[value]
        none = torch.zeros_like(number) if isinstance(number, Tensor) else 0.0
        return each(call, 0, lambda u: call.at({0: u, value: none}))

    return rule


def pooled(dims: int) -> Rule:
    """Return the rule of what takes of each window the entry that was largest.

    Args:
        dims: Dimensions of a window, among which places count.
    """

    def rule(call: Call, _: list[int], found: Any) -> list[Line]:
        value, places = found
        flat = places.flatten(-dims)

        def take(u: Tensor) -> Tensor:
            return u.flatten(-dims).gather(-1, flat).view_as(value)

        return [*each(call, 0, take), STILL]

    return rule


def chosen(call: Call, _: list[int], found: Any) -> list[Line] | None:
    """Take values along a dimension from the places where they were."""
    name = call.func.overloadpacket.__name__
    if isinstance(found, Tensor) and len(call.args) == 1:  # of all elements
        return extreme(call, [0], found)
    if isinstance(found, Tensor) or not call.args[0].ndim:
        return None
    at = 2 if name == "topk" else 1
    dim = call.args[at] if len(call.args) > at else call.kwargs.get("dim", -1)
    value, places = found
    gone = value.ndim < call.args[0].ndim
    places = places.unsqueeze(dim) if gone else places

    def take(u: Tensor) -> Tensor:
        taken = u.gather(dim, places)
        return taken.squeeze(dim) if gone else taken

    return [*each(call, 0, take), STILL]


def extreme(call: Call, _: list[int], value: Tensor) -> list[Line]:
    """Take the mean over the places of the largest or smallest, as torch does."""
    x, *rest = call.args
    dims = rest[0] if rest and rest[0] else list(range(x.ndim))
    keep = len(rest) > 1 and rest[1]
    largest = "max" in call.func.overloadpacket.__name__
    there = (x == (aten.amax if largest else aten.amin)(x, dims, True)).to(value.dtype)
    share = there / there.sum(dims, True)
    return each(call, 0, lambda u: (u * share).sum(dims, keep))


def larger(call: Call, _: list[int], value: Tensor) -> list[Line]:
    """Take the larger or smaller of two, and half of each where they are the same."""
    x, y = call.args
    first = torch.where(x == y, 0.5, (x == value).to(value.dtype))

    def order(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            own, share = (a, first) if b is None else (b, 1 - first)
            return None if own is None else own * share
        return torch.lerp(b, a, first)

    pairs = zip(call.line(0), call.line(1), strict=True)
    found = [order(a, b) for a, b in pairs]
    return [(found[0], found[1])]
