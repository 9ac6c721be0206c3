"""Floor 1: what moves entries of a row to other places, in a program."""

from __future__ import annotations

from typing import Any, Final

import torch

from torch_dropout_ir.jet_kinds import Kind
from torch_dropout_ir.jet_nodes import chosen
from torch_dropout_ir.jet_program import Program, Rule, signed, told


def _sliced(to: Program, node: Any, inputs: list[int]) -> int:
    own = to.row(inputs[0])
    dim, shape = signed(node._saved_dim, len(own) + 1), node._input_metadata[0].shape
    if not dim:
        if shape[0] == to.rows and node._saved_step == 1:
            return to.reshaped(own, inputs[0])
        device = node._input_metadata[0].device
        rows = torch.arange(shape[0], device=device) * node._saved_step
        first = max(0, signed(node._saved_start, to.rows))
        return to.picked(inputs[0], rows + first)
    start = max(0, signed(node._saved_start, own[dim - 1]))
    step = node._saved_step
    return to.add(
        Kind.CHOSEN, shape[1:], inputs[0], dim=dim - 1, start=start, step=step
    )


def _selected(to: Program, node: Any, inputs: list[int]) -> int:
    own, dim = to.along(inputs[0], node._saved_dim)
    start, sizes = signed(node._saved_index, own[dim]), (*own[:dim], *own[dim + 1 :])
    return to.add(Kind.CHOSEN, sizes, inputs[0], dim=dim, start=start, step=1)


def _gathered(to: Program, node: Any, inputs: list[int]) -> int:
    a, index = inputs[0], node._saved_index
    own, dim = to.along(a, node._saved_dim)
    sizes = to.elementwise(node, a, -1, False) or ()
    sized = (*sizes[:dim], *own[dim : dim + 1], *sizes[dim + 1 :])
    told(sized == tuple(own))
    return to.add(Kind.GATHERED, sizes, a, -1, (index,), dim=dim)


def _at_indices(to: Program, node: Any, inputs: list[int]) -> int:
    """Entries along a dimension that a node has found, by its own numbers."""
    own, dim = to.along(inputs[0], node._saved_dim)
    index = node._saved_indices
    index = index if index.ndim > len(own) else index.unsqueeze(dim + 1)
    values, sizes = (index,), index.shape[1:]
    number = to.add(Kind.GATHERED, sizes, inputs[0], -1, values, dim=dim)
    return to.reshaped(node._input_metadata[0].shape[1:], number)


def _flipped(to: Program, node: Any, inputs: list[int]) -> int:
    number = inputs[0]
    for saved in node._saved_dims:
        own, dim = to.along(number, saved)
        last = own[dim] - 1
        number = to.add(Kind.CHOSEN, own, number, dim=dim, start=last, step=-1)
    return number


def _parted(to: Program, node: Any, inputs: list[int]) -> int:
    """Parts along a dimension of a row, one after the other."""
    own, dim = to.along(inputs[0], node._saved_dim)
    number = start = 0
    for part in node._input_metadata:
        sizes = part.shape[1:]
        number = to.add(Kind.CHOSEN, sizes, inputs[0], dim=dim, start=start, step=1)
        start += sizes[dim] if len(sizes) == len(own) else 1
    return number


def _joined(to: Program, node: Any, inputs: list[int]) -> int:
    """Tensors beside one another along a dimension of a row."""
    shape, stacked = node._input_metadata[0].shape, "Stack" in node.name()
    dim = signed(node._saved_dim, len(shape)) - 1
    told(dim >= 0)
    counts, number = [], -1  # of a constant the size is not known
    for i in inputs:
        own = to.sizes[i] if i >= 0 else None
        counts.append(1 if stacked else own[dim] if own else -1)
    for k, i in enumerate(inputs):
        if i < 0:
            continue
        left, right = counts[:k], counts[k:]
        told(-1 not in left or -1 not in right)
        start = shape[dim + 1] - sum(right) if -1 in left else sum(left)
        number = to.add(Kind.PLACED, shape[1:], i, number, dim=dim, start=start, step=1)
    return number


def _turned(to: Program, node: Any, inputs: list[int]) -> int:
    """Dimensions of a row in another order."""
    own, name = to.row(inputs[0]), node.name()
    count = len(own) + 1
    dims = list(range(count))
    if "Permute" in name:
        dims = [signed(d, count) for d in node._saved_dims]
    elif "Transpose" in name:
        i, j = signed(node._saved_dim0, count), signed(node._saved_dim1, count)
        dims[i], dims[j] = j, i
    else:
        dims.reverse()
    told(dims[:1] == [0])
    sizes = [own[d - 1] for d in dims[1:]]
    moved = [d for d in dims[1:] if own[d - 1] > 1]
    if moved == sorted(moved):
        return to.reshaped(sizes, inputs[0])
    return chosen(to, node, inputs)


# Those that have more than one result.
_PARTED: Final = ("SplitBackward0", "SplitWithSizesBackward0", "UnbindBackward0")
SEVERAL: Final = (*_PARTED, "LinalgSlogdetBackward0")
PLACES: Final[dict[str, Rule]] = {
    "SliceBackward0": _sliced,
    "SelectBackward0": _selected,
    "GatherBackward0": _gathered,
    "FlipBackward0": _flipped,
    **{
        f"{x}Backward0": _at_indices
        for x in "Cummax Kthvalue Max Min Sort Topk".split()
    },
    "MedianBackward1": _at_indices,
    **dict.fromkeys(_PARTED, _parted),
    **dict.fromkeys(("CatBackward0", "StackBackward0"), _joined),
    **dict.fromkeys(("PermuteBackward0", "TransposeBackward0", "TBackward0"), _turned),
}
