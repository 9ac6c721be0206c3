"""From the outputs of a training pass to the number on which it is trained.

Semantics:

* Calls of torch's functions on what comes of the outputs are listed, until the script
  calls ``backward``: on the loss. The list, run again on other outputs, is their loss.
  Where that call keeps the graph, another one can follow: the losses are added up.
* Of that number the last factor is taken away where it is a tensor, as a gradient
  scaler has it, and a division by the number of passes that went backward since the
  last optimizer step, as scripts that accumulate gradients do it.
* What is written on (``loss += ...``, ``each.masked_fill_(...)``), but for the outputs
  themselves, is followed as if a new tensor were made.
* Nothing else is followed that was written on, nor what draws random numbers, is a
  gradient, has a derivative of its own (``autograd.Function``, compiled code), or
  depends on the model's parameters otherwise; what comes of others is constant.
* The mode lies under those of the script, so that what the script enters and leaves
  meanwhile stays what it is. It only looks: every call is made as it was.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from torch_dropout_ir.analysis.followed_loss import (
    At,
    Beside,
    FollowedLoss,
    Step,
    draws,
    filled,
    inside,
    keeps_graph,
    leading_to,
    memory,
    unwritten,
    versions,
    without_factors,
    without_statistics,
    writes,
)
from torch_dropout_ir.analysis.function_modes import lay_under, take_away
from torch_dropout_ir.analysis.own_graph import OwnGraph
from torch_dropout_ir.losses import TORCH_LOSSES, LossFunction
from torch_dropout_ir.regularizers.leaves import flatten

_MOST_STEPS: Final = 1000
_BACKWARD: Final = (Tensor.backward, torch.autograd.backward)
# Nodes of the graph that make copies, in order: one tells DDP when the backward pass
# starts (`find_unused_parameters`, `static_graph`), one calls hooks of that pass.
_COPYING: Final = ("_DDPSinkBackward", "BackwardHookFunctionBackward")
# The output of a model that returns a tensor, or the first of several.
OUTPUT: Final = At("outputs", 0)
_LOST: Final = At("lost", 0)  # what was written on, or comes of that


class LossCalls(TorchFunctionMode):
    """Looks on while a script computes its loss.

    Args:
        outputs: What the model returned.
        passes: Passes that went backward since the last optimizer step, and this one.
        model: The model.

    Attributes:
        steps: The calls that are listed.
        trained: The number on which ``backward`` was called, less what scales it.
        of_module: What the loss module has returned, where there is one.
    """

    def __init__(self, outputs: Any, passes: int, model: nn.Module) -> None:
        super().__init__()
        self._passes, self._own = passes, OwnGraph(model)
        self.one = isinstance(outputs, Tensor)
        self._known: Any = WeakIdKeyDictionary()
        self._nodes: dict[tuple[Any, int], At] = {}
        self.steps: list[Step] = []
        self._read: Any = WeakIdKeyDictionary()
        self._beside = Beside([], [])
        self._versions: dict[At, list[int]] = {}
        self._first: At | None = None
        self.trained: At | None = None
        self._missed = False
        self.of_module: weakref.ref[Tensor] | None = None
        for place, leaf in enumerate(flatten(outputs)[0]):
            if isinstance(leaf, Tensor):
                self._known[leaf] = At("outputs", place)
                self._nodes[leaf.grad_fn, leaf.output_nr] = At("outputs", place)
        self._looking = bool(self._known)

    def enter(self) -> None:
        """Lay the mode under those that are active, but over a default device's."""
        if not lay_under(self):
            self._rest()

    def leave(self) -> None:
        """Take the mode away, wherever it lies."""
        self._rest()
        sweep()

    @property
    def rests(self) -> bool:
        """Whether it looks no more."""
        return not self._looking

    def _rest(self) -> None:
        self._looking = False
        self._known.clear()
        self._nodes.clear()

    def at(self, x: Any) -> At | None:
        """Return where ``x`` comes from, if it is a tensor, and from the outputs.

        A copy that DDP or a hook of the backward pass hands out is the output.
        """
        if not isinstance(x, Tensor):
            return None
        found: At | None = self._known.get(x)
        if found == _LOST:
            return found
        if found is not None and found.of == "steps" and x.requires_grad:
            if not self.steps[found.place].differentiated:
                found = None  # of a function with a derivative of its own
        return self._copied(x) if found is None else found

    def _copied(self, x: Tensor) -> At | None:
        """Return where a tensor comes from that nodes of the graph have copied."""
        node, place, found = x.grad_fn, x.output_nr, None
        while found is None and node is not None and node.name() in _COPYING:
            if place >= len(node.next_functions):
                break
            node, place = node.next_functions[place]
            found = self._nodes.get((node, place))
        return found

    def lost(self, outputs: Any) -> bool:
        """Whether some of the outputs were written on since the pass."""
        return any(self.at(x) == _LOST for x in inside(outputs, Tensor))

    @property
    def went_back(self) -> bool:
        """Whether ``backward`` was called, or may have been when it looked no more."""
        return self.rests or self._missed or self.trained is not None

    @property
    def overwritten(self) -> bool:
        """Whether what the loss has read is no longer what it was."""
        result = self.trained or self._first
        steps = {} if result is None else leading_to(result, self.steps)
        read = inside([(step.args, step.kwargs) for step in steps.values()], At)
        beside = {at for at in read if at in self._versions}
        return any(versions(self._beside[at]) != self._versions[at] for at in beside)

    @property
    def in_part(self) -> bool:
        """Whether ``backward`` was called on a number that could not be followed."""
        return self._missed and self.trained is None

    def found(self) -> tuple[LossFunction, tuple[Tensor, ...], bool] | None:
        """Return the loss, what it reads beside the outputs, and whether these alone.

        The loss is what ``backward`` was called on, or, where that could not be
        followed, what the first of torch's loss functions returned; None if neither.
        """
        result = self.trained or self._first
        if result is None:
            return None
        beside, targets = self._beside, tuple(self._beside.targets)
        step = self.steps[result.place] if result.of == "steps" else None
        if step is None:
            return FollowedLoss([], result, "the model's own", {}, []), (), False
        if step.function not in TORCH_LOSSES:
            name, rest = "that of the script", beside.constants
            return FollowedLoss(self.steps, result, name, {}, rest), targets, False
        options = {
            name: beside[x] if isinstance(x, At) else x
            for name, x in step.kwargs.items()
            if not isinstance(x, At) or x in self._versions
        }
        places = [x.of if isinstance(x, At) else "" for x in step.args]
        straight = places == ["outputs", "targets"]
        if straight and self.one:
            plain = functools.partial(step.function, **options)
            return plain, (beside[step.args[1]],), True
        name = f"{step.function.__name__} of the script"
        loss = FollowedLoss(self.steps, result, name, options, beside.constants)
        return loss, targets, straight and len(targets) == 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or not self._looking:
            return func(*args, **kwargs)
        if func in _BACKWARD:
            self._note(args[0] if args else None)
            if not keeps_graph(args, kwargs):
                self._rest()
            return func(*args, **kwargs)
        number = unwritten(func, args, known=self.at(args[0] if args else None))
        out = func(*args, **kwargs)
        self._follow(func, args, kwargs, out, number)
        return out

    def _note(self, root: Any) -> None:
        """The script goes back from here: this is what it trains on."""
        if isinstance(root, (tuple, list)) and len(root) == 1:
            root = root[0]
        at = self.at(root)
        if at in (None, _LOST) or root.numel() != 1:
            self._missed = self.of_module is None or self.of_module() is not root
            if self.trained is not None:  # a part of the loss is not known
                self.trained = self._first = None
                self._rest()
            return
        at = without_factors(at, self.steps, self._passes)
        if self.trained is not None:
            self.steps.append(Step(torch.add, (self.trained, at), {}, True))
            at = At("steps", len(self.steps) - 1)
        self.trained = at

    def _follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        number: tuple[Callable[..., Any], tuple[Any, ...]] | None,
    ) -> None:
        """List a call, if something of the outputs goes in and tensors come out.

        One that writes is followed by ``number``, where there is that call without
        writing.
        """
        results = out if isinstance(out, (tuple, list)) else (out,)
        into = [(x, self.at(x)) for x in inside((args, kwargs), Tensor)]
        name = getattr(func, "__name__", "")
        tensors = any(isinstance(x, Tensor) for x in results)
        wrote = writes(name, kwargs)  # an assignment to elements returns none
        if not (tensors or wrote) or all(at is None for _, at in into):
            return
        lost, written = any(at == _LOST for _, at in into), None
        if wrote:
            written = args[0] if args else kwargs.get("out")
            if number is None or lost:
                self._lose(written)
                return
            func, args = number
            into = [(x, self.at(x)) for x in inside((args, kwargs), Tensor)]
        if lost:
            self._known.update((x, _LOST) for x in results if isinstance(x, Tensor))
            return
        free = (x for x, at in into if at is None and x.requires_grad)
        grad = func is torch.autograd.grad  # in tensors of this pass alone
        if draws(name) or grad or any(map(self._own.leads_to, free)):
            self._lose(written)
            return
        if len(self.steps) == _MOST_STEPS:
            self._missed = True
            self._rest()
            return
        place = len(self.steps)
        read, named = filled(
            without_statistics(func, args, kwargs), Tensor, self._stand_in
        )
        self._lose(written)
        self.steps.append(Step(func, read, named, torch.is_grad_enabled()))
        for element, x in enumerate(results):
            if isinstance(x, Tensor):
                own = None if isinstance(out, Tensor) else element
                self._known[x] = At("steps", place, own)
        if self._first is None and func in TORCH_LOSSES and out.numel() == 1:
            self._first = At("steps", place)

    def _lose(self, written: Any) -> None:
        """What shares the memory that was written on is no longer what it was."""
        if self.at(written) is not None:
            place = memory(written)
            for x in [x for x in self._known if memory(x) == place]:
                self._known[x] = _LOST

    def _stand_in(self, x: Tensor) -> At:
        at = self.at(x) or self._read.get(x)
        if at is None:
            at = self._read[x] = self._beside.add(x)
            self._versions[at] = versions(x)
        return at


def sweep() -> None:
    """Take away the modes that look no more."""
    take_away(lambda mode: isinstance(mode, LossCalls) and mode.rests)
