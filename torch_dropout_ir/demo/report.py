"""The table that closes the demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_dropout_ir.demo.data import Data
    from torch_dropout_ir.demo.run import Outcome
    from torch_dropout_ir.demo.settings import Settings

_ERRORS = {
    "R_2": "R_2 standard error",
    "top Hessian eigenvalue": "residual",
    "trace of the Hessian": "trace standard error",
}
# The direction in which dropout moves the number in the paper.
_DIRECTIONS = {
    "test accuracy (%)": +1,
    "R_1": -1,
    "effective ratio": -1,
    "trace of the Hessian": -1,
}


def table(
    outcomes: Sequence[Outcome],
    settings: Settings,
    data: Data,
    seconds: float,
    picture: Path,
) -> str:
    """Return what the demonstration prints at its end."""
    without, with_ = (outcome.numbers for outcome in outcomes)
    rows = [("", outcomes[0].name, outcomes[1].name, "dropout makes it")]
    for name in without:
        if name in _ERRORS.values():
            continue
        cells = _cell(without, name), _cell(with_, name)
        rows.append((name, *cells, _verdict(name, without, with_)))
    widths = [max(len(row[c]) for row in rows) for c in range(4)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    shape = f"{data.train[0].shape[1]}-{settings.width}-10"
    head = (
        f"{data.name}; {shape} network; {settings.steps} steps of gradient descent, "
        f"lr {settings.lr:g}, start std {settings.std:g}; {seconds:.0f} s"
    )
    foot = [
        f"picture:     {picture}",
        f"TensorBoard: torch-dropout-ir board {settings.log_dir}",
    ]
    return "\n".join(["", head, "", *lines, "", *foot])


def _cell(numbers: dict[str, float], name: str) -> str:
    value, error = f"{numbers[name]:.4g}", numbers.get(_ERRORS.get(name, ""))
    return f"{value} ± {error:.1g}" if error else value  # of what is exact no error


def _verdict(name: str, without: dict[str, float], with_: dict[str, float]) -> str:
    moved = with_[name] - without[name]
    errors = [numbers.get(_ERRORS.get(name, ""), 0.0) for numbers in (without, with_)]
    if abs(moved) <= 2 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5:
        return "no difference"
    found = "higher" if moved > 0 else "lower"
    direction = _DIRECTIONS.get(name.split(" at ")[0])
    if direction is None:  # the paper says nothing of it
        return found
    return f"{found}, {'as in' if moved * direction > 0 else 'unlike'} the paper"
