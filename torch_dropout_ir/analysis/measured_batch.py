"""The batch that a measurement is of, and the loss of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_dropout_ir.analysis.capture import Capture
from torch_dropout_ir.analysis.replay import NO_DROPOUT
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.losses import Loss, resolve_loss

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
