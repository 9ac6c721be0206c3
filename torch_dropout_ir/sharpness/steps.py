"""Functions that jump: torch takes their derivative to be zero, and says nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from torch import Tensor

_JUMPS: Final = ("Ceil", "Floor", "Round", "Sgn", "Sign", "Trunc")


def depended_on(
    value: Tensor, leaves: Mapping[str, Tensor], found: Iterable[Tensor | None]
) -> list[str]:
    """Return the names of the leaves that a value depends on smoothly.

    What is rounded, cut to an integer or made a sign has a gradient of zeros, which
    is not told from that of a minimum. A straight-through estimator leaves a way
    around the step, and counts.

    Args:
        value: The value, with its graph.
        leaves: Leaves of the graph by name.
        found: The gradient in each; None where there is none.

    Returns:
        Those that have a gradient, and that a path leads to without a step.
    """
    left, seen, reached = [value.grad_fn], set[Any](), set[int]()
    while left:
        node = left.pop()
        if node is None or node in seen or _jumps(node.name()):
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))
        left.extend(following for following, _ in node.next_functions)
    pairs = zip(leaves.items(), found, strict=True)
    return [n for (n, x), g in pairs if g is not None and id(x) in reached]


def _jumps(name: str) -> bool:
    """Whether a node of the graph is of a step function, by its name."""
    return name.rstrip("0123456789") in [f"{jump}Backward" for jump in _JUMPS]
