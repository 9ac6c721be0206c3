"""Squared norms of gradients at pairs of masks, and of mini-batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from torch_dropout_ir.arrivals import arrivals
from torch_dropout_ir.functional import Batch, parameters, preserved_rng
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.checks import check_differentiable
from torch_dropout_ir.regularizers.inner_products import products, wide_dtype
from torch_dropout_ir.regularizers.masked import dropout_risk
from torch_dropout_ir.regularizers.tangents import LayerOutputs, along


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
        self._params = parameters(model)
        self._targets = list(self._params.values())
        self._shared_mask = shared_mask
        self.met = False  # whether a site acted

    def _watch(self, *_: object) -> None:
        self.met = True

    def _gradients(self, batch: Batch, receive: Callable[[int, Tensor], None]) -> None:
        """Draw masks; give each parameter's gradient away as it comes, by number."""

        def take(i: int, g: Tensor) -> None:
            receive(i, g.to_dense() if g.is_sparse else g)

        masked = dropout_risk(
            self._model,
            batch,
            self._loss,
            shared_mask=self._shared_mask,
            watch=self._watch,
        )
        with arrivals(self._targets, take), torch.enable_grad(), masked as value:
            check_differentiable("gradient_norm", value)
            torch.autograd.grad(value, self._targets, allow_unused=True)

    def within(self, batch: Batch, num_masks: int, mean: dict[int, Tensor]) -> Tensor:
        """Return value, mean, and mask noise of one batch, each from all of its masks.

        ``mean`` is filled with the mean gradient by number of the parameter.
        """
        found = self._table()
        for k in range(num_masks):
            self._add_masks(batch, found, mean, k, True)
        counts = num_masks, num_masks * (num_masks - 1) / 2, num_masks - 1
        return self._sum(found) / found[0].new_tensor(counts)

    def _add_masks(
        self,
        batch: Batch,
        found: list[Tensor],
        mean: dict[int, Tensor],
        k: int,
        keeps: bool,
    ) -> None:
        """Take the gradient at masks number ``k`` into sums and mean."""
        missed = set(mean)
        receive = functools.partial(self._add, found, mean, missed, k, keeps)
        self._gradients(batch, receive)
        if k == 0:
            _take_apart(mean)
        for i in missed.copy():  # at these masks the loss does not depend on it
            receive(i, torch.zeros_like(mean[i]))

    @staticmethod
    def _add(
        found: list[Tensor],
        mean: dict[int, Tensor],
        missed: set[int],
        k: int,
        keeps: bool,
        i: int,
        g: Tensor,
    ) -> None:
        """Take the gradient of parameter ``i`` at mask ``k`` into sums and mean."""
        missed.discard(i)
        so_far = mean.pop(i, None)
        so_far = (g if k == 0 else torch.zeros_like(g)) if so_far is None else so_far
        square, inner, away = products(g, so_far)
        found[i] += torch.stack((square, k * inner, k / (k + 1) * away))
        if keeps:
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
        found = self._table()
        first: dict[int, Tensor] = {}
        layers = LayerOutputs(self._model)
        with layers:
            self._add_masks(batch, found, first, 0, True)
        parts = None
        if self.met and layers.fewer_than(first.values()):
            parts = self._in_two(batch, found, first)
        if parts is None:
            self._add_masks(batch, found, first, 1, False)
            parts = self._sum(found) / found[0].new_tensor((2, 1, 1))
        return torch.cat((parts, parts.new_zeros(1)))

    def _in_two(
        self, batch: Batch, found: list[Tensor], first: dict[int, Tensor]
    ) -> Tensor | None:
        """Return value, mean and mask noise of two masks; one gradient at a time.

        The inner product of both gradients is the derivative at the second masks along
        the gradient at the first, which takes no pass back. None where it cannot be had
        at full precision.
        """
        if len(set(self._rates)) > 1:
            return None
        direction = {n: first.get(i) for i, n in enumerate(self._params)}
        with preserved_rng(self._model):  # the pass back has the same masks
            inner = along(self._model, batch, self._loss, direction, self._shared_mask)
        if inner is None:
            return None
        first.clear()  # now they are held by nobody
        direction.clear()
        second = self._table()
        self._gradients(batch, functools.partial(_add_square, second))
        value = (self._sum(found)[0] + self._sum(second)[0]) / 2
        inner = (self._rates[0] / 4 * inner).to(value)
        return torch.stack((value, inner, value - inner))

    def _table(self) -> list[Tensor]:
        return [x.new_zeros(3, dtype=wide_dtype(x).to_real()) for x in self._targets]

    def _sum(self, found: list[Tensor]) -> Tensor:
        pairs = zip(self._rates, found, strict=True)
        return torch.stack([rate / 4 * x for rate, x in pairs]).sum(0)


def _add_square(found: list[Tensor], i: int, g: Tensor) -> None:
    found[i] += products(g, g.new_zeros(()).expand(g.shape))


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
