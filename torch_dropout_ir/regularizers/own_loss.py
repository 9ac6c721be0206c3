"""A loss that the model makes itself, as a function of an output that it made it of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_dropout_ir.loss_cuts import cut
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.output_products import HessianProduct
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.outputs import OutputsRead, read_outputs, real_leaves


def outputs_within(
    clean: CleanPass, loss: Loss, targets: Any
) -> tuple[OutputsRead, HessianProduct] | None:
    """Return the outputs of a model that returns its own loss, and their products.

    They are a tensor that the model returns beside the loss and through which all of
    that goes, as its logits: its second derivative in them is had of the graph of the
    pass. None where the loss is another, or no tensor is such a cut.
    """
    if loss.kind != "general" or isinstance(clean.outputs, Tensor):
        return None
    try:
        read = read_outputs(clean.outputs, loss, targets)
        if any([x.numel() > 1 for x in read.tensors]):
            return None
        with torch.enable_grad():
            value = read.risk(read.tensors)
    except (RuntimeError, TypeError, ValueError):
        return None
    if not value.requires_grad:
        return None
    sites = {edge.node for edge in clean.edges}
    outputs = cut(value, real_leaves(clean.outputs)[0], sites)
    if outputs is None:
        return None
    own = Loss(lambda *_: value, "general", loss.reduction)
    read = OutputsRead([outputs], lambda _: value, own)
    return read, HessianProduct.within(value, outputs)
