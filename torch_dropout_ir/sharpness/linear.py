r"""Second derivatives of linear layers and convolutions at the cost of what is asked.

Such a layer ``y = x * W + b`` is bilinear, so three of its kinds make up all of its
derivatives: with ``g`` the derivative in ``y``, and dots for what a product sends back
through the gradient's graph,

.. math:: \bar x = g \star W, \quad \bar W = g \star x, \qquad
    g' = \dot x * W + x * \dot W + \dot b, \quad
    x' = g \star \dot W, \quad W' = g \star \dot x

Torch's own double backward also computes what leads nowhere, such as the derivative in
the network's input, and takes the one in the weight by a convolution with roles
exchanged, for which CPUs have no fast kernel.

The derivative in the weight of a linear layer, or in one that is larger than the
patches it meets, is a product of matrices: it is added to the sum that it is a part of,
so that nothing of the size of ``W`` is made. CPUs rearrange the whole of such a weight
in their own kernel of a convolution, which takes longer than the sum itself. Nor is the
gradient in a leaf made while the graph is built, where nobody reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_dropout_ir import tracing
from torch_dropout_ir.gradient_factors import Geometry, mapped, slopes

# By identity of a leaf: the sum that its derivatives belong to, and their factor.
# Backward passes on a GPU run in threads that no context variable reaches.
_SUMS: Final[dict[int, tuple[Tensor, float]]] = {}
# Identities of leaves in which no derivative is wanted now.
_UNWANTED: Final[set[int]] = set()


@contextlib.contextmanager
def added_into(
    leaves: Sequence[Tensor], sums: Sequence[Tensor], scale: float
) -> Iterator[None]:
    """Add derivatives in leaves, times a factor, to sums, inside the context."""
    own = {id(x): (s, scale) for x, s in zip(leaves, sums, strict=True)}
    try:
        _SUMS.update(own)
        yield
    finally:
        for key in own:
            _SUMS.pop(key, None)


@contextlib.contextmanager
def in_roots_alone(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Take derivatives in what is sent back, and in no leaf, inside the context.

    A graph tells what its nodes have a derivative in, not which of them is asked for.
    """
    own = set(map(id, leaves))
    try:
        _UNWANTED.update(own)
        yield
    finally:
        _UNWANTED.difference_update(own)


def product(leaf: int, g: Tensor, x: Tensor, shape: torch.Size) -> Tensor | None:
    """Return ``g' x``, ``[o, d]``; None where it is added to the sum of its leaf.

    ``leaf`` is its identity, 0 for none; ``g`` (``[T, o]``) and ``x`` (``[T, d]``) are
    rows of the derivative in what came out, and of what went in.
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


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry | None,
        leaf: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.leaf = geometry, leaf
        return mapped(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rest = ctx.geometry, ctx.leaf, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return *_Derivative.apply(g, x, weight, *rest), None, None
        return *_derivatives(g, x, weight, *rest), None, None


class _Derivative(torch.autograd.Function):
    """The derivatives in input, weight and bias, themselves to be differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry | None,
        leaf: int,
        needed: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, weight)
        ctx.geometry, ctx.leaf = geometry, leaf
        ctx.set_materialize_grads(False)
        read = needed[0], needed[1] and not leaf, needed[2]
        in_x, in_weight, in_bias = _derivatives(g, x, weight, geometry, 0, read)
        return in_x, unread(weight) if needed[1] > read[1] else in_weight, in_bias

    @staticmethod
    def backward(
        ctx: Any, x_dot: Tensor | None, weight_dot: Tensor | None, b_dot: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g, x, weight = ctx.saved_tensors
        in_g, in_x, in_weight = ctx.needs_input_grad[:3]
        geometry = ctx.geometry
        if ctx.leaf in _UNWANTED:
            in_x = in_weight = False
        found: list[Tensor | None] = [None] * 6
        if in_g:
            terms: list[Tensor] = []
            if weight_dot is not None:
                terms.append(mapped(x, weight_dot, b_dot, geometry))
            elif b_dot is not None:
                terms.append(b_dot.view(-1, *(1,) * (g.ndim - 2)).expand_as(g))
            if x_dot is not None:
                terms.append(mapped(x_dot, weight, None, geometry))
            if terms:
                found[0] = terms[0] + terms[1] if len(terms) > 1 else terms[0]
        if in_x and weight_dot is not None:
            mask = True, False, False
            found[1] = _derivatives(g, x, weight_dot, geometry, 0, mask)[0]
        if in_weight and x_dot is not None:
            mask = False, True, False
            found[2] = _derivatives(g, x_dot, weight, geometry, ctx.leaf, mask)[1]
        return tuple(found)


def _derivatives(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry | None,
    leaf: int,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """First derivatives; None for the weight's once they are in the sum of its leaf."""
    if geometry is None:
        mask = [needed[0], False, needed[2]]
        in_x, _, in_bias = slopes(g, x, weight, None, mask)
        own = product(leaf, g, x, weight.shape) if needed[1] else None
        return in_x, own, in_bias
    whole = needed[1] and not _outweighs(g, x, weight, geometry)
    # The kernel on CPUs takes that of the bias along with the weight's, or makes both.
    mask = [needed[0], whole, whole and needed[2]]
    found: list[Tensor | None] = [None, None, None]
    if any(mask):
        found = slopes(g, x, weight, geometry, mask)
    if needed[1] and not whole:
        found[1] = product(leaf, *_patches(g, x, weight, geometry), weight.shape)
    if needed[2] and not whole:
        found[2] = g.sum([0, *range(2, g.ndim)])
    return tuple(found)


def _patches(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Return what came out and the patches that the weight met, as rows."""
    kernel = {
        "kernel_size": tuple(weight.shape[2:]), "stride": tuple(geometry[0]),
        "padding": tuple(geometry[1]), "dilation": tuple(geometry[2]),
    }  # fmt: skip
    return _rows(g.flatten(2)), _rows(F.unfold(x, **kernel))


def _rows(planes: Tensor) -> Tensor:
    """``[N, d, T]`` as ``[N T, d]``."""
    return planes.mT.reshape(-1, planes.shape[1])


def _outweighs(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether a weight has more entries than all the patches that it meets."""
    *_, transposed, _, groups = geometry
    plain = x.is_cpu and g.ndim == 4 and not transposed and groups == 1
    return plain and len(weight) > g[:, 0].numel() > 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W' + b`` for ``x`` of two dimensions and more."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    found: Tensor = _Layer.apply(rows, weight, bias, None, leaf_of(weight))
    return found if x.ndim == 2 else found.view(*x.shape[:-1], len(weight))


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, leaf: int
) -> Tensor:
    """Return ``x * W + b``; ``geometry`` is what aten's convolution takes behind these.

    ``leaf`` is the weight's identity where it is a leaf, whose gradient nobody reads
    while the graph is built; else 0.
    """
    found: Tensor = _Layer.apply(x, weight, bias, geometry, leaf)
    return found
