r"""Second derivatives of linear layers, added to a sum where it lies.

With ``y = x W' + b``, ``g`` the derivative in ``y``, and dots for what a product sends
back through the gradient's graph,

.. math:: \bar x = g W, \quad \bar W = g^\top x, \qquad
    g' = \dot x W^\top + x \dot W^\top + \dot b, \quad
    x' = g \dot W, \quad W' = g^\top \dot x

Both parts of a product in ``W`` are products of matrices: they are added to the sum
that they are parts of, so that nothing of the size of ``W`` is made. Nor is the
gradient in a leaf while the graph is built, where nobody reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_dropout_ir import tracing
from torch_dropout_ir.weight_parts import slope_of_rows

# By identity of a leaf: the sum that its derivatives belong to, and their factor.
# Backward passes on a GPU run in threads that no context variable reaches.
_SUMS: Final[dict[int, tuple[Tensor, float]]] = {}


@contextlib.contextmanager
def added_into(
    leaves: Sequence[Tensor], sums: Sequence[Tensor], scale: float
) -> Iterator[None]:
    """Add derivatives in leaves, times a factor, to sums, inside the context.

    Args:
        leaves: Leaves that linear layers of the graph have as weights, among others.
        sums: A tensor of the shape of each.
        scale: The factor.
    """
    own = {id(x): (s, scale) for x, s in zip(leaves, sums, strict=True)}
    try:
        _SUMS.update(own)
        yield
    finally:
        for key in own:
            _SUMS.pop(key, None)


def product(leaf: int, g: Tensor, x: Tensor, shape: torch.Size) -> Tensor | None:
    """Return ``g' x``, or None where it has been added to the sum of its leaf.

    Args:
        leaf: Identity of the leaf that it is a derivative in; 0 for none.
        g: Rows of the derivative in what came out, ``[T, o]``.
        x: Rows of what went in, ``[T, d]``.
        shape: Shape of the leaf, of ``o d`` entries.
    """
    found = _SUMS.get(leaf) if tracing.eager() else None
    if found is None or found[0].dtype != g.dtype:
        return (g.T @ x).view(shape)
    found[0].flatten(1).addmm_(g.T, x, alpha=found[1])
    return None


def leaf_of(weight: Tensor) -> int:
    """Return the identity of a leaf; 0 for other tensors, and in what runs again."""
    return id(weight) if weight.is_leaf and not tracing.runs_twice() else 0


def unread(weight: Tensor) -> Tensor:
    """Stand for the gradient in a leaf: only where its derivatives start is wanted."""
    return weight.new_zeros(()).expand(weight.shape)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, leaf: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leaf = leaf
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return *_Derivative.apply(g, x, weight, ctx.leaf, needed), None
        return (
            slope_of_rows(g, weight, x) if needed[0] else None,
            product(ctx.leaf, g, x, weight.shape) if needed[1] else None,
            g.sum(0) if needed[2] else None,
            None,
        )


class _Derivative(torch.autograd.Function):
    """The derivatives in input, weight and bias, themselves to be differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        leaf: int,
        needed: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, weight)
        ctx.leaf = leaf
        ctx.set_materialize_grads(False)
        in_weight = None
        if needed[1]:
            in_weight = unread(weight) if leaf else g.T @ x
        in_x = slope_of_rows(g, weight, x) if needed[0] else None
        return in_x, in_weight, g.sum(0) if needed[2] else None

    @staticmethod
    def backward(
        ctx: Any, x_dot: Tensor | None, weight_dot: Tensor | None, b_dot: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g, x, weight = ctx.saved_tensors
        in_g, in_x, in_weight = ctx.needs_input_grad[:3]
        found: list[Tensor | None] = [None] * 5
        if in_g:
            terms: list[Tensor] = []
            if weight_dot is not None:
                terms.append(F.linear(x, weight_dot, b_dot))
            elif b_dot is not None:
                terms.append(b_dot.expand_as(g))
            if x_dot is not None:
                terms.append(F.linear(x_dot, weight))
            if terms:
                found[0] = terms[0] + terms[1] if len(terms) > 1 else terms[0]
        if in_x and weight_dot is not None:
            found[1] = slope_of_rows(g, weight_dot, x)
        if in_weight and x_dot is not None:
            found[2] = product(ctx.leaf, g, x_dot, weight.shape)
        return tuple(found)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W' + b`` for ``x`` of two dimensions and more."""
    rows = x.reshape(-1, x.shape[-1])
    found: Tensor = _Linear.apply(rows, weight, bias, leaf_of(weight))
    return found if x.ndim == 2 else found.view(*x.shape[:-1], len(weight))
