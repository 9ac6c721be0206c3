"""Gradients of leaves, given away one by one while a backward pass makes them.

``torch.autograd.grad`` holds all that it returns to its end, and where a leaf is used
more than once, as each weight is in a gradient's graph, the first part of its
derivative waits for the others. Sums need neither.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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


@contextlib.contextmanager
def arrivals(leaves: Sequence[Tensor], receive: Receive) -> Iterator[None]:
    """Give the gradient of each leaf away as it comes, inside the context.

    In its place ``torch.autograd.grad`` is left with one element, expanded; sparse
    gradients are small, and stay. A leaf's own hooks come first.

    Args:
        leaves: The tensors in which derivatives are taken, each of them once.
        receive: Called with the number of the leaf and its whole gradient.
    """

    def take(g: Tensor | None, i: int) -> Tensor | None:
        if g is None:  # what is given away elsewhere
            return None
        receive(i, g)
        return g if g.is_sparse else g.new_zeros(()).expand(g.shape)

    with contextlib.ExitStack() as stack:
        for i, x in enumerate(leaves):
            if x._backward_hooks is None:  # the dictionary of a hook would stay
                stack.callback(setattr, x, "_backward_hooks", None)
            hook = x.register_hook(functools.partial(take, i=i))
            stack.callback(hook.remove)
        yield


@contextlib.contextmanager
def parts_given(last: Sequence[Last], receive: Receive) -> Iterator[None]:
    """Give each part of a leaf's derivative away as it comes, inside the context.

    Args:
        last: What :func:`last_nodes` returned.
        receive: Called with the number of a leaf and a part of its derivative.
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

    Args:
        nodes: Nodes of a graph.
        leaves: The leaves.

    Returns:
        Nodes with, by the place of a result, the number of the leaf and the
        transposition that is between.
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


def root_of(value: Tensor, nodes: Iterable[Any] | None = None) -> Tensor | None:
    """Return the root of a derivative that will be differentiated again.

    Without one that requires a gradient, torch takes a function that can be
    differentiated once for a linear one, and says nothing.

    Args:
        value: What is differentiated, with its graph.
        nodes: The nodes of that, where they are at hand.

    Returns:
        Ones that require a gradient where a function of the graph has a derivative of
        its own; None, which is as good, elsewhere.
    """
    if nodes is None:
        nodes = graph_nodes([value.grad_fn] if value.grad_fn else [])
    own = any(isinstance(node, BackwardCFunction) for node in nodes)
    return torch.ones_like(value).requires_grad_() if own else None


def uneven(like: Tensor, first: int = 0) -> Tensor:
    """Return numbers in ``[1, 2)`` without pattern, and without a random draw.

    Losses see differences of outputs, sums, second differences: a direction with a
    pattern may be one along which they are constant.

    Args:
        like: A tensor of the shape, dtype and device wanted.
        first: Where to start, for another tensor than the one before.

    Returns:
        A tensor of its shape.
    """
    count = like.numel()
    index = torch.arange(first, first + min(count, _PERIOD), device=like.device)
    period = (1 + index.double() ** 2 * _GOLDEN % 1).to(like.dtype)
    return period.repeat(-(-count // _PERIOD))[:count].view(like.shape)


def linear_root(like: Tensor) -> Tensor:
    """Return a root that a derivative, linear in it, will be differentiated in.

    Next to zero, for hooks may clamp what is sent back; not zero, where what is sent
    back through a sum of exponentials, by its logarithm, has no derivative.

    Args:
        like: A tensor of the shape, dtype and device wanted.

    Returns:
        A leaf of its shape that requires a gradient.
    """
    return (uneven(like) * torch.finfo(like.dtype).eps).requires_grad_()


def once_differentiable(derivatives: Iterable[Tensor | None]) -> bool:
    """Whether derivatives come from a function that can be differentiated once.

    Args:
        derivatives: Derivatives with their graph.

    Returns:
        True where such a function has left its error in the graph. It leads nowhere,
        and what leads nowhere is not run where derivatives in tensors are asked for.
    """
    ends = [x.grad_fn for x in derivatives if x is not None and x.grad_fn]
    return any(node.name() == ONCE for node in graph_nodes(ends))


def graph_nodes(starts: Iterable[Any], but: Collection[Any] = ()) -> Iterator[Any]:
    """Yield each node of the graph that begins at some nodes once, ``but`` for some."""
    left = list(set(starts).difference(but))
    seen: set[Any] = {*left, *but}
    while left:
        node = left.pop()
        yield node
        new = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= new
        left.extend(new)


def taken(node: Any) -> int:
    """Return how many numbers a node takes in a backward pass; 0 if not known."""
    return sum(math.prod(x.shape) for x in getattr(node, "_input_metadata", ()))
