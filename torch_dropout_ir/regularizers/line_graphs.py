r"""How lines go through what autograd differentiates twice: by a graph of it alone.

Of ``y = f(x)`` and numbers ``c`` like ``y``, autograd has :math:`g = J^\top c`, linear
in ``c``, and of :math:`\langle g, \dot x \rangle` the derivative in ``c`` is :math:`J
\dot x`. That of :math:`\langle g, \ddot x \rangle + \partial_x \langle g, \dot x
\rangle\, \dot x` in ``c`` is :math:`J \ddot x + f''[\dot x, \dot x]`. No derivative in
``x`` is taken but the two that a double backward of the whole takes, and each result is
held against the sum that it was taken of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

from torch_dropout_ir.arrivals import uneven
from torch_dropout_ir.regularizers.coupling import nearly_equal
from torch_dropout_ir.regularizers.line_calls import (
    STILL,
    Call,
    Line,
    NoRuleError,
    tensors,
)

T = TypeVar("T")
# Times the rounding of one sum of products: what a kernel may be off by.
_ROUNDED: Final = 100


def by_graph(call: Call, _: list[int], value: Any) -> list[Line]:
    """Take an operation of which no rule is known."""
    leaves, spec = _pytree.tree_flatten((call.args, call.kwargs))

    def function(*given: Any) -> Any:
        args, kwargs = _pytree.tree_unflatten(given, spec)
        return call.func(*args, **kwargs)

    lines = [call.line_of(x) for x in leaves]
    again, found = outside(lambda: along(function, leaves, lines), tensors(leaves)[0])
    if not call.written:  # what writes at random reads nothing
        for y, x in zip(tensors(again), tensors(value), strict=True):
            if x.is_floating_point() and x.numel() and not nearly_equal(y.detach(), x):
                raise NoRuleError("an operation that returns other numbers each time")
    return found


def outside(run: Callable[[], T], x: Tensor) -> T:
    """Run in another thread: inside of a mode torch has no derivatives."""
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None

    def there() -> T:
        with torch.cuda.stream(stream):  # a thread has its own; None is no matter
            return run()

    with ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(there).result()


def along(
    function: Callable[..., Any], leaves: Sequence[Any], lines: Sequence[Line]
) -> tuple[Any, list[Line]]:
    """Return what a function makes of what moves, and the line of each tensor of it."""
    live = [i for i, line in enumerate(lines) if any([u is not None for u in line])]
    at = {i: leaves[i].detach().requires_grad_() for i in live}
    value = function(*[at.get(i, x) for i, x in enumerate(leaves)])
    made = tensors(value)
    own = [i for i, y in enumerate(made) if y.requires_grad]
    ends = [made[i] for i in own]
    # Numbers of both signs without pattern.
    pairs = [(uneven(y.detach(), 0) - 1.5, y) for y in ends]
    heads = [c * (1 + 0.5j) if y.is_complex() else c for c, y in pairs]
    heads = [c.requires_grad_() for c in heads]
    roots = [lines[i] for i in live]
    firsts, seconds = _derivatives(ends, heads, [at[i] for i in live], roots)
    found = dict(zip(own, zip(firsts, seconds, strict=True), strict=True))
    return value, [found.get(i, STILL) for i in range(len(made))]


def _derivatives(
    ends: list[Tensor], heads: list[Tensor], at: list[Tensor], roots: list[Line]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return first and second derivatives of results, linear in their heads."""
    slopes = _gradients(ends, heads, at)
    moved = [(g, u) for g, (u, _) in zip(slopes, roots, strict=True)]
    bent = [(g, w) for g, (_, w) in zip(slopes, roots, strict=True)]
    bends = _gradients(*_live(moved), at=at)
    bent += [(k, u) for k, (u, _) in zip(bends, roots, strict=True)]
    return _of_heads(heads, moved), _of_heads(heads, bent)


Pairs = list[tuple["Tensor | None", "Tensor | None"]]


def _live(pairs: Pairs) -> tuple[list[Tensor], list[Tensor]]:
    """Return what has a graph, and what that is multiplied by."""
    found = [(g, u) for g, u in pairs if g is not None and u is not None]
    own = [(g, u) for g, u in found if g.requires_grad]
    return [g for g, _ in own], [u for _, u in own]


def _gradients(
    ends: list[Tensor], roots: list[Tensor], at: list[Tensor], graph: bool = True
) -> list[Tensor | None]:
    if not ends:
        return [None] * len(at)
    return list(
        torch.autograd.grad(
            ends, at, roots, retain_graph=True, create_graph=graph, allow_unused=True
        )
    )


def _of_heads(heads: list[Tensor], pairs: Pairs) -> list[Tensor | None]:
    """Return the derivative in the heads of a sum of products, which is linear."""
    found = _gradients(*_live(pairs), at=heads, graph=False)
    known = [(g.detach(), u) for g, u in pairs if g is not None and u is not None]
    size = sum([float(x.norm()) for x in found if x is not None])
    given = max([_spread(c) for c in heads], default=0.0)
    reach = sum([(_spread(g) + given) * float(u.norm()) for g, u in known])
    total = sum([_product(g, u) for g, u in known])
    again = sum([_product(c.detach(), x) for c, x in zip(heads, found, strict=True)])
    numbers = [*heads, *[g for g, _ in known]]
    eps = max([torch.finfo(x.dtype).eps for x in numbers], default=0.0)
    # Neither is one that is no number, where that of the whole may be.
    if not abs(total - again) <= eps**0.5 * size + _ROUNDED * eps * reach:
        raise NoRuleError("a derivative that is not linear in what follows")
    # Of what changes nothing it is the tensor given, which others write on; of a
    # conjugate one that is still to be made, on which nothing can be.
    own = [None if x is None else x.detach() for x in found]
    return [None if x is None else x.resolve_conj().resolve_neg() for x in own]


def _spread(x: Tensor) -> float:
    return float(x.detach().norm()) / max(1, x.numel()) ** 0.5


def _product(g: Tensor, u: Tensor | None) -> float:
    if u is None:
        return 0.0
    return float((g.conj() * u).sum().real) if g.is_complex() else float((g * u).sum())
