"""What the graph of a pass tells about samples: whether each has rows of its own.

Semantics:

* A tensor whose first dimension is a multiple of the number of samples holds them one
  after the other. Elementwise functions, products with a weight from the right,
  convolutions, pools, and what normalizes, sums or reorders within a row leave it so.
* A graph of such operations alone, from the sites to the outputs, keeps samples apart.
  One with any other operation may do so too: only derivatives tell then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from torch import Tensor

_ELEMENTWISE: Final = frozenset(
    f"{name}Backward{k}"
    for k in (0, 1)
    for name in (
        "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Exp", "Log", "Sqrt", "Pow", "Sin",
        "Cos", "Relu", "LeakyRelu", "Elu", "Gelu", "Silu", "Mish", "Tanh", "Sigmoid",
        "LogSigmoid", "Softplus", "Hardtanh", "Hardswish", "Hardsigmoid", "Softshrink",
        "Hardshrink", "Threshold", "Clamp", "ClampMin", "Clone", "Expand", "ToCopy",
    )
)  # fmt: skip
# Of the inputs of these the first is of samples, and the others are of none.
_OF_THE_FIRST: Final = frozenset(
    f"{name}Backward0"
    for name in (
        "Mm", "Convolution", "MaxPool2DWithIndices", "AvgPool2D", "AdaptiveAvgPool2D",
        "Prelu",
    )
)  # fmt: skip
_VIEWS: Final = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
_SOFTMAX: Final = ("SoftmaxBackward0", "LogSoftmaxBackward0")
_REDUCED: Final = ("MeanBackward1", "SumBackward1")


def rows_apart(outputs: Tensor, sites: Sequence[Tensor], count: int) -> bool:
    """Whether every operation from the sites to the outputs keeps samples apart.

    Args:
        outputs: A tensor of the outputs, with its graph; several rows a sample may be
            one after the other.
        sites: What enters the graph at each site.
        count: Number of samples.

    Returns:
        True where that is certain; False where the graph does not tell.
    """
    ends = {x.grad_fn for x in sites}
    if outputs.grad_fn is None or not outputs.ndim or outputs.shape[0] % count:
        return False
    leads: dict[Any, bool] = {}
    for node in _inputs_first(outputs.grad_fn):
        if node in ends:
            leads[node] = True
            continue
        followed = [leads.get(child, False) for child, _ in node.next_functions]
        leads[node] = any(followed)
        if leads[node] and not _keeps_rows(node, followed, count):
            return False
    return True


def _inputs_first(root: Any) -> Iterator[Any]:
    """Yield the nodes of a graph, each after those that it leads to."""
    begun, stack = set(), [root]
    done = set()
    while stack:
        node = stack[-1]
        if node in begun:
            stack.pop()
            if node not in done:
                done.add(node)
                yield node
            continue
        begun.add(node)
        stack += [x for x, _ in node.next_functions if x is not None and x not in begun]


def _keeps_rows(node: Any, followed: Sequence[bool], count: int) -> bool:
    """Whether the inputs that lead to sites meet in no other sample's rows."""
    shape = node._input_metadata[0].shape
    shapes = [
        child._input_metadata[place].shape
        for (child, place), leads in zip(node.next_functions, followed, strict=True)
        if leads
    ]
    if any(not s or s[0] % count for s in (shape, *shapes)):
        return False
    name = node.name()
    if name in _ELEMENTWISE:
        return all(len(s) == len(shape) and s[0] == shape[0] for s in shapes)
    if name in _VIEWS:
        return True
    first = followed[0] and not any(followed[1:]) and shapes[0][0] == shape[0]
    if name in _OF_THE_FIRST:
        return first
    if name == "AddmmBackward0":  # bias, rows, weight
        return list(followed) == [False, True, False]
    return first and _within_rows(node, name, len(shapes[0]))


def _within_rows(node: Any, name: str, ndim: int) -> bool:
    """Whether an operation along some dimensions leaves the first alone."""

    def alone(*dims: int) -> bool:
        return all(0 < (d - 2**64 if d >= 2**63 else d) % ndim for d in dims)

    if name in _SOFTMAX or name == "SelectBackward0":
        return alone(node._saved_dim)
    if name in _REDUCED:
        return len(node._saved_dim) > 0 and alone(*node._saved_dim)
    if name == "TransposeBackward0":
        return alone(node._saved_dim0, node._saved_dim1)
    if name == "NativeLayerNormBackward0":
        return len(node._saved_normalized_shape) < ndim
    return name == "NativeBatchNormBackward0" and not node._saved_training
