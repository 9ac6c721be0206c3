"""Floor 1: the outputs that a loss was made of, by its graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from torch import Tensor

from torch_dropout_ir.loss_terms import LOSSES, OF_LABELS

_OF_LOSSES: Final = LOSSES | OF_LABELS | {"LogSoftmaxBackward0"}


def cut(value: Tensor, leaves: Iterable[Any], stops: set[Any]) -> Tensor | None:
    """Return the output nearest to a loss through which it depends on some nodes.

    What a loss of torch's makes of another, as the losses of samples, is no output.
    """
    cuts = []
    for x in leaves:
        node = x.grad_fn if isinstance(x, Tensor) and x.ndim else None
        if node is not None and len(node._input_metadata) == 1:
            if between := _between(value, node, stops):
                cuts.append((between, x))
    cuts.sort(key=lambda pair: len(pair[0]))
    nearest, found = cuts[0] if cuts else (set(), None)
    for between, x in cuts[1:]:  # each further away than those before
        if any([node.name() in _OF_LOSSES for node in between - nearest]):
            nearest, found = between, x
    return found


def _between(value: Tensor, end: Any, stops: set[Any]) -> set[Any]:
    """Return the nodes between a loss and an output; none if it is no cut."""
    left, seen, met = [value.grad_fn], {end}, False
    while left:
        node = left.pop()
        met = met or node is end
        if node is None or node in seen:
            continue
        if node in stops:
            return set()
        seen.add(node)
        left += [child for child, _ in node.next_functions]
    return seen - {end} if met else set()
