"""Ranks of a model that is wrapped after attaching: known at its first step."""

from __future__ import annotations

import datetime
from typing import Final

from torch import nn

from torch_dropout_ir.analysis.delivery import warn
from torch_dropout_ir.analysis.distributed import Ranks, ranks_of
from torch_dropout_ir.analysis.meetings import Meeting, processes

# The backward pass has just brought all ranks together.
WAIT: Final = datetime.timedelta(seconds=30)


def join_late(ranks: Ranks, model: nn.Module, setting: str) -> bool:
    """Return whether ``ranks`` are several now: those of the model as it is wrapped.

    Where it is neither wrapped nor agreed on, ``ranks`` is told why it stays alone.
    """
    if processes() == 1:
        return False
    found = ranks_of(model)
    if found.group is not None and Meeting(found.group, "late", setting).agreed(WAIT):
        ranks.become(found)
        return True
    reason = (
        f"{processes()} processes run, but this model is neither wrapped in "
        "DistributedDataParallel nor sharded by `fully_shard`, or not all of them have "
        "attached to it alike: each process measures and writes for itself"
    )
    ranks.part(reason)
    warn(f"{reason}. Wrap it, and attach on every rank with the same arguments.")
    return False
