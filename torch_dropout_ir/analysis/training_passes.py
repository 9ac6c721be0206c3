"""Which passes a script trains on: not those that only look."""

from __future__ import annotations

import threading

import torch

from torch_dropout_ir.tracing import recomputes


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
