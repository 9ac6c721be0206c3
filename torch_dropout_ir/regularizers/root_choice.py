"""Which roots of the loss's Hessian a Gauss-Newton form takes, of parts of it too."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final, TypeAlias

import torch
from torch import Tensor

from torch_dropout_ir.collectives import alone
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.output_hessian import HessianRoots
from torch_dropout_ir.output_products import (
    ALL,
    HessianProduct,
    ProductRoots,
    Root,
    Rows,
    of_rows,
)
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.loss_parts import LossParts
from torch_dropout_ir.regularizers.loss_weight import blocks_fit
from torch_dropout_ir.regularizers.outputs import OutputsRead
from torch_dropout_ir.sample_blocks import Blocks
from torch_dropout_ir.softmax_roots import SoftmaxRoots

Roots: TypeAlias = "HessianRoots | SoftmaxRoots | ProductRoots"
_LARGE: Final = 2**16  # elements of the sites' inputs
_FEW: Final = 4  # outputs of a sample: half a millisecond, and a tenth of the spread


def choose(
    clean: CleanPass,
    read: OutputsRead,
    num_samples: int | None,
    product: HessianProduct | None,
) -> tuple[Roots | None, bool]:
    """Return the roots, and whether one sample's term depends on another's outputs.

    Roots of what is known of the Hessian, else of products with it; None where there
    are none.
    """
    loss, f = read.loss, read.tensors[0]
    if loss is not None and product is not None and loss.kind == "general":
        if product.blocks is not None and _enough(clean, f, product.blocks):
            return HessianRoots(loss, read.single, read.targets, product), False
    if loss is None or product is None or not f.ndim:
        couples, terms = read.couples(product=product), None
    elif loss.kind == "general":
        terms = product.terms
        couples = not (terms and terms.by_row) and read.couples(product=product)
        single = terms is not None and terms.log_softmax is None
        if single or (f.shape[0] == f.numel() and not couples):
            loss = Loss(loss.function, "elementwise", loss.reduction)
    else:
        couples, terms = False, None
    softmax = terms is not None and terms.log_softmax is not None
    known = loss is not None and loss.kind != "general"
    if not known and loss is not None and not couples:
        known = _blocks_pay(clean, f, num_samples, 0 if softmax else _FEW)
    if loss is not None and known:
        return HessianRoots(loss, read.single, read.targets, product), couples
    if product is not None and num_samples and terms is not None and softmax:
        return SoftmaxRoots(product, terms), couples
    if product is not None and f.ndim and num_samples:
        return ProductRoots(product, num_samples > 1 or clean.matters), couples
    return None, couples


def _enough(clean: CleanPass, f: Tensor, blocks: Blocks) -> bool:
    """Return whether blocks do: what is between samples is none of sites apart.

    Of many outputs not where memory matters, for roots of both signs keep a graph.
    """
    if f.shape[1:].numel() > _FEW and clean.matters:
        return False
    if not blocks.couples:
        return True
    # Samples draw by themselves then, as with a loss that is a sum over them.
    return alone() and clean.count(f) == len(f) and clean.samples_meet(f) is False


def _blocks_pay(clean: CleanPass, f: Tensor, num_samples: int | None, few: int) -> bool:
    """Return whether to take eigenvectors of the blocks of samples: they spread less.

    Beside a large network, with many draws or few outputs, they take little time;
    with ``few`` outputs of a sample they pay in any case.
    """
    width = f.shape[1:].numel()
    if num_samples is None or not blocks_fit(f):
        return blocks_fit(f)
    size = sum([h.numel() for _, h, _ in clean.uses])
    large = size >= _LARGE and f.numel() * width * width <= num_samples * size
    return large or width <= max(few, num_samples)


class PartRoots:
    """Roots for a loss that is the sum of itself on parts of the rows.

    What a part's own roots need is there for that part alone, and made again for each
    draw: beside the outputs, a root is all that is held.

    Attributes:
        like: The outputs.
        curved: Whether the Hessian is not zero.
    """

    def __init__(
        self,
        parts: LossParts,
        clean: CleanPass,
        outputs: Tensor,
        num_samples: int | None,
    ) -> None:
        self.like = outputs
        self._parts = parts
        self._num_samples = num_samples
        self._clean = clean
        self.curved = parts.curved or any(x.curved for _, x in self._each())

    def exact(self, rows: Rows = ALL) -> Iterator[Root]:
        """Yield what :meth:`HessianRoots.exact` does, each time made again by parts."""
        f = self.like
        for c in range(f.shape[1:].numel()):
            root, signs = torch.zeros_like(f), f.new_zeros(len(f))
            for own, roots in self._each():
                assert isinstance(roots, HessianRoots)
                root[own], signs[own] = next(islice(roots.exact(), c, None))
                del roots
            yield of_rows(root, rows), of_rows(signs, rows)

    def sample(self, rows: Rows = ALL) -> list[Root]:
        """Draw roots whose signed squares are the Hessian on average: at most two."""
        found: dict[float, Tensor] = {}
        for own, roots in self._each():
            for root, sign in roots.sample():
                assert not isinstance(sign, Tensor)
                if sign not in found:
                    found[sign] = torch.zeros_like(self.like)
                found[sign][own] = root
            del root, roots
        return [(of_rows(root, rows), sign) for sign, root in found.items()]

    def _each(self) -> Iterator[tuple[Tensor, Roots]]:
        """Yield the rows of each part and its own roots."""
        for k, own in enumerate(self._parts.rows):
            read = self._parts.read(k, [self.like[own]])
            roots, _ = choose(self._clean, read, self._num_samples, read.product())
            assert roots is not None  # a loss of one tensor has some
            del read
            yield own, roots
            del roots
