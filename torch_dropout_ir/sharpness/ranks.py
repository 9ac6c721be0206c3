"""Ranks over which batches are spread: sums over them, and one vector for all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_dropout_ir.collectives import released
from torch_dropout_ir.sites import uncompiled

Group = Any  # a process group, "auto" or None


def unwrapped(model: nn.Module, group: Group) -> tuple[nn.Module, RankSums]:
    """Return the model inside ``DistributedDataParallel`` or a compiler, and ranks."""
    model = uncompiled(model)
    if isinstance(model, DistributedDataParallel):
        return uncompiled(model.module), RankSums(
            model.process_group if group == "auto" else group
        )
    return model, RankSums(None if group == "auto" else group)


class RankSums:
    """The ranks of a process group; one where there is no group.

    Attributes:
        rank: This one.
        size: Their number.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        alone = group is None
        self.rank = 0 if alone else dist.get_rank(group)
        self.size = 1 if alone else dist.get_world_size(group)
        self.spread = not alone

    def broadcast(self, vector: Tensor) -> Tensor:
        """Return the first rank's ``vector``, on every rank."""
        if self.spread:
            vector = vector.clone()  # the caller's stays its own
            first = dist.get_global_rank(self._group, 0)
            with released(vector):
                dist.broadcast(vector, first, group=self._group)
        return vector

    def sum(
        self, total: Tensor | None, weight: float, error: Exception | None, like: Tensor
    ) -> tuple[Tensor | None, float]:
        """Return sum and weight of all ranks; where one has failed, all raise.

        ``total`` is None where this rank had no sample; ``error`` is what went wrong
        here; ``like`` has the device, and the dtype that is not float64.

        Raises:
            RuntimeError: If another rank failed.
        """
        if not self.spread:
            if error is not None:
                raise error
            return total, weight
        size, item = (0, 0) if total is None else (total.numel(), total.element_size())
        head = like.new_tensor(
            [weight, float(error is not None), size, item], dtype=torch.float64
        )
        heads = [torch.empty_like(head) for _ in range(self.size)]
        with released(head, *heads):
            dist.all_gather(heads, head, group=self._group)
        weights, errors, sizes, items = torch.stack(heads).T.tolist()
        if error is not None:
            raise error
        if any(errors):
            raise RuntimeError("another rank failed: its error says why")
        if total is None:
            dtype = like.dtype if max(items) == like.element_size() else torch.float64
            total = like.new_zeros(int(max(sizes)), dtype=dtype)
        with released(total):
            dist.all_reduce(total, group=self._group)
        return total, sum(weights)
