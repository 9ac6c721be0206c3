"""Which linear layer makes a model's outputs of what the first site passes on."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.arrivals import graph_nodes
from torch_dropout_ir.gradient_factors import address
from torch_dropout_ir.hooks import after_call
from torch_dropout_ir.tracing import mapped, unasked
from torch_dropout_ir.written_parameters import written_by

# Functions that give numbers out of tensors, or as many elements as such say.
_NUMBERS: Final = frozenset((
    "__array__", "__bool__", "__complex__", "__contains__", "__dlpack__", "__float__",
    "__format__", "__index__", "__int__", "allclose", "argwhere", "bincount", "equal",
    "is_nonzero", "item", "masked_select", "nonzero", "numpy", "repeat_interleave",
    "tolist", "unique", "unique_consecutive",
))  # fmt: skip
_MASKS: Final = (torch.bool, torch.uint8)


class LastWeight:
    """Sees what reads the first site as it is, and whether that is all there is.

    What a model does may hang on what dropout has made, where it asks for a number
    then: its outputs are no linear layer's, whatever this pass has shown. What goes
    another way unseen is scripted code, and hooks on all modules.
    """

    def __init__(self) -> None:
        self._first: weakref.ref[Tensor] | None = None
        self._version = 0
        self._asked = False
        # Outputs of layers that nothing else holds are let go of.
        self._reads: list[tuple[Tensor, weakref.ref[Tensor], int]] = []

    def begin(self, out: Tensor) -> None:
        """Look for what reads a tensor: the first site has passed it on."""
        self._first, self._version = weakref.ref(out), out._version

    def clear(self) -> None:
        """Forget a pass."""
        self._first, self._asked = None, False
        self._reads.clear()

    @contextlib.contextmanager
    def reading(self, named: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
        """Record inside which of those linear layers read the first site as it is."""
        layers = [layer for _, layer in named if type(layer) is nn.Linear]
        # Before hooks of the model's own, which may make something else of the output.
        hooks = [after_call(x, self._read, first=True) for x in layers]
        try:
            yield
        finally:
            for remove in hooks:
                remove()

    def _read(self, layer: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
        # Identity is not enough: an operation in place leaves the tensor the same.
        first = self._first and self._first()
        if first is None or not args or args[0] is not first:
            return
        # As it is in this call, of `torch.func.functional_call` perhaps.
        own = [x for x in (layer.weight, layer.bias) if x is not None and x.grad_fn]
        made = own and first.grad_fn in graph_nodes([x.grad_fn for x in own])
        if first._version == self._version and not made:
            self._reads.append((layer.weight, weakref.ref(output), output._version))

    def see(self, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Look at a call that is about to be made in the pass."""
        if self._first is None:
            return
        self._asked = self._asked or name in _NUMBERS or _chooses(name, args)
        if self._reads and (given := written_by(name, args, named)):
            with unasked():
                places = {address(x) for x in given if not mapped(x)}
                self._reads = [x for x in self._reads if address(x[0]) not in places]

    def found(self, outputs: Any) -> Tensor | None:
        """Return the weight of what read a site directly and made the outputs."""
        if self._asked or not isinstance(outputs, Tensor):
            return None
        now = outputs._version
        made = [
            weight
            for weight, output, version in self._reads
            if output() is outputs and now == version
        ]
        return made[0] if len(made) == 1 else None


def _chooses(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a call takes as many elements as a condition holds for."""
    if name == "where":
        return len(args) == 1
    place = args[1] if name == "__getitem__" else ()
    places = place if isinstance(place, tuple) else (place,)
    return any([isinstance(x, Tensor) and x.dtype in _MASKS for x in places])
