"""Functions that jump: torch takes their derivative to be zero, and says nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from torch import Tensor

_WITHOUT: Final = ("derivative", "differentiable", "double backward", "not implemented")
NO_DERIVATIVE: Final = (
    "expected a model and a loss that can be differentiated twice, got an operation "
    "that cannot: {}. Put one in its place that can, or leave out the parameters below "
    "it with `params=`."
)
_JUMPS: Final = ("Ceil", "Floor", "Round", "Sgn", "Sign", "Trunc")


def depended_on(
    value: Tensor, leaves: Mapping[str, Tensor], found: Iterable[Tensor | None]
) -> list[str]:
    """Return the names of the leaves that a value depends on smoothly.

    What is rounded, cut to an integer or made a sign has a gradient of zeros, which
    is not told from that of a minimum. A straight-through estimator leaves a way
    around the step, and counts. ``found`` is the gradient in each leaf, None for none.
    """
    left, seen, reached = [value.grad_fn], set[Any](), set[int]()
    while left:
        node = left.pop()
        if node is None or node in seen or _jumps(node):
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))
        left.extend(following for following, _ in node.next_functions)
    pairs = zip(leaves.items(), found, strict=True)
    return [n for (n, x), g in pairs if g is not None and id(x) in reached]


def _jumps(node: Any) -> bool:
    """Whether a node of the graph is of a step function, or of a rounded quotient."""
    if getattr(node, "_saved_rounding_mode", None):
        return True
    return node.name().rstrip("0123456789") in [f"{jump}Backward" for jump in _JUMPS]


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Say what to do about an operation without a derivative inside the context."""
    try:
        yield
    except RuntimeError as err:
        said = str(err).rstrip(".")
        known = NO_DERIVATIVE.partition("{")[0]
        if said.startswith(known) or not any(word in said for word in _WITHOUT):
            raise
        raise NotImplementedError(NO_DERIVATIVE.format(said)) from err
