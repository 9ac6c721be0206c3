"""One pass of a model under dropout whose masks are ours to choose."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from torch_dropout_ir import ops
from torch_dropout_ir.functional import Batch, at_sites, call, fresh
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.sites import Site


@contextlib.contextmanager
def dropout_risk(
    model: nn.Module, batch: Batch, loss: Loss, *, shared_mask: bool = False
) -> Iterator[Tensor]:
    """Give ``R_drop`` of a batch at one draw of masks; differentiate it inside.

    Args:
        model: The model.
        batch: ``(inputs, targets)``.
        loss: The loss.
        shared_mask: If True, one mask serves all samples (the paper's ``eta``); else
            each sample draws its own, as ``nn.Dropout`` does.

    Yields:
        Scalar.
    """

    def drop(site: Site, h: Tensor) -> Tensor:
        shape = site.mask_shape(h.shape)
        if shared_mask and h.ndim:
            shape = (1, *shape[1:])
        if shape == tuple(h.shape):
            return ops.dropout(h, site.p)
        noise = ops.dropout(h.new_ones(shape), site.p)
        return torch.where(noise != 0, h * noise, torch.zeros_like(h))

    with at_sites(model, drop):
        yield loss(call(model, batch[0]), batch[1])


def clean_risk(model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
    """Return ``R_S`` of a batch: dropout off, batch normalization as in training."""
    with at_sites(model, fresh):
        return loss(call(model, batch[0]), batch[1])


@torch.no_grad()
def excess_risks(model: nn.Module, batch: Batch, loss: Loss, num_masks: int) -> Tensor:
    """Return ``R_drop - R_S`` at independent masks on one batch, ``[num_masks]``."""
    clean = clean_risk(model, batch, loss)
    draws = []
    for _ in range(num_masks):
        with dropout_risk(model, batch, loss) as risk:
            draws.append(risk - clean)
    return torch.stack(draws)
