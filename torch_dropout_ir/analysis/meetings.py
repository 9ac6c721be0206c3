"""Meetings of ranks of which some may not come: through the store, with an end."""

from __future__ import annotations

import collections
import contextlib
import datetime
import zlib
from typing import Any, ClassVar

import torch.distributed as dist


class Meeting:
    """One meeting of the ranks of a group, which all hold theirs in the same order.

    ``what`` is its kind, of which meetings are counted; this rank ``said`` that.
    """

    _held: ClassVar[collections.Counter[str]] = collections.Counter()  # by this process

    def __init__(self, group: Any, what: str, said: str = "here") -> None:
        ranks = dist.get_process_group_ranks(group)
        named = repr(ranks).encode()
        self._kind = f"torch_dropout_ir/{what}/{zlib.crc32(named)}"
        Meeting._held[self._kind] += 1
        self._place = f"{self._kind}/{Meeting._held[self._kind]}"
        self._said = said
        self._own = f"{self._place}/{dist.get_rank()}"
        self._keys = [f"{self._place}/{rank}" for rank in ranks]
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._store.set(self._own, said)

    def wait(self, limit: datetime.timedelta) -> bool:
        """Return whether all have come before the limit."""
        try:
            self._store.wait(self._keys, limit)
        except RuntimeError:
            return False
        return True

    def called_off(self) -> None:
        """Take it back: the next one is this one."""
        Meeting._held[self._kind] -= 1
        self._store.delete_key(self._own)

    def agreed(self, limit: datetime.timedelta) -> bool:
        """Return whether all have come and say the same: one answer for all of them.

        The first rank that knows its answer gives that of all, also of those that come
        later: nobody begins an exchange that another does not take part in.
        """
        alike = False
        with contextlib.suppress(RuntimeError):
            said = self._said.encode()
            alike = self.wait(limit) and all(
                self._store.get(key) == said for key in self._keys
            )
        answer = self._store.compare_set(f"{self._place}/answer", "", f"{alike}")
        return bool(answer == b"True")


def processes() -> int:
    """Return how many processes run."""
    started = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if started else 1
