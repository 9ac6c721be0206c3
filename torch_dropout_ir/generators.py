"""Floor 1: generators of random numbers: where they stand, and back to there."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

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
    """The same with those of Python and NumPy.

    Layers are dropped by them, and words replaced; to ask them takes as long as a small
    pass.
    """

    def __init__(self, of: nn.Module | Sequence[torch.Generator]) -> None:
        super().__init__(of)
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def moved(self) -> bool:
        """Return whether one has drawn since."""
        return super().moved() or any(True for _ in self.others_moved())

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


@contextlib.contextmanager
def preserved_rng(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Give back the generators of torch, Python and NumPy as they were.

    They are those of the model's devices; inside the context they begin at ``seed``,
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
