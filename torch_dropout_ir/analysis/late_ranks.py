"""Ranks of a model that is wrapped after attaching: known at its first step."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from torch_dropout_ir.analysis.delivery import warn
from torch_dropout_ir.analysis.distributed import Ranks, ranks_of


class LateRanks:
    """One of several processes that has attached before the model was wrapped.

    By the first step each process has attached or never will: the backward pass has
    brought all of them together. So nobody waits to learn whether all have.
    """

    _attached = 0  # in this process: all ranks attach in the same order

    def __init__(self) -> None:
        LateRanks._attached += 1
        self._here = f"torch_dropout_ir/unwrapped/{LateRanks._attached}"
        _store().set(f"{self._here}/{dist.get_rank()}", "here")

    def enter(self, ranks: Ranks, model: nn.Module, setting: str) -> bool:
        """Make ``ranks`` those that train ``model``, as it is wrapped now.

        Args:
            ranks: A process alone; changed in place where it is one of several.
            model: The model in its wrapper, if it is in one.
            setting: What all have to agree on.

        Returns:
            Whether it is one of several.
        """
        found = ranks_of(model)
        several = found.group is not None
        members = dist.get_process_group_ranks(found.group) if several else []
        there = several and _store().check([f"{self._here}/{r}" for r in members])
        if there and found.alike(setting):
            ranks.become(found)
            return True
        warn(
            f"{dist.get_world_size()} processes run, but this model is neither wrapped "
            "in DistributedDataParallel nor sharded by `fully_shard`, or not all of "
            "them have attached to it alike: each process measures and writes for "
            "itself. Wrap it, and attach on every rank with the same arguments."
        )
        return False


def late_ranks(ranks: Ranks) -> LateRanks | None:
    """Return what waits for a wrapper; None where there is nothing to wait for."""
    if ranks.group is None and dist.is_available() and dist.is_initialized():
        return LateRanks() if dist.get_world_size() > 1 else None
    return None


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
