"""Roots of the loss's Hessian in the outputs, made of a part of the rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from torch_dropout_ir.output_hessian import HessianRoots
from torch_dropout_ir.output_products import ALL, Root, Rows, of_rows
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.loss_parts import LossParts
from torch_dropout_ir.regularizers.root_choice import Roots, choose


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
        self.curved = parts.curved or any(_curved(x) for _, x in self._each())

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


def _curved(roots: Roots) -> bool:
    """Whether a part's Hessian is known not to be zero, or a draw shows it."""
    return roots.curved or (bool(roots.sample()) and roots.curved)
