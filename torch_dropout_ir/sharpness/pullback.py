"""Reverse derivatives of a graph that is kept, and what passes through it run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torch_dropout_ir.arrivals import (
    ONCE,
    Receive,
    graph_nodes,
    last_nodes,
    parts_given,
)
from torch_dropout_ir.sharpness.differentiability import NO_DERIVATIVE, explained
from torch_dropout_ir.sharpness.surface import Surface
from torch_dropout_ir.tracing import unasked

Pieces = Sequence[Tensor]
Product = Callable[[Pieces, Receive | None], list[Tensor | None]]
_OURS: Final = "torch_dropout_ir."


@contextlib.contextmanager
def backward(surface: Surface, value: Tensor) -> Iterator[None]:
    """Let a backward pass through a value find what it needs, and no more.

    Where it runs nobody's code, no mode has to be asked at each step of it.
    """
    with unasked():
        bare = bare_of(surface, graph_nodes([value.grad_fn] if value.grad_fn else []))
    quiet = unasked() if bare else contextlib.nullcontext()
    with explained(), surface.backward(), quiet:
        yield


def bare_of(surface: Surface, nodes: Iterable[Any]) -> bool:
    """Whether a pass through nodes runs torch's own code and ours alone."""
    return not surface.operations.hooked and not any(map(_foreign, nodes))


def nodes_from(edges: Iterable[GradientEdge | None]) -> list[Any]:
    """Return the nodes of the graph that begins at some edges."""
    return list(graph_nodes([edge.node for edge in edges if edge is not None]))


def _foreign(node: Any) -> bool:
    """Whether a node of a graph runs Python code that is not of this package."""
    made_by = getattr(node, "_forward_cls", None)
    return made_by is not None and not made_by.__module__.startswith(_OURS)


def edge_of(value: Tensor | None) -> GradientEdge | None:
    """Where derivatives of a value start; None where there are none."""
    return (
        None if value is None or not value.requires_grad else get_gradient_edge(value)
    )


def pullback(
    surface: Surface,
    starts: Sequence[GradientEdge | None],
    nodes: Iterable[Any],
    targets: Pieces,
    once: bool = False,
) -> Product:
    """Return the reverse derivative, in ``targets``, of values, for many uses."""
    places = [i for i, edge in enumerate(starts) if edge is not None]
    active = [edge for edge in starts if edge is not None]
    last = last_nodes(nodes, targets)

    def pull(v: Pieces, receive: Receive | None = None) -> list[Tensor | None]:
        if not active:
            return [None] * len(targets)
        given = parts_given(last, receive) if receive else contextlib.nullcontext()
        with surface.backward(), given:
            return list(
                torch.autograd.grad(
                    active,
                    targets,
                    [v[i] for i in places],
                    retain_graph=not once,
                    allow_unused=True,
                )
            )

    return pull


def twice(starts: Sequence[GradientEdge | None]) -> list[Any]:
    """Return the nodes of gradients; refuse what torch would differentiate to zero.

    A backward pass marked as once differentiable leaves an error in the graph that
    leads nowhere, and what leads nowhere is not run.
    """
    nodes = nodes_from(starts)
    if any(node.name() == ONCE for node in nodes):
        raise NotImplementedError(NO_DERIVATIVE.format("it is once differentiable"))
    return nodes
