"""Squared norms of gradients at pairs of masks, and of mini-batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.arrivals import arrivals
from torch_dropout_ir.collectives import go_on
from torch_dropout_ir.functional import Batch, parameters
from torch_dropout_ir.gradient_factors import address
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.checks import check_differentiable
from torch_dropout_ir.regularizers.gradient_means import GradientMeans
from torch_dropout_ir.regularizers.inner_products import (
    Gradient,
    compared,
    wide_dtype,
)
from torch_dropout_ir.regularizers.masked import NoiseSeen, dropout_risk
from torch_dropout_ir.weight_parts import WeightParts

# Entries of a gradient that are made at a time: a share of all, within these.
_SHARE: Final = 16
_FEWEST: Final = 2**11
_MOST: Final = 2**16


class GradientPairs:
    """Squared norms of the gradients of one model, weighted by learning rates."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        rates: Sequence[float],
        shared_mask: bool,
    ) -> None:
        self._model = model
        self._loss = loss
        self._rates = rates
        self._targets = list(parameters(model).values())
        share = sum(x.numel() for x in self._targets) // _SHARE
        self._entries = min(_MOST, max(_FEWEST, share))
        self._shared_mask = shared_mask
        self._remake = True  # dropped inputs of layers, as they go backward
        self.seen = NoiseSeen()
        self.risk: Tensor | float = 0.0  # the sum of all losses

    def _gradients(
        self, batch: Batch, receive: Callable[[int, Gradient], None]
    ) -> None:
        """Draw masks; give each parameter's gradient away as it comes, by number."""
        if self._remake and not self._pass(batch, receive):
            self._remake = False  # of a model that writes on what it has dropped
        if not self._remake:
            self._pass(batch, receive)

    def _pass(self, batch: Batch, receive: Callable[[int, Gradient], None]) -> bool:
        """Return whether the pass could go backward."""

        def take(i: int, g: Tensor) -> None:
            receive(i, g.to_dense() if g.is_sparse else g)

        parts = WeightParts(self._targets, receive)
        masked = dropout_risk(
            self._model,
            batch,
            self._loss,
            self.seen,
            shared_mask=self._shared_mask,
            note=parts.note if self._remake else None,
        )
        with arrivals(self._targets, take), torch.enable_grad(), parts, masked as value:
            check_differentiable("gradient_norm", value)
            if parts.overwritten():
                return False
            self.risk = self.risk + value.detach()
            parts.settle(value)
            go_on("backward")
            torch.autograd.grad(value, self._targets, allow_unused=True)
        return True

    def within(self, batch: Batch, num_masks: int, means: GradientMeans) -> Tensor:
        """Return value, mean, and mask noise of one batch, each from all of its masks.

        ``means`` is filled with the mean gradients of the masks that it counts.
        """
        found = self._table()
        self._gradients(batch, means.enter)
        for k in range(1, num_masks):
            missed = means.numbers()
            enter = functools.partial(self._enter, found, means, missed, k)
            self._gradients(batch, enter)
            for i in missed.copy():  # at these masks the loss does not depend on it
                enter(i, None)
        counts = num_masks, num_masks * (num_masks - 1) / 2, num_masks - 1
        return self._sum(found) / found[0].new_tensor(counts)

    def _enter(
        self,
        found: list[Tensor],
        means: GradientMeans,
        missed: set[int],
        k: int,
        i: int,
        g: Gradient | None,
    ) -> None:
        """Take the gradient of parameter ``i`` at mask ``k`` into sums and means."""
        missed.discard(i)
        over = k == means.count
        mean = means.take(i) if over else means.get(i)
        square, first, inner, away = self._compared(i, g, mean)
        square = square + first if k == 1 else square  # that of the mean of one
        found[i] += torch.stack((square, k * inner, k / (k + 1) * away))
        if not over:
            means.enter(i, g, k)

    def beside(self, batch: Batch, num_masks: int, means: GradientMeans) -> Tensor:
        """Return the value of a batch and its inner product with a mean gradient."""
        found = self._table()

        def take(i: int, g: Gradient) -> None:
            square, _, inner, away = self._compared(i, g, means.get(i))
            found[i] += torch.stack((square, inner, away))

        for _ in range(num_masks):
            self._gradients(batch, take)
        return self._sum(found)[:2] / num_masks

    def across(self, a: Batch, b: Batch, num_masks: int) -> Tensor:
        """Return value, mean, mask noise (of the first) and batch noise of two."""
        means = self._means(a, num_masks)
        first, _, noise = self.within(a, num_masks, means)
        second, inner = self.beside(b, num_masks, means)
        value = (first + second) / 2
        return torch.stack((value, inner, noise, value - noise - inner))

    def pair(self, batch: Batch) -> Tensor:
        """Return value, mean, mask noise and batch noise, which is 0, of two masks."""
        found = self.within(batch, 2, self._means(batch, 1))
        return torch.cat((found, found.new_zeros(1)))

    def _means(self, batch: Batch, count: int) -> GradientMeans:
        given = (x for x in Inputs.of(batch[0]).leaves() if isinstance(x, Tensor))
        inputs = {address(x) for x in given}
        return GradientMeans(self._targets, count, inputs, self._entries)

    def _compared(self, i: int, a: Gradient | None, b: Gradient | None) -> Tensor:
        return compared(a, b, self._targets[i], self._entries)

    def _table(self) -> list[Tensor]:
        return [x.new_zeros(3, dtype=wide_dtype(x).to_real()) for x in self._targets]

    def _sum(self, found: list[Tensor]) -> Tensor:
        pairs = zip(self._rates, found, strict=True)
        return torch.stack([rate / 4 * x for rate, x in pairs]).sum(0)
