"""Floor 1: what a loss is a sum of, as its graph tells.

Semantics:

* A loss is made of terms of one entry each where it is linear in elementwise functions
  of those entries, whatever it adds up: of outputs, or of log-probabilities that are a
  log-softmax of something linear in the outputs.
* A function may choose entries first (a label's log-probability), all of it the same:
  of entries in two places it could be a function of two.
* A graph with any other operation may be of such a sum too: it does not tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Edges: TypeAlias = Sequence[tuple[Any, int]]
# By node: its name, and what leads to it.
Nodes: TypeAlias = dict[Any, tuple[str, Edges]]
LEAF: Final = type(
    get_gradient_edge(torch.zeros((), requires_grad=True, device="cpu")).node
)


def _named(*names: str) -> frozenset[str]:
    return frozenset(f"{x}Backward{k}" for k in (0, 1) for name in names
                     for x in name.split())  # fmt: skip


UNARY: Final = _named(
    "Add Sub Mul Div Neg Abs Exp Log Sqrt Rsqrt Pow Sin Cos Relu LeakyRelu Elu Gelu "
    "Silu Mish Tanh Sigmoid LogSigmoid Softplus Hardtanh Hardswish "
    "Softshrink Hardshrink Threshold Clamp ClampMin Clone ToCopy Alias Erf Erfc Lgamma "
    "Digamma Polygamma Acos Asin Atan Tan SpecialI0E SpecialLogNdtr"
)
ELEMENTWISE: Final = UNARY | _named(
    "Addcmul Atan2 Cosh Expm1 Lerp Log1P Logaddexp Maximum Minimum Reciprocal Rsub "
    "Sinh Square Where Xlogy"
)
LOSSES: Final = frozenset(
    f"{name}Backward0"
    for name in (
        "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "HuberLoss", "MseLoss",
        "SmoothL1Loss", "SoftMarginLoss",
    )
)  # fmt: skip
OF_LABELS: Final = frozenset(("NllLossBackward0", "NllLoss2DBackward0"))
_CHOOSES: Final = OF_LABELS | _named(
    "Expand Gather Index IndexSelect MaskedSelect Permute ReshapeAlias Select Slice "
    "Squeeze T Transpose UnsafeView Unsqueeze View"
)
_LINEAR: Final = _CHOOSES | _named(
    "Add Sub Rsub Neg Sum Mean Cat Stack Clone ToCopy MaskedFill Where"
) | {"SqueezeBackward2", "MulBackward1", "DivBackward1"}  # fmt: skip
_LOG_SOFTMAX: Final = "LogSoftmaxBackward0"

# How the loss depends on what a node makes: linearly; as on an entry of its own; that,
# chosen from what is further inside. Then how log-probabilities depend on it: linearly.
_ADDED, _BENT, _CHOSEN, _INSIDE = range(4)


class Terms(NamedTuple):
    """Of what entries a loss is a sum of terms.

    Attributes:
        log_softmax: The node that makes them of the outputs; None where those are they.
        linear: Whether it is linear in them.
        direct: Whether the log-softmax is that of the outputs as they are.
        classes: The dimension in which that adds up to one.
        squares: Whether it is linear in squares of what is linear in them.
        tops: The nodes that bend them and that the loss is linear in, if no other one
            leads to these.
        end: What makes the entries that are bent.
    """

    log_softmax: Any
    linear: bool
    direct: bool = True
    classes: int = -1
    squares: bool = False
    tops: frozenset[Any] = frozenset()
    end: Any = None

    @property
    def by_row(self) -> bool:
        """Whether they show that no two rows of the outputs meet."""
        return self.log_softmax is None or (self.direct and self.classes > 0)


def is_end(node: Any, outputs: Tensor) -> bool:
    """Whether the graph of a loss ends in a node, which is that of its outputs."""
    if outputs.grad_fn is not None:  # they have a graph of their own
        return node is outputs.grad_fn
    return type(node) is LEAF and getattr(node, "variable", None) is outputs


def nodes_of(value: Tensor, end: Any = None) -> Nodes:
    """Return the nodes of the graph of a loss, each after those it leads to.

    None of those that ``end`` leads to, if that is given.
    """
    found: Nodes = {}
    begun: dict[Any, Edges] = {}
    stack: list[Any] = [value.grad_fn] if value.grad_fn else []
    while stack:
        node = stack[-1]
        edges = begun.get(node)
        if edges is None:
            begun[node] = edges = () if node is end else node.next_functions
            more = [x for x, _ in edges if x is not None and x not in begun]
            if more:
                stack += more
                continue
        stack.pop()
        if node not in found:
            found[node] = node.name(), edges
    return found


def terms_of(value: Tensor, outputs: Tensor, nodes: Nodes) -> Terms | None:
    """Return of what a loss is a sum of terms; None where its graph does not tell.

    The graph ends in ``outputs``. ``nodes`` is filled with those that were looked at,
    all where the graph tells.
    """
    if value.grad_fn is None:  # the outputs themselves, of a model that has its loss
        return Terms(None, True)
    walk = _Walk(outputs)
    left: list[tuple[Any, int]] = [(value.grad_fn, _ADDED)]
    seen = set(left)
    while left:
        node, how = left.pop()
        known = nodes.get(node)
        if known is None:
            edges = () if node is outputs.grad_fn else node.next_functions
            known = nodes[node] = node.name(), edges
        name, edges = known
        if not edges and (type(node) is LEAF or node is outputs.grad_fn):
            walk.leaf(node, how)
            continue
        inner = walk.step(name, node, how, edges)
        if inner is None:
            return None
        for child, _ in edges:
            if child is not None and (child, inner) not in seen:
                seen.add((child, inner))
                left.append((child, inner))
    return walk.found()


class _Walk:
    def __init__(self, outputs: Tensor) -> None:
        self._outputs = outputs
        self._linear = self._squares = True
        self._inside: list[Any] = []  # where chains inside the log-softmax end
        self._of: set[Any] = set()  # what makes the entries
        self._ends: set[Any] = set()  # below elementwise functions
        self._tops: set[Any] = set()  # elementwise functions that are added up
        self._below: set[Any] = set()  # those of which others are made

    def leaf(self, node: Any, how: int) -> None:
        """Note the outputs; what else has a gradient is a constant here."""
        if not is_end(node, self._outputs):
            return
        if how == _INSIDE:
            self._inside.append(node)
        else:
            self._entries(node, how)

    def step(self, name: str, node: Any, how: int, edges: Edges) -> int | None:
        """Return how the loss depends on what leads to a node; None if not known."""
        linear = is_linear(name, edges)
        self._squares &= linear or (how == _ADDED and _squares(name, node))
        if name == _LOG_SOFTMAX and how != _INSIDE:
            self._entries(node, how)
            return _INSIDE
        if linear and how in (_ADDED, _INSIDE):
            return how
        if how == _INSIDE:
            return None
        elementwise = name in ELEMENTWISE
        if how == _CHOSEN:
            chosen = elementwise or _chooses(name, node)
            return _CHOSEN if chosen and _lead(edges) == 1 else None
        if how == _ADDED:
            self._linear = False
        if elementwise or (
            name in LOSSES and (how == _ADDED or not node._saved_reduction)
        ):
            (self._tops if how == _ADDED else self._below).add(node)
            return _BENT
        if how == _BENT and _chooses(name, node) and _lead(edges) == 1:
            self._ends.add(node)
            return _CHOSEN
        return None

    def found(self) -> Terms | None:
        """Return what has been seen, where it is of one entry at a time."""
        if len(self._of) != 1 or len(self._ends) > 1:
            return None
        (node,), end = self._of, next(iter(self._ends), None)
        tops = frozenset(() if self._tops & self._below else self._tops)
        if is_end(node, self._outputs):
            squares = self._squares and not self._linear
            return Terms(None, self._linear, squares=squares, tops=tops, end=end)
        if not self._inside:
            return None
        direct = node.next_functions[0][0] in self._inside
        classes = node._saved_dim
        if classes >= 2**63:  # what is saved has no sign
            classes = classes - 2**64 + max(1, len(node._input_metadata[0].shape))
        return Terms(node, self._linear, direct, classes, tops=tops, end=end)

    def _entries(self, node: Any, how: int) -> None:
        self._of.add(node)
        if how == _BENT:
            self._ends.add(node)


def _chooses(name: str, node: Any) -> bool:
    """Whether each entry of what a node makes is of one entry, or none, at most."""
    return name in _CHOOSES and (name not in OF_LABELS or not node._saved_reduction)


def _squares(name: str, node: Any) -> bool:
    """Whether each entry of what a node makes is a square, or all add such up."""
    power = name == "PowBackward0" and node._saved_exponent == 2
    return power or name == "MseLossBackward0"


def is_linear(name: str, edges: Edges) -> bool:
    """Return whether a node is known to be linear in those inputs that lead to outputs.

    ``edges`` are what leads to it; None in the place of a constant.
    """
    if name == "MulBackward0":
        return _lead(edges) == 1
    if name == "DivBackward0":
        return all([child is None for child, _ in edges[1:]])
    return name in _LINEAR


def _lead(edges: Edges) -> int:
    """Return how many inputs of a node are no constants."""
    return len(edges) if len(edges) == 1 else sum([x is not None for x, _ in edges])
