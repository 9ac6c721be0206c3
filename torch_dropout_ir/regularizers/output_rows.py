"""The rows of some samples in the outputs, and the loss as a function of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_dropout_ir.regularizers.outputs import OutputsRead, real_leaves


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
    read: OutputsRead, outputs: Any, samples: Tensor, count: int
) -> OutputsRead:
    """Return the loss as a function of the outputs of some samples.

    Args:
        read: What the loss reads of all samples.
        outputs: What the model returned for those.
        samples: Their numbers.
        count: How many there are in all.

    Returns:
        Its tensors are those of ``outputs``; the other rows are as in ``read``.
    """
    leaves, _ = real_leaves(outputs)
    tensors = [leaves[i] for i in read.places]
    alone = _loss_of_rows(read, rows_of_samples(samples, len(read.tensors[0]) // count))
    if alone is not None:
        return OutputsRead(tensors, alone, None, read.places)

    def risk(tensors: Sequence[Tensor]) -> Tensor:
        pairs = zip(read.tensors, tensors, strict=True)
        return read.risk([
            f.index_copy(0, rows_of_samples(samples, len(f) // count).to(f.device), x)
            for f, x in pairs
        ])

    return OutputsRead(tensors, risk, None, read.places)


def _loss_of_rows(
    read: OutputsRead, rows: Tensor
) -> Callable[[Sequence[Tensor]], Tensor] | None:
    """Return a loss of some rows alone whose derivatives are those of the whole loss.

    A sum or mean over rows of a known kind, taken of some of them, is that of the whole
    but for a constant and, of a mean, a factor: their share in the weight of all. None
    where it is of another kind, or leaves all of these rows out.
    """
    loss, targets, f = read.loss, read.targets, read.single
    known = loss is not None and loss.kind in ("squared", "cross_entropy")
    if not known or not isinstance(targets, Tensor) or targets.shape[:1] != f.shape[:1]:
        return None
    assert loss is not None
    if loss.kind == "squared" and targets.shape != f.shape:  # torch pairs all rows
        return None
    some = targets[rows.to(targets.device)]
    if loss.reduction == "sum":
        return lambda x: loss(x[0], some)
    share = loss.num_terms(some)
    share = share and share / loss.num_terms(targets)
    return (lambda x: share * loss(x[0], some)) if share else None
