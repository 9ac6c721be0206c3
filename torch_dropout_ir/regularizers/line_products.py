r"""How lines go through products and quotients.

A product of two has the derivatives :math:`\dot a b + a \dot b` and :math:`\ddot a b +
2 \dot a \dot b + a \ddot b`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.regularizers.line_calls import Call, Line, Rule, alike, aten, room

# What adds a product to what is there.
_MORE: Final = {aten.mm: "addmm_", aten.bmm: "baddbmm_"}


def product(i: int, j: int, *added: int) -> Rule:
    """Return the rule of what is linear in arguments ``i`` and ``j``, where both move.

    Those that are ``added`` do not.
    """

    def rule(call: Call, moving: list[int], _: Any) -> list[Line] | None:
        if moving != [i, j]:
            return None
        own = [k for k in added if call.args[k] is not None]
        rest = {k: torch.zeros_like(call.args[k]) for k in own}
        more = _MORE.get(call.func.overloadpacket)

        def times(u: Tensor, v: Tensor) -> Tensor:
            return call.at({**rest, i: u, j: v})

        left, right = (call.args[i], call.line(i)), (call.args[j], call.line(j))
        return [of_product(left, right, times, more)]

    return rule


def of_product(
    left: tuple[Tensor, Line],
    right: tuple[Tensor, Line],
    times: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
    more: str | None = None,
) -> Line:
    """Return the line of a product of two that move, each given with its line.

    ``more`` names what adds a product to what is there, if anything does.
    """
    (x, a), (y, b) = left, right

    def total(*pairs: tuple[Any, Any, int]) -> Tensor | None:
        found = None
        for u, v, factor in pairs:
            if u is None or v is None:
                continue
            if found is not None and more is not None:
                found = getattr(found, more)(u, v, alpha=factor)
                continue
            term = times(u, v)
            term = term if factor == 1 else term.mul_(factor)
            found = term if found is None else found.add_(term)
        return found

    first = total((a[0], y, 1), (x, b[0], 1))
    return first, total((a[1], y, 1), (a[0], b[0], 2), (x, b[1], 1))


def multiplied(call: Call, __: list[int], value: Tensor) -> list[Line]:
    """Products of single elements, of which a term takes no place of its own."""
    x, y = call.args
    (a, alone), (b, _) = call.take(0, value=True), call.take(1, value=True)

    def total(u: Tensor | None, *terms: tuple[Any, Any, int]) -> Tensor | None:
        """``u y``, on ``u`` where nobody else reads it, and more."""
        found = None
        if u is not None and alike(u, value):
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


def divided(call: Call, moving: list[int], value: Tensor) -> list[Line] | None:
    """Quotients: of ``q y = x`` the derivatives give those of ``q``."""
    if call.kwargs or -1 in moving:  # rounded
        return None
    y = call.args[1]
    q = call.args[0] / y if call.written else value
    (a, alone), ((b1, b2), _) = call.take(0), call.take(1, value=True)

    def order(u: Tensor | None, *less: tuple[Tensor | None, Tensor | None, int]) -> Any:
        if u is None or not alike(u, q):
            found = torch.zeros_like(q) if u is None else u.expand(q.shape).clone()
        else:
            found = room(u, alone)
            found = found if found is u else found.copy_(u)
        for v, w, factor in less:
            if v is not None and w is not None:
                found.addcmul_(v, w, value=-factor)
        return found.div_(y)

    first = order(a.pop(0), (q, b1, 1))
    return [(first, order(a.pop(0), (first, b1, 2), (q, b2, 1)))]
