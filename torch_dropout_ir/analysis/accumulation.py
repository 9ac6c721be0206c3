"""Which passes a script trains on, and factors that are none of its loss's own."""

from __future__ import annotations

import threading
from typing import Final

import torch

from torch_dropout_ir.analysis.followed_loss import TIMES, At, Step
from torch_dropout_ir.tracing import recomputes

PATIENCE: Final = 500  # passes: more than scripts accumulate
_DIVIDED: Final = ("div", "divide", "true_divide", "__truediv__", "__div__")


class Accumulation:
    """Counts the passes that a script makes for a step, and divides its loss by.

    The last group of an epoch may be shorter than the others, and divided by as many.

    Attributes:
        passes: Passes that went backward for this optimizer step, and this one.
        whole: Passes of the largest group that was seen to be divided by them.
        idle: Passes that went backward since a step was seen, gradients kept or not.
        stride: Of how many passes one is looked at after many without a step of any.
    """

    def __init__(self) -> None:
        self.passes = self.whole = 1
        self.idle = self._others = 0
        self.stride = 1

    def tired(self) -> bool:
        """Whether not to look at a pass, since no optimizer steps."""
        self._others += self.idle >= PATIENCE
        return self._others % self.stride != 0

    def stepped(self) -> bool:
        """Look at every pass from now on; return whether the last was looked at."""
        seen, self.stride = self._others % self.stride == 0, 1
        return seen

    def taken_off(self, at: At, steps: list[Step], scales: set[int]) -> At:
        """Return what a number was before a scaler and accumulation have changed it.

        ``steps`` are the calls that lead to it, ``scales`` those of a gradient scaler.
        """
        while at.of == "steps":
            step = steps[at.place]
            times = step.function.__name__ in TIMES
            if not times and step.function.__name__ not in _DIVIDED:
                break
            if len(step.args) != 2 or not isinstance(step.args[0], At):
                break
            inner, factor = step.args[0]._replace(part=at.part), step.args[1]
            groups = (1, self.passes, max(self.passes, self.whole))
            mean = next((n for n in groups if factor == (1 / n if times else n)), 0)
            if not mean and at.place not in scales:
                break
            at, self.whole = inner, max(self.whole, mean)
        return at


class TrainingPasses:
    """Tells passes that train from others, by their thread and their graph.

    Others are without a graph where there are some with one, or in another thread than
    that of the steps.
    """

    def __init__(self) -> None:
        self._attached = threading.get_ident()
        self._steps = self._last = 0  # threads: of the steps; of the last pass
        self._with_graph = False

    def only_looks(self) -> bool:
        """Whether nothing trains on the pass that this thread makes."""
        if recomputes():  # checkpointing makes a pass once more to go backward
            return True
        here = threading.get_ident()
        if self._steps not in (0, here):
            return True
        # Until a step is seen: what makes no graph in another thread serves the model.
        others = self._with_graph or here != self._attached
        return others and not torch.is_grad_enabled()

    def begins(self) -> None:
        """Enter a pass of this thread."""
        self._last, self._with_graph = threading.get_ident(), torch.is_grad_enabled()

    @property
    def own(self) -> bool:
        """Whether the last pass is one of this thread."""
        return self._last == threading.get_ident()

    def stepped(self) -> None:
        """Enter that the optimizer steps in this thread."""
        self._steps = self._last if self.own else 0
