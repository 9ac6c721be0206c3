"""R_2: the squared gradient norm that a finite step adds, and its parts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_dropout_ir.functional import Batch, as_batches, parameters
from torch_dropout_ir.losses import Loss, resolve_loss
from torch_dropout_ir.regularizers.checks import check_finite
from torch_dropout_ir.regularizers.masked import dropout_risk


@dataclasses.dataclass(frozen=True)
class GradientNorm:
    r"""R_2 and its decomposition, all 0-d and in the units of the loss.

    Attributes:
        value: The paper's form, :math:`\frac{\epsilon}{4} E\lVert g \rVert^2`, the mean
            of the modified loss of a step; the sum of the next three.
        mean_gradient: The drift form, :math:`\frac{\epsilon}{4} \lVert E g \rVert^2
            = \frac{\epsilon}{4} \lVert \nabla (R_S + R_1) \rVert^2`, which the mean
            iterate follows; unbiased, so it can be negative.
        dropout_noise: :math:`\frac{\epsilon}{4} E_b \mathrm{tr}\,\mathrm{Cov}_\eta(g)`,
            the part that the masks add on one batch.
        batch_noise: :math:`\frac{\epsilon}{4} \mathrm{tr}\,\mathrm{Cov}_b(E_\eta g)`,
            the part that the choice of the mini-batch adds; 0 for one batch.
        standard_error: Standard error of ``value``; NaN with fewer than two pairs of
            masks, or of batches where there are several.
        mean_gradient_standard_error: The same for ``mean_gradient``.
        dropout_noise_standard_error: The same for ``dropout_noise``.
        batch_noise_standard_error: The same for ``batch_noise``.
        num_masks: Number of masks drawn a batch.
        shared_mask: Whether one mask served all samples.
    """

    value: Tensor
    mean_gradient: Tensor
    dropout_noise: Tensor
    batch_noise: Tensor
    standard_error: Tensor
    mean_gradient_standard_error: Tensor
    dropout_noise_standard_error: Tensor
    batch_noise_standard_error: Tensor
    num_masks: int
    shared_mask: bool


def gradient_norm(
    model: nn.Module,
    batch: Any,
    loss: Any,
    *,
    lr: float | Mapping[str, float],
    num_masks: int = 2,
    shared_mask: bool = False,
) -> GradientNorm:
    r"""Return R_2 and its parts, from pairs of masks and pairs of batches.

    .. math::
        R_2 = \frac{\epsilon}{4} E \lVert \nabla R_{drop}(\theta, \eta) \rVert^2
        = \frac{\epsilon}{4} \lVert E g \rVert^2
        + \frac{\epsilon}{4} E_b \mathrm{tr}\,\mathrm{Cov}_\eta(g)
        + \frac{\epsilon}{4} \mathrm{tr}\,\mathrm{Cov}_b(E_\eta g)

    A pair ``g, g'`` of gradients at independent masks on one batch gives
    :math:`(\lVert g \rVert^2 + \lVert g' \rVert^2)/2` and the noise of the masks,
    :math:`\lVert g - g' \rVert^2 / 2`, without bias; their inner product is the rest.
    Of several batches, inner products across a pair of them give the squared mean
    gradient, and what is left is the noise of the mini-batches, which plain SGD has
    too. Steps count alike, whatever the sizes of their batches.

    Costs a forward and a backward pass a mask and batch, and the memory of one gradient
    (of three where there are several batches): the second of a pair is met parameter by
    parameter, as it is made. For optimizers other than gradient descent R_2 is a
    diagnostic, not the theory. For a gradient that the script has anyway,
    ``(lr / 4) * g.square().sum()`` is one unbiased sample of the first form, free of
    extra passes.

    Args:
        model: The model; neither it nor its ``.grad`` fields change.
        batch: ``(inputs, targets)``; or an even number of mini-batches, as a list or a
            loader, of which consecutive ones are paired.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        lr: Learning rate, or one a parameter name.
        num_masks: Number of masks a batch, even.
        shared_mask: If True, one mask serves all samples of the batch (the paper's
            ``eta``); else each sample draws its own, as ``nn.Dropout`` does.

    Returns:
        The parts with standard errors over the pairs.

    Raises:
        ValueError: If ``num_masks`` is odd or below 2, ``lr`` lacks a parameter, the
            number of batches is odd, a batch is empty, or a gradient is not finite.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, eq. (5); Barrett & Dherin,
        *Implicit gradient regularization*, ICLR 2021; Smith et al., *On the origin of
        implicit regularization in stochastic gradient descent*, ICLR 2021.

    Example:
        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
        >>> batch = torch.ones(8, 3), torch.zeros(8, 1)
        >>> r2 = gradient_norm(net, batch, "mse", lr=0.1, num_masks=4)
        >>> torch.testing.assert_close(r2.value, r2.mean_gradient + r2.dropout_noise)
    """
    if num_masks < 2 or num_masks % 2:
        raise ValueError(
            f"gradient_norm: expected an even `num_masks` >= 2, got {num_masks}"
        )
    norms = _Norms(model, resolve_loss(loss), lr, shared_mask)
    batches = list(as_batches(batch))
    if len(batches) == 1:
        rows = [norms.pair(batches[0]) for _ in range(num_masks // 2)]
    elif batches and len(batches) % 2 == 0:
        rows = [
            norms.across(a, b, num_masks)
            for a, b in zip(batches[::2], batches[1::2], strict=True)
        ]
    else:
        raise ValueError(
            "gradient_norm: expected one batch or an even number of them, got "
            f"{len(batches)}: the squared mean gradient comes from pairs"
        )
    table = torch.stack(rows)
    check_finite("gradient_norm", table.sum(), model, batches[0][0])
    mean = table.mean(0)
    error = table.std(0) / len(rows) ** 0.5 if len(rows) > 1 else mean * float("nan")
    names = ("value", "mean_gradient", "dropout_noise", "batch_noise")
    errors = ("standard_error", *(f"{name}_standard_error" for name in names[1:]))
    found = dict(zip((*names, *errors), (*mean, *error), strict=True))
    return GradientNorm(num_masks=num_masks, shared_mask=shared_mask, **found)


class _Norms:
    """Squared norms of the gradients of one model, weighted by learning rates."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        lr: float | Mapping[str, float],
        shared_mask: bool,
    ) -> None:
        params = parameters(model)
        self._model = model
        self._loss = loss
        self._rates = learning_rates(lr, list(params))
        self._targets = list(params.values())
        self._shared_mask = shared_mask

    def _gradient(self, batch: Batch) -> list[Tensor]:
        masked = dropout_risk(
            self._model, batch, self._loss, shared_mask=self._shared_mask
        )
        with torch.enable_grad(), masked as value:
            found = torch.autograd.grad(value, self._targets, allow_unused=True)
        return [
            torch.zeros_like(x) if g is None else g
            for g, x in zip(found, self._targets, strict=True)
        ]

    def _inner(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        terms = zip(self._rates, a, b, strict=True)
        return torch.stack([r / 4 * (x * y).sum() for r, x, y in terms]).sum()

    def pair(self, batch: Batch, total: list[Tensor] | None = None) -> Tensor:
        """Return value, mean, mask noise and 0 from two masks.

        Args:
            batch: The batch.
            total: Where the gradients are added to, a sum for each parameter.

        Returns:
            The four numbers.
        """
        first = self._gradient(batch)
        rows: list[Tensor] = []

        def meet(place: int, h: Tensor) -> None:
            g, h, rate = _dense(first[place]), _dense(h), self._rates[place]
            norms = (torch.linalg.vector_norm(x).square() for x in (g, h))
            across = torch.dot(g.reshape(-1), h.reshape(-1))
            apart = torch.linalg.vector_norm(g - h).square() / 2  # never negative
            numbers = torch.stack([
                sum(norms) / 2,
                across,
                apart,
                torch.zeros_like(apart),
            ])
            rows.append(rate / 4 * numbers)
            if total is not None:
                # Not in place: a gradient of autograd's may be a view of one number.
                first[place] = g.new_empty(0)
                total[place] = total[place] + g + h

        self._each_gradient(batch, meet)
        return torch.stack(rows).sum(0)

    def _each_gradient(self, batch: Batch, take: Callable[[int, Tensor], None]) -> None:
        """Hand over each parameter's gradient as it is made, and let go of it."""
        left = set(range(len(self._targets)))
        masked = dropout_risk(
            self._model, batch, self._loss, shared_mask=self._shared_mask
        )

        def taken(place: int, g: Tensor) -> Tensor | None:
            left.discard(place)
            take(place, g.detach())
            if g.layout is not torch.strided:
                return None
            return g.new_zeros(()).expand(g.shape)  # one element in its place

        with torch.enable_grad(), masked as value, contextlib.ExitStack() as stack:
            for place, x in enumerate(self._targets):
                stack.enter_context(_hooked(x, functools.partial(taken, place)))
            torch.autograd.grad(value, self._targets, allow_unused=True)
        for place in left:
            take(place, torch.zeros_like(self._targets[place]))

    def across(self, a: Batch, b: Batch, num_masks: int) -> Tensor:
        """Return value, mean, mask noise and batch noise from two batches."""
        first, mean_a = self._mean_of_pairs(a, num_masks)
        second, mean_b = self._mean_of_pairs(b, num_masks)
        within = (first + second) / 2
        across = self._inner(mean_a, mean_b)
        return torch.stack([within[0], across, within[2], within[1] - across])

    def _mean_of_pairs(
        self, batch: Batch, num_masks: int
    ) -> tuple[Tensor, list[Tensor]]:
        total = [x.new_zeros(()).expand(x.shape) for x in self._targets]
        rows = [self.pair(batch, total) for _ in range(num_masks // 2)]
        return torch.stack(rows).mean(0), [t / num_masks for t in total]


def _dense(x: Tensor) -> Tensor:
    return x if x.layout is torch.strided else x.to_dense()


@contextlib.contextmanager
def _hooked(x: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call a hook with the gradient of ``x`` inside the context, after its own."""
    own = x._backward_hooks
    handle = x.register_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        if own is None:
            x._backward_hooks = None


def learning_rates(lr: float | Mapping[str, float], names: list[str]) -> list[float]:
    """Return the learning rate of each parameter.

    Raises:
        ValueError: If a mapping lacks one.
    """
    if not isinstance(lr, Mapping):
        return [lr] * len(names)
    missing = [name for name in names if name not in lr]
    if missing:
        raise ValueError(
            f"expected a learning rate `lr` for every parameter, got none for {missing}"
        )
    return [lr[name] for name in names]
