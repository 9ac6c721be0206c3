"""Where the random generators stood at a moment, so that a pass can be run again."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from torch_dropout_ir.analysis.attributes import own_generators, set_back


class Generators:
    """The state of torch's, Python's, NumPy's and the model's generators at one moment.

    Also whether autocast is on: what is drawn can depend on it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._cpu = torch.get_rng_state()
        devices = {x.device for x in model.parameters() if x.is_cuda}
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in devices}
        self._python, self._numpy = random.getstate(), np.random.get_state()
        self._own = own_generators(model)
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        ]

    def restore(self) -> None:
        """Set the generators back to that moment."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        set_back(self._own)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Cast as was done at that moment."""
        with contextlib.ExitStack() as stack:
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            yield

    def moved(self) -> Iterator[str]:
        """Yield the names of Python's and NumPy's generator, where it has drawn."""
        if random.getstate() != self._python:
            yield "random"
        (_, now, place, *_), (_, then, before, *_) = np.random.get_state(), self._numpy
        if place != before or not np.array_equal(now, then):
            yield "numpy.random"
