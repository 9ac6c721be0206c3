"""What one training step shows: inputs, targets, masks; and nothing of it moved.

Semantics:

* Between measurements the root module carries one hook, which does nothing: put there
  and taken away for each measurement, it would have compiled code compiled again. A
  second one and the look-outs for the loss, a global hook on modules and a mode for
  functions, live inside a step that measures. Its batch is kept until the next one.
"""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_dropout_ir.analysis.accumulation import Accumulation, TrainingPasses
from torch_dropout_ir.analysis.bystanders import Bystanders
from torch_dropout_ir.analysis.followed_loss import versions
from torch_dropout_ir.analysis.loss_calls import sweep
from torch_dropout_ir.analysis.observed_masks import ObservedMasks
from torch_dropout_ir.analysis.own_pass import OTHER_PASS, TRAINS, OwnPass, not_again
from torch_dropout_ir.analysis.root_hook import (
    CompiledCall,
    RootHook,
    compiled,
    compiled_in_place,
)
from torch_dropout_ir.analysis.script_loss import ScriptLoss
from torch_dropout_ir.hooks import after_call
from torch_dropout_ir.inputs import Inputs
from torch_dropout_ir.module_calls import measuring, replaced
from torch_dropout_ir.turns import in_turn, inside

_P = ParamSpec("_P")


def _timed(
    look: Callable[Concatenate[Capture, _P], None],
) -> Callable[Concatenate[Capture, _P], None]:
    """Let what a method takes be told by :meth:`Capture.spent`."""

    @functools.wraps(look)
    def timed(self: Capture, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        started = time.perf_counter()
        try:
            look(self, *args, **kwargs)
        finally:
            if not self.paused:  # else it is part of a measurement
                self._seconds += time.perf_counter() - started

    return timed


class Capture:
    """Watches the forward passes of a model in training mode.

    Where ``model``, which is run again for its masks, is None it would not draw the
    same, as in a compiled wrapper.

    Attributes:
        inputs: Arguments of the last training pass that was looked at.
        passes: Passes before that one that went backward for the same optimizer step.
        masks: What was seen of its masks.
        trains: Why the model is never to be run again, where that would be training.
        missed: Why the last pass cannot be measured, where there was one.
        unlike: How the measures' passes differ from the script's.
        bystanders: What the measures' own passes leave aside.
        script: What follows the loss of the passes.
        accumulation: How many passes there are for a step.
        want_masks, want_targets: Whether to look for those of the coming pass.
        cast: Whether autocast was on when it began.
        started: When the last pass looked at began, by ``time.perf_counter()``.
        wrapper: Weak reference to the DDP that has called the model last, if any.
        paused: True while the analysis itself runs the model.
    """

    def __init__(self, watched: nn.Module, model: nn.Module | None) -> None:
        self.watched = watched
        self.model = model
        self.inputs: Inputs | None = None
        self._versions = list[int]()  # of their tensors, before the pass
        self._outputs: Any = None
        self._own: OwnPass | None = None
        self.passes = 0
        self.missed = self.unlike = self.trains = ""
        self.started, self.cast = float("-inf"), False
        self.masks, self.script = ObservedMasks(), ScriptLoss()
        self.accumulation = Accumulation()
        self.bystanders = Bystanders(watched)
        self.wrapper: Callable[[], nn.Module | None] = lambda: None
        self.want_masks = self.want_targets = self._new_step = True
        self.paused, self._seconds = False, 0.0
        self._trained = TrainingPasses()
        self._open = False  # whether the step is looked at
        self._within = False  # whether a pass that is looked at has not ended
        self._outside = False  # whether the call is watched, and not by hooks
        stacks = (contextlib.ExitStack() for _ in range(4))
        self._told, self._step, self._after_once, self._root = stacks
        self._hook = RootHook()
        self._then = RootHook(self._after, missed=self._miss)

    def attach(self, owner: object) -> None:
        """Put a hook on the root module; ``owner`` lives as long as it does."""
        call, self._hook = self._hook.call, RootHook(None, owner, self._miss)
        if compiled_in_place(self.watched):
            stand_in = CompiledCall(self.watched, self._hook, self._then, owner)
            self._root.callback(stand_in.leave)
            self._outside = True
        else:
            hook = self.watched.register_forward_pre_hook(
                self._hook, with_kwargs=True, prepend=True
            )  # before hooks of the script's that change the inputs
            self._root.callback(hook.remove)
        # Not before: till then torch may call it in another thread without `kwargs`.
        self._hook.call = call

    def follow(self) -> None:
        """Watch the compiled model, where the script has compiled it since."""
        wrapper = None if self._outside else compiled(self.watched)
        if wrapper is None:
            return
        self.watched = wrapper
        self.model = None  # its masks are others than those of the compiled one
        self._told.close()
        before = self._hook  # in compiled code, where it does nothing
        self.attach(before.owner)
        before.call = None

    def detach(self) -> None:
        """Remove every hook and let go of what was seen."""
        self._hook.call = None  # before torch forgets that it takes `kwargs`
        for stack in (self._told, self._step, self._root):
            stack.close()
        sweep()
        self.script.stop()
        self.inputs = self._outputs = None

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Let the analysis run the model, in its turn, and end the step."""
        with in_turn():
            self.paused = True
            try:
                yield
            finally:
                self.paused = False
                self.end_step()

    def end_step(self) -> None:
        """Stop looking at what the step does; the batch stays until the next one."""
        self._trained.stepped()
        self._told.close()
        self._stop_looking()
        self.script.stop()

    def _stop_looking(self) -> None:
        self._open = False
        self._step.close()
        self._outputs = None

    def take(self, passes: list[int]) -> bool:
        """Let the inputs be those of some passes, if they can be made again."""
        found = self.script.inputs_of(passes)
        if isinstance(found, str):
            self._miss(found)
            return False
        self.inputs, self._versions = found, versions(found.leaves())
        return True

    @_timed
    def _before(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        sweep()  # in this thread, whose passes may train no more
        aside = self.paused or not self.watched.training or measuring()
        if aside or self._trained.only_looks():
            return
        self._trained.begins()
        if self._new_step:
            self.passes, self.accumulation.idle, self._new_step = 0, 0, False
        if self.accumulation.tired():  # what was seen of the pass before stays
            self._told.close()
            self.script.leave()
            return self._step.close()
        # While its forward pass runs; a private name.
        parallel = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if parallel is not None:
            self.wrapper = weakref.ref(parallel)
        self.started = time.perf_counter()
        self.masks.forget()
        self.cast = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
        given = Inputs(args, kwargs)
        self.inputs = given.renewed().cut_off()
        self._versions, self.missed = versions(self.inputs.leaves()), ""
        if self._open or self.want_masks or self.want_targets:
            self._open_step(given)

    def _miss(self, reason: str) -> None:
        self.missed, self.inputs = reason, None

    @_timed
    def want(self, anything: bool, needed: set[str]) -> None:
        """Say what the coming step must show; without anything, no pass is seen.

        ``needed`` is what measures need. R_1 is of the calls of dropout functions too,
        which show in their masks.
        """
        self.want_targets = not needed.isdisjoint({"targets", "batches", "loss"})
        first = self.want_targets and not self.masks.known
        self.want_masks, self._new_step = "masks" in needed or first, True
        self._hook.call = self._before if anything else None
        if anything:
            self._listen()

    def spent(self) -> float:
        """Return the seconds of looking at passes since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _listen(self) -> None:
        if self.model is not None:  # a compiled one has its hooks in the graph
            self._told.enter_context(self.bystanders.told())

    def _open_step(self, given: Inputs) -> None:
        """Look at the coming pass in full, where something of it is wanted."""
        if self.script.went_back:
            self.accumulation.idle += 1
            self.passes = self.accumulation.passes
        self._stop_looking()
        self.script.begin(given.leaves())
        self._listen()  # to hooks that are there since
        if self.want_masks and self.model is not None and not replaced():
            self.masks.begins(self.model)
        self._open = self.want_masks or self.want_targets
        self.bystanders.writes.begin()
        if self._open and not self._outside:
            self._after_once.callback(after_call(self.watched, self._then, always=True))
            self._within = True
            self._step.callback(self._after_once.close)

    @_timed
    def _after(self, _: nn.Module, __: tuple[Any, ...], outputs: Any) -> None:
        looked_at = self._open and self._trained.own
        if self.paused or measuring() or not looked_at or self._trained.only_looks():
            return
        self._within = False
        self._after_once.close()  # not for a call around it, as of a trainer's own step
        self._check_inputs()
        self.bystanders.writes.end()
        self._own = OwnPass(self.watched, outputs)
        if not self.watched.training:
            return
        self.masks.ends(self.watched)
        if self.want_targets and outputs is not None:
            self._outputs = outputs
            self.accumulation.passes = self.passes + 1
            given = self.inputs, self._versions
            self.script.follow(self.watched, self.accumulation, outputs, *given)

    def _check_inputs(self) -> None:
        """Let go of inputs of which no second pass is the same, or can be masked."""
        if self.inputs and (why := not_again(self.inputs.leaves(), self._versions)):
            self._miss(why)

    def observe(self, model: nn.Module) -> None:
        """Look at the masks of the last pass, where it was one to look at.

        ``model`` is run again for that: the own one, or a copy that runs alone.
        """
        self._told.close()
        if self.script.leave():  # every call of the measures would go through it
            self.passes = self.accumulation.passes - 1
        self._check_inputs()
        if self.trains or (self._within and inside(self.watched)):
            self.trains = TRAINS
            self._miss(TRAINS)
        self.unlike = self._own.unlike(self.watched) if self._own else ""
        if self.model is None:
            return
        found = self.masks.observe(model, self.inputs, self.bystanders)
        if self.masks.other_draws:
            self.unlike = self.unlike or OTHER_PASS
        if found and self._own and not self.unlike:
            self.unlike = self._own.differs(self._outputs, found.outputs)
