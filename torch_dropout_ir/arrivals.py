"""Gradients of leaves, given away one by one while a backward pass makes them.

``torch.autograd.grad`` holds all that it returns to its end, and where a leaf is used
more than once, as each weight is in a gradient's graph, the first part of its
derivative waits for the others. Sums need neither.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

Receive = Callable[[int, Tensor], None]  # of a derivative, or a part, by its number
Leads = dict[int, tuple[int, Any]]
Last = tuple[Any, Leads]
ONCE: Final = "torch::autograd::Error"  # a node in the graph of such a derivative
_TRANSPOSE: Final = "TBackward0"  # between the weight of a linear layer and its uses
_GOLDEN: Final = (5**0.5 - 1) / 2
_PERIOD: Final = 2**16
# A private name, of the backward pass that runs; without it there is but one.
_TASK: Final = getattr(torch._C, "_current_graph_task_id", int)


@contextlib.contextmanager
def arrivals(
    leaves: Sequence[Tensor], receive: Receive, starts: Iterable[Any] = ()
) -> Iterator[None]:
    """Give the gradient of each leaf away as it comes, inside the context.

    In its place ``torch.autograd.grad`` is left with one element, expanded; sparse
    gradients are small, and stay. A leaf's own hooks come first. ``receive`` is called
    with the number of the leaf and its whole gradient. Functions of the graph may take
    backward passes of their own, as those do that run a layer again, whose gradients
    are theirs: ``starts`` are the tensor, or the nodes, that the pass begins with.
    Without them all that arrives is given away, whoever sends it.
    """
    outer: list[int] = []

    def begin(_: Any) -> None:
        outer.append(_TASK())

    def take(g: Tensor | None, i: int) -> Tensor | None:
        if g is None or (outer and outer[0] != _TASK()):  # given away elsewhere
            return g
        receive(i, g)
        return g if g.is_sparse else g.new_zeros(()).expand(g.shape)

    with contextlib.ExitStack() as stack:
        for i, x in enumerate(leaves):
            if x._backward_hooks is None:  # the dictionary of a hook would stay
                stack.callback(setattr, x, "_backward_hooks", None)
            hook = x.register_hook(functools.partial(take, i=i))
            stack.callback(hook.remove)
        for each in starts:
            register = getattr(each, "register_prehook", None) or each.register_hook
            stack.callback(register(begin).remove)
        yield


@contextlib.contextmanager
def parts_given(last: Sequence[Last], receive: Receive) -> Iterator[None]:
    """Give each part of a leaf's derivative away as it comes, inside the context.

    ``last`` are :func:`last_nodes`; ``receive`` is called with the number of a leaf.
    """

    def give(results: tuple[Any, ...], _: Any, leads: Leads) -> tuple[Any, ...]:
        left = list(results)
        for k, (i, between) in leads.items():
            if left[k] is not None:
                receive(i, left[k] if between is None else between(left[k]))
                left[k] = None
        return tuple(left)

    with contextlib.ExitStack() as stack:
        for node, leads in last:
            hook = node.register_hook(functools.partial(give, leads=leads))
            stack.callback(hook.remove)
        yield


def last_nodes(nodes: Iterable[Any], leaves: Sequence[Tensor]) -> list[Last]:
    """Return the nodes next to leaves, and which of their results leads to which.

    By the place of a result, the number of the leaf and the transposition between.
    """
    numbers = {id(x): i for i, x in enumerate(leaves)}
    nodes = list(nodes)

    def number(node: Any) -> int | None:
        return numbers.get(id(getattr(node, "variable", None)))

    ends = {n: (i, None) for n in nodes if (i := number(n)) is not None}
    turned = {
        n: (ends[n.next_functions[0][0]][0], n)
        for n in nodes
        if n.name() == _TRANSPOSE and n.next_functions[0][0] in ends
    }
    ends |= turned
    found = []
    for node in nodes:
        leads = {
            k: ends[n] for k, (n, _) in enumerate(node.next_functions) if n in ends
        }
        if leads:
            found.append((node, leads))
    return found


def root_of(
    value: Tensor, nodes: Iterable[Any] | None = None, learns: bool = False
) -> Tensor | None:
    """Return the root of a derivative that will be differentiated again.

    Without one that requires a gradient, torch takes a function that can be
    differentiated once for a linear one, and says nothing. Nor does it say anything of
    one that cuts its derivative off: that raises from now on. So it is ones that
    require a gradient where a function of the graph has a derivative of its own, or the
    root ``learns``; None, which is as good, elsewhere. ``nodes`` are those of the
    graph, where at hand.
    """
    if nodes is None:
        nodes = graph_nodes([value.grad_fn] if value.grad_fn else [])
    learns = _watched(nodes) or learns
    return torch.ones_like(value).requires_grad_() if learns else None


def _watched(nodes: Iterable[Any]) -> bool:
    """Watch the functions of a graph that have derivatives of their own, if any."""
    own = [node for node in nodes if isinstance(node, BackwardCFunction)]
    for node in own:
        node.register_hook(functools.partial(_check_kept, type(node).__name__))
    return bool(own)


def _check_kept(
    name: str, results: Sequence[Tensor | None], given: Sequence[Tensor | None]
) -> None:
    """Raise if what is to be differentiated again is cut off: not 0, of nothing."""
    live = any([g is not None and g.requires_grad for g in given])
    found = [g for g in results if g is not None]
    if not (live and torch.is_grad_enabled()) or any([g.requires_grad for g in found]):
        return
    if any([bool(g.count_nonzero()) for g in found]):
        raise RuntimeError(
            f"`{name.removesuffix('Backward')}` can be differentiated once, not twice: "
            "its `backward` cuts off what it returns from what that depends on (by "
            "`detach`, `torch.no_grad` or a backward pass of its own). `monte_carlo` "
            "takes no derivative"
        )


def uneven(like: Tensor, first: int = 0) -> Tensor:
    """Return numbers in ``[1, 2)``, shaped as ``like``, without pattern or random draw.

    Losses see differences of outputs, sums, second differences: a direction with a
    pattern may be one along which they are constant. ``first`` is where to start, for
    another tensor than the one before.
    """
    count = like.numel()
    index = torch.arange(first, first + min(count, _PERIOD), device=like.device)
    period = (1 + index.double() ** 2 * _GOLDEN % 1).to(like.dtype)
    return period.repeat(-(-count // _PERIOD))[:count].view(like.shape)


def linear_root(like: Tensor) -> Tensor:
    """Return a leaf, shaped as ``like``, to differentiate a derivative linear in it in.

    Next to zero, for hooks may clamp what is sent back; not zero, where what is sent
    back through a sum of exponentials, by its logarithm, has no derivative.
    """
    _watched(graph_nodes([like.grad_fn] if like.grad_fn else []))
    return (uneven(like) * torch.finfo(like.dtype).eps).requires_grad_()


def once_differentiable(derivatives: Iterable[Tensor | None]) -> bool:
    """Return whether derivatives come from a function that can be differentiated once.

    Such a function leaves its error in the graph. It leads nowhere, and what leads
    nowhere is not run where derivatives in tensors are asked for.
    """
    ends = [x.grad_fn for x in derivatives if x is not None and x.grad_fn]
    return any([node.name() == ONCE for node in graph_nodes(ends)])


def graph_nodes(starts: Iterable[Any]) -> Iterator[Any]:
    """Yield each node of the graph that begins at some nodes once."""
    left = list(set(starts))
    seen: set[Any] = {*left}
    while left:
        node = left.pop()
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                left.append(child)


def taken(node: Any) -> int:
    """Return how many numbers a node takes in a backward pass; 0 if not known."""
    return sum(math.prod(x.shape) for x in getattr(node, "_input_metadata", ()))
