"""What was found, cell by cell: kept in a file, and written as tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from curvature.contenders import CONTENDERS
from curvature.race import TARGETS
from curvature.tasks import TASKS


def joined(rows: list[dict], path: Path | None) -> list[dict]:
    """Return the rows with those of earlier runs, and write them where those were."""
    known: dict[tuple, dict[str, Any]] = {}
    earlier = json.loads(path.read_text()) if path and path.exists() else []
    for r in (*earlier, *rows):
        old = known.setdefault((r["task"], r["steps"]), {})
        both = {k: old.get(k, {}) | r.get(k, {}) for k in ("budgets", "race")}
        old |= r | both
    order = list(TASKS)
    whole = sorted(known.values(), key=lambda r: (order.index(r["task"]), r["steps"]))
    if path:
        path.write_text(json.dumps(whole, indent=1))
    return whole


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
    for r in (r for r in rows if "top" in r):
        lines += [
            [_name(r), f"top-1, {how}", f"{x['products']} products",
             f"true error {x['error']:.1e}"]
            for how, x in r["top"].items()
        ]  # fmt: skip
        lines += [
            [_name(r), "top-1 by any method from a random start", r["floor"], ""],
        ]
    for r in (r for r in rows if "density" in r):
        lines.append([_name(r), "density of 20 steps", f"{r['density']} products", ""])
    for r in (r for r in rows if "product" in r):
        lines += [
            [_name(r), f"repeated product, {kind}", f"{x:.2f} of jvp(grad)", ""]
            for kind, x in r["product"].items()
        ]
        t = r["trace"]
        lines.append(
            [_name(r), f"trace, {t['method']}", f"{t['units']:.1f} units",
             f"standard error {t['standard_error']:.1e}"]
        )  # fmt: skip
        if "times_hutchinson" in t:
            lines.append(
                [_name(r), f"Hutchinson in that time, {t['hutchinson']} products", "",
                 f"standard error {t['times_hutchinson']:.1f} times that"]
            )  # fmt: skip
    for r in (r for r in rows if "trace_error" in r):
        lines.append([_name(r), "trace", "", f"true error {r['trace_error']:.1e}"])
    for r in (r for r in rows if "methods" in r):
        lines += [
            [_name(r), f"top-1 to 1e-3 by {how}", f"{count:.0f} products",
             f"{units:.1f} units"]
            for how, (count, units) in r["methods"].items()
        ]  # fmt: skip
    return _table(["", "what", "cost", "error"], lines)


def _race(rows: list[dict]) -> list[str]:
    """Units of time of each contender, by what they race for."""
    lines = []
    for r in (r for r in rows if r.get("race")):
        cells = (
            " / ".join(r["race"].get(what, {}).get(name, ".") for what in TARGETS)
            for name in CONTENDERS
        )
        lines.append([_name(r), *cells])
    return _table([" / ".join(TARGETS), *CONTENDERS], lines)


def _memory(rows: list[dict]) -> list[str]:
    """Peaks, in MB."""
    found = [r for r in rows if "memory" in r]
    names = list(found[0]["memory"]) if found else []
    lines = [[_name(r), *(f"{r['memory'][n]:.0f}" for n in names)] for r in found]
    return _table(["peak, MB", *names], lines)
