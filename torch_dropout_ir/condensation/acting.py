"""Weights as they act: parametrized ones, read without moving anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torch_dropout_ir.sharpness.frozen import modes
from torch_dropout_ir.vectors import full_precision


@contextlib.contextmanager
def acting(module: nn.Module) -> Iterator[None]:
    """Make a layer's weights what its next forward pass would use.

    Parametrizations are evaluated in evaluation mode, where spectral normalization
    takes no further power iteration. The older normalizations and pruning, which are
    hooks that write the weight before a pass, write it now; the old one comes back at
    the end.
    """
    with full_precision(), contextlib.ExitStack() as stack:
        if nn.utils.parametrize.is_parametrized(module):
            stack.enter_context(_evaluated(module.parametrizations))  # type: ignore[arg-type]
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm, BasePruningMethod)):
                name, now = _compute(hook, module)
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, now)
        yield


def _evaluated(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context in which a module and all in it are in evaluation mode."""
    return modes(dict.fromkeys(module.modules(), False))


def _compute(
    hook: WeightNorm | SpectralNorm | BasePruningMethod, module: nn.Module
) -> tuple[str, Tensor]:
    if isinstance(hook, BasePruningMethod):
        return hook._tensor_name, hook.apply_mask(module)
    if isinstance(hook, SpectralNorm):
        return hook.name, hook.compute_weight(module, do_power_iteration=False)
    return hook.name, hook.compute_weight(module)


def affine(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return weight ``[out, in]`` and bias ``[out]`` of a linear layer, as it acts.

    A subclass with a forward of its own (a low-rank update beside the weight, say) is
    asked for the images of zero and of the unit vectors, in evaluation mode.

    Raises:
        NotImplementedError: If that forward is no affine map of the rows of a matrix.
    """
    if type(module).forward is nn.Linear.forward:
        return module.weight, module.bias
    with _evaluated(module):
        size = module.in_features
        units = torch.eye(size, dtype=module.weight.dtype, device=module.weight.device)
        probe = torch.linspace(-2.0, 3.0, size, device="cpu").to(units)[None]
        try:
            offset = module.forward(torch.zeros_like(units[:1]))
            columns, image = module.forward(units) - offset, module.forward(probe)
        except Exception as err:  # whatever a user's forward raises
            raise NotImplementedError(
                f"input_weights: the forward of {type(module).__name__} takes no "
                f"matrix [samples, {size}]: {err}"
            ) from err
        expected = probe @ columns + offset
    error = torch.linalg.vector_norm((image - expected).detach().double())
    scale = torch.linalg.vector_norm(image.detach().double())
    if error > 100 * size**0.5 * torch.finfo(units.dtype).eps * (1 + scale):
        raise NotImplementedError(
            f"input_weights: the forward of {type(module).__name__} is not an affine "
            "map; pass a matrix [neurons, d] of your own to the functions instead."
        )
    has_bias = module.bias is not None or bool(offset.detach().any())
    return columns.T, offset[0] if has_bias else None
