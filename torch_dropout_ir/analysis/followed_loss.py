"""A loss as the list of calls that a script made of the outputs of its model.

Semantics of sums:

* Where of two numbers that are added up one is not followed, as a penalty on parameters
  or on a gradient, the sum stands for the other one, and is a part of the loss.
* What a script makes of a part is followed where it is made of each term alike.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from torch_dropout_ir.leaves import flatten

_HALF: Final = (torch.bfloat16, torch.float16)
TIMES: Final = ("mul", "multiply", "__mul__", "__rmul__")
_SUMS: Final = ("add", "sub", "subtract")
_DIVIDES: Final = ("div", "divide", "true_divide")
_ALIKE: Final = (*TIMES, *_DIVIDES, "neg", "sum", "mean", "clone", "to", "float")


class At(NamedTuple):
    """Stands in a recorded call for a tensor: in which list it is, and where.

    Attributes:
        of: ``"outputs"`` of the model, ``"targets"`` for whatever else was there,
            ``"constants"`` for what comes of the parameters of others, or ``"steps"``
            for what came of a call.
        place: Its number; of outputs, that of the pass.
        element: Which one, where a call or a pass has returned several.
        part: Whether it stands for a sum of which other terms are not followed.
    """

    of: str
    place: int
    element: int | None = None
    part: bool = False


LOST: Final = At("lost", 0)  # what was written on, or comes of that
UNKNOWN: Final = (None, LOST)
Origins = list[tuple[Tensor, At | None]]  # what a call is given, and where it is from


class Step(NamedTuple):
    """A call.

    Attributes:
        function: What was called.
        args: Its arguments, with an :class:`At` in the place of each tensor.
        kwargs: Those by name.
        differentiated: Whether autograd was on.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    differentiated: bool


class Beside:
    """What a loss reads beside the outputs.

    Attributes:
        targets: What came with the batch, as far as one can tell.
        constants: Parameters of other modules, and what comes of them: they are not
            the batch's, and have no gradient here.
    """

    def __init__(self) -> None:
        self.targets, self.constants = list[Tensor](), list[Tensor]()
        self._places: Any = WeakIdKeyDictionary()
        self._versions: dict[At, list[int]] = {}

    def keep(self, x: Tensor) -> At:
        """Return where a tensor is kept, anew where it was written on since."""
        at: At | None = self._places.get(x)
        if at is None or self._versions[at] != versions(x):
            of = "constants" if x.requires_grad else "targets"
            kept: list[Tensor] = getattr(self, of)
            kept.append(x.detach() if x.requires_grad else x)
            at = self._places[x] = At(of, len(kept) - 1)
            self._versions[at] = versions(x)
        return at

    def changed(self, at: At) -> bool:
        """Whether what is kept there was written on since it was read."""
        return at in self._versions and versions(self[at]) != self._versions[at]

    def __getitem__(self, at: At) -> Tensor:
        return getattr(self, at.of)[at.place]


class FollowedLoss:
    """A loss ``(outputs, targets) -> scalar``: what a script did with its outputs.

    Args:
        steps: Calls, in order; those that do not lead to the result are left out.
        result: Which tensor is the loss.
        name: What to call it.
        options: Those of torch's loss function that returned it, ``reduction`` and
            ``ignore_index`` among them; none where it is no such function's.
        constants: What it reads of the parameters of others.

    Attributes:
        passes: The numbers of the passes whose outputs it reads.
    """

    def __init__(
        self,
        steps: list[Step],
        result: At,
        name: str,
        options: dict[str, Any],
        constants: list[Tensor],
    ) -> None:
        self._steps = leading_to(result, steps)
        self.passes = passes_of(result, steps)
        self._result, self._constants = result, constants
        self.__name__ = name
        self.keywords = options  # where those of a functools.partial are

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of other outputs; of several passes they are a tuple.

        ``targets`` is the tensor that the script read beside them; a tuple where these
        are several or none.
        """
        results: dict[int, Any] = {}
        each = outputs if len(self.passes) > 1 else (outputs,)
        leaves = (flatten(x)[0] for x in each)
        found: dict[str, Any] = {
            "outputs": dict(zip(self.passes, leaves, strict=True)),
            "targets": targets if isinstance(targets, tuple) else (targets,),
            "constants": self._constants,
            "steps": results,
        }

        def read(at: At) -> Any:
            value = found[at.of][at.place]
            return value if at.element is None else value[at.element]

        for place, step in self._steps.items():
            args, kwargs = _of_one_precision(filled((step.args, step.kwargs), At, read))
            with torch.set_grad_enabled(
                torch.is_grad_enabled() and step.differentiated
            ):
                results[place] = step.function(*args, **kwargs)
        return read(self._result)


def _of_one_precision(given: Any) -> Any:
    """Return arguments with those in half precision as wide as the widest.

    What autocast has made of other models is read beside outputs that are not cast.
    """
    shaped = [x for x in inside(given, Tensor) if x.ndim and x.is_floating_point()]
    kinds = {x.dtype for x in shaped}
    if len(kinds) < 2 or kinds.isdisjoint(_HALF):
        return given
    widest = functools.reduce(torch.promote_types, kinds)
    return filled(given, Tensor, lambda x: x.to(widest) if x.dtype in _HALF else x)


def leading_to(result: At, steps: list[Step]) -> dict[int, Step]:
    """Return the calls that a result is made of, by their numbers."""
    wanted = {result.place} if result.of == "steps" else set()
    for place in range(len(steps) - 1, -1, -1):
        if place in wanted:
            read = inside((steps[place].args, steps[place].kwargs), At)
            wanted |= {at.place for at in read if at.of == "steps"}
    return {place: steps[place] for place in sorted(wanted)}


def passes_of(result: At, steps: list[Step]) -> list[int]:
    """Return the numbers of the passes whose outputs a result is made of."""
    made = leading_to(result, steps).values()
    read = inside((result, [(step.args, step.kwargs) for step in made]), At)
    return sorted({at.place for at in read if at.of == "outputs"})


def inside(x: Any, kind: type) -> Iterator[Any]:
    """Yield what is of a type among arguments."""
    if isinstance(x, kind):
        yield x
    elif isinstance(x, dict):
        yield from inside(tuple(x.values()), kind)
    elif isinstance(x, slice):
        yield from inside((x.start, x.stop, x.step), kind)
    elif isinstance(x, (tuple, list)):
        for value in x:
            yield from inside(value, kind)


def filled(x: Any, kind: type, read: Callable[[Any], Any]) -> Any:
    """Return arguments with ``read(y)`` in the place of each ``y`` of a type."""
    if isinstance(x, kind):
        return read(x)
    if isinstance(x, dict):
        return {key: filled(value, kind, read) for key, value in x.items()}
    if isinstance(x, slice):
        return slice(*filled((x.start, x.stop, x.step), kind, read))
    if isinstance(x, (tuple, list)) and not isinstance(x, torch.Size):
        values = [filled(value, kind, read) for value in x]
        return values if isinstance(x, list) else tuple(values)
    return x


def versions(given: Any) -> list[int]:
    """Return the version counters of the tensors among arguments."""
    return [x._version for x in inside(given, Tensor) if not x.is_inference()]


def memory(x: Tensor) -> int | None:
    """Return where the memory of a tensor is; None where it has none of one piece."""
    with contextlib.suppress(NotImplementedError, RuntimeError):
        return x.untyped_storage().data_ptr()
    return None


def followed_term(call: Step, into: Origins) -> At | Step | None:
    """Return the followed one of two numbers that a call adds up, or what makes it.

    None where a call does something else, or neither is followed.
    """
    name = getattr(call.function, "__name__", "")
    if name not in _SUMS or call.kwargs or not _two_numbers(into):
        return None
    (_, first), (_, second) = into
    at = second if first in UNKNOWN else first
    if at is None or at == LOST:
        return None
    at = at._replace(part=True)
    if first in UNKNOWN and name != "add":
        return Step(torch.neg, (at,), {}, call.differentiated)
    return at


def bends(call: Step, into: Origins) -> bool:
    """Whether a call makes of a part what it would not make of each term alike."""
    if not any(at is not None and at.part for _, at in into):
        return False
    name = getattr(call.function, "__name__", "")
    if name in _SUMS:
        return not _two_numbers(into) and len(into) > 1
    followed = [x for x, at in into if at is not None]
    first = call.args[0] if call.args else call.kwargs.get("input")
    above = name not in _DIVIDES or first is followed[0]
    return name not in _ALIKE or len(followed) > 1 or not above


def _two_numbers(into: Origins) -> bool:
    return len(into) == 2 and all(x.numel() == 1 for x, _ in into)
