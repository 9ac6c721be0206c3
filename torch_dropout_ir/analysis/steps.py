"""The steps of the optimizer that trains a model, seen through torch's own hooks.

Semantics:

* Torch goes through its hooks in each step of any optimizer, and raises where one is
  put in or taken away meanwhile, by another thread or a collection. So there is one
  pair as long as an analysis watches, taken away when no step goes through it.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from torch_dropout_ir.analysis.accumulation import PATIENCE
from torch_dropout_ir.analysis.own_pass import written
from torch_dropout_ir.tracing import frames

Before = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], Any]
After = Callable[[Optimizer], None]

_watches: Final[dict[int, tuple[Before, After]]] = {}
_numbers: Final = itertools.count()
_handles: Final[list[RemovableHandle]] = []
_REPLACED: Final = 2
STEPS: Final = "optimizer steps"  # what is absent until one is seen
NO_STEP: Final = (
    "none was seen: measures are taken at the steps of a torch.optim.Optimizer that "
    "steps this model, in eager code. With another kind of optimizer, or a compiled "
    "step, call `analysis.measure()`; without an optimizer R_2 is left out there. "
    f"After {PATIENCE} passes without a step, few are looked at"
)


class OptimizerSteps:
    """Tells when the optimizer that counts makes a step.

    It is the one that was given, or else the first that steps parameters of the model,
    until another one does so several times between its steps: then the script has
    replaced it.

    Attributes:
        announced: Whether to call before the coming step too.
        moved: Whether it had moved the parameters when it called its closure.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self._own = weakref.ref(model)
        self._given = optimizer is not None
        self._found = None if optimizer is None else weakref.ref(optimizer)
        self._strangers: dict[int, int] = {}  # steps of others since its last one
        self.announced = self.moved = False

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, once it is known and as long as it lives."""
        return None if self._found is None else self._found()

    def watch(
        self, before: Callable[[], None], after: Callable[[], None]
    ) -> Callable[[], None]:
        """Return what ends calls of two methods, kept alive by nobody, around steps.

        ``before`` is called where the step is :attr:`announced`.
        """
        after_step = self._calling(after, made=True)
        return _watch_steps(self._calling_before(before), after_step)

    def _calling(self, method: Callable[[], None], made: bool) -> Callable[..., None]:
        owner, call = weakref.ref(method.__self__), method.__func__  # type: ignore[attr-defined]

        def hook(optimizer: Optimizer, *_: Any) -> None:
            own, found = owner(), self._found
            known = found is not None and found() is optimizer and not self._strangers
            if own is None or not (known or self._counts(optimizer, made)):
                return
            if not (self.announced and torch.compiler.is_compiling()):
                call(own)

        return hook

    def _calling_before(self, method: Callable[[], None]) -> Callable[..., Any]:
        plain = self._calling(method, made=False)

        def hook(
            optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            if not self.announced or torch.compiler.is_compiling():
                return None
            self.moved = False
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                return plain(optimizer)
            # Forward and backward passes are in the closure: the step comes after it.
            first, start = iter((True,)), self._written()

            def watched() -> Any:
                if once := next(first, False):
                    self.moved = self._written() != start
                loss = closure()
                if once:
                    plain(optimizer)
                return loss

            if len(args) > 1:
                return (args[0], watched, *args[2:]), kwargs
            return args, {**kwargs, "closure": watched}

        return hook

    def _written(self) -> list[Any]:
        model = self._own()
        return [] if model is None else written(model)

    def _counts(self, optimizer: Optimizer, made: bool) -> bool:
        """Whether its step counts; ``made`` once it is."""
        if self._found is not None and self._found() is optimizer:
            self._strangers.clear()
            return True
        if self._given or not steps_model(optimizer, self._own()):
            return False
        steps = self._strangers.get(id(optimizer), 0)
        if self.optimizer is not None and steps < _REPLACED:
            self._strangers[id(optimizer)] = steps + made
            return False
        self._found = weakref.ref(optimizer)
        self._strangers.clear()
        return True


def steps_model(optimizer: Optimizer, model: nn.Module | None) -> bool:
    """Whether an optimizer steps parameters of a model."""
    own = set() if model is None else {id(x) for x in model.parameters()}
    stepped = (x for group in optimizer.param_groups for x in group["params"])
    return any(id(x) in own for x in stepped)


def _watch_steps(before: Before, after: After) -> Callable[[], None]:
    """Return what ends calls of functions around steps of all optimizers, when eager.

    ``before`` is as torch's hook: it may return other arguments.
    """
    number = next(_numbers)
    _watches[number] = before, after
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before))
        _handles.append(register_optimizer_step_post_hook(_after))

    def end() -> None:
        _watches.pop(number, None)
        if not (_watches or _stepping()):
            while _handles:
                _handles.pop().remove()

    return end


def _before(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if torch.compiler.is_dynamo_compiling():
        return None  # a compiled step would take the measures into its graph
    given = None
    for number in [*_watches]:
        watch = _watches.get(number)  # it may have ended since
        found = watch and watch[0](optimizer, args, kwargs)
        if found is not None:
            given = args, kwargs = found
    return given


def _after(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    for number in [*_watches]:
        if (watch := _watches.get(number)) is not None:
            watch[1](optimizer)


def _stepping() -> bool:
    """Whether a thread is in the middle of a step."""
    running = sys._current_frames().values()
    return any(
        frame.f_globals.get("__name__") == Optimizer.__module__
        for last in running
        for frame in frames(last)
    )
