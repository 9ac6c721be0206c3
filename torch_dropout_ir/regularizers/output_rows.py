"""The rows of some samples in the outputs, and the loss as a function of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_dropout_ir.regularizers.outputs import OutputsRead, flatten


def rows_of_samples(samples: Tensor, each: int) -> Tensor:
    """Return the numbers of the rows of some samples.

    Args:
        samples: Their numbers.
        each: Rows of a sample, one after the other.

    Returns:
        The numbers.
    """
    if each == 1:
        return samples
    return (samples[:, None] * each + torch.arange(each)).flatten()


def replace_rows(
    read: OutputsRead,
    outputs: Any,
    samples: Tensor,
    count: int,
    slope: Tensor | None = None,
) -> OutputsRead:
    """Return the loss as a function of the outputs of some samples.

    Args:
        read: What the loss reads of all samples.
        outputs: What the model returned for those.
        samples: Their numbers.
        count: How many there are in all.
        slope: What :func:`slope_of_rows` returned; made here if None.

    Returns:
        Its tensors are those of ``outputs``; the other rows are as in ``read``.
    """
    leaves, _ = flatten(outputs)
    tensors = [leaves[i] for i in read.places]
    rows = rows_of_samples(samples, len(read.tensors[0]) // count)
    alone = _loss_of_rows(read, rows, slope)
    if alone is not None:
        return OutputsRead(tensors, alone, None, read.places)

    def risk(tensors: Sequence[Tensor]) -> Tensor:
        pairs = zip(read.tensors, tensors, strict=True)
        return read.risk([
            f.index_copy(0, rows_of_samples(samples, len(f) // count).to(f.device), x)
            for f, x in pairs
        ])

    return OutputsRead(tensors, risk, None, read.places)


def slope_of_rows(read: OutputsRead) -> Tensor | None:
    """Return the gradient of a sum or mean over rows, None of another kind of loss."""
    loss, targets, f = read.loss, read.targets, read.single
    known = loss is not None and loss.kind in ("squared", "cross_entropy")
    if not known or not isinstance(targets, Tensor) or targets.shape[:1] != f.shape[:1]:
        return None
    assert loss is not None
    if loss.kind == "squared" and targets.shape != f.shape:  # torch pairs all rows
        return None
    return read.slopes([f.requires_grad_()], create_graph=False)[0]


def _loss_of_rows(
    read: OutputsRead, rows: Tensor, slope: Tensor | None
) -> Callable[[Sequence[Tensor]], Tensor] | None:
    """Return a loss of some rows alone whose derivatives are those of the whole loss.

    A sum or mean over rows of a known kind, taken of some of them, is that of the whole
    but for a constant and a factor (of a mean, their share in the weight of all), which
    the gradient tells. None where it is of another kind, or the gradient is zero.
    """
    slope = slope_of_rows(read) if slope is None else slope
    loss, targets, f = read.loss, read.targets, read.single
    if slope is None or loss is None:
        return None
    rows = rows.to(f.device)
    some = targets[rows.to(targets.device)]
    whole, at = slope[rows], f[rows].requires_grad_()
    with torch.enable_grad():
        (own,) = torch.autograd.grad(loss(at, some), at)
    factor = (whole * own).sum() / own.square().sum()
    off = (factor * own - whole).norm()
    if not bool(off <= torch.finfo(f.dtype).eps ** 0.5 * whole.norm()):
        return None
    return lambda x: factor * loss(x[0], some)
