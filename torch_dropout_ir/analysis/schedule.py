"""What is due at a step, decided alike on all ranks."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Set

from torch_dropout_ir.analysis.attempts import Attempts
from torch_dropout_ir.analysis.cadence import Cadence
from torch_dropout_ir.analysis.distributed import Ranks


class Schedule:
    """The cadence, less what is put off; of ranks, all look at the first one's clock.

    They do so after a measurement and, when nothing is due, at the step where something
    may be, as far as the pace so far tells: the steps between exchange nothing.
    """

    def __init__(self, cadence: Cadence, attempts: Attempts, ranks: Ranks) -> None:
        self._cadence = cadence
        self._attempts = attempts
        self._ranks = ranks
        self._review = 0

    def due(self, step: int) -> set[str]:
        """Return the names of the measures to take at ``step``."""
        auto = self._cadence.every == "auto"
        if auto and self._ranks.group is not None and self._ranks.size > 1:
            if step < self._review:
                return set()
            try:
                self._agree(step)
            except Exception as err:
                self._attempts.fail("schedule", err, step)
                self._review = sys.maxsize
                return set()
        names = self._cadence.due(step)
        return self._attempts.willing(names, step) if names else set()

    def _agree(self, step: int) -> None:
        numbers = self._ranks.first(self._cadence.numbers())
        self._cadence.load_numbers(numbers)
        self._review = step + self._cadence.wait(step)

    def afford(self, names: Set[str], step: int, seconds: float) -> set[str]:
        """Return those of ``names`` for which there is a budget, of all ranks alike.

        ``seconds`` is what the passes of this step have taken.
        """
        self._cadence.expect(seconds)
        if self._ranks.size > 1 and self._cadence.every == "auto":
            with self._ranks.together():
                numbers = self._ranks.first(self._cadence.numbers())
            self._cadence.load_numbers(numbers)
        waiting = self._cadence.afford(names, step)
        for name in waiting.keys() & self._cadence.first.keys():
            self._attempts.postpone(name, waiting[name])
        return set(names) - waiting.keys()

    def enter(self, seconds: Mapping[str, float], whole: float, step: int) -> None:
        """Enter what each measure took by itself, and the ``whole`` time.

        What is nobody's own (capture, records, writing) is shared out.
        """
        rest = max(0.0, whole - sum(seconds.values())) / max(1, len(seconds))
        for name, own in seconds.items():
            if self._attempts.lacks(name):
                self._cadence.put_off(name, step, own + rest)
            else:
                self._cadence.measured(name, own + rest)

    def restart(self) -> None:
        """Look at the clock at the next step, whatever was planned."""
        self._review = 0
