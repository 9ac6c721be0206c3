r"""A loss of any kind as a sum of itself on parts of the rows, where that is shown.

Semantics:

* Where the graph of a loss shows a sum of terms of one row each, its derivatives in the
  rows of a part are those of the loss of that part alone, but for a factor, if it is
  the same function of a part as of the whole: a mean counts fewer rows, and weights of
  classes, a temperature or a threshold may be taken of the batch.
* That is looked at, not believed. Half of the rows are moved a little. Then each row of
  the gradient of the whole has to be that of its part times one number, the weight of
  the part; in each part rows that stay have to keep their gradient, or they look at the
  outputs of others with the graph cut; and products with the Hessian of a part have to
  be those of its halves, weighed likewise.
* Of each row some random projections are compared, within their own length: a row that
  fits well counts as much as one that does not.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree

from torch_dropout_ir.arrivals import uneven
from torch_dropout_ir.collectives import every
from torch_dropout_ir.exhaustion import raise_if_exhausted
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.output_products import HessianProduct
from torch_dropout_ir.output_scales import alike
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.loss_weight import apart
from torch_dropout_ir.regularizers.output_rows import chunks, rows_of_samples
from torch_dropout_ir.regularizers.outputs import OutputsRead

# Parts besides a first, small one: of one a double backward holds less than a step.
_PARTS: Final = 8
_STAYS: Final = 2  # one sample of so many
_MOVES: Final = 1 / 8  # by so much of itself, at most
_PROJECTIONS: Final = 8
_ROWS: Final = 256
_BLOCKS: Final = 64
_SEED: Final = 0


class LossParts:
    """The loss of each part, whose derivatives are those of the whole in its rows.

    Attributes:
        weights: What the loss of each part is multiplied by; none where it is no sum of
            them.
        curved: Whether it is known to have a second derivative that is not zero.
        beside: As given.
        samples: The numbers of the samples of each part.
    """

    def __init__(
        self, read: OutputsRead, count: int, beside: tuple[str, ...] = ()
    ) -> None:
        assert read.loss is not None
        self.weights: list[float] = []
        self.curved = False
        self.beside = beside
        self._loss = read.loss
        self._targets = read.targets
        self.samples = [*chunks(count, _PARTS)]
        self._count = count
        stay = torch.zeros(count, dtype=torch.bool, device="cpu")
        for own in self.samples:
            stay[own[::_STAYS]] = len(own) > 1
        f = read.single
        self._each = len(f) // count
        eps = torch.finfo(f.dtype).eps
        self._near, self._near_again = eps ** (2 / 3), eps**0.5
        self._stay = stay.repeat_interleave(self._each).to(f.device)
        by_row = uneven(f.new_empty(len(f))) / 2
        self._by_row = torch.where(self._stay, 0, by_row) * _MOVES
        self._within = uneven(f[0]) / 2
        self._width = _width(f.shape)
        same = torch.Generator(f.device).manual_seed(_SEED)
        count = max(1, min(_PROJECTIONS, self._width // 16))
        onto = f.new_empty(self._width, count).normal_(generator=same)
        self._onto = onto / onto.norm(dim=0)

    def read(self, part: int, tensors: list[Tensor]) -> OutputsRead:
        """Return what the loss of a part reads, of its outputs, times its weight."""
        weight, loss = self.weights[part], self._loss.function

        def weighed(f: Any, y: Any) -> Tensor:
            return weight * loss(f, y)

        own = Loss(weighed, self._loss.kind)
        targets = self._targets_of(self.samples[part])
        return OutputsRead(tensors, lambda x: own(x[0], targets), own, targets=targets)

    def look(self, clean: CleanPass, read: OutputsRead) -> bool:
        """Find the weights; return whether outputs and graph are used up."""
        weights = [self._loss.option(x, None) for x in ("weight", "pos_weight")]
        plain = not any([x is not None for x in weights])
        plain = plain and alike(read.tensors[0], self._targets)
        if every(self._loss.kind == "elementwise" and plain, "single outputs"):
            mean = self._loss.reduction == "mean"
            shares = [len(x) / self._count for x in self.samples]
            self.weights = shares if mean else [1.0] * len(shares)
            rows, y = self._rows(self.samples[0]), self._targets_of(self.samples[0])
            product = HessianProduct(self._loss, read.single[rows], y)
            ones = torch.ones_like(product.at)
            self.curved = bool(product(ones, keep=False).any())
            return False
        self._compare(clean, read)
        if not every(bool(self.weights), "weights of parts"):
            self.weights = []
        return True

    def _compare(self, clean: CleanPass, read: OutputsRead) -> None:
        f = read.single
        try:
            parts = []
            for samples in self.samples:
                parts.append(self._gradient(f, self._rows(samples), samples))
                if not self._keeps(f, samples, parts[-1]):
                    return
            first = self.samples[0]
            if not self._holds(f, first[: max(4, len(first) // 4)]):
                return
            moved = [torch.empty_like(f)]
            for rows in torch.arange(len(f), device=f.device).chunk(_BLOCKS):
                moved[0][rows] = self._moved(f[rows], rows)
            # With their graph: in a step nothing but the loss holds the outputs.
            clean.outputs = None
            read.tensors.clear()
            del f
            whole = self._whole(moved)
        except Exception as err:
            raise_if_exhausted(err)
            return  # a loss that does not run on a part, or where outputs have moved
        weights = []
        for samples, part in zip(self.samples, parts, strict=True):
            own = whole[self._rows(samples)]
            weights.append(_weight(own, part))
            if not _are(own, part, weights[-1], self._near):
                return
        self.weights, self.curved = weights, True

    @property
    def rows(self) -> list[Tensor]:
        """The numbers of the rows of each part."""
        return [self._rows(samples) for samples in self.samples]

    def _rows(self, samples: Tensor) -> Tensor:
        return rows_of_samples(samples, self._each).to(self._stay.device)

    def _targets_of(self, samples: Tensor) -> Any:
        """Return the targets of some samples: the rows of what has rows of all."""

        def take(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.ndim or len(x) % self._count:
                return x
            return x[rows_of_samples(samples, len(x) // self._count).to(x.device)]

        return _pytree.tree_map(take, self._targets)

    def _of(self, gradient: Tensor) -> Tensor:
        """Return projections of each row, and its length at the end."""
        flat = gradient.detach().reshape(-1, self._width)
        found = torch.cat((flat @ self._onto, flat.norm(dim=1, keepdim=True)), 1)
        return found.view(len(gradient), -1, found.shape[1])

    def _gradient(self, f: Tensor, rows: Tensor, samples: Tensor) -> Tensor:
        at = self._moved(f[rows], rows)
        product = HessianProduct(self._loss, at, self._targets_of(samples))
        return self._of(*torch.autograd.grad(product.value, product.at))

    def _keeps(self, f: Tensor, samples: Tensor, moved: Tensor) -> bool:
        """Return whether rows of a part that stay keep the gradient if others move.

        In each part: a number of rows that outputs choose, which is a factor of all,
        may be the same in some.
        """
        rows = self._rows(samples)
        product = HessianProduct(self._loss, f[rows], self._targets_of(samples))
        kept = self._of(*torch.autograd.grad(product.value, product.at))
        stay = self._stay[rows]
        return _are(moved[stay], kept[stay], 1.0, self._near)

    def _holds(self, f: Tensor, samples: Tensor) -> bool:
        """Whether a part's rows are apart, its products its halves', and not 0."""
        rows = self._rows(samples)
        product = HessianProduct(self._loss, f[rows], self._targets_of(samples))
        if not apart(product):
            return False
        moved = self._gradient(f, rows, samples)
        v = uneven(product.at.detach()) - 1.5
        curved = self._of(product(v, keep=False))
        del product  # its graph
        for half in torch.arange(len(samples), device="cpu").chunk(2):
            at, own = rows_of_samples(half, self._each).to(f.device), samples[half]
            again = HessianProduct(self._loss, f[rows[at]], self._targets_of(own))
            part = self._gradient(f, rows[at], own)
            weight = _weight(moved[at], part)
            if not _are(moved[at], part, weight, self._near):
                return False
            pair = curved[at], self._of(again(v[at], keep=False))
            if not _are(*pair, weight, self._near_again):
                return False
        return bool(curved.any())

    def _whole(self, moved: list[Tensor]) -> Tensor:
        """Return the gradient where half of the rows, handed over, have moved."""
        with torch.enable_grad():
            at = moved.pop()
            at.add_(at.new_zeros((), requires_grad=True))
            edge = get_gradient_edge(at)
            value = self._loss(at, self._targets)
            del at
        return self._of(*torch.autograd.grad(value, [edge]))

    def _moved(self, f: Tensor, rows: Tensor) -> Tensor:
        """Return rows where they have moved towards zero, but for those that stay."""
        by_row = self._by_row[rows].view(-1, *(1,) * (f.ndim - 1))
        return f * (1 - by_row * self._within)


def _weight(whole: Tensor, part: Tensor) -> float:
    """Return the number times which a part is nearest to its rows of the whole."""
    whole, part = whole[..., :-1].double(), part[..., :-1].double()
    return float((whole * part).sum() / part.square().sum())


def _are(whole: Tensor, part: Tensor, weight: float, tolerance: float) -> bool:
    """Whether each row is that of the part times the weight, within its length."""
    length = whole[..., -1:]
    off = (whole - weight * part)[..., :-1].abs().amax(-1, keepdim=True)
    longer = (length - abs(weight) * part[..., -1:]).abs()
    return bool((torch.maximum(off, longer) <= tolerance * length).all())


def _width(shape: torch.Size) -> int:
    """Return the entries of what is compared as a row: of few samples a part of one."""
    rows, inner = shape[0], list(shape[1:])
    while rows < _ROWS and len(inner) > 1:
        rows *= inner.pop(0)
    return math.prod(inner)
