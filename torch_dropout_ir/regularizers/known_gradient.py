"""A value that comes with its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

_ONCE: Final = (
    "modified_loss: expected a loss with a penalty on its gradient to be "
    "differentiated once, got create_graph=True. Pass `max_bytes=None`, which keeps "
    "its graph for that."
)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradient: Sequence[Tensor | None], *params: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, root: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_ONCE)
        found = ctx.saved_tensors
        if root != 1:  # else it is given away, and nothing of its size is made
            found = [None if g is None else g * root for g in found]
        return None, None, *found


def with_gradient(
    value: Tensor, params: Sequence[Tensor], gradient: Sequence[Tensor | None]
) -> Tensor:
    """Return a value whose gradient in the parameters is known.

    Args:
        value: Scalar, without a graph.
        params: The parameters.
        gradient: A tensor for each, or None where there is no dependence.

    Returns:
        The value, which can be differentiated once.
    """
    found: Tensor = _Known.apply(value, gradient, *params)
    return found
