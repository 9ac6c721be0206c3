"""Floor 1: what chooses entries of a row, in a program."""

from __future__ import annotations

from typing import Any, Final

from torch_dropout_ir.jet_kernels import Kind
from torch_dropout_ir.jet_program import Program, Rule, signed


def _sliced(to: Program, node: Any, inputs: list[int]) -> int | None:
    own = to.sizes[inputs[0]]
    if own is None:
        return None
    dim, shape = signed(node._saved_dim, len(own) + 1), node._input_metadata[0].shape
    if not dim:
        whole = shape[0] == to.rows and node._saved_step == 1
        return to.add(Kind.LINEAR, own, inputs[0], alpha=1.0) if whole else None
    start = max(0, signed(node._saved_start, own[dim - 1]))
    step = node._saved_step
    return to.add(
        Kind.CHOSEN, shape[1:], inputs[0], dim=dim - 1, start=start, step=step
    )


def _selected(to: Program, node: Any, inputs: list[int]) -> int | None:
    own = to.sizes[inputs[0]]
    if own is None:
        return None
    dim = signed(node._saved_dim, len(own) + 1) - 1
    if dim < 0:
        return None
    place, sizes = signed(node._saved_index, own[dim]), (*own[:dim], *own[dim + 1 :])
    return to.add(Kind.CHOSEN, sizes, inputs[0], dim=dim, start=place, step=1)


def _gathered(to: Program, node: Any, inputs: list[int]) -> int | None:
    a, index = inputs[0], node._saved_index
    sizes, own = to.elementwise(node, a, -1, False), to.sizes[a]
    if sizes is False or sizes is None or own is None:
        return None
    dim = signed(node._saved_dim, len(own) + 1) - 1
    sized = (*sizes[: max(0, dim)], *own[dim : dim + 1], *sizes[dim + 1 :])
    if dim < 0 or sized != tuple(own):
        return None
    return to.add(Kind.GATHERED, sizes, a, -1, (index,), dim=dim)


def _parted(to: Program, node: Any, inputs: list[int]) -> int | None:
    """Parts along a dimension of a row, one after the other."""
    own, number = to.sizes[inputs[0]], None
    if own is None:
        return None
    dim, start = signed(node._saved_dim, len(own) + 1) - 1, 0
    if dim < 0:
        return None
    for part in node._input_metadata:
        sizes = part.shape[1:]
        number = to.add(Kind.CHOSEN, sizes, inputs[0], dim=dim, start=start, step=1)
        start += sizes[dim] if len(sizes) == len(own) else 1
    return number


# Those that have more than one result.
SEVERAL: Final = ("SplitBackward0", "SplitWithSizesBackward0", "UnbindBackward0")
PLACES: Final[dict[str, Rule]] = {
    "SliceBackward0": _sliced,
    "SelectBackward0": _selected,
    "GatherBackward0": _gathered,
    **dict.fromkeys(SEVERAL, _parted),
}
