r"""A call of an operation, some of whose arguments move along a line; products.

A product of two has the derivatives :math:`\dot a b + a \dot b` and :math:`\ddot a b +
2 \dot a \dot b + a \ddot b`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils.weak import WeakIdRef

aten: Final = torch.ops.aten
# What adds a product to what is there.
_MORE: Final = {aten.mm: "addmm_", aten.bmm: "baddbmm_"}
# A private name; with a torch that lacks it nothing is written over.
_USES: Final = getattr(torch._C, "_storage_Use_Count", None)
# First and second derivative; None for zero.
Line: TypeAlias = "tuple[Tensor | None, Tensor | None]"
STILL: Final[Line] = (None, None)
# Whether first and second derivatives are asked for.
Orders: TypeAlias = "tuple[bool, bool]"
BOTH: Final[Orders] = (True, True)


# Of a call, which arguments move, and what it returned: the line of each tensor of it;
# None where a graph of it is to tell.
Rule: TypeAlias = "Callable[[Call, list[int], Any], list[Line] | None]"


class NoRuleError(RuntimeError):
    """An operation whose derivatives along a line are not known."""


class _Mover(NamedTuple):
    """A tensor that moves: its line, itself while others hold it, where it is given."""

    line: Line
    held: WeakIdRef | None
    places: list[int]


class Call:
    """A call of an operation whose derivatives are to be taken when it is over.

    It holds the values of what it was given, not the tensors: when those are gone,
    nobody else reads their derivatives, and they may be written on. ``over`` is a
    tensor that the operation writes on; ``wanted`` says whether first and second
    derivatives are asked for.

    Attributes:
        written: Whether the operation has still to write its result.
    """

    def __init__(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Any,
        line_of: Callable[[Tensor], Line],
        over: Tensor | None = None,
        wanted: Orders = BOTH,
    ) -> None:
        self.func = func
        self.wanted = wanted
        self.written = over is not None
        self._movers: dict[int, _Mover] = {}
        stand: dict[int, Tensor] = {}

        def value(x: Any, place: int) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) not in stand:
                line = line_of(x)
                if line is STILL:
                    return x
                stand[id(x)] = x.detach()
                held = None if x is over else WeakIdRef(x)
                self._movers[id(stand[id(x)])] = _Mover(line, held, [])
            self._movers[id(stand[id(x)])].places.append(place)
            return stand[id(x)]

        self.args = [
            _pytree.tree_map(lambda y, i=i: value(y, i), x) for i, x in enumerate(args)
        ]
        self.kwargs = _pytree.tree_map(lambda y: value(y, -1), dict(kwargs))

    def line_of(self, x: Any) -> Line:
        """Return the line of what it was given; zero for what is no tensor."""
        mover = self._movers.get(id(x))
        return STILL if mover is None else mover.line

    def line(self, i: int) -> Line:
        """Return the line of an argument."""
        return self.line_of(self.args[i]) if i < len(self.args) else STILL

    def moving(self) -> list[int]:
        """Return which arguments move, -1 for those by keyword."""
        return sorted({i for mover in self._movers.values() for i in mover.places})

    def take(self, i: int, value: bool = False) -> tuple[list[Tensor | None], bool]:
        """Return the line of an argument, given away, and whether nobody else reads it.

        Its value goes too, unless that is needed.
        """
        x = self.args[i]
        mover = self._movers.get(id(x))
        if not value:
            self.args[i] = None
        if mover is None:
            return [None, None], False
        if len(mover.places) > 1:
            return list(mover.line), False
        del self._movers[id(x)]
        return list(mover.line), mover.held is None or mover.held() is None

    def at(self, new: dict[int, Any]) -> Any:
        """Call it with other arguments, by number; what is between is as by default."""
        own = [x.default_value for x in self.func._schema.arguments]
        given = [*self.args, *own[len(self.args) : max(new, default=0) + 1]]
        args = [new.get(i, x) for i, x in enumerate(given)]
        return self.func(*args, **self.kwargs)


def each(call: Call, i: int, function: Callable[[Tensor], Any]) -> list[Line]:
    """Return the lines of what a function makes of the derivatives of an argument.

    The first of them goes when that is done.
    """
    orders, _ = call.take(i)
    found = []
    while orders:
        u = orders.pop(0)
        found.append(None if u is None else tensors(function(u)))
        del u
    count = max(len(x) for x in found if x is not None)
    first, second = ([None] * count if x is None else x for x in found)
    return list(zip(first, second, strict=True))


def room(u: Tensor, alone: bool) -> Tensor:
    """Return where to write what is like a derivative: on it, if nobody else reads it.

    ``alone`` says that nobody does as such; as part of another somebody may.
    """
    return u if alone and not shared(u) and dense(u) else torch.empty_like(u)


def alike(u: Tensor, value: Tensor) -> bool:
    """Whether a derivative can be written over by one of what an operation returns."""
    return u.shape == value.shape and u.dtype == value.dtype


def shared(x: Tensor) -> bool:
    """Whether another tensor is in the same memory, as far as torch tells."""
    storage = x.untyped_storage()
    return _USES is None or int(_USES(storage._cdata)) > 2  # `x` and `storage`


def dense(u: Tensor) -> bool:
    """Whether each element has one place in memory, and no other is between them."""
    size = 1
    for stride, n in sorted(zip(u.stride(), u.shape, strict=True)):
        if n != 1 and stride != size:
            return False
        size *= n
    return True


def can_move(x: Tensor) -> bool:
    """Whether a tensor is of numbers that can move."""
    return x.is_floating_point() or x.is_complex()


def out_of_place(func: Any) -> Any:
    """Return the operation that another does in place; raise if there is none."""
    name = func.overloadpacket.__name__
    plain = getattr(aten, name.removesuffix("_"), None)
    instead = getattr(plain, func._overloadname, None)
    if not name.endswith("_") or instead is None:
        raise NoRuleError(str(func))
    return instead


def in_place(func: Any) -> Any:
    """Return the operation that does in place what another does; None if none pays."""
    if func.is_view or func.namespace != "aten" or func.overloadpacket is aten.div:
        return None
    written = getattr(aten, f"{func.overloadpacket.__name__}_", None)
    return getattr(written, func._overloadname, None)


def tensors(found: Any) -> list[Tensor]:
    """Return the tensors among some things."""
    return [x for x in _pytree.tree_leaves(found) if isinstance(x, Tensor)]


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
