"""Losses that have no curvature to speak of, or not by the model's outputs alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_dropout_ir.losses import Loss


def check_penalties(
    caller: str, model: nn.Module, loss: Loss, outputs: Any, targets: Any
) -> None:
    """Raise if a loss depends on the parameters by another way than the outputs.

    Derivatives are taken at other tensors than the model's own parameters, which such
    a loss would not see. Parameters of the loss itself are constants.

    Raises:
        ValueError: If the loss reads parameters of ``model``.
    """
    fixed = tree_map_only(Tensor, Tensor.detach, outputs)
    with torch.enable_grad():
        value = loss(fixed, targets)
        if not value.requires_grad:
            return
        named = {n: x for n, x in model.named_parameters() if x.requires_grad}
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    read = [n for n, g in zip(named, found, strict=True) if g is not None]
    if read:
        raise ValueError(
            f"{caller}: expected a loss of outputs and targets alone, got one that "
            f"depends on {len(read)} parameters by another way ({read[0]!r} first), as "
            "a penalty on weights does: its derivatives would be left out. Leave it "
            "out of `loss`, or let the model return it with its outputs."
        )


def check_risk(caller: str, risk: Tensor, place: int) -> None:
    """Raise if derivatives of the loss of the batch at a place mean nothing.

    Raises:
        ValueError: If it is not finite or does not depend on the parameters.
    """
    if not bool(risk.detach().isfinite()):
        raise ValueError(
            f"{caller}: expected a finite loss, got {risk.item()} on batch "
            f"{place}. Look for it in the inputs, targets and parameters: there is "
            "no curvature to speak of."
        )
    if not risk.requires_grad:
        raise ValueError(
            f"{caller}: expected a loss that depends on the parameters, got "
            f"one without a gradient on batch {place}. Something in the model or "
            "the loss cuts it: torch.no_grad, detach, item, argmax, round, an "
            "integer dtype."
        )
