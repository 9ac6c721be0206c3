"""Squared norms of gradients at pairs of masks, and of mini-batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from torch_dropout_ir.arrivals import arrivals
from torch_dropout_ir.collectives import go_on
from torch_dropout_ir.functional import Batch, parameters
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.checks import check_differentiable
from torch_dropout_ir.regularizers.inner_products import (
    compared,
    products,
    wide_dtype,
)
from torch_dropout_ir.regularizers.masked import NoiseSeen, dropout_risk
from torch_dropout_ir.weight_parts import Factors, WeightParts


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
        self._shared_mask = shared_mask
        self.seen = NoiseSeen()
        self.risk: Tensor | float = 0.0  # the sum of all losses

    def _gradients(
        self,
        batch: Batch,
        receive: Callable[[int, Tensor], None],
        factors: Callable[[int, Factors], None] | None = None,
    ) -> None:
        """Draw masks; give each parameter's gradient away as it comes, by number."""

        def take(i: int, g: Tensor) -> None:
            receive(i, g.to_dense() if g.is_sparse else g)

        parts = WeightParts(self._targets, factors)

        masked = dropout_risk(
            self._model,
            batch,
            self._loss,
            self.seen,
            shared_mask=self._shared_mask,
        )
        with arrivals(self._targets, take), torch.enable_grad(), parts, masked as value:
            check_differentiable("gradient_norm", value)
            self.risk = self.risk + value.detach()
            parts.settle(value)
            go_on("backward")
            torch.autograd.grad(value, self._targets, allow_unused=True)

    def within(self, batch: Batch, num_masks: int, mean: dict[int, Tensor]) -> Tensor:
        """Return value, mean, and mask noise of one batch, each from all of its masks.

        ``mean`` is filled with the mean gradient by number of the parameter.
        """
        found = self._table()
        for k in range(num_masks):
            missed = set(mean)
            receive = functools.partial(self._add, found, mean, missed, k)
            self._gradients(batch, receive)
            if k == 0:
                _take_apart(mean)
            for i in missed.copy():  # at these masks the loss does not depend on it
                receive(i, torch.zeros_like(mean[i]))
        counts = num_masks, num_masks * (num_masks - 1) / 2, num_masks - 1
        return self._sum(found) / found[0].new_tensor(counts)

    @staticmethod
    def _add(
        found: list[Tensor],
        mean: dict[int, Tensor],
        missed: set[int],
        k: int,
        i: int,
        g: Tensor,
    ) -> None:
        """Take the gradient of parameter ``i`` at mask ``k`` into sums and mean."""
        missed.discard(i)
        so_far = mean.pop(i, None)
        so_far = (g if k == 0 else torch.zeros_like(g)) if so_far is None else so_far
        square, inner, away = products(g, so_far)
        found[i] += torch.stack((square, k * inner, k / (k + 1) * away))
        mean[i] = so_far.lerp_(g, 1 / (k + 1)) if k else g

    def beside(self, batch: Batch, num_masks: int, mean: dict[int, Tensor]) -> Tensor:
        """Return the value of a batch and its inner product with a mean gradient."""
        found = self._table()

        def receive(i: int, g: Tensor) -> None:
            found[i] += products(g, mean.get(i, g.new_zeros(()).expand(g.shape)))

        for _ in range(num_masks):
            self._gradients(batch, receive)
        return self._sum(found)[:2] / num_masks

    def across(self, a: Batch, b: Batch, num_masks: int) -> Tensor:
        """Return value, mean, mask noise (of the first) and batch noise of two."""
        mean: dict[int, Tensor] = {}
        first, _, noise = self.within(a, num_masks, mean)
        second, inner = self.beside(b, num_masks, mean)
        value = (first + second) / 2
        return torch.stack((value, inner, noise, value - noise - inner))

    def pair(self, batch: Batch) -> Tensor:
        """Return value, mean, mask noise and batch noise, which is 0, of two masks."""
        found, first = self._table(), dict[int, Tensor | Factors]()

        def keep(i: int, factors: Factors) -> None:
            first[i] = factors.smaller()

        def compare(i: int, g: Tensor | Factors | None) -> None:
            found[i] += compared(first.pop(i, None), g, self._targets[i])

        self._gradients(batch, first.__setitem__, keep)
        self._gradients(batch, compare, compare)
        for i in list(first):  # at the second masks the loss does not depend on it
            compare(i, None)
        return torch.cat((self._sum(found), found[0].new_zeros(1)))

    def _table(self) -> list[Tensor]:
        return [x.new_zeros(3, dtype=wide_dtype(x).to_real()) for x in self._targets]

    def _sum(self, found: list[Tensor]) -> Tensor:
        pairs = zip(self._rates, found, strict=True)
        return torch.stack([rate / 4 * x for rate, x in pairs]).sum(0)


def _take_apart(gradients: dict[int, Tensor]) -> None:
    """Give each gradient memory of its own: those of a sum's terms are one tensor."""
    seen: set[int] = set()
    for i, g in gradients.items():
        spread = any(
            not step and n > 1 for step, n in zip(g.stride(), g.shape, strict=True)
        )
        if spread or g.data_ptr() in seen:
            gradients[i] = g.clone(memory_format=torch.contiguous_format)
        seen.add(gradients[i].data_ptr())
