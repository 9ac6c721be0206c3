"""The Gauss-Newton form of a pass: roots of the loss's Hessian sent to the sites."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from torch_dropout_ir.output_hessian import HessianRoots
from torch_dropout_ir.output_products import (
    ALL,
    HessianProduct,
    ProductRoots,
    Root,
    Rows,
)
from torch_dropout_ir.registration import form_sums
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.coupling import alike, by_powers
from torch_dropout_ir.regularizers.loss_graph import one_by_one
from torch_dropout_ir.regularizers.outputs import OutputsRead
from torch_dropout_ir.regularizers.root_pulls import plain, pull_root
from torch_dropout_ir.regularizers.site_curvature import SiteCurvature
from torch_dropout_ir.regularizers.site_forms import Form, Sums

_MOST_BLOCK_ELEMENTS: Final = 2**24
_LARGE: Final = 2**16  # elements of the sites' inputs
_FEW: Final = 4  # outputs of a sample: half a millisecond, and a tenth of the spread


class RootForms:
    """The Gauss-Newton forms of a loss, in a pass over all rows or some of them.

    Without a root, products with the Hessian take its place.

    Args:
        clean: The pass over all rows.
        read: What the loss reads of its outputs.
        num_samples: Random roots; None for the exact sum.
        product: Products with the loss's Hessian, where it has no closed form.

    Attributes:
        num_samples: Random roots; None for the exact sum.
        rooted: Whether there are roots.
        one_pass: Whether the graph is gone through for a single draw.
        loss_couples: Whether the loss couples samples.
    """

    def __init__(
        self,
        clean: CleanPass,
        read: OutputsRead,
        num_samples: int | None,
        product: HessianProduct | None,
    ) -> None:
        self.num_samples = num_samples
        self.loss_couples = False
        self._roots: HessianRoots | ProductRoots | None = None
        loss, f = read.loss, read.tensors[0]
        if loss is None or product is None or not f.ndim:
            self.loss_couples = read.couples(product=product)
        elif loss.kind == "general":
            alone = one_by_one(product.value, product.at)
            self.loss_couples = not alone and read.couples(product=product)
            if alone or (len(f) == f.numel() and not self.loss_couples):
                loss = dataclasses.replace(loss, kind="elementwise")
        blocks = not self.loss_couples and _blocks_pay(clean, f, num_samples)
        if loss is not None and (loss.kind != "general" or blocks):
            self._roots = HessianRoots(loss, read.single, read.targets, product)
        elif product is not None and f.ndim and num_samples:
            self._roots = ProductRoots(product, num_samples > 1 or clean.matters)
        self._count = clean.count(f)
        self.rooted = self._roots is not None
        self.one_pass = num_samples == 1 and isinstance(self._roots, HessianRoots)

    @property
    def curved(self) -> bool:
        """Whether the Hessian is known not to be zero."""
        return self._roots is not None and self._roots.curved

    def roots(self, coupled: bool) -> Iterator[tuple[int, Root]]:
        """Yield the roots of all rows, each with the number of its draw.

        Args:
            coupled: Whether samples meet in the network.

        Yields:
            The number, and a root with its sign.
        """
        assert self._roots is not None
        if self.num_samples is None:
            assert isinstance(self._roots, HessianRoots)
            for root in _apart(self._count, coupled, self._roots.exact()):
                yield 0, root
            return
        for draw in range(self.num_samples):
            for root in self._roots.sample():
                yield draw, root

    def sums(
        self, clean: CleanPass, read: OutputsRead, *, keep: bool = True
    ) -> Sums | None:
        """Draw one root and add its forms up at once, where a small pass can do that.

        Args:
            clean: The pass.
            read: What the loss reads of its outputs.
            keep: Whether its graph is kept.

        Returns:
            The sums; None, with nothing drawn, where :meth:`draws` has to be asked.
        """
        outputs = read.tensors[0]
        if self._roots is None or self.num_samples != 1 or clean.matters:
            return None
        meet = clean.samples_meet(outputs) if _alike(clean, outputs) else None
        if meet is None or not clean.uses:
            return None
        roots = self._roots.sample()
        found: list[tuple[int, Tensor, float]] = []
        for left, (root, sign) in zip(reversed(range(len(roots))), roots, strict=True):
            assert not isinstance(sign, Tensor)
            pulled = clean.derivatives(outputs, root, keep or bool(left))
            found += [(i, g, sign) for i, g in enumerate(pulled) if g is not None]
        meet = meet or self.loss_couples
        if not found:
            zero = self._roots.like.new_zeros(())
            return Sums([zero, zero.clone()], [], meet)
        uses, shapes = clean.uses, clean.mask_shapes
        summed = form_sums(
            [plain(uses[i][1]) for i, _, _ in found],
            [g for _, g, _ in found],
            [uses[i][0].variance / 2 * sign for i, _, sign in found],
            [shapes[i][0] if shapes[i] else 1 for i, _, _ in found],
            [math.prod(shapes[i][1:]) for i, _, _ in found],
        )
        return Sums(summed, [uses[i][0].name for i, _, _ in found], meet)

    def draws(
        self,
        clean: CleanPass,
        read: OutputsRead,
        *,
        coupled: bool | None = None,
        rows: Rows = ALL,
        keep: bool = True,
    ) -> tuple[list[list[Form]], bool]:
        """Return draws of the forms, the exact sum as a single one.

        Args:
            clean: The pass.
            read: What the loss reads of its outputs.
            coupled: Whether samples meet in the network; None to find that out.
            rows: The rows of the batch that the pass is of.
            keep: Whether its graph is kept.

        Returns:
            The draws, and whether samples meet in the network.
        """
        exact = self._roots is None or self.num_samples is None
        if exact and coupled is None:
            coupled = bool(clean.uses) and clean.couples_samples(read.tensors)
        if self._roots is None:
            curvature = SiteCurvature(clean, read, linearized=True)
            meet = coupled or self.loss_couples
            return curvature.draws(self.num_samples, bool(meet)), bool(coupled)
        outputs = read.tensors[0]
        if self.num_samples is None:
            assert isinstance(self._roots, HessianRoots)
            roots = _apart(clean.count(outputs), coupled, self._roots.exact(rows))
            pulled = (pull_root(clean, outputs, root, sign) for root, sign in roots)
            return [[form for forms in pulled for form in forms]], bool(coupled)
        return self._sampled(clean, outputs, coupled, rows, keep)

    def _sampled(
        self,
        clean: CleanPass,
        outputs: Tensor,
        coupled: bool | None,
        rows: Rows,
        keep: bool,
    ) -> tuple[list[list[Form]], bool]:
        assert self._roots is not None and self.num_samples is not None
        coupled = clean.samples_meet(outputs) if coupled is None else coupled
        count = clean.count(outputs) if coupled is None else None
        draws: list[list[Form]] = []
        for k in range(self.num_samples):
            roots = self._roots.sample(rows)
            forms: list[Form] = []
            meet = False
            for j, (root, sign) in enumerate(roots):
                last = k + 1 == self.num_samples and j + 1 == len(roots)
                needed = keep or not last or coupled is None
                plain: dict[int, Tensor] | None = {} if coupled is None else None
                forms += pull_root(clean, outputs, root, sign, needed, plain)
                if plain is not None and count is not None:
                    # What a root misses is 0 in its form too.
                    scaled = by_powers(root, count=count)
                    found = clean.row_weights(outputs, scaled)
                    meet |= not alike(plain, found, count)
            coupled = coupled or meet
            draws.append(forms)
        return draws, bool(coupled)


def _alike(clean: CleanPass, outputs: Tensor) -> bool:
    """Whether one operation can read all there is."""
    dtype, device = outputs.dtype, outputs.device
    return dtype in (torch.float32, torch.float64) and all([
        type(h) is Tensor and h.dtype == dtype and h.device == device
        for _, h, _ in clean.uses
    ])


def _blocks_pay(clean: CleanPass, f: Tensor, num_samples: int | None) -> bool:
    """Whether to take eigenvectors of the blocks of samples: they spread less.

    Beside a large network, with many draws or few outputs, they take little time.

    Args:
        clean: The pass over all rows.
        f: The outputs.
        num_samples: Random roots; None for the exact sum, which has no other way.

    Returns:
        Whether they pay.
    """
    width = f[0].numel()
    if f.numel() * width > _MOST_BLOCK_ELEMENTS or num_samples is None:
        return f.numel() * width <= _MOST_BLOCK_ELEMENTS
    size = sum([h.numel() for _, h, _ in clean.uses])
    large = size >= _LARGE and f.numel() * width * width <= num_samples * size
    return large or width <= max(_FEW, num_samples)


def _apart(count: int, coupled: bool | None, roots: Iterator[Root]) -> Iterator[Root]:
    """Take roots apart: outputs that meet do not share one.

    Args:
        count: Number of samples.
        coupled: Whether they meet; else only the rows of each do.
        roots: The roots, of all rows of the outputs.

    Yields:
        One root for each row where samples meet; else one for the rows that have the
        same place in all samples.
    """
    for root, sign in roots:
        rows = root.shape[0]
        apart = rows if coupled else rows // max(1, count)
        if apart < 2 and not coupled:
            yield root, sign
            continue
        for i in range(apart):
            alone = torch.zeros_like(root)
            alone[i::apart] = root[i::apart]
            yield alone, sign[i::apart] if isinstance(sign, Tensor) else sign
