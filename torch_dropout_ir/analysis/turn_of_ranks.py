"""Threads that measure over ranks take their turns in one order on all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch_dropout_ir.analysis.distributed import Ranks
from torch_dropout_ir.turns import in_turn


@contextlib.contextmanager
def turn_of(ranks: Ranks) -> Iterator[None]:
    """Take this thread's turn, on the first rank before the others.

    Threads of a process take turns, and ranks wait for each other inside. With two
    models, the thread of one could have its turn here and that of the other there:
    each would wait for what the other thread is not let to. Where the first rank has
    its turn, no other thread of it has one that ranks could wait for.

    Args:
        ranks: Those that measure together.

    Yields:
        Nothing.
    """
    several, first = ranks.size > 1, not ranks.rank
    with contextlib.ExitStack() as stack:
        if first or not several:
            stack.enter_context(in_turn())
        if several:
            # A rank that fails is told of by the measurement.
            with contextlib.suppress(RuntimeError), ranks.together():
                ranks.most(0, "turn")
        if several and not first:
            stack.enter_context(in_turn())
        yield
