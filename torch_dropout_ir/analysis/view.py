"""What measures are given to look at, of what a step has shown, and what is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from torch_dropout_ir.analysis.capture import Capture
from torch_dropout_ir.analysis.distributed import Ranks
from torch_dropout_ir.analysis.measured_batch import MeasuredBatch
from torch_dropout_ir.analysis.replay import own_statistics
from torch_dropout_ir.analysis.sharded import gathered_model
from torch_dropout_ir.analysis.snapshot import (
    Snapshot,
    received_gradients,
    theory_note,
)
from torch_dropout_ir.analysis.steps import OptimizerSteps
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.masks import MaskStatistics
from torch_dropout_ir.sites import active_sites

NOT_PICKLED: Final = (
    "an Analysis holds hooks and open files and cannot be pickled: save "
    "`analysis.state_dict()`, attach again, and `load_state_dict` it there"
)
_SAVED: Final = ("step", "history", "statistics", "cadence")


class View:
    """Makes snapshots of a model that trains.

    Attributes:
        counted: Mask statistics of the run that this one goes on from.
    """

    def __init__(
        self,
        model: nn.Module,
        capture: Capture,
        batch: MeasuredBatch,
        steps: OptimizerSteps,
        ranks: Ranks,
    ) -> None:
        self._model = model
        self._capture = capture
        self._batch = batch
        self._steps = steps
        self._ranks = ranks
        self.counted: dict[str, MaskStatistics] = {}

    def snapshot(
        self,
        step: int,
        runs: bool,
        inputs_of: Callable[[Inputs, int], Inputs],
        targets_of: Callable[[Inputs], Any],
    ) -> Snapshot:
        """Return the state just before a step.

        ``runs`` tells whether measures need more than gradients; ``inputs_of`` and
        ``targets_of`` are those of :class:`Analysis`.
        """
        capture, batch = self._capture, self._batch
        self._ranks.check_shards(self._model)
        model = gathered_model(self._model) if runs else self._model
        capture.observe(model)
        if runs and capture.inputs is None:
            capture.follow()
        (inputs, targets), source = batch.choose(step, capture, inputs_of, targets_of)
        seen = None if targets is None else [(inputs, targets)]
        batches = seen if batch.data is None else batch.data
        if capture.trains:
            inputs = targets = batches = None
        optimizer = self._steps.optimizer
        notes = theory_note(self._model, optimizer, self._steps.moved) | batch.note
        lr, gradients = received_gradients(self._model, optimizer)
        return Snapshot(
            model=model,
            step=step,
            sites=(*active_sites(model), *capture.masks.calls.values()),
            loss=batch.loss,
            inputs=inputs,
            targets=targets,
            source=source,
            missed=capture.missed,
            batches=batches,
            given=batch.data is not None,
            lr=lr,
            gradients=gradients,
            statistics=self.statistics(),
            notes=notes | {"masks": capture.masks.failure, "ranks": self._ranks.note},
            ranks=self._ranks,
        )

    def statistics(self) -> dict[str, MaskStatistics]:
        """Return mask statistics by site, with those of the run before."""
        seen = self._capture.masks.statistics | own_statistics(self._model)
        empty = MaskStatistics()
        return {n: self.counted.get(n, empty) + s for n, s in seen.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as plain numbers and tensors."""
        return {n: dataclasses.asdict(seen) for n, seen in self.statistics().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.counted = {n: MaskStatistics(**seen) for n, seen in state.items()}
        self.share()

    def share(self) -> None:
        """Leave the statistics of before to the first rank: they add over ranks."""
        if self._ranks.rank:
            self.counted = {}


def check_state(state: Any) -> None:
    """Raise a ValueError unless it is what :meth:`Analysis.state_dict` returns."""
    if isinstance(state, dict) and all(name in state for name in _SAVED):
        return
    got = f"keys {sorted(map(str, state))[:4]}" if isinstance(state, dict) else state
    raise ValueError(
        "load_state_dict: expected what `analysis.state_dict()` returned, with "
        f"{', '.join(_SAVED)}, got {got}"
    )
