"""The batch that curvature is of, cut where its graph would be larger than training's.

Semantics:

* The graph of a second derivative keeps some four times what a training pass does.
  Where that is much, the samples are cut into eight parts, and products are added up
  over them: it is the same curvature where samples do not see each other.
* Whether they do is found out: the loss of the batch is the mean of the parts' losses,
  here and at parameters moved at random, or it is not. Where it is not (batch
  normalization in training, a loss over pairs of samples, weights by class), the first
  eighth stands for the batch, and a sentence says so.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from torch_dropout_ir.functional import (
    Batch,
    Inputs,
    as_batches,
    batch_size,
    preserved_rng,
)
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.row_chunks import rows_of
from torch_dropout_ir.sharpness.surface import Surface

_OVER: Final = 4  # a second derivative's graph, over what a pass keeps
_PARTS: Final = 8
_MOVED: Final = 0.1  # of the parameters' root mean square


def fitting(
    model: nn.Module, loss: Loss, batches: Any, max_bytes: int
) -> tuple[Any, str]:
    """Return batches whose graphs of second derivatives are small, and what they are.

    Args:
        model: The model; left as it is.
        loss: The loss.
        batches: Batches of the loss surface. Several are taken as they are: one of
            them is in memory at a time.
        max_bytes: Memory of a graph below which nothing is cut.

    Returns:
        Batches, and a sentence where they are not all of the samples.
    """
    given = as_batches(batches)
    if not isinstance(given, list) or len(given) != 1:
        return batches, ""
    batch = given[0]
    try:
        count = batch_size(batch)
    except TypeError:
        return batches, ""  # inputs that are objects of the script's own
    whole = Surface("sharpness", model, loss, given, copied=False)
    if count < 2 or _OVER * _kept(whole, batch) <= max_bytes:
        return batches, ""
    step = -(-count // _PARTS)
    parts = [_rows(batch, count, i, i + step) for i in range(0, count, step)]
    try:
        same = _same(whole, Surface("sharpness", model, loss, parts, copied=False))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return batches, ""  # a model or loss that takes no other number of samples
    if same:
        return parts, ""
    few = max(2, step)  # of one alone, batch normalization makes nothing
    return [_rows(batch, count, 0, few)], (
        f"of the first {few} of {count} samples, alone: in this model or loss samples "
        "see each other, and the graph of them all is larger than `max_bytes`"
    )


def _kept(surface: Surface, batch: Batch) -> int:
    """Bytes that a pass keeps for its backward pass, besides the parameters."""
    own = {x.untyped_storage().data_ptr() for x in surface.state().values()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # An output of the node that keeps it, held as it is, would hold its node.
        return x.detach()

    leaves = {n: x.detach().requires_grad_() for n, x in surface.params.items()}
    with torch.enable_grad(), surface.held(None), saved_tensors_hooks(pack, _itself):
        surface.risk(leaves, batch, 0, None)
    return sum(kept.values())


def _itself(x: Tensor) -> Tensor:
    return x


def _rows(batch: Batch, count: int, start: int, stop: int) -> Batch:
    """Take some samples of a batch."""
    rows = slice(start, stop)
    inputs = rows_of(Inputs.of(batch[0]), rows, count)
    if batch[1] is batch[0]:  # a model that computes its loss has its targets there
        return inputs, inputs
    return inputs, rows_of(Inputs((batch[1],), {}), rows, count).args[0]


def _same(whole: Surface, parts: Surface) -> bool:
    """Whether both are one loss: where the parameters are, and around."""
    sizes = torch.stack([x.double().square().mean() for x in whole.params.values()])
    with preserved_rng(whole.model, 0):
        moved = {
            n: x + _MOVED * float(sizes.mean().sqrt()) * torch.randn_like(x)
            for n, x in whole.params.items()
        }
    eps = max(torch.finfo(x.dtype).eps for x in moved.values())
    for params in (whole.params, moved):
        a, b = whole.value(params), parts.value(params)
        if not abs(a - b) <= eps ** (2 / 3) * max(abs(a), abs(b)):
            return False
    return True
