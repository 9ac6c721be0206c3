"""Sums over samples, a few rows at a time, so that memory stays that of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_dropout_ir import tracing


def differentiated(*tensors: Tensor) -> bool:
    """Whether what is made of these tensors may be differentiated or transformed."""
    live = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return live or not tracing.eager()


def sum_by_rows(
    form: Callable[..., Tensor],
    elements: int,
    rows: Tensor,
    *others: Tensor,
    whole: Sequence[Tensor] = (),
) -> Tensor:
    """Return the sum of ``form`` over blocks of rows.

    It is a function of blocks of ``rows``, of ``elements`` at most, and of ``others``
    with as many rows, and of ``whole`` as it is, to a scalar or a tensor of one shape.
    Where a gradient will be asked for, a block is computed again in the backward pass
    rather than kept. Where a ``torch.func`` transform or a compiler looks on, all rows
    are one block.
    """
    count = max(1, elements // max(1, rows.shape[1]))
    if rows.shape[0] <= count or not tracing.eager():
        return form(rows, *others, *whole)
    again = differentiated(rows, *others, *whole)
    total = rows.new_zeros(())
    for block in zip(*(x.split(count) for x in (rows, *others)), strict=True):
        if again:
            part = checkpoint(
                form, *block, *whole, use_reentrant=False, preserve_rng_state=False
            )
        else:
            part = form(*block, *whole)
        total = total + part
    return total
