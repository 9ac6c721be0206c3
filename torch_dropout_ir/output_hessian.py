r"""Floor 1: the Hessian of a loss in the outputs, its roots and random roots of it.

Squared errors, cross-entropy and torch's losses of one output each have closed forms;
for any other callable the blocks :math:`H_i` of the samples come from products with the
second derivative, as long as the loss is a sum (or mean) of terms of one sample each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.losses import Loss
from torch_dropout_ir.output_products import (
    ALL,
    SIGNS,
    WIDE,
    HessianProduct,
    Root,
    Rows,
    few,
    magnitudes,
    of_rows,
    signed,
    signs_of,
    with_signs,
)
from torch_dropout_ir.output_scales import (
    alike,
    closed_diagonal,
    cross_entropy_scale,
    even_scale,
    is_convex,
    is_logistic,
    logistic_diagonal,
    squared_scale,
    with_root,
)
from torch_dropout_ir.registration import block_roots, diagonal_roots
from torch_dropout_ir.softmax_roots import softmax_root

_DRAWN_AT_ONCE: Final = 2**18
_SMALL_BLOCK: Final = 16  # outputs of a sample
WIDEST: Final = 256  # of them, of a loss that is not known


def hessian_columns(product: HessianProduct) -> Tensor:
    """Return the Hessian of the loss in each sample's outputs, ``[K, n, K]``.

    Column ``c`` of each is at the index ``c``. ``K`` is the number of outputs of a
    sample; costs ``K`` products with the second derivative of the loss alone, none
    of the network, or none where its graph tells.
    """
    if product.blocks is not None:
        return product.blocks.columns
    outputs = product.at
    samples, width = outputs.shape[0], outputs.shape[1:].numel()
    places = torch.eye(width, dtype=outputs.dtype, device=outputs.device)
    places = places.unsqueeze(1).expand(-1, samples, -1)
    columns = product.each(places.view(width, *outputs.shape))
    return columns.reshape(width, samples, width)


class HessianRoots:
    """Roots of the loss's Hessian in the outputs of all samples, or of some.

    The loss is a sum (or mean) of terms of one sample each; ``product`` are products
    with the Hessian, where they are at hand.

    Attributes:
        like: The outputs that it was made of, or what has their shape.
    """

    def __init__(
        self,
        loss: Loss,
        outputs: Tensor,
        targets: Any,
        product: HessianProduct | None = None,
    ) -> None:
        self._kind = loss.kind
        known = loss.kind == "cross_entropy"
        held = known or (few(outputs) and outputs.is_contiguous())
        self.like = outputs if held else outputs.new_empty(()).expand(outputs.shape)
        self._convex = loss.kind in ("squared", "cross_entropy") or is_convex(loss)
        self._few: Tensor | None = None
        if loss.kind == "squared":
            self._factor = squared_scale(loss, outputs.shape, targets) ** 0.5
        elif loss.kind == "cross_entropy":
            even = even_scale(loss, outputs, targets)
            self._mass: Tensor | float = (
                cross_entropy_scale(loss, outputs, targets) if even is None else even
            )
        elif loss.kind == "elementwise":
            diagonal = _diagonal(loss, outputs, targets, product)
            self._few, self._at_once = (
                diagonal if few(outputs) else None,
                diagonal_roots,
            )
            self._spectrum = diagonal, None
        else:
            product = product or HessianProduct(loss, outputs, targets)
            columns = hessian_columns(product)
            if few(outputs) and columns.shape[0] <= _SMALL_BLOCK:
                self._few, self._at_once = columns, block_roots
            else:
                self._spectrum = eigen(columns.movedim(0, -1))

    @functools.cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues, and eigenvectors where those are not the outputs."""
        assert self._few is not None
        return eigen(self._few.movedim(0, -1))

    @functools.cached_property
    def _signs(self) -> tuple[float, ...]:
        return SIGNS[:1] if self._convex else signs_of(self._spectrum[0])

    @property
    def curved(self) -> bool:
        """Whether the Hessian is not zero."""
        return self._convex or bool(self._signs)

    def exact(self, rows: Rows = ALL) -> Iterator[Root]:
        """Yield ``(s_c, sign_c)`` with ``sum_c sign_c s_c s_c' = H_i`` of some rows.

        A tensor shaped as their outputs and a sign, a float or one a sample.
        """
        f = of_rows(self.like, rows)
        width = f.shape[1:].numel()
        flat = -1, width  # a single number has a row too
        for c in range(width):
            if self._kind == "general":
                values, vectors = of_rows(self._spectrum[0], rows), self._spectrum[1]
                assert vectors is not None
                vectors = of_rows(vectors, rows)
                root = vectors[..., c] * values[:, c, None].abs().sqrt()
                yield root.view(f.shape), values[:, c].sign()
                continue
            column = torch.zeros(f.shape, dtype=f.dtype, device=f.device)
            column.view(flat)[:, c] = 1.0
            if self._kind == "elementwise":
                values = of_rows(self._spectrum[0], rows).reshape(flat)[:, c]
                column.view(flat)[:, c] = values.abs().sqrt()
                yield column, values.sign()
            elif self._kind == "squared":
                yield column * self._factor, 1.0
            else:
                yield self._softmax_root(f, column, rows), 1.0

    def _softmax_root(self, f: Tensor, column: Tensor, rows: Rows) -> Tensor:
        """Column of a root of ``H_i`` at one output of each sample."""
        classes = 1 if f.ndim > 1 else 0
        softmax = f.softmax(classes)
        weighted = column * softmax.sqrt()
        centred = weighted - softmax * weighted.sum(classes, keepdim=True)
        return centred * self._of_mass(rows) ** 0.5

    def _of_mass(self, rows: Rows) -> Tensor | float:
        """Return what the terms of samples weigh, one number where they do alike."""
        return (
            of_rows(self._mass, rows) if isinstance(self._mass, Tensor) else self._mass
        )

    def sample(self, rows: Rows = ALL) -> list[Root]:
        r"""Draw ``v`` with :math:`E[v_i v_i^\top] = H_i`.

        Samples draw independently, and so do the outputs of one sample, so that cross
        terms vanish. For cross-entropy ``v`` is made of random signs
        (:func:`~torch_dropout_ir.softmax_roots.softmax_root`); for squared losses it is
        normal; else a random combination of the eigenvectors of the block.

        Returns:
            A tensor shaped as the outputs with its sign or weight; where blocks are
            indefinite a second one for their negative part.
        """
        f = of_rows(self.like, rows)
        if self._kind == "squared":
            drawn = torch.randn_like(f)
            if f.dtype in WIDE:  # half precision has no room for the square of it
                return [(drawn, self._factor**2)]
            return [(drawn.mul_(self._factor), 1.0)]
        if self._kind == "cross_entropy":
            mass, root = self._of_mass(rows), softmax_root(f)
            if not isinstance(mass, Tensor):
                return [(root, mass)]
            return [(root.mul_(mass.sqrt()), 1.0)]
        if self._few is not None:
            roots, signs = with_signs(self._at_once(self._few), self.like)
            self._signs = SIGNS[:1] if self._convex else signs
            return [(of_rows(root, rows), sign) for root, sign in roots]
        values, vectors = self._spectrum
        values = of_rows(values, rows)
        roots = []
        for sign in self._signs or SIGNS[:1]:
            if vectors is None:
                root = torch.empty_like(values)
                count = max(1, _DRAWN_AT_ONCE * len(values) // max(1, values.numel()))
                pairs = zip(root.split(count), values.split(count), strict=True)
                for part, own in pairs:
                    part.copy_(signed(magnitudes(own, sign)))
            else:
                root = signed(magnitudes(values, sign))
                root = turned(of_rows(vectors, rows), root)
            roots.append((root.view(f.shape), sign))
        return roots


def eigen(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of the blocks; half precision has no such routine."""
    wide = blocks if blocks.dtype == torch.float64 else blocks.float()
    if not wide.isfinite().all():  # which the routine refuses; the estimate tells
        return blocks.sum(-1), blocks
    values, vectors = torch.linalg.eigh(wide)
    return values.to(blocks.dtype), vectors.to(blocks.dtype)


def turned(vectors: Tensor, root: Tensor) -> Tensor:
    """Return a root in the outputs from one along the eigenvectors."""
    return (vectors @ root.unsqueeze(-1)).squeeze(-1)


def _diagonal(
    loss: Loss, outputs: Tensor, targets: Any, product: HessianProduct | None
) -> Tensor:
    """Diagonal of a diagonal Hessian: its row sums."""
    if is_logistic(loss) and outputs.dtype in WIDE:
        return logistic_diagonal(loss, outputs, targets)
    closed = None if product else closed_diagonal(loss)
    if closed and alike(outputs, targets):
        return closed(outputs, targets)
    product = product or HessianProduct(loss, outputs, targets)
    told = product.terms is not None and product.terms.log_softmax is None
    if told and product.entries is not None:
        return product.entries.all()
    return product(torch.ones_like(outputs), keep=False).detach()


def holding(
    loss: Loss, outputs: Tensor, targets: Any, product: HessianProduct | None = None
) -> Loss | None:
    """Return the loss with a kind whose closed form is its Hessian, found by a probe.

    None where no form by sample holds, or it is not known and a sample has more than
    256 outputs. ``product`` are products with the Hessian, where they are at hand.
    """
    if loss.kind == "cross_entropy" and outputs.ndim < 2:  # rows are its classes
        return None
    loss, v = with_root(loss, targets), torch.randn_like(outputs)
    expected = (product or HessianProduct(loss, outputs, targets))(v).detach()
    tolerance = torch.finfo(outputs.dtype).eps ** 0.5
    for kind in dict.fromkeys((loss.kind, "general")):
        candidate = dataclasses.replace(loss, kind=kind)
        if kind == "general" and outputs[0].numel() > WIDEST:
            break
        found = _hessian_times(candidate, outputs, targets, v, product)
        if (found - expected).norm() <= tolerance * (expected.norm() + 1e-30):
            return candidate
    return None


def _hessian_times(
    loss: Loss, outputs: Tensor, targets: Any, v: Tensor, product: HessianProduct | None
) -> Tensor:
    """The product with the Hessian that the loss's kind stands for."""
    if loss.kind == "squared":
        return v * squared_scale(loss, outputs.shape, targets)
    if loss.kind == "cross_entropy":
        s = outputs.softmax(1)
        centred = v - (s * v).sum(1, keepdim=True)
        return cross_entropy_scale(loss, outputs, targets) * s * centred
    total = torch.zeros_like(v)
    for root, sign in HessianRoots(loss, outputs, targets, product).exact():
        flat = (root * v).reshape(v.shape[0], -1).sum(1) * sign
        total += root * flat.view(-1, *(1,) * (v.ndim - 1))
    return total
