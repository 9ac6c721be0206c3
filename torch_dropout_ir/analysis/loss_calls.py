"""From the outputs of a training pass to the number on which it is trained.

Semantics:

* Calls of torch's functions on what comes of the outputs are listed, until the script
  calls ``backward`` (or asks for gradients in parameters): on the loss. The list, run
  again on other outputs, is their loss. Where that call keeps the graph, another one
  can follow: the losses are added up.
* Of that number a gradient scaler's factor is taken away, and a division by the number
  of passes that went backward since the gradients were zero, or of a larger group.
* What is written on (``loss += ...``, ``each.masked_fill_(...)``), not by a view of it,
  is followed as if a new tensor were made.
* Nothing else is followed that was written on, nor what draws random numbers, is a
  gradient, has a derivative of its own (``autograd.Function``, compiled code), or
  depends on the model's parameters otherwise; what comes of others is constant.
* The mode lies under those of the script, and only looks: every call is made as it was.
"""

from __future__ import annotations

import weakref
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from torch_dropout_ir.analysis.accumulation import Accumulation
from torch_dropout_ir.analysis.followed_loss import (
    LOST,
    TIMES,
    UNKNOWN,
    At,
    Beside,
    Origins,
    Step,
    bends,
    filled,
    followed_term,
    inside,
    leading_to,
    memory,
    passes_of,
)
from torch_dropout_ir.analysis.function_modes import called, lay_under, take_away
from torch_dropout_ir.analysis.own_graph import (
    OwnGraph,
    by_scaler,
    comes_of,
    copied_from,
    goes_back,
    has_gradient,
)
from torch_dropout_ir.analysis.writing_calls import (
    without_statistics,
    without_writing,
    writes,
)
from torch_dropout_ir.generators import generators
from torch_dropout_ir.leaves import flatten
from torch_dropout_ir.losses import TORCH_LOSSES
from torch_dropout_ir.tracing import recorded

_MOST_STEPS: Final = 1000
_MOST_PASSES: Final = 8  # that are waited for together


class LossCalls(TorchFunctionMode):
    """Looks on while a script computes its loss.

    Attributes:
        steps: The calls that are listed.
        beside: What they read beside the outputs.
        one: Of each pass, whether it has returned a single tensor.
        of_module: What the loss module has returned, where there is one.
        nodes: What has made the outputs in the graph, and where they come from.
    """

    def __init__(
        self, outputs: Any, accumulation: Accumulation, model: nn.Module
    ) -> None:
        super().__init__()
        self._model, self._generators = model, generators(model)
        self._accumulation, self._own = accumulation, OwnGraph(model)
        self.one, self.steps, self.beside = list[bool](), list[Step](), Beside()
        self.of_module: weakref.ref[Tensor] | None = None
        self._known: Any = WeakIdKeyDictionary()  # where tensors come from
        self.nodes: dict[tuple[Any, int], At] = {}
        self._scales = set[int]()  # the steps that are a gradient scaler's
        self._first: At | None = None  # what a loss function of torch's returned first
        self._roots = dict[str, At]()  # what the script goes back from, by how it does
        # Whether it went back from what is not followed; None where it was not seen to
        # go back at all, as by `autograd.backward` in torch 2.10.
        self._missed: bool | None = None
        self.add(outputs)
        self.rests = not self._known  # it looks no more

    def add(self, outputs: Any) -> None:
        """Follow another pass too: the loss may compare several."""
        for place, leaf in enumerate(flatten(outputs)[0]):
            if isinstance(leaf, Tensor):
                at = self._known[leaf] = At("outputs", len(self.one), place)
                self.nodes[leaf.grad_fn, leaf.output_nr] = at
        self.one.append(isinstance(outputs, Tensor))

    def waits(self) -> bool:
        """Whether a loss of the passes so far may still come: there is a graph."""
        if self.went_back or len(self.one) == _MOST_PASSES:
            return False
        return any(x.requires_grad for x in [*self._known])

    def returned(self, x: Any) -> bool:
        """Whether ``x``, or what it copies, is all that the last pass has returned."""
        return self.one[-1] and self.at(x) == At("outputs", len(self.one) - 1, 0)

    def enter(self) -> None:
        """Lay the mode under those that are active, but over a default device's."""
        if not lay_under(self):
            self._rest()

    def leave(self) -> None:
        """Take the mode away, wherever it lies."""
        self._rest()
        sweep()

    def _rest(self) -> None:
        self.rests = True
        self._known.clear()
        self.nodes.clear()

    def at(self, x: Any) -> At | None:
        """Return where ``x`` comes from, if it is a tensor, and from the outputs.

        A copy that DDP or a hook of the backward pass hands out is the output.
        """
        if not isinstance(x, Tensor):
            return None
        found: At | None = self._known.get(x)
        if found == LOST:
            return found
        if found is not None and found.of == "steps" and x.requires_grad:
            if not self.steps[found.place].differentiated:
                found = None  # of a function with a derivative of its own
        return copied_from(x, self.nodes) if found is None else found

    def lost(self, outputs: Any) -> bool:
        """Whether some of the outputs were written on since the pass."""
        places = filter(None, map(self.at, inside(outputs, Tensor)))
        return any(at.of != "outputs" for at in places)

    @property
    def trained(self) -> At | None:
        """What the script goes back from, less factors; first by ``backward``."""
        return self._roots.get("backward") or self._roots.get("grad")

    @property
    def result(self) -> At | None:
        """That, or where it was not followed what the first loss function returned."""
        return self.trained or self._first

    @property
    def went_back(self) -> bool:
        """Whether ``backward`` was called, or may have been when it looked no more."""
        return self.rests or bool(self._missed) or "backward" in self._roots

    @property
    def overwritten(self) -> bool:
        """Whether what the loss has read is no longer what it was."""
        steps = {} if self.result is None else leading_to(self.result, self.steps)
        read = inside([(step.args, step.kwargs) for step in steps.values()], At)
        return any(map(self.beside.changed, read))

    @property
    def in_part(self) -> bool:
        """Whether what the script goes back from was not seen, or not all followed."""
        if self.trained is not None:
            return self.trained.part or bool(self._missed)
        return self._first is not None if self._missed is None else self._missed

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.rests or recorded():
            return func(*args, **kwargs)
        back = goes_back(func, args, kwargs, self._model)
        if back is not None:
            self._go_back(*back)
            return func(*args, **kwargs)
        call = Step(func, args, kwargs, torch.is_grad_enabled())
        instead = without_writing(call, self.at(args[0]) if args else None)
        out, drawn = called(func, args, kwargs, self._generators)
        self._follow(call, instead, out, drawn)
        return out

    def _go_back(self, how: str, root: Any, factor: float, keeps: bool) -> None:
        """Take note of where the script goes back from, if the model may learn."""
        if not self._learns_by(root):
            return
        self._train_on(how, root, factor)
        at = self.trained
        led = at is None or len(passes_of(at, self.steps)) == len(self.one)
        if not keeps and led and comes_of(root, self.nodes):  # no other pass is left
            self._rest()

    def _learns_by(self, root: Any) -> bool:
        """Whether the model may learn by a root: not by what was cut off from it."""
        return any(
            self._own.leads_to(x) if self.at(x) in UNKNOWN else comes_of(x, self.nodes)
            for x in inside(root, Tensor)
        )

    def _train_on(self, how: str, root: Any, factor: float) -> None:
        """Add what the script goes back from to what it trains on."""
        if self._accumulation.passes > 1 and not has_gradient(self._model):
            self._accumulation.passes = 1  # what those before added is gone
        at, before = self.at(root), self._roots.get(how)
        if at in UNKNOWN or root.numel() != 1:
            self._missed = self.of_module is None or self.of_module() is not root
            if before is not None:  # a part of the loss is not known
                self._roots, self._first = {}, None
                self._rest()
            return
        if factor != 1:
            at = self._list(Step(torch.mul, (at, factor), {}, True))
        at = self._accumulation.taken_off(at, self.steps, self._scales)
        if before is not None:
            at = self._list(Step(torch.add, (before, at), {}, True))
        self._roots[how] = at

    def _follow(self, call: Step, instead: Step | None, out: Any, drawn: bool) -> None:
        """List a call on what is of the outputs; of one that writes, ``instead``."""
        into, written = self._origins(call), None
        if all(at is None for _, at in into):
            return
        if writes(call):
            written = call.args[0] if call.args else call.kwargs.get("out")
            if instead is None:
                self._lose(written)
                return
            call, out, into = instead, written, self._origins(instead)
        made = [x for x in _each(out) if isinstance(x, Tensor)]
        lost = any(at == LOST for _, at in into) or bends(call, into)
        free = (x for x, at in into if at is None and x.requires_grad)
        other = drawn or call.function is torch.autograd.grad  # in another pass
        if made and (lost or other or any(map(self._own.leads_to, free))):
            self._lose(written)
            if (term := followed_term(call, into)) is not None:
                self._known[out] = self._list(term) if isinstance(term, Step) else term
            elif lost:
                self._known.update((x, LOST) for x in made)
        elif len(self.steps) == _MOST_STEPS:
            self._missed = True
            self._rest()
        elif made:
            self._add(call, out, written)

    def _origins(self, call: Step) -> Origins:
        """Return the tensors that a call is given, and where they come from."""
        return [(x, self.at(x)) for x in inside((call.args, call.kwargs), Tensor)]

    def _add(self, call: Step, out: Any, written: Any) -> None:
        """List a call; what it returns, or has ``written``, comes from there."""
        func, given, named, differentiated = without_statistics(call)
        args, kwargs = filled(
            (given, named), Tensor, lambda x: self.at(x) or self.beside.keep(x)
        )
        self._lose(written)
        at = self._list(Step(func, args, kwargs, differentiated))
        if getattr(func, "__name__", "") in TIMES and by_scaler():
            self._scales.add(at.place)
        for element, x in enumerate(_each(out)):
            if isinstance(x, Tensor):
                self._known[x] = at._replace(element=None if x is out else element)
        if self._first is None and func in TORCH_LOSSES and out.numel() == 1:
            self._first = at if self._learns_by(out) else None

    def _list(self, step: Step) -> At:
        self.steps.append(step)
        part = any(at.part for at in inside(step[1:3], At))
        return At("steps", len(self.steps) - 1, part=part)

    def _lose(self, written: Any) -> None:
        """What shares the memory that was written on is no longer what it was."""
        lost = {memory(x) for x in inside(written, Tensor) if self.at(x) is not None}
        if lost:
            self._known.update((x, LOST) for x in [*self._known] if memory(x) in lost)


def _each(out: Any) -> Any:
    """Return the results of a call, of which there may be one."""
    return out if isinstance(out, (tuple, list)) else (out,)


def sweep() -> None:
    """Take away the modes that look no more."""
    take_away(lambda mode: isinstance(mode, LossCalls) and mode.rests)
