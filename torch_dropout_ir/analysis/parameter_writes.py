"""Which parameters the passes of a script write on.

Key encoders that follow by momentum, annealed temperatures and constraints are kept in
parameters. Version counters do not tell of writing on ``x.data``; the values do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.tracing import unasked
from torch_dropout_ir.written_parameters import is_plain, unwritten

_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ParameterWrites:
    """Learns from the script's passes which parameters they write on."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._written: dict[int, Tensor] = {}
        self._before: list[tuple[Tensor, Any]] = []

    def begin(self) -> None:
        """A pass of the script's begins."""
        self._before = [(x, _fingerprint(x)) for x in self._model.parameters()]

    def end(self) -> None:
        """It has ended."""
        known = [(x, was) for x, was in self._before if was is not None]
        self._written |= {id(x): x for x, was in known if _fingerprint(x) != was}
        self._before = []

    def kept(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let each pass of a model, the own one or its copy, begin with these."""
        return unwritten(model, list(self._written.values()))


def _fingerprint(x: Tensor) -> Any:
    """What tells whether a parameter has the same values; None where nobody asks."""
    with unasked():  # by what looks on at the pass: this is none of the model's code
        if not is_plain(x):
            return None
        plain = torch.view_as_real(x.data) if x.is_complex() else x.data
        bits = plain.view(_BITS[plain.element_size()])
        kind = torch.promote_types(bits.dtype, torch.int32)
        # In no wider one: it takes longer.
        return x.data_ptr(), int(bits.sum(dtype=kind))
