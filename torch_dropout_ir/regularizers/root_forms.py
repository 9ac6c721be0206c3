"""The Gauss-Newton form of a pass: roots of the loss's Hessian sent to the sites."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from torch_dropout_ir.collectives import alone, every, some
from torch_dropout_ir.output_hessian import HessianRoots
from torch_dropout_ir.output_products import (
    ALL,
    HessianProduct,
    ProductRoots,
    Root,
    Rows,
)
from torch_dropout_ir.registration import COMPILED, form_sums
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.coupling import alike, apart, row_weight, row_weights
from torch_dropout_ir.regularizers.outputs import OutputsRead
from torch_dropout_ir.regularizers.root_choice import PartRoots, Roots, choose
from torch_dropout_ir.regularizers.site_curvature import SiteCurvature
from torch_dropout_ir.regularizers.site_forms import Form, Sums, by_sample, rows_of_form
from torch_dropout_ir.row_powers import by_powers


class RootForms:
    """The Gauss-Newton forms of a loss, in a pass over all rows or some of them.

    They are made of ``roots``, chosen where None are given. Without a root, products
    with the Hessian take its place.

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
        roots: PartRoots | None = None,
    ) -> None:
        self.num_samples = num_samples
        self._roots: Roots | PartRoots | None = roots
        self.loss_couples = False
        if roots is None:
            self._roots, self.loss_couples = choose(clean, read, num_samples, product)
        # Of what there is when the graph has been let go.
        self._count = clean.count(read.tensors[0]) if num_samples is None else 0
        self.rooted = self._roots is not None
        of_products = isinstance(self._roots, (PartRoots, ProductRoots))
        self.one_pass = num_samples == 1 and self.rooted and not of_products
        self._may_keep = roots is None

    @property
    def curved(self) -> bool:
        """Whether the Hessian is known not to be zero."""
        return self._roots is not None and self._roots.curved

    def may_keep(self, clean: CleanPass, read: OutputsRead) -> bool:
        """Whether one graph does for all draws, in the memory of a step."""
        may = self._may_keep and clean.weighed(read.tensors).may_keep(self.rooted)
        return every(may, "graph kept")

    def roots(self, coupled: bool) -> Iterator[tuple[int, Root, bool]]:
        """Yield the number of a draw, a signed root of all rows, if it is the last."""
        assert self._roots is not None
        if self.num_samples is None:
            assert isinstance(self._roots, (HessianRoots, PartRoots))
            roots = apart(self._count, coupled, self._roots.exact())
            following = next(roots, None)
            while following is not None:
                root, following = following, next(roots, None)
                yield 0, root, following is None
            return
        for draw in range(self.num_samples):
            drawn = self._drawn()
            for k in range(len(drawn)):  # the one that is made is held by who asks
                last = k + 1 == len(drawn) and draw + 1 == self.num_samples
                yield draw, drawn[k], last

    def _drawn(self, rows: Rows = ALL) -> Sequence[Root]:
        """Draw roots, one of each sign that there is on any rank."""
        assert self._roots is not None
        drawn = self._roots.sample(rows)
        if alone():
            return drawn
        below = [not isinstance(sign, Tensor) and sign < 0 for _, sign in drawn]
        roots: list[Root] = []
        for sign in (1.0, -1.0):
            pairs = zip(drawn, below, strict=True)
            own = [root for root, negative in pairs if negative == (sign < 0)]
            if some(bool(own), "roots"):
                roots += own or [(torch.zeros_like(drawn[0][0]), sign)]
        return roots

    def sums(
        self, clean: CleanPass, read: OutputsRead, *, keep: bool = True
    ) -> Sums | None:
        """Draw a root and add its forms up; None if :meth:`draws` is to be asked."""
        outputs = read.tensors[0]
        told = COMPILED and outputs.is_cpu and self.num_samples == 1
        if self._roots is None or not told or clean.matters:
            return None
        meet = clean.samples_meet(outputs) if _alike(clean, outputs) else None
        if meet is None or not clean.uses:
            return None
        roots, count = self._drawn(), clean.count(outputs)
        inputs, gradients, factors, rows, units, numbers = [], [], [], [], [], []
        sites: dict[str, int] = {}
        for k in range(len(roots)):
            root, sign = roots[k]
            assert not isinstance(sign, Tensor)
            pulled = clean.derivatives(outputs, root, keep or k + 1 < len(roots))
            del root
            uses = zip(clean.uses, clean.mask_shapes, pulled, strict=True)
            for (site, h, _), shape, g in uses:
                if g is None:
                    continue
                inputs.append(plain(h))
                gradients.append(g)
                factors.append(site.variance / 2 * sign)
                rows.append(rows_of_form(shape, count))
                units.append(math.prod(shape) // max(1, rows[-1]))
                numbers.append(sites.setdefault(site.name, len(sites)))
        meet = meet or self.loss_couples
        if not inputs:
            zero = self._roots.like.new_zeros(())
            return Sums([zero, zero.clone()], [], meet)
        summed = form_sums(inputs, gradients, factors, rows, units, numbers)
        return Sums(summed, list(sites), meet)

    def draws(
        self,
        clean: CleanPass,
        read: OutputsRead,
        *,
        coupled: bool | None = None,
        rows: Rows = ALL,
        keep: bool = True,
    ) -> tuple[list[list[Form]], bool]:
        """Return draws of the forms, the exact sum as one, and whether samples meet.

        ``coupled`` tells that of the network; None to find it out. ``rows`` are those
        of the batch that the pass is of.
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
            assert isinstance(self._roots, (HessianRoots, PartRoots))
            roots = apart(clean.count(outputs), coupled, self._roots.exact(rows))
            pulled = (pull_root(clean, outputs, root, sign) for root, sign in roots)
            return [added_up(chain.from_iterable(pulled))], bool(coupled)
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
            roots = self._drawn(rows)
            forms: list[Form] = []
            meet = False
            for j in range(len(roots)):
                root, sign = roots[j]
                last = k + 1 == self.num_samples and j + 1 == len(roots)
                needed = keep or not last or coupled is None
                plain: dict[int, Tensor] | None = {} if coupled is None else None
                pulled = pull_root(clean, outputs, root, sign, needed, plain)
                forms = add_up(forms, pulled) if forms else pulled
                if plain is not None and count is not None:
                    # What a root misses is 0 in its form too.
                    scaled = by_powers(root, count=count)
                    found = row_weights(clean.pull, outputs, scaled)
                    meet |= not alike(plain, found, count)
                    del scaled
                del root
            coupled = coupled or meet
            draws.append(forms)
        return draws, bool(coupled)


def add_up(forms: list[Form], more: list[Form]) -> list[Form]:
    """Return the sums of forms of the same uses."""
    pairs = zip(forms, more, strict=True)
    return [(name, form + other) for (name, form), (_, other) in pairs]


def _alike(clean: CleanPass, outputs: Tensor) -> bool:
    """Whether one operation can read all there is."""
    dtype, device = outputs.dtype, outputs.device
    return dtype in (torch.float32, torch.float64) and all([
        type(h) is Tensor and h.dtype == dtype and h.device == device
        for _, h, _ in clean.uses
    ])


def plain(h: Tensor) -> Tensor:
    """Return a tensor without its graph."""
    return h.detach() if h.requires_grad else h


def pull_root(
    clean: CleanPass,
    outputs: Tensor,
    root: Tensor,
    sign: Tensor | float,
    keep: bool = True,
    weights: dict[int, Tensor] | None = None,
) -> list[Form]:
    """Return the quadratic form of each use, summed over units, by sample.

    ``weights`` is filled with what :func:`row_weights` gives, if there.
    """
    squares: dict[int, Tensor] = {}
    count = clean.count(outputs)

    def receive(use: int, g: Tensor) -> None:
        (site, h, _), shape = clean.uses[use], clean.mask_shapes[use]
        shared = plain(h) * g
        if shared.shape != shape:
            shared = shared.sum_to_size(shape)
        # In place where memory matters; else by what has just been done.
        shared = shared.square_() if clean.matters else shared * shared
        _, squares[use] = by_sample(site, shared, count)
        if weights is not None:
            weights[use] = row_weight(g)

    clean.pull(outputs, root, receive, keep=keep)
    return [
        (site.name, site.variance / 2 * _each(sign, squares[use]) * squares[use])
        for use, (site, _, _) in enumerate(clean.uses)
        if use in squares
    ]


def added_up(forms: Iterable[Form]) -> list[Form]:
    """Return the sum of each site's forms: of an exact sum they are very many."""
    sums: dict[str, Tensor] = {}
    for name, form in forms:
        part = form.sum(dtype=torch.float64)
        sums[name] = sums[name] + part if name in sums else part
        dtype = form.dtype
    return [(name, whole.to(dtype)) for name, whole in sums.items()]


def _each(sign: Tensor | float, rows: Tensor) -> Tensor | float:
    """Return the sign of each row of a use, of which a sample may have several."""
    if not isinstance(sign, Tensor) or sign.numel() == rows.numel():
        return sign
    return sign.repeat_interleave(rows.numel() // sign.numel())
