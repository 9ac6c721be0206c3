"""The second derivative of the loss in what the sites pass on, by products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_dropout_ir.arrivals import linear_root, once_differentiable, root_of
from torch_dropout_ir.collectives import go_on
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.line_pass import Mask
from torch_dropout_ir.regularizers.outputs import OutputsRead
from torch_dropout_ir.regularizers.row_chunks import RowChunks
from torch_dropout_ir.regularizers.site_forms import Form, by_sample, join, signs
from torch_dropout_ir.tracing import derivatives

Vectors = Sequence["Tensor | None"]
# Draws whose signs are held at once, a byte each.
_DRAWS_HELD: Final = 3


class SiteCurvature:
    r"""Products with the loss's Hessian in the inputs of all uses of all sites.

    Linearized, with the Gauss-Newton matrix :math:`J^\top H J` in its place: the
    network taken as linear after the sites, the loss as it is. A product costs two or
    three backward passes, whatever the number of outputs and of sites; with
    ``create_graph`` it can be differentiated in the parameters.
    """

    def __init__(
        self,
        clean: CleanPass,
        read: OutputsRead,
        *,
        linearized: bool,
        create_graph: bool = False,
    ) -> None:
        self._clean = clean
        self._tensors = read.tensors
        self._count = math.gcd(*[clean.count(x) for x in read.tensors])
        self._linearized = linearized
        self._create_graph = create_graph
        self._zeros: list[Tensor] = []  # not-a-number where a product is none
        if not linearized:
            risk = read.risk_twice(read.tensors)
            own = root_of(risk)
            root = torch.ones_like(risk) if own is None else own
            self._slopes = _gradients([risk], clean.edges, [root], create_graph=True)
            _check_twice(self._slopes)
            return
        self._roots = [linear_root(x) for x in read.tensors]
        # Linear in the roots: its derivative in them is the derivative of the outputs.
        self._slopes = _gradients(
            read.tensors, clean.edges, self._roots, create_graph=True
        )
        _check_twice(self._slopes)
        self._at = [  # each for itself: one may have been made of another
            x.view_as(x)
            if create_graph and x.requires_grad
            else x.detach().requires_grad_()
            for x in read.tensors
        ]
        self._loss_slopes: Vectors = read.slopes(self._at)

    def product(self, vectors: Vectors, keep: bool = True) -> list[Tensor | None]:
        """Multiply a tensor for each use, None for zero, in and out."""
        graph = self._create_graph
        if not self._linearized:
            return _gradients(self._slopes, self._clean.edges, vectors, graph, keep)
        pushed = _gradients(self._slopes, self._roots, vectors, graph)
        curved = [
            torch.zeros_like(x) if c is None else c  # the loss is linear in it
            for c, x in zip(
                _gradients(self._loss_slopes, self._at, pushed, graph),
                self._at,
                strict=True,
            )
        ]
        # What is not finite may be lost on the way back, where logarithms are summed.
        self._zeros = [x.detach().mul(0).sum() for x in pushed if x is not None]
        return _gradients(self._tensors, self._clean.edges, curved, graph)

    def draws(self, num_samples: int | None, coupled: bool) -> list[list[Form]]:
        """Return draws of the forms; the exact sum as a single one where None."""
        if num_samples is None:
            return [self.exact(coupled)]
        counts = reversed(range(num_samples))
        return [self.sampled(keep=bool(left)) for left in counts]

    def sampled(
        self, positive: Sequence[Tensor] | None = None, *, keep: bool = True
    ) -> list[Form]:
        r"""Return one draw of the forms: signs :math:`z` on the mask's elements.

        :math:`E[(z \circ h)^\top A (z \circ h)] = \sum_j h_j^2 A_{jj}`. ``positive``
        says whether a sign is plus, by use; drawn if None.
        """
        uses = self._clean.uses
        if positive is None:
            drawn = [signs(site, h) for site, h, _ in uses]
        else:
            pairs = zip(positive, uses, strict=True)
            drawn = [x.to(h.dtype).mul_(2).sub_(1) for x, (_, h, _) in pairs]
        return self._forms([self._scaled(i, z) for i, z in enumerate(drawn)], keep)

    def exact(self, coupled: bool) -> list[Form]:
        """Return the forms of elements of a mask; of all samples if not coupled."""
        forms = []
        count = 1 if coupled else self._count
        for i, (site, h, _) in enumerate(self._clean.uses):
            shape = site.mask_shape(h.shape)
            own = shape if count < 2 else (shape[0] // count, *shape[1:])
            for place in range(torch.Size(own).numel()):
                one = h.new_zeros(torch.Size(own).numel())
                one[place] = 1.0
                rows = one.view(own).expand(count, *own).reshape(shape)
                vectors: list[Tensor | None] = [None] * len(self._clean.uses)
                vectors[i] = self._scaled(i, rows)
                forms += self._forms(vectors)
        return forms

    def _scaled(self, use: int, noise: Tensor) -> Tensor:
        site, h, _ = self._clean.uses[use]
        h = h if self._create_graph else h.detach()
        return site.variance**0.5 * h * noise

    def _forms(self, vectors: Vectors, keep: bool = True) -> list[Form]:
        products = self.product(vectors, keep)
        forms = [
            by_sample(site, v * found / 2, self._count)
            for (site, _, _), v, found in zip(
                self._clean.uses, vectors, products, strict=True
            )
            if v is not None and found is not None
        ]
        for zero in self._zeros:
            forms = [(name, rows + zero.to(rows.device)) for name, rows in forms]
        return forms


def _check_twice(slopes: Vectors) -> None:
    if once_differentiable(slopes):
        raise NotImplementedError(
            "expected a model and a loss that torch can differentiate twice, got a "
            "function that it can differentiate once (`once_differentiable`). Use "
            "`monte_carlo`, which needs no derivative."
        )


def _gradients(
    outputs: Vectors,
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    roots: Vectors,
    create_graph: bool,
    keep: bool = True,
) -> list[Tensor | None]:
    """Reverse derivative of the outputs that there are, None where there is none."""
    live = [
        (x, r)
        for x, r in zip(outputs, roots, strict=True)
        if x is not None and x.requires_grad and r is not None
    ]
    if not live or not inputs:
        return [None] * len(inputs)
    heads, weights = zip(*live, strict=True)
    go_on("backward")
    keep = keep or create_graph
    return list(derivatives(heads, inputs, weights, keep, create_graph))


def drawn_signs(masks: Sequence[Mask]) -> list[Tensor]:
    """Draw whether a sign is plus for each element of the masks of all rows."""
    return [signs(site, x.expand(shape)) > 0 for site, x, shape in masks]


def draws_held(num_samples: int | None) -> int:
    """Return of how many draws the signs are held at once, a byte each."""
    return min(_DRAWS_HELD, num_samples or 0)


def draws_by_chunks(
    chunks: RowChunks, masks: Sequence[Mask], num_samples: int | None, coupled: bool
) -> list[list[Form]] | None:
    """Return draws of the forms; None where samples do not run apart."""
    noise: list[list[Tensor]] = []

    def take(
        clean: CleanPass, read: OutputsRead, rows: Tensor
    ) -> list[list[Form]] | None:
        curvature = SiteCurvature(clean, read, linearized=False)
        if num_samples is None:
            if clean.couples_samples(read.tensors):
                return None
            return [curvature.exact(coupled)]
        return [
            curvature.sampled([chunks.take(z, rows) for z in draw]) for draw in noise
        ]

    if num_samples is None:
        parts = chunks.each(take)
        return None if parts is None else join(parts, None)
    found: list[list[Form]] = []
    while len(found) < num_samples:
        held = range(draws_held(num_samples - len(found)))
        # On the masks of all rows, as a pass over all of them draws them.
        noise = [drawn_signs(masks) for _ in held]
        parts = chunks.each(take)
        if parts is None:
            return None
        found += join(parts, num_samples)
    return found
