"""Taking measures: what fails is put off, later switched off, and never in the way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

from torch_dropout_ir.analysis.delivery import warn
from torch_dropout_ir.analysis.distributed import PEER, Ranks
from torch_dropout_ir.analysis.records import Record
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
        self._failures: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        self._left_out: dict[str, set[str]] = {}  # what the last attempt said of tags

    def willing(self, names: Iterable[str], step: int) -> set[str]:
        """Return those of ``names`` that are not put off beyond ``step``."""
        return {n for n in names if self._not_before.get(n, 0) <= step}

    def take(
        self, snapshot: Snapshot, names: set[str], seed: int
    ) -> tuple[dict[str, Record], dict[str, float]]:
        """Return the records of measures by tag, and the seconds that each took."""
        records: dict[str, Record] = {}
        seconds: dict[str, float] = {}
        for measure in self.measures:
            if measure.name not in names:
                continue
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


def _own(err: Exception) -> Exception:
    """Return the failure of this rank, where ranks part over it; else what was told."""
    cause = err.__context__
    return cause if str(err) == PEER and isinstance(cause, Exception) else err
