"""Taking measures when they are due: what fails is put off, and never in the way."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Final

from torch_dropout_ir.analysis.cadence import Cadence
from torch_dropout_ir.analysis.distributed import PEER, Ranks
from torch_dropout_ir.analysis.records import Record, warn
from torch_dropout_ir.analysis.snapshot import Measure, Snapshot, take

MOST_FAILURES: Final = 6


class Attempts:
    """Takes measures of a snapshot, on all ranks or on none.

    A measure that fails waits twice as long from failure to failure, and is switched
    off after six on end; taken by hand, it is tried whatever was before. ``absent``
    is told why something is missing.
    """

    def __init__(
        self, measures: Sequence[Measure], ranks: Ranks, absent: dict[str, str]
    ) -> None:
        self.measures = list(measures)
        self._ranks = ranks
        self._absent = absent
        self._failures, self._last = dict[str, int](), dict[str, int]()
        self._not_before: dict[str, float] = {}
        self._left_out: dict[str, set[str]] = {}  # what the last attempt said of tags

    def named(self, names: Set[str]) -> list[Measure]:
        """Return the measures of some names."""
        return [m for m in self.measures if m.name in names]

    def willing(self, names: Iterable[str], step: int) -> set[str]:
        """Return those of ``names`` that are not put off beyond ``step``."""
        return {n for n in names if self._not_before.get(n, 0) <= step}

    def take(
        self, snapshot: Snapshot, names: set[str], seed: int
    ) -> tuple[dict[str, Record], dict[str, float]]:
        """Return the records of measures by tag, and the seconds that each took."""
        records: dict[str, Record] = {}
        seconds: dict[str, float] = {}
        for measure in self.named(names):
            started = time.perf_counter()
            records.update(self._try(measure, snapshot, seed))
            seconds[measure.name] = time.perf_counter() - started
        return records, seconds

    def _try(
        self, measure: Measure, snapshot: Snapshot, seed: int
    ) -> dict[str, Record]:
        name = measure.name
        try:
            with self._ranks.together():
                reason = snapshot.lacks(measure.needs)
                if self._ranks.most(reason is not None, "lacks"):
                    self._absent[name] = reason or "another rank lacks what it needs"
                    return {}
                said = set(snapshot.absent)
                records = take(measure, snapshot, seed)
        except Exception as err:
            of_data = snapshot.given and "batches" in measure.needs
            self.fail(name, _own(err), snapshot.step, " on `data`" if of_data else "")
            return {}
        self._failures.pop(name, None)
        self._not_before.pop(name, None)
        for tag in (name, *self._left_out.get(name, ())):
            self._absent.pop(tag, None)
        self._left_out[name] = snapshot.absent.keys() - said
        self._last[name] = snapshot.step
        return {t: x for t, x in records.items() if self._finite(t, x, snapshot.step)}

    def _finite(self, tag: str, value: Record, step: int) -> bool:
        if not isinstance(value, float) or math.isfinite(value):
            self._absent.pop(tag, None)
            return True
        self._absent[tag] = f"{value} at step {step}, which is no number to draw"
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what measures keep between measurements, by their names."""
        kept = (m for m in self.measures if hasattr(m, "state_dict"))
        return {m.name: m.state_dict() for m in kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        for measure in self.measures:
            if measure.name in state and hasattr(measure, "load_state_dict"):
                measure.load_state_dict(state[measure.name])

    def lacks(self, name: str) -> bool:
        """Whether the last attempt at a measure gave nothing."""
        return name in self._absent or "capture" in self._absent

    def postpone(self, name: str, seconds: float) -> None:
        """Say why a first measurement, estimated at so many seconds, waits."""
        why = f"it may take some {seconds:.0f} s, for which training has not paid yet"
        if seconds == math.inf:
            why = (
                "no pass of the model in training mode was seen, which tells what it "
                "may take"
            )
        self._absent[name] = (
            f"put off: {why}; `analysis.measure()` takes it now, `every=` at fixed "
            "steps"
        )

    def fail(self, name: str, err: Exception, step: int, where: str = "") -> None:
        """Enter a failure: say why once, and put off what failed.

        ``where`` says on what, where that is not the step's batch.
        """
        reason = f"{type(err).__name__}{where}: {err}"
        count = self._failures[name] = self._failures.get(name, 0) + 1
        wait = 2 * max(1, step - self._last.get(name, step))
        self._last[name] = step
        self._not_before[name] = step + wait
        if count == MOST_FAILURES:
            self._not_before[name] = math.inf
            reason = f"switched off after {count} failures; {reason}"
        if self._absent.get(name) != reason:
            warn(
                f"the measure {name!r} failed at step {step} ({reason}); training goes "
                "on without it."
            )
        self._absent[name] = reason


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
                self._agree()
            except Exception as err:
                self._attempts.fail("schedule", err, step)
                self._review = sys.maxsize
                return set()
            self._review = step + self._cadence.wait(step)
        names = self._cadence.due(step)
        return self._attempts.willing(names, step) if names else set()

    def _agree(self) -> None:
        self._cadence.load_numbers(self._ranks.first(self._cadence.numbers()))

    def afford(self, names: Set[str], step: int, seconds: float) -> set[str]:
        """Return those of ``names`` for which there is a budget, of all ranks alike.

        ``seconds`` is what the passes of this step have taken.
        """
        self._cadence.expect(seconds)
        if self._ranks.size > 1 and self._cadence.every == "auto":
            with self._ranks.together():
                self._agree()
        waiting = self._cadence.afford(names, step)
        for name in waiting.keys() & self._cadence.first.keys():
            self._attempts.postpone(name, waiting[name])
        return set(names) - waiting.keys()

    def enter(self, seconds: Mapping[str, float], whole: float, step: int) -> None:
        """Enter what each measure took by itself, and the ``whole`` time.

        What is nobody's own (capture, records, writing) is shared out.
        """
        if not seconds:  # none could be paid for
            self._cadence.measured_seconds += whole
        rest = max(0.0, whole - sum(seconds.values())) / max(1, len(seconds))
        for name, own in seconds.items():
            if self._attempts.lacks(name):
                self._cadence.put_off(name, step, own + rest)
            else:
                self._cadence.measured(name, own + rest)

    def restart(self) -> None:
        """Look at the clock at the next step, whatever was planned."""
        self._review = 0


def _own(err: Exception) -> Exception:
    """Return the failure of this rank, where ranks part over it; else what was told."""
    cause = err.__context__
    return cause if str(err) == PEER and isinstance(cause, Exception) else err
