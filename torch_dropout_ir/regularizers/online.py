"""R_1 for a training run: the best estimate that one pass can give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_dropout_ir.functional import Batch
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.estimate import Estimate
from torch_dropout_ir.regularizers.gauss_newton import CleanPass, estimate
from torch_dropout_ir.regularizers.last_layer import last_layer
from torch_dropout_ir.sites import mask_shape


def online(
    model: nn.Module, batch: Batch, loss: Loss, *, num_samples: int = 2
) -> tuple[Estimate, Any]:
    """Return R_1 of a batch and the outputs without dropout, from one forward pass.

    Where the only site is a :class:`torch.nn.Dropout` straight before the last linear
    layer it is the closed form of :func:`last_layer`; else the sampled form of
    :func:`gauss_newton`.

    Args:
        model: The model; left as it is.
        batch: ``(inputs, targets)``; targets may be None.
        loss: The loss.
        num_samples: Backward passes where the form is sampled.

    Returns:
        The estimate and the outputs, detached.
    """
    clean = CleanPass.of(model, batch[0])
    closed = _closed_form(clean, batch[1], loss)
    found = closed or estimate(model, clean, batch[1], loss, num_samples)
    return found, clean.outputs.detach()


@torch.no_grad()
def _closed_form(clean: CleanPass, targets: Any, loss: Loss) -> Estimate | None:
    if clean.last_layer is None or loss.kind == "general":
        return None
    site, features, _ = clean.uses[0]
    outputs: Tensor = clean.outputs.detach()
    elementwise = mask_shape(site.module, features.shape) == tuple(features.shape)
    # Cross-entropy has its classes in dimension 1, the linear layer in the last.
    if not elementwise or (loss.kind == "cross_entropy" and outputs.ndim > 2):
        return None
    value = last_layer(
        features,
        clean.last_layer.weight,
        site.p,
        loss=loss,
        outputs=outputs,
        targets=targets,
    )
    return Estimate(
        value, {site.name: value}, torch.zeros_like(value), loss.is_quadratic, 0
    )
