"""What measures are given to look at, of what a step has shown, and what is saved."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_dropout_ir.analysis.capture import Capture
from torch_dropout_ir.analysis.distributed import Ranks
from torch_dropout_ir.analysis.replay import NO_DROPOUT, own_statistics
from torch_dropout_ir.analysis.sharded import gathered_model
from torch_dropout_ir.analysis.snapshot import Snapshot, received_gradients, theory_note
from torch_dropout_ir.analysis.steps import OptimizerSteps
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.losses import Loss, resolve_loss
from torch_dropout_ir.masks import MaskStatistics
from torch_dropout_ir.sites import active_sites

NOT_PICKLED: Final = (
    "an Analysis holds hooks and open files and cannot be pickled: save "
    "`analysis.state_dict()`, attach again, and `load_state_dict` it there"
)
_SAVED: Final = ("step", "history", "statistics", "cadence")
_LAST: Final = (
    "of the last of {} passes that went backward since the optimizer stepped before"
)
_IN_PART: Final = (
    "of a part of the loss, and R_1 too: of the terms that were followed, or else of "
    "the first loss function that the outputs went through. What else is in the number "
    "on which the script calls `backward()` was not followed (penalties on parameters, "
    "losses weighed by some of the model's, reversed gradients, what `modified_loss` "
    "adds, outputs of many passes). Pass `loss=` for another one"
)
_CHAINED: Final = (
    "what passes of the script have made for later ones (a state, a text so far) is "
    "held as it was, dropout and all: R_1 and derivatives are of what each makes of it"
)
_NOISY: Final = (
    "the model draws other random numbers than those of dropout (`analysis.sites` "
    "lists them): this is at one draw of them, the loss surface at another"
)
# By which models of Hugging Face divide the sum of a loss that they compute.
_COUNT: Final = "num_items_in_batch"
_SHARE: Final = f"over its share of the `{_COUNT}`: on average that is the loss of all"


def by_itself(inputs: Inputs, parts: int) -> Inputs:
    """Return the inputs of a pass whose loss is a mean by itself.

    Where passes are accumulated, or several processes train, scripts have a model of
    Hugging Face divide by the items of all of them: ``parts`` passes.
    """
    items = inputs.kwargs.get(_COUNT)
    if items is None or parts == 1:
        return inputs
    return Inputs(inputs.args, {**inputs.kwargs, _COUNT: items / parts})


class MeasuredBatch:
    """Chooses a batch whose targets are known: the step's own, where it is one.

    Attributes:
        loss: The loss; None before it is known.
        data: The user's batches, for where the step does not show its targets.
        note: What is to be said of the loss, by tag.
    """

    def __init__(self, loss: Loss | None, data: list[Batch] | None) -> None:
        self.loss = loss
        self.data = data
        self.note: dict[str, str] = {}
        self._given = loss is not None
        self._part = ""
        self._last: tuple[Batch, int] | None = None

    def choose(
        self,
        step: int,
        capture: Capture,
        inputs_of: Callable[[Inputs, int], Inputs],
        targets_of: Callable[[Inputs], Any],
    ) -> tuple[Batch, str]:
        """Return ``(inputs, targets)``, None where not known, and which batch that is.

        ``inputs_of`` and ``targets_of`` are those of :class:`Analysis`.
        """
        inputs, targets, parts = capture.inputs, None, capture.passes + 1
        if inputs is not None:
            targets = self._targets(capture, targets_of(inputs_of(inputs, parts)))
            inputs = capture.inputs  # of the passes that the loss is of
        if inputs is not None:
            inputs = inputs_of(inputs, parts)
        if inputs is not None and capture.cast:
            inputs, targets = _uncast((inputs, targets), capture.watched)
        self.note["loss/R_S"] = self._part
        if targets is not None:
            self._last = (inputs, targets), step
        elif self.data:
            return self.data[0], "`data`"
        elif self._last is not None:
            before, seen = self._last
            source = f"the batch of step {seen}, the last whose targets were seen"
            said = filter(None, (self._part, f"of {source}"))
            self.note["loss/R_S"] = "; ".join(said)
            return before, source
        last = _LAST.format(capture.passes + 1) if capture.passes else ""
        counted = inputs is not None and inputs.kwargs.get(_COUNT) is not None
        share = _SHARE if counted and last else ""
        noisy = _NOISY if NO_DROPOUT in capture.masks.unseen.values() else ""
        chained = _CHAINED if capture.script.chained else ""
        said = filter(None, (self._part, last, share, chained, capture.unlike, noisy))
        self.note["loss/R_S"] = "; ".join(said)
        return (inputs, targets), "this step's batch"

    def _targets(self, capture: Capture, own: Any) -> Any:
        """Take over the loss of the step, and return its targets, if any were seen."""
        seen = capture.script.found()
        if seen is None:
            return own
        loss, targets, straight, in_part, passes = seen
        if self._given and not straight:
            return own
        if not capture.take(passes):
            return None
        if self._given:
            return targets
        self._part = _IN_PART if in_part else ""
        with contextlib.suppress(ValueError):
            self.loss = resolve_loss(loss)
        if targets is not None:
            return targets
        # A model that computes its loss itself has the targets among its inputs.
        return capture.inputs if own is None else own


class View:
    """Makes snapshots of a model that trains.

    Attributes:
        batch: The batch that is measured, and its loss.
        counted: Mask statistics of the run that this one goes on from.
    """

    def __init__(
        self,
        model: nn.Module,
        capture: Capture,
        loss: Loss | None,
        data: list[Batch] | None,
        steps: OptimizerSteps,
        ranks: Ranks,
    ) -> None:
        self._model, self._capture = model, capture
        self._steps, self._ranks = steps, ranks
        self.batch = MeasuredBatch(loss, data)
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
        capture, batch, optimizer = self._capture, self.batch, self._steps.optimizer
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


def _uncast(batch: Batch, model: nn.Module) -> Batch:
    """Return what autocast has narrowed in the parameters' precision: values stay."""
    half = (torch.bfloat16, torch.float16)
    if any(x.dtype in half for x in model.parameters()):
        return batch

    def cast(x: Tensor) -> Tensor:
        return x.float() if x.dtype in half else x

    def wide(given: Any) -> Any:
        if isinstance(given, Inputs):
            return type(given)(*wide((given.args, dict(given.kwargs))))
        return tree_map_only(Tensor, cast, given)

    return wide(batch[0]), wide(batch[1])
