"""Which linear layer makes a model's outputs of what the first site passes on."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from torch_dropout_ir.arrivals import graph_nodes
from torch_dropout_ir.gradient_factors import address
from torch_dropout_ir.hooks import Undo, after_call, give_back
from torch_dropout_ir.tracing import mapped, unasked
from torch_dropout_ir.written_parameters import written_by

# Functions that give numbers out of tensors, or as many elements as such say.
_NUMBERS: Final = frozenset((
    "__array__", "__bool__", "__complex__", "__contains__", "__dlpack__", "__float__",
    "__format__", "__index__", "__int__", "__repr__", "allclose", "argwhere",
    "bincount", "equal", "is_nonzero", "item", "masked_select", "nonzero", "numpy",
    "repeat_interleave", "to_sparse", "tolist", "unique", "unique_consecutive",
))  # fmt: skip
_MASKS: Final = (torch.bool, torch.uint8)


class _Read(NamedTuple):
    """A call of a layer: its weight and bias, its output, and writes on that by then.

    Outputs that nothing else holds are let go of.
    """

    own: tuple[Tensor, ...]
    output: weakref.ref[Tensor]
    version: int


class LastWeight:
    """Sees what reads the first site as it is, and whether that is all there is.

    What a model does may hang on what dropout has made, where it asks for a number
    then: its outputs are no linear layer's, whatever this pass has shown. Nor are they
    where it writes on what the layer reads or makes, by ``data`` too. Not seen are
    scripted code, and hooks on all modules.

    Attributes:
        weight: That of the layer which read the site directly and made the outputs of
            the pass that has ended, if there is one.
    """

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self._layers: list[nn.Linear] = []
        self._first: weakref.ref[Tensor] | None = None
        self._version = 0
        self._more = False
        self._written: set[int] = set()
        self._reads: list[_Read] = []

    def begin(self, out: Tensor) -> None:
        """Look for what reads a tensor: the first site has passed it on."""
        self._first, self._version = weakref.ref(out), out._version

    def _site_out(self) -> Tensor | None:
        return None if self._first is None else self._first()

    def clear(self) -> None:
        """Forget a pass."""
        self._first, self._more, self.weight = None, False, None
        self._written.clear()
        self._reads.clear()

    @contextlib.contextmanager
    def reading(self, named: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
        """Record inside which of those linear layers read the first site as it is."""
        layers = [layer for _, layer in named if type(layer) is nn.Linear]
        # Some are given a way of their own: adapters, and kernels of other precision.
        self._layers = [x for x in layers if "forward" not in vars(x)]
        # Before hooks of the model's own, which may make something else of the output.
        undo: Undo = []
        try:
            for layer in self._layers:
                after_call(layer, self._read, undo, first=True)
            yield
        finally:
            give_back(undo)

    def _read(self, layer: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
        # Identity is not enough: an operation in place leaves the tensor the same.
        first = self._site_out()
        if first is None or not args or args[0] is not first:
            return
        # As it is in this call, of `torch.func.functional_call` perhaps.
        own = tuple([x for x in (layer.weight, layer.bias) if x is not None])
        nodes = [x.grad_fn for x in own if x.grad_fn]
        made = nodes and first.grad_fn in graph_nodes(nodes)
        if first._version == self._version and not made:
            self._reads.append(_Read(own, weakref.ref(output), output._version))

    def see(self, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Look at a call that is about to be made in the pass."""
        if self._site_out() is None and not self._reads:
            return
        self._more = self._more or name in _NUMBERS or _chooses(name, args)
        if given := written_by(name, args, named):
            with unasked():
                self._note({address(x) for x in given if not mapped(x)})

    def _note(self, places: set[int]) -> None:
        """Note what is written on, of what is in memory at some places."""
        seen = [self._site_out(), *[read.output() for read in self._reads]]
        if any([x is not None and address(x) in places for x in seen]):
            self._more = True
        own = chain(
            *[layer.parameters() for layer in self._layers],
            *[read.own for read in self._reads],
        )
        self._written |= {id(x) for x in own if address(x) in places}

    def end(self, outputs: Any) -> None:
        """Settle which layer made the outputs: what is asked from now on is ours."""
        self.weight = self._found(outputs)
        self._first = None
        self._reads.clear()

    def _found(self, outputs: Any) -> Tensor | None:
        if self._more or not isinstance(outputs, Tensor):
            return None
        made = [
            read.own
            for read in self._reads
            if read.output() is outputs and outputs._version == read.version
        ]
        if len(made) != 1 or any([id(x) in self._written for x in made[0]]):
            return None
        return made[0][0]


def _chooses(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a call takes as many elements as a condition holds for."""
    if name == "where":
        return len(args) == 1
    place = args[1] if name == "__getitem__" else ()
    places = place if isinstance(place, tuple) else (place,)
    return any([isinstance(x, Tensor) and x.dtype in _MASKS for x in places])
