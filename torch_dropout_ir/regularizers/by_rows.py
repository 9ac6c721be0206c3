"""Sums over samples, a few rows at a time, so that memory stays that of the inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_dropout_ir import tracing


def sum_by_rows(
    form: Callable[..., Tensor], elements: int, rows: Tensor, *others: Tensor
) -> Tensor:
    """Return the sum of ``form`` over blocks of rows.

    Under autograd a block is computed again in the backward pass rather than kept.
    Where a ``torch.func`` transform or a compiler looks on, all rows are one block.

    Args:
        form: Function of blocks of ``rows`` and ``others`` to a scalar; other tensors
            that it reads may require a gradient too.
        elements: Elements of ``rows`` that a block may have.
        rows: ``[N, D]``.
        others: Tensors with ``N`` rows.

    Returns:
        Scalar.
    """
    count = max(1, elements // max(1, rows.shape[1]))
    if rows.shape[0] <= count or not tracing.eager():
        return form(rows, *others)
    total = rows.new_zeros(())
    for block in zip(*(x.split(count) for x in (rows, *others)), strict=True):
        if torch.is_grad_enabled():
            part = checkpoint(
                form, *block, use_reentrant=False, preserve_rng_state=False
            )
        else:
            part = form(*block)
        total = total + part
    return total
