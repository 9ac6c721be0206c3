"""What was found, cell by cell: kept in a file, and written as tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curvature.contenders import CONTENDERS
from curvature.race import TARGETS
from curvature.tasks import TASKS


class Rows:
    """Cells by task and steps of training, written to a file with each thing found.

    What the file holds is not measured again: a run that was cut off goes on from it.

    Args:
        path: JSON file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        found = json.loads(path.read_text()) if path and path.exists() else []
        self._known = {(r["task"], r["steps"]): r for r in found}

    def cell(self, task: str, steps: int) -> dict[str, Any]:
        """Return what is known of a cell, to be added to."""
        return self._known.setdefault((task, steps), {"task": task, "steps": steps})

    def found(self, known: dict, key: str, find: Callable[[], Any]) -> Any:
        """Return ``known[key]``, which is found and written down if it is missing."""
        if key not in known:
            known[key] = find()
            if self._path:
                whole = Path(f"{self._path}.new")
                whole.write_text(json.dumps(self.all(), indent=1))
                whole.replace(self._path)
        return known[key]

    def all(self) -> list[dict]:
        """Return all cells, in the order of the tasks."""
        order = list(TASKS)
        return sorted(
            self._known.values(), key=lambda r: (order.index(r["task"]), r["steps"])
        )


def tables(rows: list[dict]) -> str:
    """Ours alone, the race, and memory; of what there is."""
    return "\n".join((*_own(rows), "", *_race(rows), "", *_memory(rows)))


def _name(row: dict) -> str:
    return f"{row['task']}, {row['steps']} steps"


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *lines]
    return [f"| {' | '.join(line)} |" for line in lines]


def _own(rows: list[dict]) -> list[str]:
    """Products, eigenvalue and trace."""
    lines = []
    for r in rows:
        known = r.get("accuracy", {})
        if "top" in known:
            lines += [
                [_name(r), f"top-1, {how}", f"{x['products']} products",
                 f"true error {x['error']:.1e}"]
                for how, x in known["top"]["runs"].items()
            ]  # fmt: skip
            least = known["top"]["floor"]
            lines.append([_name(r), "top-1, the least from a random start", least, ""])
        if "density" in known:
            products = f"{known['density']['products']} products"
            lines.append([_name(r), "density of 20 steps", products, ""])
        lines += [
            [_name(r), f"repeated product, {kind}", f"{x:.2f} of jvp(grad)", ""]
            for kind, x in r.get("product", {}).items()
        ]
        if "trace" in known:
            error = f"true error {known['trace']['error']:.1e}"
            lines.append([_name(r), "trace", "", error])
        lines += _trace(r)
        lines += [
            [_name(r), f"top-1 to 1e-3 by {how}", f"{count:.0f} products",
             f"{units:.1f} units"]
            for how, (count, units) in r.get("methods", {}).items()
        ]  # fmt: skip
    return _table(["", "what", "cost", "error"], lines)


def _trace(row: dict) -> list[list[str]]:
    """The trace, and what Hutchinson's would be."""
    if (t := row.get("trace")) is None:
        return []
    error = f"standard error {t['standard_error']:.1e}"
    lines = [[_name(row), f"trace, {t['method']}", f"{t['units']:.1f} units", error]]
    if "times_hutchinson" in t:
        what = f"Hutchinson in that time, {t['hutchinson']} products"
        error = f"standard error {t['times_hutchinson']:.1f} times that"
        lines.append([_name(row), what, "", error])
    return lines


def _race(rows: list[dict]) -> list[str]:
    """Units of time of each contender, by what they race for."""
    lines = []
    for r in (r for r in rows if r.get("race")):
        cells = (
            " / ".join(_units(r["race"].get(what, {}).get(name)) for what in TARGETS)
            for name in CONTENDERS
        )
        lines.append([_name(r), *cells])
    return _table([" / ".join(TARGETS), *CONTENDERS], lines)


def _units(found: float | str | None) -> str:
    return f"{found:.1f}" if isinstance(found, float) else found or "."


def _memory(rows: list[dict]) -> list[str]:
    """Peaks, in MB."""
    found = [r for r in rows if "memory" in r]
    names = list(found[0]["memory"]) if found else []
    lines = [[_name(r), *(f"{r['memory'][n]:.0f}" for n in names)] for r in found]
    return _table(["peak, MB", *names], lines)
