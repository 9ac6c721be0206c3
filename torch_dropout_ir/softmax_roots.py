"""Floor 1: random roots of the Hessian of a loss of log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_dropout_ir.loss_terms import Terms
from torch_dropout_ir.output_hessian import less_a_label
from torch_dropout_ir.output_products import (
    ALL,
    HessianProduct,
    Root,
    Rows,
    derivative_again,
    of_rows,
    of_sign,
    signs_of,
)
from torch_dropout_ir.tracing import derivatives


class SoftmaxRoots:
    r"""Roots for a loss that is a sum of terms of one log-probability each.

    With log-probabilities :math:`u = \log \operatorname{softmax} z` of a :math:`z` that
    is linear in the outputs, and the loss :math:`\varphi(u)`, the Hessian in :math:`z`
    of a row is

    .. math:: J^\top D J + m (\operatorname{diag} s - s s^\top),
              \qquad J = 1 - \mathbf 1 s^\top,

    with :math:`s = e^u`, the diagonal :math:`D = \varphi''` and the mass :math:`m =
    -\sum_c \varphi'_c`. Of a cross-entropy, with labels or soft ones, :math:`D` is 0.
    The root of the first part is :math:`J^\top` of random signs times
    :math:`\sqrt{|D|}`, that of the second the gradient at a label drawn from :math:`s`,
    times :math:`\sqrt{|m|}`. Neither takes a derivative an output.

    Args:
        product: The loss that has been run.
        terms: What its graph tells, of a log-softmax.

    Attributes:
        like: The outputs.
        curved: Whether the Hessian is not zero.

    Raises:
        ValueError: If the loss cannot be differentiated twice.
    """

    def __init__(self, product: HessianProduct, terms: Terms) -> None:
        node, value = terms.log_softmax, product.value
        edge = GradientEdge(node, 0)
        (slope,) = derivatives(
            value, (edge,), torch.ones_like(value), True, create_graph=not terms.linear
        )
        assert slope is not None  # its graph leads there
        self.like = product.at.detach()
        self._u: Tensor = node._saved_result.detach()
        self._classes, self._by_row = terms.classes, terms.by_row
        self._mass = slope.detach().sum(self._classes, keepdim=True).neg_()
        self._bend = derivative_again(slope, edge, torch.ones_like(slope))
        self._of_mass = signs_of(self._mass)
        self._of_bend = () if self._bend is None else signs_of(self._bend)
        signs = {*self._of_mass, *self._of_bend}
        self.curved, self._signs = bool(signs), sorted(signs) or [1.0]
        # What makes the logits of the outputs, where they are not the same.
        child, result = node.next_functions[0]
        self._inside = [] if terms.direct else [GradientEdge(child, result)]
        self._at = product.at

    def sample(self, rows: Rows = ALL) -> list[Root]:
        """Draw roots, whose squares with their signs are the Hessian on average.

        Args:
            rows: The samples.

        Returns:
            A tensor shaped as their outputs with its sign; a second one where there are
            both.
        """
        early, late = (rows, ALL) if self._by_row else (ALL, rows)
        roots = [(self._of_sign(sign, early), sign) for sign in self._signs]
        if self._inside:
            roots = [(self._pulled(root), sign) for root, sign in roots]
        return [(of_rows(root, late), sign) for root, sign in roots]

    def _of_sign(self, sign: float, rows: Rows) -> Tensor:
        """Draw a root of the part of one sign, in the logits."""
        u, parts = of_rows(self._u, rows), []
        if sign in self._of_mass:
            mass = of_sign(of_rows(self._mass, rows), sign)
            parts.append(less_a_label(u, self._classes).mul_(mass.sqrt_()))
        if self._bend is not None and sign in self._of_bend:
            bend = of_sign(of_rows(self._bend, rows), sign).sqrt_()
            bend = bend.copysign(torch.randn_like(bend))
            total = bend.sum(self._classes, keepdim=True)
            parts.append(bend.addcmul_(u.exp(), total, value=-1))
        if len(parts) == 2:
            return parts[0].add_(parts[1])
        return parts[0] if parts else torch.zeros_like(u)

    def _pulled(self, root: Tensor) -> Tensor:
        """Send a root on from the logits to the outputs."""
        (found,) = torch.autograd.grad(
            self._inside, [self._at], [root], retain_graph=True
        )
        return found
