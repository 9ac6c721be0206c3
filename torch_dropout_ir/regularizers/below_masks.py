r"""Gradients below the first dropout site, at two masks at once.

Nothing there depends on a mask: with ``J`` the derivative of the first site's input in
the parameters below, gradients at two masks are :math:`J^T a` and :math:`J^T b`, and

.. math::
    \lVert J^T a \rVert^2 + \lVert J^T b \rVert^2 = \frac{s + d}{2}, \qquad
    \langle J^T a, J^T b \rangle = \frac{s - d}{4}, \qquad
    s, d = \lVert J^T (a \pm b) \rVert^2.

Two passes back through one graph give them. Of the first mask ``a`` is held, which is
as large as the site's input, and no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torch_dropout_ir.arrivals import graph_nodes
from torch_dropout_ir.collectives import every, go_on
from torch_dropout_ir.regularizers.coupling import nearly_equal
from torch_dropout_ir.regularizers.inner_products import wide_dtype
from torch_dropout_ir.tracing import anything_drawn
from torch_dropout_ir.weight_parts import LINEAR

# How s and d enter both squared norms, each as their mean, the inner product, and the
# squared norm of the difference.
_SUM: Final = 1 / 4, 1 / 4, 1 / 4, 0.0
_DIFFERENCE: Final = 1 / 4, 1 / 4, -1 / 4, 1.0


class BelowMasks:
    """What is below the first site in two passes on one batch.

    Args:
        model: The model.
        targets: Its parameters.

    Attributes:
        found: Numbers of the parameters below; None before a pass back.
        alike: Whether the second pass had the same ones, and made the same of them.
        shares: While gradients below come: how the squared norm of one enters both
            squared norms, the inner product and that of the difference.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Tensor]) -> None:
        self._model = model
        self._targets = targets
        self.found: set[int] | None = None
        self.alike = True
        self.shares: tuple[float, ...] | None = None
        self._sent: list[Tensor] = []
        self._norms: list[Tensor] = []  # of the site's input, pass by pass

    def begin(self) -> None:
        """Begin a pass."""
        # Let go of at the first site: it holds the states of generators.
        self._drawn: Callable[[], bool] | None = anything_drawn(self._model)
        self._edge: GradientEdge | None = None

    def look(self, h: Tensor) -> None:
        """Look at the input of a site, before its mask is drawn."""
        drawn, self._drawn = self._drawn, None
        if drawn is not None and h.requires_grad and not drawn():
            self._edge = get_gradient_edge(h)
            self._zero = h.detach().new_zeros(()).expand(h.shape)
            self._size = h.nbytes
            norm = torch.linalg.vector_norm(h.detach(), dtype=wide_dtype(h))
            self._norms.append(norm)

    def back(
        self,
        value: Tensor,
        numbers: Mapping[int, int],
        arriving: Callable[[Tensor | None], AbstractContextManager[None]],
    ) -> None:
        """Go back through a pass, whose gradients are given away as they come.

        Args:
            value: What is differentiated.
            numbers: Those of the parameters that nobody's hooks are on, by identity.
            arriving: Gives gradients away inside its context, of what it is given or,
                below, of all that is sent back.
        """
        first = self.found is None
        below = self._numbers(value, numbers) if first or self.found else set()
        if not every(bool(below), "below masks"):
            below = set()
        # Of a generator of the model's own, or what it counts, nothing else tells.
        same = first or not below or nearly_equal(*self._norms[-2:])
        self.alike = every(self.found in (None, below) and same, "alike")
        self.found = below
        ends: list[Any] = [x for i, x in enumerate(self._targets) if i not in below]
        go_on("backward")
        edge = [self._edge] if self._edge is not None and below else []
        with arriving(value):
            found = torch.autograd.grad(value, [*ends, *edge], allow_unused=True)
        if not edge:
            return
        self._sent.append(self._zero if found[-1] is None else found[-1])
        del found
        if not first and self.alike:
            with arriving(None):
                self._on(edge[0], self._sent)

    def _on(self, edge: GradientEdge, roots: list[Tensor]) -> None:
        """Go on from the first site, from what was sent there in both passes."""
        roots[0] = roots[0] - roots[1]
        roots[1] = roots[0].add(roots[1], alpha=2)
        for self.shares in (_SUM, _DIFFERENCE):
            self._send(edge, roots)
        self.shares = None

    def _send(self, edge: GradientEdge, roots: list[Tensor]) -> None:
        """Send the last root back, which nobody holds meanwhile."""

        def take(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            k = edge.output_nr
            return (*grads[:k], roots.pop(), *grads[k + 1 :])

        ends = [self._targets[i] for i in self.found or ()]
        keep = len(roots) > 1
        go_on("backward")
        hook = edge.node.register_prehook(take)
        torch.autograd.grad([edge], ends, [self._zero], keep, allow_unused=True)
        hook.remove()

    def _numbers(self, value: Tensor, numbers: Mapping[int, int]) -> set[int]:
        """Return those of the parameters below the first site, by number.

        There are none where a derivative there may not be linear, a way leads past the
        site's input, or that is no smaller than the parameters.
        """
        if self._edge is None or value.grad_fn is None:
            return set()
        nodes = set(graph_nodes([self._edge.node]))
        above = graph_nodes([value.grad_fn], nodes)
        ways = {end for node in above for end in node.next_functions if end[0] in nodes}
        leaves = [node.variable for node in nodes if hasattr(node, "variable")]
        apart = (
            ways == {(self._edge.node, self._edge.output_nr)}
            and {getattr(node, "_forward_cls", None) for node in nodes} <= LINEAR
            and all(id(x) in numbers for x in leaves)
            and sum(x.nbytes for x in leaves) > self._size
        )
        return {numbers[id(x)] for x in leaves} if apart else set()
