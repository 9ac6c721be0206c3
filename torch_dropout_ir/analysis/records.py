"""What a measure hands out and a sink takes, and the way there."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from torch import Tensor

MOST_KEPT: Final = 2**14
_ERRORS: Final = ("_standard_error", "_residual")


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts between fixed edges.

    Attributes:
        counts: Counts, ``[bins]``.
        low: Left edge of the first bin.
        high: Right edge of the last bin.
    """

    counts: Tensor
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Image:
    """A field drawn with a diverging palette.

    Attributes:
        values: The field, ``[height, width]``.
        low: Value of the palette's first colour.
        high: Value of the palette's last colour.
        order: Numbers of the neurons that the rows (and columns) show, ``[neurons]``;
            rows that are means show blocks of it. None: rows have no names.
    """

    values: Tensor
    low: float
    high: float
    order: Tensor | None = None


Record = float | Histogram | Image


def estimate_of(tag: str) -> str | None:
    """Return the tag of the number that ``tag`` is the error of; None where it is none.

    What follows the second slash is the name of a site or a layer, for both the same.

    Example:
        >>> estimate_of("regularizer/R1_standard_error/encoder.drop")
        'regularizer/R1/encoder.drop'
    """
    group, *rest = tag.split("/", 2)
    head = "/".join((group, *rest[:1]))
    for ending in _ERRORS:
        if head.endswith(ending):
            return "/".join((head.removesuffix(ending), *rest[1:]))
    return None


def remember(
    history: dict[str, list[tuple[int, float]]],
    step: int,
    records: Mapping[str, Record],
) -> None:
    """Append the numbers among ``records``; a long curve is thinned evenly."""
    for tag, value in records.items():
        if isinstance(value, float):
            curve = history.setdefault(tag, [])
            curve.append((step, value))
            if len(curve) > MOST_KEPT:
                curve[:] = _thinned(curve)


def _thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return about half of the points that may be kept, as far apart everywhere."""
    kept, last = curve[:1], curve[-1]
    apart = 2 * (last[0] - kept[0][0]) / MOST_KEPT
    for point in curve[1:-1]:
        if point[0] - kept[-1][0] > apart:
            kept.append(point)
    return [*kept, last]


class Sink(Protocol):
    """Where records go.

    Example:
        >>> class Printer:
        ...     def write(self, step, records, notes):
        ...         print(step, sorted(records)[:1])
        ...
        ...     def close(self):
        ...         print("closed")
        >>> net, measures = nn.Linear(4, 2), tdi.analysis.measures
        >>> sgd, own = torch.optim.SGD(net.parameters()), [measures.ReceivedGradient()]
        >>> with tdi.attach_analysis(
        ...     net, measures=own, sinks=[Printer()], log_dir=False
        ... ):
        ...     net(torch.ones(5, 4)).square().mean().backward()
        ...     sgd.step()
        0 ['cost/seconds/gradient']
        closed
    """

    def write(
        self, step: int, records: Mapping[str, Record], notes: Mapping[str, str]
    ) -> None:
        """Take the records of one step; they are not changed afterwards.

        ``notes`` says by tag how a number was obtained, and under ``run/...`` what
        runs: model, sites, loss, optimizer, seed, versions.
        """

    def close(self) -> None:
        """Write out what is pending and release files; called once."""


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
