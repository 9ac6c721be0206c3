"""Floor 4: records as files and in memory; TensorBoard's sink is a package of its own.

A sink is anything with ``write(step, records, notes)`` and ``close()``
(:class:`torch_dropout_ir.analysis.Sink`).
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping
from typing import Any, TextIO

from torch_dropout_ir.analysis import Histogram, Image, Record


def _appended(path: str | os.PathLike[str], newline: str | None = None) -> TextIO:
    """Open a file at its end, on a new line where a run was cut within one."""
    file = open(path, "a", encoding="utf-8", newline=newline)
    if os.path.isfile(path) and os.path.getsize(path):
        with open(path, "rb") as there:
            there.seek(-1, os.SEEK_END)
            if there.read() != b"\n":
                file.write("\n")
    return file


class JsonLines:
    """Appends one JSON object a step: ``{"step", "records", "notes"}``.

    Notes are written where they are new. Numbers that are not finite are strings
    (``"nan"``, ``"inf"``), as JSON has none; histograms have ``counts``, ``low`` and
    ``high``, images ``values``, ``low``, ``high`` and ``order``.

    Args:
        path: The file; it is made where it is missing.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "run.jsonl")
        >>> sink = JsonLines(path)
        >>> sink.write(3, {"loss/R_S": 0.5}, {})
        >>> sink.close()
        >>> with open(path) as file:
        ...     json.loads(file.read())["records"]
        {'loss/R_S': 0.5}
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = _appended(path)
        self._said: dict[str, str] = {}

    def write(
        self, step: int, records: Mapping[str, Record], notes: Mapping[str, str]
    ) -> None:
        """Append a line, and hand it to the operating system."""
        news = {k: v for k, v in notes.items() if self._said.get(k) != v}
        self._said.update(news)
        line = {
            "step": step,
            "records": {tag: _plain(record) for tag, record in records.items()},
            "notes": news,
        }
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _plain(record: Record) -> Any:
    if isinstance(record, Histogram):
        counts = [_plain(float(x)) for x in record.counts.tolist()]
        return {"counts": counts, "low": record.low, "high": record.high}
    if isinstance(record, Image):
        rows = [[_plain(float(x)) for x in row] for row in record.values.tolist()]
        order = None if record.order is None else record.order.tolist()
        return {
            "values": rows,
            "low": record.low,
            "high": record.high,
            "order": order,
        }
    return record if math.isfinite(record) else str(record)


class Csv:
    """Appends the numbers of each step as rows ``step,tag,value``.

    Histograms and images are left out.

    Args:
        path: The file; it is made, with a header, where it is missing.

    Raises:
        OSError: If it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = _appended(path, newline="")
        self._rows = csv.writer(self._file)
        if not self._file.tell():
            self._rows.writerow(("step", "tag", "value"))

    def write(
        self, step: int, records: Mapping[str, Record], notes: Mapping[str, str]
    ) -> None:
        """Append the rows of a step, and hand them to the operating system."""
        numbers = ((t, r) for t, r in records.items() if isinstance(r, float))
        self._rows.writerows((step, tag, repr(x)) for tag, x in numbers)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Memory:
    """Keeps every record, histograms and images too.

    Attributes:
        records: Records by tag, as ``(step, record)``.
        notes: How a number was obtained, by tag; what runs under ``run/...``.
        closed: Whether the analysis has ended.

    Example:
        >>> sink = Memory()
        >>> sink.write(3, {"loss/R_S": 0.5}, {})
        >>> sink.records["loss/R_S"]
        [(3, 0.5)]
    """

    def __init__(self) -> None:
        self.records: dict[str, list[tuple[int, Record]]] = {}
        self.notes: dict[str, str] = {}
        self.closed = False

    def write(
        self, step: int, records: Mapping[str, Record], notes: Mapping[str, str]
    ) -> None:
        """Keep the records of a step."""
        for tag, record in records.items():
            self.records.setdefault(tag, []).append((step, record))
        self.notes.update(notes)

    def close(self) -> None:
        """Note that it is over."""
        self.closed = True
