"""The masks of the script's passes, each seen in a second pass, and counted."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Final

from torch import nn

from torch_dropout_ir.analysis.attributes import Generators
from torch_dropout_ir.analysis.bystanders import Bystanders
from torch_dropout_ir.analysis.records import warn
from torch_dropout_ir.analysis.replay import OtherDraws, Replay, replay
from torch_dropout_ir.generators import Standing
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.masks import MaskStatistics
from torch_dropout_ir.sites import Site

_FAILED: Final = "the masks of the last step were not observed: {}"


class ObservedMasks:
    """Counts the masks of passes.

    Attributes:
        statistics: Those of foreign sites, by name.
        calls: The calls of dropout functions that were found, by name.
        unseen: Noise that cannot be seen, by place, with the reason.
        known: Whether a pass was observed, and ``calls`` are all there are.
        failure: Why the masks of the last pass are not in the statistics.
        other_draws: Whether that is since a second pass has drawn otherwise.
    """

    def __init__(self) -> None:
        self.statistics = defaultdict[str, MaskStatistics](MaskStatistics)
        self.calls: dict[str, Site] = {}
        self.unseen: dict[str, str] = {}
        self.failure, self.known, self.other_draws = "", False, False
        self._seconds = 0.0
        self.forget()

    def forget(self) -> None:
        """Let go of where the last pass began."""
        self._start: Generators | None = None
        self._end: Standing | None = None

    def begins(self, model: nn.Module) -> None:
        """Keep where the generators stand: a pass of the script's begins."""
        self._start = Generators(model)

    def ends(self, model: nn.Module) -> None:
        """Keep where they stand at its end."""
        if self._start is not None:
            self._end = Standing(model)

    def observe(
        self, model: nn.Module, inputs: Inputs | None, bystanders: Bystanders
    ) -> Replay | None:
        """Run the last pass again and count its masks, if it was one to look at."""
        start, end, self.other_draws = self._start, self._end, False
        self._seconds = 0.0  # of a measurement that broke off before it was asked for
        self.forget()
        if start is None or inputs is None:
            return None
        started = time.perf_counter()
        try:
            with bystanders.aside(model):
                found = replay(model, inputs, start, end)
        except Exception as err:  # a measure of its own: training goes on
            self.failure = _FAILED.format(err)
            self.other_draws = isinstance(err, OtherDraws)
            warn(self.failure)
            return None
        finally:
            self._seconds = time.perf_counter() - started
        self.failure, self.known = "", True
        for name, drawn in found.statistics.items():
            self.statistics[name] += drawn
        self.calls, self.unseen = found.calls, found.unseen
        return found

    def spent(self) -> float:
        """Return the seconds of the last observation, once."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
