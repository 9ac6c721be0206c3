"""The Gauss-Newton form of a pass: roots of the loss's Hessian sent to the sites."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.output_hessian import ALL, HessianRoots, Root, Rows
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.coupling import alike, by_powers
from torch_dropout_ir.regularizers.outputs import OutputsRead
from torch_dropout_ir.regularizers.site_curvature import SiteCurvature
from torch_dropout_ir.regularizers.site_forms import Form, by_row

_MOST_BLOCK_ELEMENTS: Final = 2**24


class RootForms:
    """The Gauss-Newton forms of a loss, in a pass over all rows or some of them.

    Where the Hessian has no root that could be computed, products with it take the
    place of the roots.

    Args:
        read: What the loss reads of the outputs of all rows.
        targets: The targets, or None.
        num_samples: Random roots; None for the exact sum.

    Attributes:
        one_pass: Whether it takes a single pass backward.
        loss_couples: Whether the loss couples samples.
    """

    def __init__(
        self, read: OutputsRead, targets: Any, num_samples: int | None
    ) -> None:
        self._num_samples = num_samples
        self._roots = None
        if read.loss is not None and _has_roots(read):
            self._roots = HessianRoots(read.loss, read.single, targets)
        self.one_pass = num_samples == 1 and self._roots is not None
        self.loss_couples = self._roots is None and read.couples()

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
        if self._roots is None or self._num_samples is None:
            if coupled is None:
                coupled = bool(clean.uses) and clean.couples_samples(read.tensors)
        if self._roots is None:
            curvature = SiteCurvature(clean, read, linearized=True)
            meet = coupled or self.loss_couples
            return curvature.draws(self._num_samples, bool(meet)), bool(coupled)
        outputs = read.tensors[0]
        if self._num_samples is None:
            roots = _apart(bool(coupled), self._roots.exact(rows))
            forms = [
                f for root, sign in roots for f in _pull(clean, outputs, root, sign)
            ]
            return [forms], bool(coupled)
        return self._sampled(clean, outputs, coupled, rows, keep)

    def _sampled(
        self,
        clean: CleanPass,
        outputs: Tensor,
        coupled: bool | None,
        rows: Rows,
        keep: bool,
    ) -> tuple[list[list[Form]], bool]:
        assert self._roots is not None and self._num_samples is not None
        coupled = clean.samples_meet(outputs) if coupled is None else coupled
        draws: list[list[Form]] = []
        for k in range(self._num_samples):
            roots = self._roots.sample(rows)
            forms: list[Form] = []
            meet = False
            for j, (root, sign) in enumerate(roots):
                last = k + 1 == self._num_samples and j + 1 == len(roots)
                needed = keep or not last or coupled is None
                plain: dict[int, Tensor] | None = {} if coupled is None else None
                forms += _pull(clean, outputs, root, sign, needed, plain)
                if plain is not None:  # what a root misses is 0 in its form too
                    meet |= not alike(
                        plain, clean.row_weights(outputs, by_powers(root))
                    )
            coupled = coupled or meet
            draws.append(forms)
        return draws, bool(coupled)


def _has_roots(read: OutputsRead) -> bool:
    """Whether the Hessian of each sample has a root that can be computed."""
    if read.loss is None:
        return False
    f = read.single
    if read.loss.kind != "general":
        return True
    if f.ndim == 0 or read.couples():
        return False
    return f.numel() * f[0].numel() <= _MOST_BLOCK_ELEMENTS


def _apart(coupled: bool, roots: Iterator[Root]) -> Iterator[Root]:
    """One root for each sample where samples are coupled, else all samples at once."""
    for root, sign in roots:
        if not coupled:
            yield root, sign
            continue
        for i in range(root.shape[0]):
            alone = torch.zeros_like(root)
            alone[i] = root[i]
            yield alone, sign[i] if isinstance(sign, Tensor) else sign


def _pull(
    clean: CleanPass,
    outputs: Tensor,
    root: Tensor,
    sign: Tensor | float,
    keep: bool = True,
    weights: dict[int, Tensor] | None = None,
) -> list[Form]:
    """Quadratic form of each use, summed over units: one entry a leading index.

    Args:
        clean: The pass.
        outputs: The outputs that the root is sent back from.
        root: The root.
        sign: Its sign, one for all or one a sample.
        keep: Whether the graph is kept.
        weights: Filled with what :meth:`CleanPass.row_weights` gives, if there.

    Returns:
        The forms, use by use.
    """
    squares: dict[int, Tensor] = {}

    def receive(use: int, g: Tensor) -> None:
        site, h, _ = clean.uses[use]
        shared, shape = h.detach() * g, site.mask_shape(h.shape)
        if shared.shape != shape:
            shared = shared.sum_to_size(shape)
        _, squares[use] = by_row(site, shared.square_())
        if weights is not None:
            weights[use] = clean.row_weight(g)

    clean.pull(outputs, root, receive, keep=keep)
    return [
        (site.name, site.variance / 2 * sign * squares[use])
        for use, (site, _, _) in enumerate(clean.uses)
        if use in squares
    ]
