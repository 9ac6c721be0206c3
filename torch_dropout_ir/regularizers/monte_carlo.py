"""R_1 of anything by its definition: average over masks."""

from __future__ import annotations

from typing import Any

from torch import nn

from torch_dropout_ir.functional import Batch
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers.estimate import Estimate
from torch_dropout_ir.regularizers.masked import excess_risks


def monte_carlo(
    model: nn.Module, batch: Batch, loss: Any, *, num_masks: int = 64
) -> Estimate:
    r"""Return R_1 by its definition, averaged over random masks.

    .. math::
        R_1 = E_\eta[R_{drop}(\theta, \eta)] - R_S(\theta)
        \approx \frac{1}{K} \sum_k R_{drop}(\theta, \eta_k) - R_S(\theta)

    Unbiased for every model and loss, as far as the noise is that of dropout modules;
    other noise is switched off. Both losses are taken on the same batch. Costs one
    forward pass a mask and one more.

    Args:
        model: The model; left as it is.
        batch: ``(inputs, targets)``.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        num_masks: Number of masks, at least 2.

    Returns:
        The estimate with its standard error; ``per_site`` is empty.

    Raises:
        ValueError: If ``num_masks`` is below 2: one mask has no standard error.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Lemma 1.

    Example:
        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
        >>> x, y = torch.ones(64, 3), torch.zeros(64, 1)
        >>> found = monte_carlo(net, (x, y), "mse", num_masks=400)
        >>> exact = gauss_newton(net, (x, y), "mse", num_samples=None)
        >>> bool((found.value - exact.value).abs() < 5 * found.standard_error)
        True
    """
    if num_masks < 2:
        raise ValueError(f"monte_carlo: expected `num_masks` >= 2, got {num_masks}")
    excess = excess_risks(model, batch, resolve_loss(loss), num_masks)
    error = excess.std() / num_masks**0.5
    return Estimate(excess.mean(), {}, error, exact=False, num_samples=num_masks)
