r"""Second derivatives of convolutions that cost what is asked of them.

A convolution ``y = x * W + b`` is bilinear, so three of its kinds make up all of its
derivatives: with ``g`` the derivative in ``y``,

.. math:: \bar x = g \star W, \quad \bar W = g \star x, \qquad
    \dot g = \dot x * W + x * \dot W + \dot b, \quad
    \dot x' = g \star \dot W, \quad \dot W' = g \star \dot x

Torch's own double backward also computes what leads nowhere, such as the derivative in
the network's input, and takes the one in the weight by a convolution with roles
exchanged, for which CPUs have no fast kernel.

The derivative in a weight that is larger than the patches it meets is a product of
matrices: CPUs rearrange the whole of such a weight in their own kernel, which takes
longer than the sum itself. It is added where its sum lies.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_dropout_ir.gradient_factors import Geometry
from torch_dropout_ir.sharpness.linear import product, unread

_forward: Final = torch.ops.aten.convolution.default
_backward: Final = torch.ops.aten.convolution_backward.default


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        leaf: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.leaf = geometry, leaf
        return _forward(x, weight, bias, *geometry)

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
        geometry: Geometry,
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
        found: list[Tensor | None] = [None] * 6
        if in_g:
            terms = []
            if weight_dot is not None:
                terms.append(_forward(x, weight_dot, b_dot, *geometry))
            elif b_dot is not None:
                terms.append(b_dot.view(-1, *(1,) * (g.ndim - 2)).expand_as(g))
            if x_dot is not None:
                terms.append(_forward(x_dot, weight, None, *geometry))
            found[0] = terms[0] + terms[1] if len(terms) > 1 else (terms or [None])[0]
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
    geometry: Geometry,
    leaf: int,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """First derivatives; None for the weight's once they are in the sum of its leaf."""
    whole = needed[1] and not _outweighs(g, x, weight, geometry)
    # The kernel on CPUs takes that of the bias along with the weight's, or makes both.
    mask = [needed[0], whole, whole and needed[2]]
    found: list[Tensor | None] = [None, None, None]
    if any(mask):
        found = [*_backward(g, x, weight, [g.shape[1]], *geometry, mask)]
    if needed[1] and not whole:
        kernel = {
            "kernel_size": tuple(weight.shape[2:]), "stride": tuple(geometry[0]),
            "padding": tuple(geometry[1]), "dilation": tuple(geometry[2]),
        }  # fmt: skip
        rows = _rows(g.flatten(2)), _rows(F.unfold(x, **kernel))
        found[1] = product(leaf, *rows, weight.shape)
    if needed[2] and not whole:
        found[2] = g.sum([0, *range(2, g.ndim)])
    return tuple(found)


def _rows(planes: Tensor) -> Tensor:
    """``[N, d, T]`` as ``[N T, d]``."""
    return planes.mT.reshape(-1, planes.shape[1])


def _outweighs(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether a weight has more entries than all the patches that it meets."""
    *_, transposed, _, groups = geometry
    plain = x.is_cpu and g.ndim == 4 and not transposed and groups == 1
    return plain and len(weight) > g[:, 0].numel() > 0


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, leaf: int
) -> Tensor:
    """Return ``x * W + b``.

    Args:
        x: The input, ``[N, C, ...]``.
        weight: The weight.
        bias: The bias.
        geometry: What aten's convolution takes behind these.
        leaf: The weight's identity where it is a leaf, whose gradient nobody reads
            while the graph is built; else 0.
    """
    found: Tensor = _Convolution.apply(x, weight, bias, geometry, leaf)
    return found
