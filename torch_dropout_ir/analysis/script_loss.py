"""The loss of a step as the script computes it, and the passes that it is made of."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

from torch import Tensor, nn

from torch_dropout_ir.analysis.accumulation import Accumulation
from torch_dropout_ir.analysis.followed_loss import (
    At,
    FollowedLoss,
    passes_of,
)
from torch_dropout_ir.analysis.loss_calls import LossCalls
from torch_dropout_ir.analysis.own_graph import comes_of
from torch_dropout_ir.analysis.own_pass import not_again
from torch_dropout_ir.inputs import Inputs, SeveralInputs
from torch_dropout_ir.losses import TORCH_LOSSES, LossFunction


class Seen(NamedTuple):
    """A loss that was seen.

    Attributes:
        loss: The loss.
        targets: Its targets; None where it reads the outputs alone.
        straight: Whether any loss of outputs and targets would take these, handed on
            beside the output itself.
        in_part: Whether it is a part of the script's.
        passes: The numbers of the passes whose outputs it takes.
    """

    loss: LossFunction
    targets: Any
    straight: bool
    in_part: bool
    passes: list[int]


class ScriptLoss:
    """Follows what a script makes of the outputs of a pass, or of several.

    Attributes:
        chained: Whether one of the passes was given what an earlier one has made.
    """

    def __init__(self) -> None:
        self.chained = False
        self._calls: LossCalls | None = None
        self._made = list[tuple[Inputs | None, list[int]]]()
        self._looks = contextlib.ExitStack()

    @property
    def went_back(self) -> bool:
        """Whether the script has gone back from what it has made of them."""
        return self._calls is not None and self._calls.went_back

    def begin(self, given: list[Any]) -> None:
        """Let go of earlier passes, unless a loss of them may still come.

        ``given`` are the leaves of the coming pass's arguments.
        """
        if self._calls is None or not self._calls.waits():
            self.stop()
        elif any(node is not None for node, _ in self._calls.nodes):
            self.chained = self.chained or comes_of(given, self._calls.nodes)

    def follow(
        self,
        model: nn.Module,
        accumulation: Accumulation,
        outputs: Any,
        inputs: Inputs | None,
        versions: list[int],
    ) -> None:
        """Follow the ``outputs`` of a pass.

        ``inputs`` is what it was made with, None where it cannot be made again;
        ``versions`` are those of their tensors.
        """
        if self._calls is None:
            self._calls = LossCalls(outputs, accumulation, model)
            self._calls.enter()
            self._looks.callback(self._calls.leave)
        else:
            self._calls.add(outputs)
        self._made.append((inputs, versions))

    def leave(self) -> bool:
        """Look no more; return whether there was anything to look at."""
        self._looks.close()
        return self._calls is not None

    def stop(self) -> None:
        """Look no more, and let go of what was seen."""
        self._looks.close()
        self._calls = None
        self._made, self.chained = [], False

    def found(self) -> Seen | None:
        """Return the loss; None where none was seen, or what it read has changed."""
        calls = self._calls
        if calls is None or calls.overwritten:
            return None
        return None if calls.result is None else _followed(calls, calls.result)

    def inputs_of(self, passes: list[int]) -> Inputs | str:
        """Return what some passes were made with, or why they cannot be made again."""
        given = list[Inputs]()
        for inputs, before in (self._made[k] for k in passes):
            why = "one of the passes that the loss compares cannot be made again"
            if inputs is None or (why := not_again(inputs.leaves(), before)):
                return why
            given.append(inputs)
        return given[0] if len(given) == 1 else SeveralInputs.of_calls(given)


def _followed(calls: LossCalls, result: At) -> Seen:
    beside, part, passes = calls.beside, calls.in_part, passes_of(result, calls.steps)
    step = calls.steps[result.place] if result.of == "steps" else None
    if step is None:
        loss = FollowedLoss([], result, "the model's own", {}, [])
        return Seen(loss, None, False, part, passes)
    several: tuple[Tensor, ...] = tuple(beside.targets)
    targets = several[0] if len(several) == 1 else several or None
    rest = beside.constants
    if step.function not in TORCH_LOSSES:
        loss = FollowedLoss(calls.steps, result, "that of the script", {}, rest)
        return Seen(loss, targets, False, part, passes)
    options = {
        name: beside[x] if isinstance(x, At) else x
        for name, x in step.kwargs.items()
        if not isinstance(x, At) or x.of in ("targets", "constants")
    }
    places = [x.of if isinstance(x, At) else "" for x in step.args]
    straight = places == ["outputs", "targets"]
    if straight and calls.one[passes[0]]:
        plain = functools.partial(step.function, **options)
        return Seen(plain, beside[step.args[1]], True, part, passes)
    name = f"{step.function.__name__} of the script"
    loss = FollowedLoss(calls.steps, result, name, options, rest)
    return Seen(loss, targets, straight and len(several) == 1, part, passes)
