"""Floor 1: random roots of the Hessian of a loss of log-probabilities."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_dropout_ir.loss_terms import Terms
from torch_dropout_ir.output_products import (
    ALL,
    HessianProduct,
    Root,
    Rows,
    derivative_again,
    few,
    of_rows,
    with_signs,
)
from torch_dropout_ir.registration import softmax_roots
from torch_dropout_ir.root_kernels import (
    SIGNS,
    in_logits,
    root_of_sign,
    signs_of,
    softmax_diagonal,
)
from torch_dropout_ir.tracing import derivatives


class SoftmaxRoots:
    r"""Roots for a loss that is a sum of terms of one log-probability each.

    With log-probabilities :math:`u = \log \operatorname{softmax} z` of a :math:`z` that
    is linear in the outputs, and the loss :math:`\varphi(u)`, the Hessian in :math:`z`
    of a row is

    .. math:: J^\top D J + m (\operatorname{diag} s - s s^\top)
              = J^\top (D + m \operatorname{diag} s) J,
              \qquad J = 1 - \mathbf 1 s^\top,

    with :math:`s = e^u`, the diagonal :math:`D = \varphi''` and the mass :math:`m =
    -\sum_c \varphi'_c`. Of a cross-entropy, with labels or soft ones, :math:`D` is 0.
    A root is :math:`J^\top` of random signs times the square root of that diagonal: no
    derivative is taken for each output.

    Args:
        product: The loss that has been run.
        terms: What its graph tells, of a log-softmax.

    Attributes:
        like: The outputs.

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
        bend = derivative_again(slope, edge, torch.ones_like(slope))
        logs, slope = node._saved_result.detach(), slope.detach()
        self.like = product.at
        self._classes, self._by_row = terms.classes, terms.by_row
        self._few = (logs, slope, bend) if few(logs) else None
        if self._few is None:  # the derivatives go
            self._spectrum = softmax_diagonal(logs, slope, bend, terms.classes)
        # What makes the logits of the outputs, where they are not the same.
        child, result = node.next_functions[0]
        self._inside = [] if terms.direct else [GradientEdge(child, result)]
        self._at = product.at

    @functools.cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """The softmax, and the diagonal."""
        assert self._few is not None
        return softmax_diagonal(*self._few, self._classes)

    @functools.cached_property
    def _signs(self) -> tuple[float, ...]:
        return signs_of(self._spectrum[1])

    @property
    def curved(self) -> bool:
        """Whether the Hessian is not zero."""
        return bool(self._signs)

    def sample(self, rows: Rows = ALL) -> list[Root]:
        """Draw roots, whose squares with their signs are the Hessian on average.

        Args:
            rows: The samples.

        Returns:
            A tensor shaped as their outputs with its sign; a second one where there are
            both.
        """
        early, late = (rows, ALL) if self._by_row and not self._few else (ALL, rows)
        if self._few is not None:
            logs = self._few[0]
            roots, self._signs = with_signs(
                softmax_roots(*self._few, self._classes), logs
            )
        else:
            roots = [(self._of_sign(s, early), s) for s in self._signs or SIGNS[:1]]
        if self._inside:
            roots = [(self._pulled(root), sign) for root, sign in roots]
        return [(of_rows(root, late), sign) for root, sign in roots]

    def _of_sign(self, sign: float, rows: Rows) -> Tensor:
        """Draw a root of the part of one sign, in the logits."""
        softmax, diagonal = [of_rows(x, rows) for x in self._spectrum]
        root = root_of_sign(diagonal, sign, torch.randn_like(diagonal))
        return in_logits(root, softmax, self._classes)

    def _pulled(self, root: Tensor) -> Tensor:
        """Send a root on from the logits to the outputs."""
        (found,) = torch.autograd.grad(
            self._inside, [self._at], [root], retain_graph=True
        )
        return found
