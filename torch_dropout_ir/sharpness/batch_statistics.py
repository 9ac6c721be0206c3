"""Means and variances that batch normalization takes of one batch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_dropout_ir.sharpness.surface import Surface

Statistics = dict[str, tuple[Tensor, Tensor]]


def normalizes(model: nn.Module) -> bool:
    """Whether batch normalization makes samples of a batch see each other."""
    return any(isinstance(m, _BatchNorm) and m.training for m in model.modules())


def batch_statistics(surface: Surface) -> Statistics | None:
    """Return mean and variance that each batch normalization takes of the only batch.

    With them in the place of running statistics, in evaluation mode, the loss of the
    batch is what it is in training mode, and samples do not see each other. By name of
    the module; None where one is called twice, not at all, or holds no running
    statistics to stand in for.
    """
    batch = surface.single
    own = {
        name: module
        for name, module in surface.model.named_modules()
        if isinstance(module, _BatchNorm) and module.training
    }
    if batch is None or any(m.running_mean is None for m in own.values()):
        return None
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in own}

    def look(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            dims = [d for d in range(x.ndim) if d != 1]
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            variance, mean = torch.var_mean(wide, dims, correction=0)
            like = module.running_mean
            found[name].append((mean.to(like), variance.to(like)))

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in own.items():
            stack.callback(module.register_forward_pre_hook(look(name)).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(surface.held(None))
        surface.outputs(surface.params, batch, 0, None)
    if any(len(seen) != 1 for seen in found.values()):
        return None
    return {name: seen[0] for name, seen in found.items()}
