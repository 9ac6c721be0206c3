r"""The parts of R_1 that sites make, which add up to it.

Semantics:

* From no noise to all of it, with a share ``t`` of the noise of every site, the loss
  changes by :math:`R_{drop}(\eta) - R_S = \int_0^1 \sum_s \langle h_s \eta_s, g_s(t
  \eta) \rangle dt`, with the derivative ``g_s`` in what a site passes on. The mean over
  masks of a site's term is its part (Aumann & Shapley 1974, *Values of non-atomic
  games*; for networks Sundararajan, Taly & Yan 2017): parts add up to R_1, and are
  those of second order where the noise is small.
* A draw is one mask and one ``t``, in a pass there and back for all sites. Less its
  linear part, whose mean is known, the term grows as ``t``: drawn with density ``2 t``
  it is :math:`\langle h_s \eta_s, g_s(t \eta) - g_s(0) \rangle / 2 t`, which is
  unbiased and hardly spreads by ``t``. What it does spread by is in the error, though
  the ``t`` of several draws are evenly spaced.
* Nothing is differentiated twice, and nothing asked of model or loss: samples may meet,
  and the loss may be piecewise linear or the model's own.
* Ranks that measure together go along one path: they have the same ``t``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from torch_dropout_ir.collectives import go_on, most
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.checks import check_reachable
from torch_dropout_ir.regularizers.excess import FEWEST_FOR_AN_ERROR
from torch_dropout_ir.regularizers.first_order import FirstOrder
from torch_dropout_ir.regularizers.masked import NoiseSeen, dropout_risk
from torch_dropout_ir.sites import Site
from torch_dropout_ir.tracing import derivatives, recomputes

_BITS: Final = 30
_NOT_FINITE: Final = (
    "parts of sites: expected derivatives under dropout that are finite, got others by "
    "way of `{}`, as of a square root or a norm at 0. R_1 itself needs none"
)


class Parts(NamedTuple):
    """The part of each site, and its standard error; ``drawn`` how often."""

    values: dict[str, Tensor]
    errors: dict[str, Tensor]
    drawn: int = 0


class PathParts:
    """Draws of the sites' parts; ``first`` is what they add to first order."""

    def __init__(
        self, model: nn.Module, batch: Batch, loss: Loss, first: FirstOrder
    ) -> None:
        self._pass = model, batch, loss
        self._first = first
        self._rare: dict[str, float] = {}  # elements in the minority, by site
        self._draws: list[dict[str, Tensor]] = []
        self._constant = True  # parameters, whose derivatives nobody asks for

    def parts(self, value: Tensor, error: Tensor, count: int, limit: int = 0) -> Parts:
        """Return the parts of R_1, of which ``value`` and ``error`` are given.

        That of a single site is R_1 itself. Of several it is of ``count`` draws, or as
        many as tell the errors where that are no more than ``limit``: else the error is
        NaN, as where that of R_1 is.

        Raises:
            RuntimeError: If derivatives do not reach a site.
            ValueError: If a part is not finite.
        """  # noqa: DOC502 (`check_reachable` raises)
        sites = self._first.sites
        if len(sites) < 2:
            return Parts(dict.fromkeys(sites, value), dict.fromkeys(sites, error))
        check_reachable("parts of sites", self._first.unreachable)
        self._draw_all(count)
        if count < (needed := self._needed()) <= limit:
            self._draw_all(needed - count)
        values, errors = {}, {}
        zero = value.new_zeros((), dtype=torch.float64)
        for name in dict.fromkeys(name for x in self._draws for name in x):
            terms = torch.stack([x.get(name, zero) for x in self._draws])
            values[name] = terms.mean().to(value)
            if not terms.isfinite().all():
                raise ValueError(_NOT_FINITE.format(name))
            off = (terms.std() / len(terms) ** 0.5).to(error)
            told = self._rare[name] >= FEWEST_FOR_AN_ERROR and not error.isnan()
            known = told or not terms.any()
            errors[name] = off if known else torch.full_like(error, math.nan)
        return Parts(values, errors, len(self._draws))

    def _draw_all(self, count: int) -> None:
        """Take more draws, the squares of whose ``t`` are evenly spaced."""
        # The largest of some numbers has low bits of its own.
        drawn = most(int(torch.randint(2**62, (), device="cpu")), "path")
        begin = (drawn % 2**_BITS + 0.5) / 2**_BITS
        for k in range(count):
            t, rare = math.sqrt((k + begin) / count), dict(self._rare)
            try:
                found = self._draw(t)
            except CheckpointError:  # a block runs again, with the model's own
                if not self._constant:
                    raise
                self._constant, self._rare = False, rare
                found = self._draw(t)
            self._draws.append(found)

    def _needed(self) -> int:
        """Return how many draws it takes to tell how far each part is off."""
        rare = [x / len(self._draws) for x in self._rare.values() if x]
        return math.ceil(FEWEST_FOR_AN_ERROR / min(rare)) if rare else 0

    def _draw(self, t: float) -> dict[str, Tensor]:
        """Return the term of each site at one mask and a share of its noise."""
        shares: list[Tensor] = []
        uses: list[tuple[Site, Tensor]] = []  # and the term's linear part
        known = self._first.of_pass()

        def watch(site: Site, packed: Tensor, shape: torch.Size) -> None:
            if recomputes():  # a block under checkpointing
                return
            slope = known(site.name, shape)  # where it is not, terms spread more
            live = slope.live if slope is not None else 0
            rare = min(site.p, 1 - site.p) * (live or shape.numel())
            if site.p >= 1:  # what drops everything always does so
                rare = math.inf
            self._rare[site.name] = self._rare.get(site.name, 0.0) + rare
            linear = torch.zeros((), dtype=torch.float64, device=packed.device)
            if slope is not None:
                linear = slope.at(packed, site.p)
            uses.append((site, linear))

        def along(h: Tensor, dropped: Tensor) -> Tensor:
            share = h.new_tensor(t).requires_grad_()
            shares.append(share)
            return h + share * (dropped - h)

        risk = dropout_risk(
            *self._pass, NoiseSeen(), watch=watch, along=along, constant=self._constant
        )
        with torch.enable_grad(), risk as value:
            go_on("backward")
            found: Sequence[Tensor | None] = [None] * len(uses)
            if value.requires_grad:
                found = derivatives(value, shares[: len(uses)], None, False)
        return self._terms(uses, shares, found)

    def _terms(
        self,
        uses: Sequence[tuple[Site, Tensor]],
        shares: Sequence[Tensor],
        found: Sequence[Tensor | None],
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for (site, linear), share, slope in zip(uses, shares, found, strict=False):
            term = (0 if slope is None else slope.double()) - linear
            term = term / (2 * share.detach().double())
            if site.p >= 1:  # its mean is not zero
                term = term + linear
            terms[site.name] = terms.get(site.name, 0) + term
        return terms
