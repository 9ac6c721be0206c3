"""R_2: the squared gradient norm that a finite step adds, and its parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_dropout_ir.functional import Batch, parameters
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers.masked import dropout_risk


@dataclasses.dataclass(frozen=True)
class GradientNorm:
    r"""R_2 and its decomposition, all 0-d and in the units of the loss.

    Attributes:
        value: :math:`\frac{\epsilon}{4} E\lVert g \rVert^2`, the paper's R_2.
        mean_gradient: :math:`\frac{\epsilon}{4} \lVert E g \rVert^2`, the part that
            drives the mean iterate; unbiased, so it can be negative.
        dropout_noise: :math:`\frac{\epsilon}{4} \mathrm{tr}\,\mathrm{Cov}(g)`, the part
            that the masks add.
        standard_error: Standard error of ``value``; NaN with fewer than two pairs.
        dropout_noise_standard_error: The same for ``dropout_noise``.
        num_masks: Number of masks drawn.
        shared_mask: Whether one mask served all samples.
    """

    value: Tensor
    mean_gradient: Tensor
    dropout_noise: Tensor
    standard_error: Tensor
    dropout_noise_standard_error: Tensor
    num_masks: int
    shared_mask: bool


def gradient_norm(
    model: nn.Module,
    batch: Batch,
    loss: Any,
    *,
    lr: float | Mapping[str, float],
    num_masks: int = 2,
    shared_mask: bool = False,
) -> GradientNorm:
    r"""Return R_2 of a batch and its parts, from pairs of masks.

    .. math::
        R_2 = \frac{\epsilon}{4} E_\eta \lVert \nabla R_{drop}(\theta, \eta) \rVert^2
        = \frac{\epsilon}{4} \lVert E g \rVert^2
        + \frac{\epsilon}{4} \mathrm{tr}\,\mathrm{Cov}_\eta(g)

    A pair ``g, g'`` of gradients at independent masks gives the three parts without
    bias: :math:`(\lVert g \rVert^2 + \lVert g' \rVert^2)/2`, :math:`\langle g, g'
    \rangle` and :math:`\lVert g - g' \rVert^2 / 2`. Costs a forward and a backward
    pass a mask and the memory of two gradients. For optimizers other than gradient
    descent R_2 is a diagnostic, not the theory.

    Args:
        model: The model; neither it nor its ``.grad`` fields change.
        batch: ``(inputs, targets)``.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        lr: Learning rate, or one a parameter name.
        num_masks: Number of masks, even.
        shared_mask: If True, one mask serves all samples of the batch (the paper's
            ``eta``), else each has its own (``nn.Dropout``). R_2 depends on it.

    Returns:
        The three parts with standard errors over the pairs.

    Raises:
        ValueError: If ``num_masks`` is odd or below 2, or ``lr`` lacks a parameter.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, eq. (5); Barrett & Dherin,
        *Implicit gradient regularization*, ICLR 2021.

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
    resolved = resolve_loss(loss)
    params = parameters(model)
    rates = _rates(lr, list(params))
    targets = list(params.values())

    def gradient() -> list[Tensor]:
        masked = dropout_risk(model, batch, resolved, shared_mask=shared_mask)
        with torch.enable_grad(), masked as value:
            found = torch.autograd.grad(value, targets, allow_unused=True)
        return [
            torch.zeros_like(x) if g is None else g
            for g, x in zip(found, targets, strict=True)
        ]

    def inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
        weighted = [r / 4 * (x * y).sum() for r, x, y in zip(rates, a, b, strict=True)]
        return torch.stack(weighted).sum()

    rows = []
    for _ in range(num_masks // 2):
        g, h = gradient(), gradient()
        difference = [x - y for x, y in zip(g, h, strict=True)]
        norms = (inner(g, g) + inner(h, h)) / 2
        rows.append(
            torch.stack([norms, inner(g, h), inner(difference, difference) / 2])
        )
    pairs = torch.stack(rows)
    mean = pairs.mean(0)
    error = pairs.std(0) / len(rows) ** 0.5 if len(rows) > 1 else mean * float("nan")
    return GradientNorm(
        mean[0], mean[1], mean[2], error[0], error[2], num_masks, shared_mask
    )


def _rates(lr: float | Mapping[str, float], names: list[str]) -> list[float]:
    if not isinstance(lr, Mapping):
        return [lr] * len(names)
    missing = [name for name in names if name not in lr]
    if missing:
        raise ValueError(
            "gradient_norm: expected a learning rate `lr` for every parameter, got "
            f"none for {missing}"
        )
    return [lr[name] for name in names]
