"""Passes under dropout that are taken by parts, each of all passes before the next.

Two gradients are compared, and of the first its parameters are held while the second
pass goes forward, which holds its activations: together up to two steps' memory. So
passes go forward with what the last layers need alone, and back to these: of the first
their gradients are held. No gradient of those layers is any more when all go forward
once more, at the same masks, with what the layers before need too, and back to these,
by way of the last ones, whose weights are asked for nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from torch_dropout_ir import tracing
from torch_dropout_ir.arrivals import arrivals
from torch_dropout_ir.collectives import every, go_on, most
from torch_dropout_ir.generators import AllStanding
from torch_dropout_ir.regularizers.coupling import nearly_equal
from torch_dropout_ir.regularizers.graph_memory import TOLD, Graph, sizes_of
from torch_dropout_ir.regularizers.pass_nodes import PassNodes, kept_by, saving
from torch_dropout_ir.regularizers.step_memory import mask_bytes
from torch_dropout_ir.sites import Site
from torch_dropout_ir.weight_parts import factored

# As much as a node returns, that is there while it runs and is not kept.
_AT_HAND: Final = 2
# Parts at most: each takes all passes once more.
_MOST: Final = 4
# A share beside what is held, which is on its way back.
_BACK: Final = 8
Receive = Callable[[int, Any], None]


class _Left(NamedTuple):
    """What a part of a pass has left.

    Attributes:
        value: What is differentiated.
        began: Where generators stood before the pass.
    """

    value: Tensor
    began: AllStanding


class PassParts:
    """Goes back through passes, by parts where that holds less than all of one.

    Args:
        model: The model.
        targets: Its parameters.
        there: Where memory is that is there anyway.

    Attributes:
        parted: Whether there are several parts; the first pass tells.
        alike: Whether all passes were alike, and those of one part as those before.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[Tensor], there: set[int]
    ) -> None:
        self._model = model
        self._targets = targets
        self._own = {id(x): i for i, x in enumerate(targets)}
        self._there = there
        self._cuts = [0, 0]  # where parts end and begin, from the first to the last
        self._node_of: dict[int, int] = {}  # which has saved what, by its place
        self._like: Any = None  # nodes, who reads parameters, number of places
        self._left: list[_Left] = []
        self._pass = 0
        self._first = True  # whether it is the last layers' turn
        self._read: set[int] = set()  # whose gradients the part takes
        self.parted = False
        self.alike = True

    def next(self) -> bool:
        """Go on with the part before, if there is one."""
        self._cuts.pop()
        self._pass, self._first = 0, False
        return self.alike and len(self._cuts) > 1

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Save what the part needs of the pass inside, at the masks that it had."""
        if self._first:
            self._began = AllStanding(self._model)
        else:
            self._left[self._pass].began.restore()
        self._masks: dict[Any, int] = {}
        part = (self._cuts[-2], len(self._like[0])) if self.parted else None
        with saving(self._node_of, part) as places:
            yield
        self._places = next(places)

    def look(self, site: Site, h: Tensor, y: Tensor) -> None:
        """Look at what a site was given and has made of it."""
        if self._like is None:
            with tracing.unasked():
                self._masks[y.grad_fn] = mask_bytes(site, h)

    def taken(self, receive: Receive) -> Receive:
        """Return what receives, of gradients that layers give away, a part's own."""

        def take(i: int, g: Any) -> None:
            if i in self._read:
                receive(i, g)

        return take

    def back(self, value: Tensor, receive: Receive, plain: bool) -> None:
        """Go back through the part, giving gradients away as they come.

        Args:
            value: What is differentiated.
            receive: Is called with the number of a parameter and its gradient.
            plain: Whether nobody's hooks see what is sent back.
        """
        found = PassNodes(value, self._own)
        names = [node.name() for node in found.nodes]
        like = names, found.readers, self._places
        if self._like is None:
            self._like = like
            self._choose(value, found, plain)
        same = like == self._like
        if not self._first:
            same = same and nearly_equal(value, self._left[self._pass].value)
        if self.parted:
            self.alike = every(self.alike and same, "alike")
        if self.alike:
            self._go(value, found, receive)
        self._pass += 1

    def _go(self, value: Tensor, found: PassNodes, receive: Receive) -> None:
        self._read = found.read_in(*self._cuts[-2:])
        ends = [x for i, x in enumerate(self._targets) if i in self._read]
        go_on("backward")
        if ends:
            with arrivals(self._targets, receive, [value]):
                torch.autograd.grad([value], ends, allow_unused=True)
        if self._first:
            self._left.append(_Left(value.detach(), self._began))

    def _choose(self, value: Tensor, found: PassNodes, plain: bool) -> None:
        """Choose the parts, the same ones on all ranks."""
        count = len(found.nodes)
        room = self._room(value, found) if plain and TOLD else None
        inner = [] if room is None else self._inner(found, room)
        inner += [0] * (most(len(inner), "parts") - len(inner))
        inner = [most(cut, "cut") for cut in inner]
        fits = plain and TOLD and found.ordered and inner == sorted(set(inner))
        self.parted = every(bool(inner) and fits, "fits")
        self._cuts = [0, *(inner if self.parted else []), count]

    def _room(self, value: Tensor, found: PassNodes) -> int | None:
        """Return the bytes that a part may hold; None where a whole pass may go.

        Gradients that the parameters have are there beside, which a step lets go of.
        """
        self._saved = [self._saved_by(k, node) for k, node in enumerate(found.nodes)]
        self._sizes = {i: self._held(i, x, found) for i, x in found.readers.items()}
        beside = sum([x.grad.nbytes for x in self._targets if x.grad is not None])
        room = self._step(value, found) - beside
        forward = self._forward(found, self._saved)
        whole = forward + sum(self._sizes.values())
        return None if whole <= room else max(room, whole // _MOST)

    def _forward(self, found: PassNodes, saved: Sequence[Mapping[int, int]]) -> int:
        """Return the most bytes that a pass holds on its way forward."""
        held, seen, highest = 0, set[int](), 0
        for node, own in zip(found.nodes, saved, strict=True):
            held += sum([size for x, size in own.items() if x not in seen])
            seen |= own.keys()
            highest = max(highest, held + _AT_HAND * sum(sizes_of(node)))
        return highest

    def _inner(self, found: PassNodes, room: int) -> list[int]:
        """Return where to cut: few parts, in as little more room as they take."""
        reads: dict[int, int] = {}  # bytes of the gradients that a node completes
        for i, readers in found.readers.items():
            reads[readers[0]] = reads.get(readers[0], 0) + self._sizes[i]
        cuts = self._within(found, room, reads)
        while len(cuts) >= _MOST:
            room += room // 16 + 1
            cuts = self._within(found, room, reads)
        return cuts

    def _within(
        self, found: PassNodes, room: int, reads: Mapping[int, int]
    ) -> list[int]:
        """Return where to cut such that each part has room, if cuts allow."""
        cuts: list[int] = []
        held, forward, seen = 0, 0, set[int]()
        for k in reversed(range(len(found.nodes))):
            own = self._saved[k]
            new = sum([size for x, size in own.items() if x not in seen])
            forward = new + max(forward, _AT_HAND * sum(sizes_of(found.nodes[k])))
            seen |= own.keys()
            own_gradients = reads.get(k, 0)
            both = held + own_gradients + forward
            if both + both // _BACK > room and held:
                cuts.append(k + 1)
                held = 0
            held += own_gradients
        return cuts[::-1]

    def _saved_by(self, k: int, node: Any) -> dict[int, int]:
        """Return the bytes that a node has saved, by storage; note by which places."""
        sizes, places = kept_by(node)
        self._node_of.update(dict.fromkeys(places, k))
        return {x: size for x, size in sizes.items() if x not in self._there}

    def _held(self, i: int, readers: list[int], found: PassNodes) -> int:
        """Return the bytes of a gradient, as a tensor or as its factors."""
        whole, node = self._targets[i].nbytes, found.nodes[readers[0]]
        if len(readers) > 1 or not factored(node):
            return whole
        return min(whole, sum(sizes_of(node)) + sum(self._saved[readers[0]].values()))

    def _step(self, value: Tensor, found: PassNodes) -> int:
        """Return the bytes that a step holds, whose masks are kept another way."""
        saved = [dict(own) for own in self._saved]
        for k, node in enumerate(found.nodes):
            saved[k][-1 - k] = self._masks.get(node, 0)
            if getattr(node, "drawn", None) is not None:  # what is made again here
                rows, weight = node._input_metadata[0].shape[0], node.next_functions[1]
                x = weight[0].variable
                saved[k][-1 - k] = rows * x.shape[1] * x.itemsize
        graph = Graph([value.grad_fn], self._there)
        graph.saved = dict(zip(found.nodes, saved, strict=True))
        back = graph.step_back(graph.leading_to(graph.leaves), {}, {})[1]
        return max(back, self._forward(found, saved))
