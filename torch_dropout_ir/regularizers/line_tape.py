"""The operations of a loss, recorded once, and run again along a line.

Semantics:

* A loss that is called holds what its frames name until it returns, and nothing tells
  what of it is still to be read. Of a record that is known: a tensor goes with its
  derivatives when it has been read last, and what is made takes its place where that
  is possible; a first derivative is made only where something further on bends.
* What is recorded is what ran at these outputs: choices that the loss's Python makes
  by their values are those that it made. A record holds no tensor that the loss has
  made, but those that it was given from elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from torch_dropout_ir.gradient_factors import address
from torch_dropout_ir.regularizers.line_calls import (
    Line,
    NoRuleError,
    alike,
    can_move,
    dense,
    in_place,
    out_of_place,
    shared,
    tensors,
)
from torch_dropout_ir.regularizers.line_mode import Constants, Moving
from torch_dropout_ir.regularizers.line_rules import bends


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Stands for a tensor that the loss was given or made."""

    number: int


@dataclasses.dataclass
class _Step:
    """An operation that ran.

    Attributes:
        func: The operation.
        given: Its arguments, and those by keyword.
        moving: The numbers of those that move, and what it returned by them.
        seen: Whether autograd sees it.
        bends: Whether it is not linear in these.
        made: The numbers of what it returned; -1 for what is not read.
        over: The same operation in place, where its result is like its first argument.
        writes: Whether it wrote on a tensor, and not as autograd sees; or on one whose
            memory others show.
        shown: Whether it is the latter.
        last: The numbers of what is read last here.
        first: Whether first derivatives of what it returned are read.
    """

    func: Any
    given: tuple[Any, Any]
    moving: list[int]
    seen: bool
    bends: bool
    made: list[int]
    over: Any
    writes: bool
    shown: bool
    last: list[int] = dataclasses.field(default_factory=list)
    first: bool = False

    def reads(self) -> list[int]:
        leaves = _pytree.tree_leaves(self.given)
        return [x.number for x in leaves if isinstance(x, _Slot)]


class Tape:
    """A function of some tensors to a scalar, as the operations that it ran.

    Raises where lines do not go through one of them, or none has a second derivative.
    """

    def __init__(
        self, function: Callable[[Sequence[Tensor]], Tensor], at: Sequence[Tensor]
    ) -> None:
        recorder = _Recorder()
        given = [recorder.name(x.detach(), moves=True) for x in at]
        recorder.given = {address(x) for x in given}
        with torch.enable_grad(), recorder, recorder.constants:
            value = function(given)
        result = recorder.numbers.get(value)
        if result is None:
            raise NoRuleError("a loss that is made where no operation is seen")
        self._result: int = result
        self._steps, self._read = _needed(recorder.steps, result)
        if not any([step.bends for step in self._steps]):
            raise NoRuleError("a loss of straight pieces, as its graph tells")

    def curvature(self, at: list[Tensor], lines: list[Line]) -> Tensor:
        r"""Return :math:`\frac{d^2}{dt^2} L` where the tensors move along lines.

        Both lists are emptied: what nobody else holds is written on.
        """
        zero = at[0].new_zeros(())
        moving = Moving()
        moving.constants.asked = True
        held: dict[int, Tensor] = {}
        for number in range(len(at)):
            # Of it and its memory there is no other owner, if nobody else holds it.
            x, line = at.pop(0).detach(), lines.pop(0)
            if number in self._read:
                held[number] = x
                moving.move(x, line)
            del x, line
        with moving:
            for step in self._steps:
                _run(step, held, moving)
        _, second = moving.line(held[self._result])
        return zero if second is None else second


def _run(step: _Step, held: dict[int, Tensor], moving: Moving) -> None:
    """Run a step; none but its mode then knows of what is read last in it."""

    def take(x: Any) -> Any:
        return held[x.number] if isinstance(x, _Slot) else x

    args, kwargs = _pytree.tree_map(take, step.given)
    for number in step.last:
        del held[number]
    func = step.func
    if step.over is not None and not shared(args[0]) and dense(args[0]):
        func = step.over
    moving.wanted = step.first, True
    with torch.set_grad_enabled(step.seen):  # the mode knows what is constant
        found = func(*args, **kwargs)
    for number, x in zip(step.made, tensors(found), strict=True):
        if number >= 0:
            held[number] = x


def _needed(steps: list[_Step], result: int) -> tuple[list[_Step], set[int]]:
    """Return the steps that a result needs, and the numbers of all that they read."""
    read, first = {result}, set[int]()
    kept: list[_Step] = []
    # Numbers do not tell who else shows what is written on: nothing is left out then.
    every = any([step.shown for step in steps])
    for step in reversed(steps):
        if not (step.writes or every) and read.isdisjoint(step.made):
            continue
        step.first = every or not first.isdisjoint(step.made)
        step.made = [n if n in read else -1 for n in step.made]
        if step.first or step.bends:
            first.update(step.moving)
        own = step.reads()
        step.last = list({n for n in own if n not in read})
        x = step.given[0][0] if step.given[0] else None
        number = x.number if isinstance(x, _Slot) else None
        # What is given twice would be read where it has been written on.
        if number not in step.last or own.count(number) > 1:
            step.over = None
        read.update(own)
        kept.append(step)
    return kept[::-1], read


class _Recorder(TorchDispatchMode):
    """Records what runs, and raises where a line would not go through it."""

    def __init__(self) -> None:
        super().__init__()
        self.constants = Constants()
        self.steps: list[_Step] = []
        self.numbers = WeakTensorKeyDictionary()
        self.given: set[int] = set()  # memory that is not the loss's own
        self._moves: set[int] = set()
        self._count = 0

    def name(self, x: Tensor, *, moves: bool) -> Tensor:
        self.numbers[x] = self._count
        if moves and can_move(x):
            self._moves.add(self._count)
        self._count += 1
        return x

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        places, writes = self._places(args, kwargs), func._schema.is_mutable
        seen = bool(places) and torch.is_grad_enabled()
        own = not writes or not shared(args[0])  # else another tensor shows it
        if places and not seen and not (self.constants.asked and own):
            raise NoRuleError(f"{func} without autograd")
        shown = seen and writes and shared(args[0])
        bare = out_of_place(func) if seen and writes else func
        run = func if shown else bare
        given = _pytree.tree_map(self._slot, (args, kwargs))
        # What is written on without autograd moves as before.
        moves = self._numbers([args, kwargs] if seen else args[:1] if writes else ())
        if shown:
            self._move_with(args[0])
        found = func(*args, **kwargs)
        made = tensors(found)
        for x in made:
            self.name(x, moves=bool(moves))
        like = len(made) == 1 and bool(args) and isinstance(args[0], Tensor)
        like = like and alike(args[0], made[0]) and args[0] is not made[0]
        over = in_place(run) if like and seen == bool(places) else None
        numbers = [self.numbers[x] for x in made]
        step = _Step(
            run, given, moves, seen, seen and bends(bare, places, args), numbers, over,
            shown or (writes and not seen), shown,
        )  # fmt: skip
        self.steps.append(step)
        return found

    def _move_with(self, x: Tensor) -> None:
        """Let all move that shows what is written on; raise if it was given."""
        storage = address(x)
        own = [n for y, n in self.numbers.items() if address(y) == storage]
        if storage in self.given or id(x if x._base is None else x._base) not in {
            id(y) for y in self.numbers
        }:
            raise NoRuleError("a loss that writes on what it was given")
        self._moves.update(own)

    def _numbers(self, given: Any) -> list[int]:
        return sorted({self.numbers[x] for x in tensors(given) if self._moving(x)})

    def _places(self, args: Any, kwargs: Any) -> list[int]:
        """Return which arguments move, -1 for those by keyword."""
        own = [i for i, x in enumerate(args) if any(map(self._moving, tensors(x)))]
        return own + [-1] * any(map(self._moving, tensors(kwargs)))

    def _moving(self, x: Tensor) -> bool:
        return self.numbers.get(x) in self._moves

    def _slot(self, x: Any) -> Any:
        number = self.numbers.get(x) if isinstance(x, Tensor) else None
        return x if number is None else _Slot(number)
