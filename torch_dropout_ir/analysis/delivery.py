"""Records on their way to the sinks; a sink that fails is switched off."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping

from torch_dropout_ir.analysis.records import Record, Sink


class Delivery:
    """Writes to every sink that still works; ``absent`` says why one does not."""

    def __init__(self, sinks: Iterable[Sink], absent: dict[str, str]) -> None:
        self._sinks = list(sinks)
        self._absent = absent

    def write(
        self, step: int, records: Mapping[str, Record], notes: Mapping[str, str]
    ) -> None:
        """Write the records of a step; switch off a sink that fails."""
        for sink in list(self._sinks):
            try:
                sink.write(step, records, notes)
            except Exception as err:
                self._sinks.remove(sink)
                name, how = type(sink).__name__, f"{type(err).__name__}: {err}"
                self._absent[name] = f"switched off at step {step}; {how}"
                warn(f"{name} failed ({how}) and is switched off; `history` goes on.")

    def close(self) -> None:
        """Close the sinks that still work."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as err:
                warn(f"closing {type(sink).__name__} failed: {err}")
        self._sinks.clear()


class Postponed:
    """A sink that ``make`` opens when there is something to write."""

    def __init__(self, make: Callable[[], Sink]) -> None:
        self._make = make
        self._sink: Sink | None = None

    def write(
        self, step: int, records: Mapping[str, Record], notes: Mapping[str, str]
    ) -> None:
        """Write the records of a step."""
        if self._sink is None:
            self._sink = self._make()
        self._sink.write(step, records, notes)

    def close(self) -> None:
        """Close it, if it was opened."""
        if self._sink is not None:
            self._sink.close()


def warn(message: str) -> None:
    """Warn, but let no filter make an error of it: training goes on."""
    with contextlib.suppress(Warning):
        warnings.warn(f"torch_dropout_ir: {message}", stacklevel=3)
