r"""What lines go through as a whole, before autograd takes it apart or hides it.

Of attention, scores :math:`\alpha q k^\top` are a product, the weights their softmax,
and the result is a product of these with the values. Of a part of the queries each is
there with its line, never of all.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from torch_dropout_ir.attention_again import Attention, Part, Parted
from torch_dropout_ir.dropout_calls import RECURRENT
from torch_dropout_ir.regularizers.line_calls import STILL, Line, of_product, tensors
from torch_dropout_ir.regularizers.line_graphs import outside
from torch_dropout_ir.regularizers.line_mode import Moving
from torch_dropout_ir.regularizers.line_recurrent import along_steps
from torch_dropout_ir.regularizers.line_slabs import along_rows, of_softmax

_KIND: Final[Any] = torch.autograd.function.FunctionMeta
_LOCK: Final = threading.Lock()
_MOVING: Final[dict[int, Moving]] = {}  # by thread


class Wholes(TorchFunctionMode):
    """Takes recurrent layers step by step, attention some queries at a time."""

    def __init__(self, moving: Moving) -> None:
        super().__init__()
        self._moving = moving

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if name in RECURRENT and not kwargs:
            weights = next(x for x in args if isinstance(x, list))
            own = _but(args, weights)
            if self._moving.moves(own) and not self._moving.moves(weights):
                run = functools.partial(along_steps, name, args)
                return tuple(self._along(run, tensors(args)))
        if func is F.scaled_dot_product_attention:
            found = Attention.of(*args, **kwargs)
            if found and not self._moving.moves(_but([args, kwargs], found.given)):
                if not self._moving.moves(found.given):
                    return found.again()
                run = functools.partial(along_queries, found)
                return self._along(run, found.given)[0]
        return func(*args, **kwargs)

    def _along(self, run: Callable[..., Any], given: Sequence[Tensor]) -> list[Tensor]:
        lines = {id(x): self._moving.line(x) for x in given}
        with self._moving.aside():
            found, moved = outside(lambda: run(lambda x: lines[id(x)]), given[0])
            _move(self._moving, found, moved)
        return list(found)


def _but(given: Any, some: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors among what is given, but some."""
    return [x for x in tensors(given) if not any([x is y for y in some])]


@contextlib.contextmanager
def whole_functions(moving: Moving) -> Iterator[None]:
    """Let lines go through such functions as a whole inside the context."""
    here = threading.get_ident()
    with _LOCK:
        _MOVING[here] = moving
        _KIND.__getattribute__ = _attribute  # a call may be by a name of its own
    try:
        with Wholes(moving):
            yield
    finally:
        with _LOCK:
            del _MOVING[here]
            if not _MOVING:
                del _KIND.__getattribute__


def _attribute(cls: Any, name: str) -> Any:
    """Hand out what a function with a derivative of its own runs forward."""
    found = type.__getattribute__(cls, name)
    moving = _MOVING.get(threading.get_ident())
    if name != "forward" or moving is None:
        return found
    return functools.partial(_forward, moving, cls, found)


def _forward(moving: Moving, cls: Any, forward: Any, *args: Any) -> Any:
    """Run such a function forward, and take the graph of it alone."""
    told = args[: isinstance(args[0], torch.autograd.function.FunctionCtx)]
    leaves, spec = _pytree.tree_flatten(args[len(told) :])
    read = tensors(leaves)
    constant = moving.constants.aside or moving.constants.asked
    if torch.is_grad_enabled() or constant or not moving.moves(read):
        return forward(*args)
    lines = [moving.line(x) if isinstance(x, Tensor) else STILL for x in leaves]
    over: dict[int, Tensor] = {}  # what copies of the last call are of

    def function(*new: Any) -> Any:
        own = [
            x if line is STILL else x.clone()
            for x, line in zip(new, lines, strict=True)
        ]
        over.clear()
        over.update({id(y): x for x, y in zip(leaves, own, strict=True) if y is not x})
        return cls.apply(*_pytree.tree_unflatten(own, spec))

    with moving.aside(), torch.enable_grad():
        found, moved = along_rows(function, leaves, lines)
        own = _pytree.tree_map_only(Tensor, lambda y: _given(y, over), found)
        del found
        dirty = [x for x in tensors(own) if any([x is y for y in read])]
        _move(moving, tensors(own), moved, dirty)
    if told and dirty:
        told[0].mark_dirty(*dirty)
    return own


def _given(y: Tensor, over: dict[int, Tensor]) -> Tensor:
    """Return what a function returns: what it was given, where it wrote on that."""
    x = over.get(id(y))
    return y.detach() if x is None else x.copy_(y.detach())


def _move(
    moving: Moving, made: list[Tensor], lines: list[Line], dirty: Sequence[Tensor] = ()
) -> None:
    first, second = moving.wanted
    for x, (u, w) in zip(made, lines, strict=True):
        anew = any([x is y for y in dirty])
        move = moving.overwrite if anew else moving.move
        move(x, (u if first else None, w if second else None))


@torch.no_grad()  # of what the model was given, too
def along_queries(
    attention: Attention, line_of: Callable[[Tensor], Line]
) -> tuple[list[Tensor], list[Line]]:
    """Return what attention makes of what it is given, and how that moves."""
    lines = [(x, line_of(x)) for x in attention.given]
    moved = [(x, line[k]) for k in range(2) for x, line in lines]
    orders = [x.new_zeros(()).expand_as(x) if u is None else u for x, u in moved]

    def call(part: Part, *own: Tensor) -> tuple[Tensor, ...]:
        q, k, v, q1, k1, v1, q2, k2, v2 = own
        p = attention.weigh(part, q, k)
        q, q1, q2 = (attention.factor * u for u in (q, q1, q2))
        scores = of_product((q, (q1, q2)), (k.mT, (k1.mT, k2.mT)))
        found = of_product((p, of_softmax(p, scores)), (v, (v1, v2)))
        return p @ v, *[u for u in found if u is not None]  # both are there

    parts = Parted(call, (True, False, False) * 3, (True,) * 3)
    y, first, second = parts.whole(attention.weights, [*attention.given, *orders])
    return [y], [(first, second)]
