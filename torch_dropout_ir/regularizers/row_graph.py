"""What the graph of a pass tells about samples: whether each has rows of its own.

Semantics:

* Samples have a place in a tensor: a dimension along which they follow each other, each
  with as many entries, and how often they do so (once, where rows are one after the
  other). What reorders, joins or splits dimensions moves it; elementwise functions,
  products with a weight from the right, convolutions, pools, attention, and what
  normalizes or sums within a sample leave it.
* A graph of such operations alone, from the sites to the first dimension of the
  outputs, keeps samples apart. One with any other operation may do so too: only
  derivatives tell then. In batch normalization in training mode samples meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_dropout_ir.attention_again import KeepsGiven
from torch_dropout_ir.loss_terms import LEAF, UNARY


class Place(NamedTuple):
    """Where samples are: along ``dim`` the index is (turn, sample, entry)."""

    dim: int
    turns: int


class Op(NamedTuple):
    """A node of the graph, its inputs, the places of samples in them, their number."""

    node: Any
    edges: Sequence[tuple[Any, int]]
    places: Sequence[Place | None]
    samples: int

    @property
    def shape(self) -> Sequence[int]:
        """Shape of the first result."""
        return self.node._input_metadata[0].shape

    def leading(self) -> list[tuple[Place, Sequence[int]]]:
        """Return the inputs that lead to sites: place and shape."""
        pairs = zip(self.edges, self.places, strict=True)
        return [
            (place, child._input_metadata[result].shape)
            for (child, result), place in pairs
            if place is not None
        ]

    def dims(self, saved: Any, ndim: int) -> list[int]:
        """Return dimensions that a node has saved, counted from the first."""
        given = saved if isinstance(saved, tuple) else (saved,)
        return [(d - 2**64 if d >= 2**63 else d) % max(1, ndim) for d in given]


START: Final = Place(0, 1)
_BATCH_NORM: Final = frozenset(("NativeBatchNormBackward0", "CudnnBatchNormBackward0"))


def rows_meet(
    outputs: Tensor, sites: Sequence[GradientEdge], count: int
) -> bool | None:
    """Return whether an operation from the sites to the outputs lets samples meet.

    False where every operation keeps samples apart; True where one below which all
    do is batch normalization in training mode; None where the graph does not tell.
    Several rows of one of ``count`` samples may be one after the other.
    """
    if outputs.grad_fn is None or not outputs.ndim or outputs.shape[0] % count:
        return None
    found: dict[Any, Place | None] = {}
    ends, stack = {edge.node for edge in sites}, [(outputs.grad_fn, None)]
    for node, edges in inputs_first(stack, found):
        places = [found.get(child) for child, _ in edges]
        if node in ends:
            if any([place not in (None, START) for place in places]):
                return None
            found[node] = START
            continue
        if not any(places):
            found[node] = None
            continue
        name = node.name()
        if name in UNARY and len(edges) == 1:
            found[node] = places[0]
        else:
            op = Op(node, edges, places, count)
            if name in _BATCH_NORM and _meets(op):
                above = [x for x, begun in stack if begun is not None]
                return True if all(map(_passes, (node, *above))) else None
            found[node] = RULES.get(name, lambda _: None)(op)
            if found[node] is None:
                return None
    return False if found[outputs.grad_fn] in (None, START) else None


def inputs_first(
    stack: list[tuple[Any, Any]], done: dict[Any, Any]
) -> Iterator[tuple[Any, Any]]:
    """Yield nodes of a graph that are not ``done``, with what they lead to, after that.

    ``stack`` holds the node to begin with; then those that are to come, and with what
    they lead to those that have been begun.
    """
    while stack:
        node, edges = stack.pop()
        if node in done:
            continue
        if edges is None:
            edges, begun = node.next_functions, len(stack)
            stack.append((node, edges))
            for child, _ in edges:
                if type(child) is not LEAF and child not in done and child is not None:
                    stack.append((child, None))
            if len(stack) > begun + 1:
                continue
            stack.pop()
        yield node, edges


def _meets(op: Op) -> bool:
    """Whether batch normalization takes its statistics of several samples."""
    return bool(op.node._saved_training and op.places[0] and op.places[0].dim == 0)


def _passes(node: Any) -> bool:
    """Whether derivatives go through a node, as far as it is batch normalization."""
    if node.name() not in _BATCH_NORM:
        return True
    # A scale of zero, with which residual branches begin, lets none pass.
    scale = getattr(node.next_functions[1][0], "variable", None)
    return scale is not None and any(scale.tolist())


def broadcast(op: Op) -> Place | None:
    """Elementwise, with inputs that are repeated along missing dimensions."""
    shape, found = op.shape, None
    for place, own in op.leading():
        dim = place.dim + len(shape) - len(own)
        if own[place.dim] != shape[dim]:
            return None
        moved = place if dim == place.dim else Place(dim, place.turns)
        if found is not None and found != moved:
            return None
        found = moved
    return found


def _view(op: Op) -> Place | None:
    """Dimensions joined and split: the order of the entries stays."""
    ((place, own),) = op.leading()
    left = math.prod(own[: place.dim]) * place.turns
    for dim, size in enumerate(op.shape):
        if not size or not left:
            return None
        if not size % (left * op.samples):
            return Place(dim, left)
        if left % size:
            return None
        left //= size
    return None


def _reordered(op: Op) -> Place | None:
    ((place, own),) = op.leading()
    order = list(range(len(own)))
    if op.node.name() == "PermuteBackward0":
        order = op.dims(op.node._saved_dims, len(own))
    else:
        named = op.node.name() == "TransposeBackward0"
        saved = (op.node._saved_dim0, op.node._saved_dim1) if named else (0, 1)
        if len(own) < 2:
            return place
        a, b = op.dims(saved, len(own))
        order[a], order[b] = b, a
    return Place(order.index(place.dim), place.turns)


def _first(*dims: int) -> Callable[[Op], Place | None]:
    """Of the first input alone, along whose given dimensions nothing meets."""

    def rule(op: Op) -> Place | None:
        place = op.places[0]
        if place is None or any(op.places[1:]) or place.dim not in dims:
            return None
        return place

    return rule


def _one_by_one(op: Op) -> Place | None:
    """The same for each place in the first dimension: products of many matrices."""
    found = {place for place in op.places if place is not None}
    place = found.pop()
    return place if not found and place.dim == 0 else None


def _matrices(op: Op) -> Place | None:
    """Rows of the first, or columns of the second; of many, the same one in both."""
    *added, left, right = op.places
    if any(added):
        return None
    if left and not (right or left.dim):
        return left  # as of a linear layer; to ask for shapes takes longer
    if left and right:
        return _one_by_one(op) if len(op.shape) > 2 else None
    place, summed = (left, -1) if left else (right, -2)
    return place if place and place.dim != len(op.shape) + summed else None


def _attention(op: Op) -> Place | None:
    return None if any(op.places[3:]) else _one_by_one(op)


def within(op: Op) -> Place | None:
    """Along dimensions that a node has saved, which stay."""
    places = {place for place in op.places if place is not None}
    place = places.pop()
    several = hasattr(op.node, "_saved_dims")
    saved = op.node._saved_dims if several else op.node._saved_dim
    dims = op.dims(saved, len(op.shape))
    return None if places or place.dim in dims else place


def _sliced(op: Op) -> Place | None:
    ((place, own),) = op.leading()
    return place if own[place.dim] == op.shape[place.dim] else None


def less(op: Op) -> Place | None:
    """Along dimensions that a node has saved, which go where it does not keep them."""
    ((place, own),) = op.leading()
    saved = op.node._saved_dim
    dims = [] if saved is None else op.dims(saved, len(own))
    if not dims or place.dim in dims:  # none are all
        return None
    if getattr(op.node, "_saved_keepdim", False):
        return place
    return Place(place.dim - sum(d < place.dim for d in dims), place.turns)


def _layer_norm(op: Op) -> Place | None:
    place, ndim = op.places[0], len(op.shape)
    own = ndim - len(op.node._saved_normalized_shape)
    return None if any(op.places[1:]) or place is None or place.dim >= own else place


def _batch_norm(op: Op) -> Place | None:
    return None if _meets(op) else _first(0, 1)(op)  # of channels each has its own


def _rules() -> dict[str, Callable[[Op], Place | None]]:
    rules: dict[str, Callable[[Op], Place | None]] = dict.fromkeys(UNARY, broadcast)
    named: dict[Callable[[Op], Place | None], str] = {
        broadcast: "Expand MaskedFill Where",
        _view: "View UnsafeView ReshapeAlias Unsqueeze Squeeze",
        _reordered: "Transpose Permute T",
        _matrices: "Mm Bmm Addmm",
        _first(0): "Convolution MaxPool2DWithIndices AvgPool2D AdaptiveAvgPool2D "
        "PreluKernel NativeGroupNorm",
        # From each of the first, for each batch of what they are measured to.
        lambda op: broadcast(op) if _first(0)(op) else None: "Cdist EuclideanDist",
        _first(0, 1): "UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D "
        "UpsampleLinear1D UpsampleBilinear2D UpsampleBicubic2D UpsampleTrilinear3D",
        _attention: "ScaledDotProductFlashAttention "
        "ScaledDotProductFlashAttentionForCpu ScaledDotProductEfficientAttention "
        "ScaledDotProductCudnnAttention",
        within: "Softmax SafeSoftmax LogSoftmax Split SplitWithSizes Cat",
        _sliced: "Slice",
        less: "Select Unbind",
        _layer_norm: "NativeLayerNorm",
        _batch_norm: "NativeBatchNorm CudnnBatchNorm",
    }
    for rule, names in named.items():
        rules |= {f"{name}Backward0": rule for name in names.split()}
    rules |= dict.fromkeys(("MeanBackward1", "SumBackward1"), less)
    rules[f"{KeepsGiven.__name__}Backward"] = _one_by_one
    return rules | {"SqueezeBackward1": _view, "SqueezeBackward2": _view}


RULES: Final = _rules()
