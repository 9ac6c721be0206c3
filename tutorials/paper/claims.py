"""What the paper claims, held against the numbers of every seed."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

VERDICTS = ("not reproduced", "reproduced in direction", "reproduced")


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper, held against every seed.

    Attributes:
        text: What is claimed.
        paper: The paper's number, as a person reads it.
        values: Ours, one for each seed.
        holds: Whether a value of ours is the paper's, within the tolerance in ``text``.
        direction: Whether a value at least points the same way.
        unit: What follows a number.
    """

    text: str
    paper: str
    values: Sequence[float]
    holds: Callable[[float], bool]
    direction: Callable[[float], bool]
    unit: str = ""

    @property
    def verdict(self):
        """The worst of the seeds': one that fails is not averaged away."""
        level = [2 if self.holds(v) else int(self.direction(v)) for v in self.values]
        return VERDICTS[min(level)] if level else VERDICTS[0]

    @property
    def ours(self):
        """Mean over the seeds, and half of the distance between the extremes."""
        found = [v for v in self.values if math.isfinite(v)]
        if not found:
            return "no number"
        mean, spread = statistics.fmean(found), (max(found) - min(found)) / 2
        without = len(self.values) - len(found)
        said = f", no number in {without} of {len(self.values)} seeds" * bool(without)
        return f"{_short(mean)} ± {_short(spread)}{self.unit}{said}"

    @property
    def record(self):
        """What ``results/<figure>.json`` keeps of it."""
        return {
            "text": self.text,
            "paper": self.paper,
            "unit": self.unit,
            "values": [float(v) for v in self.values],
            "ours": self.ours,
            "verdict": self.verdict,
        }


def worst(claims):
    """The verdict of a figure: its worst claim's."""
    return VERDICTS[min(VERDICTS.index(one.verdict) for one in claims)]


def _short(value):
    if value == 0:
        return "0"
    return f"{value:.3g}" if 1e-2 <= abs(value) < 1e4 else f"{value:.2e}"
