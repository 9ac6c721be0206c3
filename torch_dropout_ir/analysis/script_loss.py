"""The loss of a step as the script computes it, and the passes that it is made of."""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from torch_dropout_ir.analysis.accumulation import Accumulation
from torch_dropout_ir.analysis.followed_loss import (
    At,
    FollowedLoss,
    leading_to,
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
        self._module: LossModule | None = None
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
        self._module = LossModule(outputs, self._calls)
        self._looks.callback(self._module.look())

    def leave(self) -> bool:
        """Look no more; return whether there was anything to look at."""
        self._looks.close()
        return self._calls is not None

    def stop(self) -> None:
        """Look no more, and let go of what was seen."""
        self._looks.close()
        self._calls = self._module = None
        self._made, self.chained = [], False

    def found(self) -> Seen | None:
        """Return the loss; None where none was seen, or what it read has changed."""
        calls = self._calls
        if calls is None or calls.overwritten:
            return None
        module = self._module and self._module.loss(calls.result is not None)
        if module:
            return Seen(*module, True, calls.in_part, [len(self._made) - 1])
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


class LossModule:
    """Looks for the module that is called with outputs and targets: it is the loss.

    One that reads more of the outputs than it is called with (it has kept a part of
    them, or a closure has) is no function of these two; its calls are followed instead.
    """

    def __init__(self, outputs: Any, calls: LossCalls) -> None:
        self._outputs = outputs
        self._calls = calls
        self._begun: dict[int, int] = {}  # calls listed before, by the module
        self._seen: tuple[nn.Module, Any, At | None] | None = None

    def look(self) -> Callable[[], None]:
        """Look at the calls of all modules; return what ends that."""
        stack = contextlib.ExitStack()
        stack.callback(register_module_forward_pre_hook(_weakly(self._begin)).remove)
        stack.callback(register_module_forward_hook(_weakly(self._end)).remove)
        return stack.close

    def loss(self, followed: bool) -> tuple[nn.Module, Any] | None:
        """Return a copy of the module, and its targets.

        None where there is no such module, the script has trained on another number
        (while calls ``followed`` tell of a loss as well), it may have changed in the
        call, or it holds what cannot be copied, as a tensor with its graph.
        """
        if self._seen is None:
            return None
        module, targets, at = self._seen
        # Buffers of a script's own may have moved in the call; torch's are weights.
        still = isinstance(module, nn.modules.loss._Loss) or not [*module.buffers()]
        own = still and at == self._calls.trained
        if followed and at is not None and not own:
            return None
        try:
            return copy.deepcopy(module), targets  # its buffers are the script's
        except Exception:
            return None

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._seen is not None or len(args) != 2:
            return  # one that takes more is followed as a function is
        same = args[0] is self._outputs or self._calls.returned(args[0])
        if same and not self._calls.lost(args[0]):
            self._begun[id(module)] = len(self._calls.steps)

    def _end(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        before = self._begun.pop(id(module), None)
        if before is None or self._seen is not None or self._calls.lost(args[0]):
            return
        number = isinstance(result, Tensor) and result.numel() == 1
        if not number or not result.requires_grad:
            return
        at = self._calls.at(result)
        if at is None or all(k >= before for k in leading_to(at, self._calls.steps)):
            self._seen = module, args[1], at
            self._calls.of_module = weakref.ref(result)


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that calls a bound method as long as its object lives."""
    weak = weakref.WeakMethod(method)

    def hook(*call: Any) -> None:
        if (living := weak()) is not None:
            living(*call)

    return hook
