"""R_1 of dropout straight before the last linear layer, in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_dropout_ir.losses import Loss, resolve_loss
from torch_dropout_ir.output_hessian import (
    cross_entropy_scale,
    hessian_product,
    squared_scale,
)
from torch_dropout_ir.sites import noise_variance


def last_layer(
    features: Tensor,
    weight: Tensor,
    p: float,
    *,
    loss: Any = "mse",
    outputs: Tensor | None = None,
    targets: Any = None,
) -> Tensor:
    r"""Return R_1 of dropout on the input of the last linear layer.

    .. math::
        R_1 = \frac{p}{2 (1 - p)} \sum_i \sum_j h_{ij}^2 \, w_j^\top H_i w_j

    with :math:`w_j` the column of unit ``j`` and :math:`H_i` the Hessian of the loss,
    reduction included, in the outputs of sample ``i``. For the paper's risk
    (:func:`~torch_dropout_ir.losses.half_squared_error`, ``H_i = 1/n``) it is its
    eq. (4); for :func:`torch.nn.functional.mse_loss` (``"mse"``) it is ``2/d'`` times
    that, ``d'`` the number of outputs. In the units of the loss.

    Exact (Lemma 1) for a squared loss: the expected dropout loss is the loss plus
    this, at any width, depth and ``p``. For other losses it is the second-order part.
    No pass through the network; differentiable in every tensor argument.

    Args:
        features: Inputs of the last layer before dropout, ``[..., D]``.
        weight: Weight of the last layer, ``[C, D]``.
        p: Probability of dropping, in ``[0, 1)``. The paper's ``p`` is our ``1 - p``.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable
            ``(outputs, targets) -> scalar``.
        outputs: Network outputs without dropout, ``[..., C]``; needed unless the loss
            is squared.
        targets: The targets, where the loss's Hessian depends on them.

    Returns:
        Scalar with the dtype and device of ``features``.

    Raises:
        ValueError: If ``p`` is outside ``[0, 1)``, shapes disagree, or ``outputs`` is
            missing for a loss that needs it.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, eq. (4) and Lemma 1.

    Example:
        >>> from torch_dropout_ir.losses import half_squared_error
        >>> h, w = torch.ones(4, 3), torch.ones(2, 3)
        >>> last_layer(h, w, p=0.5, loss=half_squared_error).item()
        3.0
    """
    resolved = resolve_loss(loss)
    if features.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            "last_layer: expected `features` [..., D] and `weight` [C, D], got "
            f"{list(features.shape)} and {list(weight.shape)}"
        )
    variance = noise_variance(p)
    rows = features.reshape(-1, features.shape[-1])
    if resolved.kind == "squared":
        shape = torch.Size((*features.shape[:-1], weight.shape[0]))
        scale = squared_scale(resolved, shape)
        form = scale * (rows.square() @ weight.square().sum(0)).sum()
        return variance / 2 * form
    if outputs is None:
        raise ValueError(
            "last_layer: the Hessian of this loss depends on the outputs: expected "
            "`outputs` [..., C], got None"
        )
    logits = outputs.reshape(-1, weight.shape[0])
    if resolved.kind == "cross_entropy":
        flat = targets.flatten() if isinstance(targets, Tensor) else None
        return variance / 2 * _softmax_form(resolved, rows, weight, logits, flat)
    return variance / 2 * _general_form(resolved, rows, weight, outputs, targets)


def _softmax_form(
    loss: Loss, rows: Tensor, weight: Tensor, logits: Tensor, targets: Tensor | None
) -> Tensor:
    """Sum of ``h^2 (s'w^2 - (s'w)^2)``: the variance of each column under softmax."""
    softmax = logits.softmax(-1)
    if targets is not None and targets.is_floating_point():
        targets = targets.view(logits.shape)
    scale = cross_entropy_scale(loss, logits, targets)
    spread = softmax @ weight.square() - (softmax @ weight).square()
    return (scale * rows.square() * spread).sum()


def _general_form(
    loss: Loss, rows: Tensor, weight: Tensor, outputs: Tensor, targets: Any
) -> Tensor:
    """Sum over outputs ``c`` of ``h^2 w_c (H_c w)``, one product with H for each."""
    product = hessian_product(loss, outputs, targets)
    total = rows.new_zeros(())
    for c in range(weight.shape[0]):
        place = torch.zeros_like(outputs.detach())
        place[..., c] = 1.0
        products = product(place).reshape(-1, weight.shape[0]) @ weight
        total = total + (rows.square() * products * weight[c]).sum()
    return total
