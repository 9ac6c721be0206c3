"""Derivatives of a dropout loss along a direction, in one pass forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_dropout_ir.functional import Batch
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.masked import dropout_risk
from torch_dropout_ir.vectors import Params

if TYPE_CHECKING:
    from typing_extensions import Self

# Bytes of gradients under which memory is no matter, and their share of the outputs of
# layers under which a pass back holds next to nothing else.
_FEWEST: Final = 2**20
_SHARE: Final = 8
_FULL: Final = (torch.float32, torch.float64)


class LayerOutputs:
    """Bytes of what the layers of a model return in the passes inside the context."""

    def __init__(self, model: nn.Module) -> None:
        self._leaves = [m for m in model.modules() if not m._modules]
        self._hooks = contextlib.ExitStack()
        self._bytes = 0

    def __enter__(self) -> Self:
        for module in self._leaves:
            self._hooks.callback(module.register_forward_hook(self._see).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _see(self, _: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._bytes += output.nbytes

    def fewer_than(self, gradients: Iterable[Tensor]) -> bool:
        """Whether gradients are of weight beside them."""
        held = sum(g.nbytes for g in gradients)
        return held >= _FEWEST and held * _SHARE > self._bytes


def along(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    direction: Mapping[str, Tensor | None],
    shared_mask: bool,
) -> Tensor | None:
    """Return the derivative of ``R_drop`` at the next masks in some parameters.

    Args:
        model: The model.
        batch: ``(inputs, targets)``.
        loss: The loss.
        direction: A tensor by name of a parameter; None for zero.
        shared_mask: Whether one mask serves all samples.

    Returns:
        0-d; None where an operation has no forward derivative, or the pass is not in
        full precision.
    """
    steps = {n: x for n, x in direction.items() if x is not None}
    full = all(x.dtype in _FULL for x in steps.values())
    if not full or torch.is_autocast_enabled(next(model.parameters()).device.type):
        return None
    own = dict(model.named_parameters())
    try:
        with (
            torch.no_grad(),
            forward_ad.dual_level(),
            sdpa_kernel(SDPBackend.MATH),  # the fused ones have no such derivative
        ):
            duals: Params = {
                n: forward_ad.make_dual(own[n].detach(), x) for n, x in steps.items()
            }
            masked = dropout_risk(
                model, batch, loss, shared_mask=shared_mask, params=duals
            )
            with masked as value:
                found = forward_ad.unpack_dual(value).tangent
    except RuntimeError:  # NotImplementedError is one
        return None
    return None if found is None else found.detach()
