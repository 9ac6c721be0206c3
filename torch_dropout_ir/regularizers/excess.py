"""``R_drop - R_S`` over masks, with what is known to average out taken away.

Semantics:

* To first order in the noise, ``R_drop - R_S`` is ``sum_j g_j h_j eta_j``, whose mean
  over masks is zero and whose size is what makes R_1 hard to see. ``g`` costs one
  backward pass for all masks.
* Each draw is corrected by a multiple of its own linear part; the multiple is the
  regression coefficient over the *other* draws, hence independent of this one, and the
  mean stays unbiased. Where the network is far from linear at its noise, the
  coefficient, and with it the correction, goes to zero.
* Where next to no mask element differs from the rest (``p`` near 0 or 1, few units, few
  draws), the draws tell nothing of their spread: there is no standard error then, and
  where they are few, no fit. Units that are 0, as behind a ReLU, do not count.
* Ranks that measure together draw together: where their passes meet, a mask moves the
  losses of all, and what is independent of the others is the draw of all of them.
* Antithetic masks would take away the same part, but only at ``p = 1/2``.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.collectives import every, joined, some
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.generators import AllStanding
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.clean_pass import clean_pass
from torch_dropout_ir.regularizers.first_order import FirstOrder
from torch_dropout_ir.regularizers.masked import NoiseSeen, clean_risk, dropout_risk
from torch_dropout_ir.sites import Site
from torch_dropout_ir.tracing import mapped

# Elements that are in the minority, dropped or kept, expected over all draws. With
# fewer the errors of tiny networks did not cover, p from 0.001 to 0.999.
FEWEST_FOR_AN_ERROR: Final = 20
_FEWEST_FOR_A_FIT: Final = 100
TOO_ALIKE: Final = (
    "no standard error: next to no mask element differs from the rest; take more masks,"
    " outside of `frozen_masks`, of a model that does not seed the generators"
)


class ExcessRisk:
    """Draws of ``R_drop - R_S`` on one batch.

    Attributes:
        first: What sites add to first order, as given or by a pass of its own.
        noisy: Whether the model draws other noise than dropout's.
        seen: What the passes have shown of the noise.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        loss: Loss,
        first: FirstOrder | None = None,
    ) -> None:
        self._model = model
        self._batch = batch
        self._loss = loss
        self._excess: list[Tensor] = []
        self._linear: list[Tensor] = []
        self._minority: float | None = None  # None: no mask was seen
        self._first, self._differ = list[Tensor](), False  # masks, until others come
        self.seen = NoiseSeen()
        began = AllStanding(model)
        with torch.no_grad():
            # The mean of squares is a view of all of them.
            self._clean = clean_risk(model, batch, loss).clone()
        # Other noise than dropout's is drawn afresh for each mask, once for both sides.
        self.noisy = some(began.moved(), "noise")
        if first is None:

            def risk(outputs: object) -> Tensor:
                return loss(outputs, batch[1])

            with clean_pass(model, batch[0], reduce=risk) as clean:
                first = FirstOrder.of_risk(clean, clean.outputs)
        self.first = first

    @torch.no_grad()
    def draw(self, num_masks: int) -> None:
        """Run the model at ``num_masks`` more masks."""
        for _ in range(num_masks):
            self._draw()

    def _draw(self) -> None:
        linear = self._clean.new_zeros((), dtype=torch.float64)
        use, slope_of = 0, self.first.of_pass()

        def watch(site: Site, packed: Tensor, shape: torch.Size) -> None:
            nonlocal linear, use
            slope = slope_of(site.name, shape)
            live = slope.live if slope is not None else 0
            self._compare(use, packed)
            use += 1
            if 0 < site.p < 1:
                rare = min(site.p, 1 - site.p) * (live or shape.numel())
                self._minority = (self._minority or 0.0) + rare
            if slope is not None and site.p < 1:
                linear = linear + slope.at(packed, site.p)

        began = AllStanding(self._model) if self.noisy else None
        masked = dropout_risk(
            self._model, self._batch, self._loss, self.seen, watch=watch
        )
        with masked as risk:
            value = risk
        clean = self._clean
        if began is not None:
            began.restore()
            clean = clean_risk(self._model, self._batch, self._loss, keyed=True)
        self._excess.append((value - clean).double())
        self._linear.append(linear)

    def _compare(self, use: int, packed: Tensor) -> None:
        """Look whether the masks are those of the first draw, as frozen ones are.

        Inside a transform they cannot be looked at, and are taken for others.
        """
        if mapped(packed):
            self._differ = True
        elif not self._excess:
            self._first.append(packed)
        elif not self._differ:
            known = self._first[use : use + 1]
            if not (known and torch.equal(packed, known[0])):
                self._first, self._differ = [], True

    @property
    def num_masks(self) -> int:
        """Number of masks drawn so far."""
        return len(self._excess)

    def corrected(self) -> Tensor:
        """Return the draws less their linear parts, float64 ``[num_masks]``."""
        return self._corrected()[0]

    def _corrected(self) -> tuple[Tensor, bool]:
        """Return the corrected draws, and whether there was something to fit."""
        excess, linear = (joined(torch.stack(x)) for x in (self._excess, self._linear))
        enough = every(self.can_fit, "fit") and len(linear) > 4
        if not (enough and bool(linear.any()) and bool(linear.isfinite().all())):
            return excess, False
        # Slope over the other draws; where those are all alike there is none.
        others = len(excess) - 1
        x, c = excess.sum() - excess, linear.sum() - linear
        covariance = (excess * linear).sum() - excess * linear - x * c / others
        squares = linear.square().sum() - linear.square()
        variance = squares - c.square() / others
        known = variance > 1e-9 * squares
        slopes = torch.where(known, covariance / torch.where(known, variance, 1.0), 0.0)
        return excess - slopes * linear, True

    @property
    def knows_its_error(self) -> bool:
        """Whether the masks differ often enough to tell how far the mean is off.

        Where each pass seeds the generators they are the same.
        """
        if self._minority is None:
            return True
        return self._differ and self._minority >= FEWEST_FOR_AN_ERROR

    def lacking(self) -> int:
        """Return how many more masks it takes to tell how far the mean is off.

        It depends on ``p`` and shapes alone, so that the mean stays unbiased.
        """
        if not self._minority or self._minority >= FEWEST_FOR_AN_ERROR:
            return 0
        drawn = len(self._excess)
        return math.ceil(FEWEST_FOR_AN_ERROR * drawn / self._minority) - drawn

    @property
    def can_fit(self) -> bool:
        """Whether the masks differ often enough to fit the linear part to them."""
        return self._minority is not None and self._minority >= _FEWEST_FOR_A_FIT

    def mean(self) -> tuple[Tensor, Tensor]:
        """Return the mean over masks and its standard error, 0-d; of all ranks as one.

        A fit to few draws spreads by more than the draws show: their variance is taken
        ``(K + 2) / (K - 1)`` times, which covers what was simulated from five draws on.
        NaN where the masks hardly differ.
        """
        draws, fitted = self._corrected()
        count = len(draws)
        variance = draws.var() / count
        if fitted:
            variance = variance * (count + 2) / (count - 1)
        # No difference of losses is known better than they are.
        size = joined(self._clean.double()).abs()
        error = torch.maximum(
            variance.sqrt(), size * torch.finfo(self._clean.dtype).eps
        )
        if not every(self.knows_its_error, "error"):
            error = torch.full_like(error, float("nan"))
        return draws.mean().to(self._clean), error.to(self._clean)

    def stopping_bias(self) -> Tensor:
        r"""Return the bias of the mean where the draws stop at a relative error, 0-d.

        Where ``K`` is the number of draws at which :math:`s^2 / K = r^2 m^2`, Wald's
        identity :math:`E[K (m - \mu)] = 0` makes the bias of ``m`` that of :math:`-
        \mathrm{Cov}(\log K, m)`, and :math:`\log K` moves as :math:`\log s^2 - 2 \log
        m`: :math:`2 s^2 / (K m) - \mu_3 / (K s^2)`, to second order in ``r``.
        """
        draws = self.corrected()
        mean, variance = draws.mean(), draws.var(correction=0)
        third = (draws - mean).pow(3).mean()
        bias = (2 * variance / mean - third / variance) / len(draws)
        return bias.to(self._clean)
