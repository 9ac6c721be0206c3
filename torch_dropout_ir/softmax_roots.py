"""Floor 1: random roots of the Hessian of a loss of log-probabilities."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_dropout_ir.entry_curvature import EntryCurvature
from torch_dropout_ir.loss_terms import Terms
from torch_dropout_ir.output_products import (
    ALL,
    SIGNS,
    HessianProduct,
    Root,
    Rows,
    derivative_again,
    few,
    magnitudes,
    of_rows,
    signed,
    signs_of,
    with_signs,
)
from torch_dropout_ir.registration import softmax_roots
from torch_dropout_ir.tracing import derivatives

_DRAWN_AT_ONCE: Final = 2**15


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
    derivative is taken for each output. Log-probabilities and a root are all that is
    held, and what makes roots is that of some rows at a time.

    Attributes:
        like: The outputs.
    """

    def __init__(self, product: HessianProduct, terms: Terms) -> None:
        node, value = terms.log_softmax, product.value
        edge, entries = GradientEdge(node, 0), product.entries
        again = not terms.linear and entries is None
        (slope,) = derivatives(
            value, (edge,), torch.ones_like(value), True, create_graph=again
        )
        assert slope is not None  # its graph leads there
        self.like = product.at
        self._classes, self._by_row = terms.classes, terms.by_row
        if again:
            bend = derivative_again(slope, edge, torch.ones_like(slope))
            entries = None if bend is None else EntryCurvature(bend, None)
        self._bend, self._few = entries, None
        self._logs, slope = node._saved_result.detach(), slope.detach()
        if few(self._logs):
            bend = None if entries is None else entries.all()
            self._few = self._logs, slope, bend
        else:
            self._mass = slope.sum(self._classes, keepdim=True).neg_()
        # What makes the logits of the outputs, where they are not the same.
        child, result = node.next_functions[0]
        self._inside = [] if terms.direct else [GradientEdge(child, result)]
        self._at = product.at

    @property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """The softmax, and the diagonal."""
        if self._few is not None:
            return softmax_diagonal(*self._few, self._classes)
        return self._logs.exp(), self._filled(_diagonal)

    @functools.cached_property
    def _signs(self) -> tuple[float, ...]:
        if self._few is not None:
            return signs_of(self._spectrum[1])
        own = self._mass if self._bend is None else self._bend.chosen
        both = {*signs_of(self._mass), *signs_of(own)}  # of one part there may be none
        return tuple([sign for sign in SIGNS if sign in both])

    @property
    def curved(self) -> bool:
        """Whether the Hessian is not zero."""
        return bool(self._signs)

    def sample(self, rows: Rows = ALL) -> Sequence[Root]:
        """Return random roots of the samples ``rows`` with signs, one or both.

        Their squares with their signs are the Hessian on average.
        """
        if self._few is not None:
            roots, self._signs = with_signs(
                softmax_roots(*self._few, self._classes), self._logs
            )
            return [(self._pulled(root, rows), sign) for root, sign in roots]
        draw = functools.partial(self._root, rows)
        return _OneByOne(draw, self._signs or SIGNS[:1])

    def _root(self, rows: Rows, sign: float) -> Tensor:
        own = rows if self._by_row else ALL
        root = self._filled(functools.partial(self._drawn, sign), own)
        return self._pulled(root, ALL if self._by_row else rows)

    def _filled(
        self, make: Callable[[Tensor, Tensor, Tensor | None], Tensor], rows: Rows = ALL
    ) -> Tensor:
        """Make a tensor of the softmax, the mass and the bend, of a part at a time."""
        logs, mass = of_rows(self._logs, rows), of_rows(self._mass, rows)
        bend = found = None
        if self._bend is not None:
            bend = of_rows(self._bend.all(), rows)
            # Some entries are put into room of its own; all may be sent back as a view.
            if self._bend.chosen.numel() < self._logs.numel():
                found = bend
        found = torch.empty_like(logs) if found is None else found
        count = max(1, _DRAWN_AT_ONCE * len(logs) // max(1, logs.numel()))
        count = count if self._classes else len(logs)
        for i in range(0, len(logs), count):
            at = slice(i, i + count)
            own = None if bend is None else bend[at]
            found[at] = make(_wide(logs[at]).exp(), mass[at], own)
        return found

    def _drawn(
        self, sign: float, s: Tensor, mass: Tensor, bend: Tensor | None
    ) -> Tensor:
        root = signed(magnitudes(_diagonal(s, mass, bend), sign))
        return in_logits(root, s, self._classes)

    def _pulled(self, root: Tensor, rows: Rows) -> Tensor:
        """Send a root on from the logits to the outputs."""
        if self._inside:
            (root,) = torch.autograd.grad(
                self._inside, [self._at], [root], retain_graph=True
            )
        return of_rows(root, rows)


class _OneByOne(Sequence[Root]):
    """Roots that are drawn as they are asked for, so that only one is held."""

    def __init__(self, draw: Callable[[float], Tensor], signs: Sequence[float]) -> None:
        self._draw = draw
        self._signs = signs

    def __len__(self) -> int:
        return len(self._signs)

    def __getitem__(self, i: Any) -> Any:
        sign = self._signs[i]
        return self._draw(sign), sign


def softmax_root(f: Tensor) -> Tensor:
    r"""Return a draw of ``v``, :math:`E[v v^\top] = \operatorname{diag} q - q q^\top`.

    With :math:`q` the softmax of ``f`` over its classes, and random signs :math:`z`,

    .. math:: v = r \circ z - q \, r^\top z, \qquad r_c = \sqrt{q_c}.

    A square :math:`(a^\top v)^2` has a standard deviation of at most :math:`\sqrt 2`
    times its mean, whatever :math:`q` is. The gradient at a label drawn from :math:`q`
    has the same mean square, but as labels get rare its spread grows without a bound,
    and draws that miss them show nothing of it.
    """
    if f.ndim == 1:
        return softmax_root(f.unsqueeze(0)).squeeze(0)
    if few(f):
        return softmax_roots(f.log_softmax(1), None, None, 1)[0]
    root = torch.empty_like(f)
    # Some samples at a time, lest the signs take as much space as the outputs.
    count = max(1, _DRAWN_AT_ONCE * len(f) // max(1, f.numel()))
    for part, own in zip(root.split(count), f.split(count), strict=True):
        q = _wide(own).softmax(1)
        part.copy_(in_logits(signed(q.sqrt()), q, 1))
    return root


def _wide(x: Tensor) -> Tensor:
    """Return what a root is the difference of, for which half precision has no room."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _diagonal(s: Tensor, mass: Tensor, bend: Tensor | None) -> Tensor:
    return s * mass if bend is None else (s * mass).add_(bend)


def softmax_diagonal(
    log_softmax: Tensor, slope: Tensor | None, bend: Tensor | None, classes: int
) -> tuple[Tensor, Tensor]:
    """Return ``s``, and ``D + m diag(s)`` for what ``softmax_roots`` is given."""
    s = log_softmax.exp()
    diagonal = s if slope is None else s * slope.sum(classes, keepdim=True).neg_()
    return s, diagonal if bend is None else diagonal + bend


def in_logits(root: Tensor, softmax: Tensor, classes: int) -> Tensor:
    """Take what log-probabilities have in common off a root, written on: ``J' r``."""
    return root.addcmul_(softmax, root.sum(classes, keepdim=True), value=-1)
