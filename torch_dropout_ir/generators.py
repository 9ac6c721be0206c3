"""Floor 1: generators of random numbers: where they stand, and back to there."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from torch_dropout_ir.turns import in_turn


def generators(model: nn.Module) -> list[torch.Generator]:
    """Return torch's generators that a pass may draw from."""
    if not torch.cuda.is_initialized():
        return [torch.default_generator]
    tensors = (*model.parameters(), *model.buffers())
    devices = sorted({x.device.index or 0 for x in tensors if x.is_cuda})
    return [
        torch.default_generator,
        *(torch.cuda.default_generators[i] for i in devices),
    ]


STATE: Final[dict[type, Callable[[Any], Any]]] = {
    torch.Generator: torch.Generator.get_state,
    random.Random: random.Random.getstate,
    np.random.RandomState: np.random.RandomState.get_state,
    np.random.Generator: lambda x: copy.deepcopy(x.bit_generator.state),
}
SET_STATE: Final[dict[type, Callable[[Any, Any], None]]] = {
    torch.Generator: lambda x, was: x.set_state(was),
    random.Random: random.Random.setstate,
    np.random.RandomState: np.random.RandomState.set_state,
    np.random.Generator: lambda x, was: setattr(x.bit_generator, "state", was),
}


class Standing:
    """Where some of torch's generators stand, or those that a pass may draw from."""

    def __init__(self, of: nn.Module | Sequence[torch.Generator]) -> None:
        found = generators(of) if isinstance(of, nn.Module) else of
        self._states = [(g, g.get_state()) for g in found]

    def moved(self) -> bool:
        """Return whether one has drawn since."""
        return any([not torch.equal(g.get_state(), x) for g, x in self._states])

    def restore(self) -> None:
        """Set them back to there."""
        for generator, state in self._states:
            generator.set_state(state)


class AllStanding(Standing):
    """The same with those of Python and NumPy, and those that modules hold.

    Layers are dropped by them, and words replaced; to ask them takes as long as a small
    pass.
    """

    def __init__(self, of: nn.Module | Sequence[torch.Generator]) -> None:
        super().__init__(of)
        self._python, self._numpy = random.getstate(), np.random.get_state()
        modules = of.modules() if isinstance(of, nn.Module) else ()
        held = [x for m in modules for x in vars(m).values() if type(x) in STATE]
        self._hold(held)

    def _hold(self, own: Sequence[Any]) -> None:
        """Note where generators of a model's own stand."""
        self._own = [(x, STATE[type(x)](x)) for x in own]

    def moved(self) -> bool:
        """Return whether one has drawn since."""
        if super().moved() or any(True for _ in self.others_moved()):
            return True
        return any([_text(STATE[type(x)](x)) != _text(was) for x, was in self._own])

    def others_moved(self) -> Iterator[str]:
        """Yield the names of Python's and NumPy's generator, where it has drawn."""
        if random.getstate() != self._python:
            yield "random"
        (_, now, place, *_), (_, then, before, *_) = np.random.get_state(), self._numpy
        if place != before or not np.array_equal(now, then):
            yield "numpy.random"

    def restore(self) -> None:
        """Set them back to there."""
        super().restore()
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        for x, was in self._own:
            SET_STATE[type(x)](x, was)


def _text(state: Any) -> str:
    """The state of a generator, with its arrays as lists, which compare as one."""
    return json.dumps(state, default=lambda x: x.tolist())


@contextlib.contextmanager
def preserved_rng(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Give back the generators of torch, Python, NumPy and the model as they were.

    Torch's are those of the model's devices; inside the context they begin at ``seed``,
    or go on from where they are.
    """
    with in_turn():
        before = AllStanding(model)
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)
                for generator in generators(model):
                    generator.manual_seed(seed)
            yield
        finally:
            before.restore()
