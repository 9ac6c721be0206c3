"""Floor 1: random roots of the Hessian of a loss of log-probabilities."""

from __future__ import annotations

import functools
from typing import Final

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
    signed,
    with_signs,
)
from torch_dropout_ir.registration import softmax_roots
from torch_dropout_ir.root_kernels import (
    SIGNS,
    in_logits,
    magnitudes,
    signs_of,
    softmax_diagonal,
)
from torch_dropout_ir.tracing import derivatives

_DRAWN_AT_ONCE: Final = 2**16


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
    derivative is taken for each output. With :math:`D = 0` the softmax and a root are
    all that is held, and what makes roots is that of some rows at a time.

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
        self.like = product.at
        self._classes, self._by_row = terms.classes, terms.by_row
        bend = None
        if not terms.linear:
            bend = derivative_again(slope, edge, torch.ones_like(slope))
        logs, slope = node._saved_result.detach(), slope.detach()
        self._few = (logs, slope, bend) if few(logs) else None
        if self._few is None:
            self._mass = slope.sum(self._classes, keepdim=True).neg_()
            del slope  # before there is a softmax
            self._softmax, self._bend = logs.exp(), bend
        # What makes the logits of the outputs, where they are not the same.
        child, result = node.next_functions[0]
        self._inside = [] if terms.direct else [GradientEdge(child, result)]
        self._at = product.at

    @property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """The softmax, and the diagonal."""
        if self._few is not None:
            return softmax_diagonal(*self._few, self._classes)
        s = self._softmax
        return s, _diagonal(s, self._mass, self._bend)

    @functools.cached_property
    def _signs(self) -> tuple[float, ...]:
        plain = self._few is None and self._bend is None
        return signs_of(self._mass if plain else self._spectrum[1])

    @property
    def curved(self) -> bool:
        """Whether the Hessian is not zero."""
        return bool(self._signs)

    def sample(self, rows: Rows = ALL) -> list[Root]:
        """Return roots for the samples ``rows``, with signs: two where there are both.

        Their squares with their signs are the Hessian on average.
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
        s, mass = of_rows(self._softmax, rows), of_rows(self._mass, rows)
        bend = None if self._bend is None else of_rows(self._bend, rows)
        count = max(1, _DRAWN_AT_ONCE * len(s) // max(1, s.numel()))
        if not self._classes or len(s) <= count:
            return self._drawn(s, mass, bend, sign)
        root = torch.empty_like(s)
        for i in range(0, len(s), count):
            at = slice(i, i + count)
            some = None if bend is None else bend[at]
            root[at] = self._drawn(s[at], mass[at], some, sign)
        return root

    def _drawn(
        self, s: Tensor, mass: Tensor, bend: Tensor | None, sign: float
    ) -> Tensor:
        root = signed(magnitudes(_diagonal(s, mass, bend), sign))
        return in_logits(root, s, self._classes)

    def _pulled(self, root: Tensor) -> Tensor:
        """Send a root on from the logits to the outputs."""
        (found,) = torch.autograd.grad(
            self._inside, [self._at], [root], retain_graph=True
        )
        return found


def _diagonal(s: Tensor, mass: Tensor, bend: Tensor | None) -> Tensor:
    return s * mass if bend is None else (s * mass).add_(bend)
