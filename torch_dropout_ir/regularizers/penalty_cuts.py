r"""A product with the Hessian by parts of a pass, where samples meet.

Where a pass goes through one tensor :math:`h` on its way, :math:`R = r(h(a), b)` of
parameters :math:`a` below it and :math:`b` above, the derivative of :math:`u^\top
\nabla R` is made of a graph of second derivatives of either part alone. With
:math:`s = \partial r / \partial h`, which a plain pass gives, the part below has
:math:`u_a^\top h'(a)^\top s`; its derivatives in :math:`a` and in :math:`s`, the latter
:math:`\dot h`, are of that part. That above has :math:`u_b^\top \partial_b r + \dot
h^\top \partial_h r`, whose derivative in :math:`h` goes through the part below once
more. A pass is run for each part, which saves what that needs, and two beside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torch_dropout_ir.arrivals import root_of
from torch_dropout_ir.regularizers.coupling import nearly_equal
from torch_dropout_ir.regularizers.graph_memory import TOLD, sizes_of
from torch_dropout_ir.regularizers.pass_nodes import PassNodes, kept_by, saving, size_at

# Parts at most: each takes a pass.
_MOST: Final = 6
# What second derivatives hold: of what was saved, and of the largest result while one
# runs; and what a pass forward has at hand of that.
_TWICE: Final = 2.5
_AT_HAND: Final = 7
_FORWARD: Final = 3
# More than the least that is no reason for one part more.
_NEARLY: Final = 1.05
Add = Callable[[int, Tensor], None]


class OtherPassError(RuntimeError):
    """A pass that is not what it was."""


class CutPasses:
    """Passes that are alike, cut where all of a pass goes through one tensor.

    Args:
        run: Runs one at the same masks, and returns what is differentiated.
        params: The parameters.
    """

    def __init__(self, run: Callable[[], Tensor], params: Sequence[Tensor]) -> None:
        self._run = run
        self._params = params
        self._own = {id(x): i for i, x in enumerate(params)}
        self._node_of: dict[int, int] = {}  # which has saved what, by its place
        self._cuts: list[int] = []
        self._like: Any = None  # the value, nodes and who reads parameters
        self._sent: list[Tensor | None] = []

    @property
    def value(self) -> Tensor:
        """What is differentiated, as the first pass has it."""
        return self._like[0]

    def slopes(self) -> list[Tensor | None] | None:
        """Return the gradient by a whole pass; None where there is nothing to cut."""
        value = self._pass(None)
        found = PassNodes(value, self._own)
        self._like = value.detach(), [n.name() for n in found.nodes], found.readers
        self._cuts = self._chosen(found)
        if not self._cuts:
            return None
        ends: list[Any] = [*self._params, *[found.narrow[cut] for cut in self._cuts]]
        got = torch.autograd.grad([value], ends, allow_unused=True)
        self._sent = [*got[len(self._params) :]]
        return [*got[: len(self._params)]]

    def products(self, at: Mapping[int, Tensor], add: Add) -> Tensor | None:
        """Add the Hessian's product with a vector, as its parts come.

        Args:
            at: The vector, by the number of a parameter.
            add: Is called with such a number and a part of the product.

        Returns:
            The derivative of the gradient along the vector in what was sent back.

        Raises:
            OtherPassError: If a pass is not what the first was.
        """  # noqa: DOC502 (raised by what is called)
        bounds = [0, *self._cuts, len(self._like[1])]
        moved: Tensor | None = None  # where a part ends, along the vector
        bent = []
        for k, (first, stop) in enumerate(itertools.pairwise(bounds)):
            sent = None if stop == bounds[-1] else self._sent[k]
            into, moved = self._part(first, stop, sent, moved, at, add)
            if sent is not None:
                self._sent[k] = sent = None
            bent.append(into)
        roots = {
            c: x for c, x in zip(self._cuts, bent[1:], strict=True) if x is not None
        }
        if roots:
            found = self._again(0, self._cuts[-1])[1]
            edges = [found.narrow[cut] for cut in roots]
            got = torch.autograd.grad(
                edges, self._params, [*roots.values()], allow_unused=True
            )
            _add_all(range(len(got)), got, add)
        return moved

    def _part(
        self,
        first: int,
        stop: int,
        sent: Tensor | None,
        moved: Tensor | None,
        at: Mapping[int, Tensor],
        add: Add,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Add what a part has; return derivatives in its beginning and in ``sent``."""
        value, found = self._again(first, stop)
        last = stop == len(found.nodes)
        if sent is None and not last:
            return None, None
        root = None if sent is None else sent.detach().requires_grad_()
        root = root_of(value, learns=True) if root is None else root
        start: Any = value if last else found.narrow[stop]
        read = sorted(found.read_in(first, stop))
        own: list[Any] = [self._params[i] for i in read]
        below: list[GradientEdge] = [found.narrow[first]] if first else []
        slopes = torch.autograd.grad(
            [start], [*own, *below], [root], create_graph=True, allow_unused=True
        )
        pairs = zip(slopes, [*[at.get(i) for i in read], moved], strict=False)
        live = [
            (get_gradient_edge(g), u)  # its value is let go of
            for g, u in pairs
            if g is not None and u is not None and g.requires_grad
        ]
        del slopes, pairs
        if not live:
            return None, None
        heads, along = zip(*live, strict=True)
        ends = [*own, *below, root]
        got = torch.autograd.grad(heads, ends, along, allow_unused=True)
        _add_all(read, got, add)
        return got[len(own)] if first else None, got[-1]

    def _again(self, first: int, stop: int) -> tuple[Tensor, PassNodes]:
        value = self._pass((first, stop))
        found = PassNodes(value, self._own)
        expected, *like = self._like
        same = like == [[n.name() for n in found.nodes], found.readers]
        same = same and all([cut in found.narrow for cut in self._cuts])
        if not (same and nearly_equal(value, expected)):
            raise OtherPassError("expected a pass to be what it was, got another")
        return value, found

    def _pass(self, part: tuple[int, int] | None) -> Tensor:
        with saving(self._node_of, part):
            return self._run()

    def _chosen(self, found: PassNodes) -> list[int]:
        """Return where to cut: few parts that hold no more than a step, or least."""
        ends, seen = [0], set[int]()
        for k, node in enumerate(found.nodes):
            sizes = kept_by(node)
            self._node_of.update(dict.fromkeys(sizes.places, k))
            new = [n for x, n in sizes.storages.items() if x not in seen]
            seen.update(sizes.storages)
            ends.append(ends[-1] + sum(new))
        made = max([sum(sizes_of(node)) for node in found.nodes])
        tried = []
        for count in range(2, _MOST + 1) if TOLD and found.narrow else ():
            cuts = sorted({
                min(found.narrow, key=lambda c: abs(ends[c] * count - ends[-1] * j))
                for j in range(1, count)
            })
            bounds = itertools.pairwise([0, *cuts, len(found.nodes)])
            own = max([ends[stop] - ends[first] for first, stop in bounds])
            held = max(_TWICE * own + _AT_HAND * made, ends[cuts[-1]] + _FORWARD * made)
            held += sum([size_at(found.narrow[cut]) for cut in cuts])
            tried.append((held, cuts))
        least = min([held for held, _ in tried], default=math.inf)
        room = max(ends[-1], _NEARLY * least)
        if least >= (1 + _TWICE) * ends[-1]:
            return []
        return next(cuts for held, cuts in tried if held <= room)


def _add_all(numbers: Any, got: Sequence[Tensor | None], add: Add) -> None:
    for i, g in zip(numbers, got, strict=False):
        if g is not None:
            add(i, g)
