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
from typing import Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.collectives import go_on, most
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.excess import FEWEST_FOR_AN_ERROR, Slope
from torch_dropout_ir.regularizers.masked import NoiseSeen, dropout_risk
from torch_dropout_ir.sites import Site
from torch_dropout_ir.tracing import derivatives, recomputes

_BITS: Final = 30
_OTHERS: Final = (
    "dropout site `{}` acts otherwise than in the pass without noise: its linear part, "
    "which is taken away, is not known"
)


class PathParts:
    """Draws of the sites' parts; ``slopes`` are ``linear_parts``, an entry a use."""

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        loss: Loss,
        slopes: Sequence[Slope | None],
    ) -> None:
        self._pass = model, batch, loss
        self._slopes = slopes
        self._rare: dict[str, float] = {}  # elements in the minority, by site
        self._draws: list[dict[str, Tensor]] = []

    def draw(self, count: int) -> None:
        """Take ``count`` more draws, the squares of whose ``t`` are evenly spaced.

        Raises:
            RuntimeError: If a site acts that did not in the pass without noise.
        """  # noqa: DOC502 (in a pass)
        # The largest of some numbers has low bits of its own.
        drawn = most(int(torch.randint(2**62, (), device="cpu")), "path")
        begin = (drawn % 2**_BITS + 0.5) / 2**_BITS
        for k in range(count):
            self._draws.append(self._draw(math.sqrt((k + begin) / count)))

    @property
    def num_draws(self) -> int:
        """Number of draws taken so far."""
        return len(self._draws)

    def lacking(self) -> int:
        """Return how many more draws it takes to tell how far each part is off."""
        rare = [x for x in self._rare.values() if x]
        if not rare or min(rare) >= FEWEST_FOR_AN_ERROR:
            return 0
        drawn = len(self._draws)
        return math.ceil(FEWEST_FOR_AN_ERROR * drawn / min(rare)) - drawn

    def means(
        self, value: Tensor, error: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the part of each site and its standard error, like ``value``'s.

        NaN is the error where next to no mask element differs from the rest, or that of
        their sum is.
        """
        values, errors = {}, {}
        for name in self._draws[0]:
            terms = torch.stack([x[name] for x in self._draws])
            values[name] = terms.mean().to(value)
            off = (terms.std() / len(terms) ** 0.5).to(error)
            told = self._rare[name] >= FEWEST_FOR_AN_ERROR and not error.isnan()
            known = told or not terms.any()
            errors[name] = off if known else torch.full_like(error, math.nan)
        return values, errors

    def _draw(self, t: float) -> dict[str, Tensor]:
        """Return the term of each site at one mask and a share of its noise."""
        shares: list[Tensor] = []
        uses: list[tuple[Site, Tensor]] = []  # and the term's linear part

        def watch(site: Site, packed: Tensor, shape: torch.Size) -> None:
            if recomputes():  # a block under checkpointing
                return
            use = len(uses)
            known = use < len(self._slopes)
            slope = self._slopes[use] if known else None
            if not known or (slope is not None and slope.terms.shape != shape):
                raise RuntimeError(_OTHERS.format(site.name))
            rare = min(site.p, 1 - site.p) * (slope.live if slope is not None else 0)
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

        risk = dropout_risk(*self._pass, NoiseSeen(), watch=watch, along=along)
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
        if len(uses) != len(self._slopes):
            raise RuntimeError(_OTHERS.format(uses[-1][0].name if uses else ""))
        for (site, linear), share, slope in zip(uses, shares, found, strict=False):
            term = (0 if slope is None else slope.double()) - linear
            term = term / (2 * share.detach().double())
            if site.p >= 1:  # its mean is not zero
                term = term + linear
            terms[site.name] = terms.get(site.name, 0) + term
        return terms
