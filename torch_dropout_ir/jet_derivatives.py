"""Floor 1: the rule of linear nodes in a program, by their own derivatives.

Called, a node gives what it sends back. Where that does not change with its inputs, it
is linear in them, and what it sends of each entry that it makes are the numbers by
which it multiplies. Rows stay apart where a root of which each row weighs another power
of two gives, to the bit, what the plain one does by them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_dropout_ir.arrivals import once_differentiable, uneven
from torch_dropout_ir.jet_kinds import Kind
from torch_dropout_ir.jet_program import Program, Shape, told
from torch_dropout_ir.row_powers import POWERS, by_powers
from torch_dropout_ir.tracing import derivatives, of_each


def by_derivatives(to: Program, node: Any, inputs: list[int], result: int = 0) -> int:
    """Return the number of what a linear node makes, of which rows stay apart.

    Complex numbers are pairs of real ones, in a last dimension of the row.
    """
    made, live = node._input_metadata[result], [i for i in inputs if i >= 0]
    own = [to.sizes[i] for i in live]
    by_row = list(made.shape[:1]) == [to.rows] and None not in own
    told(by_row)
    sizes: Shape = (*made.shape[1:], *(2,) * made.dtype.is_complex)
    count, width = math.prod(sizes), sum([math.prod(x or ()) for x in own])
    told(0 < to.rows * count * max(count, width) <= to.most)
    pull = functools.partial(_sent, node, inputs, result)
    roots = _roots(tuple(made.shape), made.dtype, made.device, count)
    # One alone first: what torch says is once differentiable ends the process if many.
    told(not _bends(node, inputs, pull(roots[count])))
    found = of_each(pull, roots).detach()
    told(found.shape[1:] == (to.rows, width) and _apart(*found[count:]))
    return mapped(to, _joint(to, live, width), found[:count].movedim(0, 1), sizes)


def _bends(node: Any, inputs: list[int], sent: Tensor) -> bool:
    """Whether what a node has sent back changes with its inputs, which it has saved."""
    if not sent.requires_grad:
        return False
    if once_differentiable([sent]):
        return True
    pairs = zip(node.next_functions, inputs, strict=True)
    ends = [GradientEdge(*edge) for edge, i in pairs if i >= 0]
    slopes = derivatives(sent, ends, uneven(sent.detach()), True)
    return any([x is not None and bool(x.any()) for x in slopes])


def mapped(to: Program, a: int, by: Tensor, sizes: Shape) -> int:
    """Return the number of sums of entries of ``a`` times numbers, which it adds.

    Those are ``[rows, made, entries]`` or the same of all rows; a row of what is made
    has the shape ``sizes``.
    """
    count, width = by.shape[-2:]
    row = to.reshaped((1, width), a)
    number = to.add(Kind.TIMES, (count, width), row, -1, (by, by))
    number = to.add(Kind.SUMMED, (count,), number, dim=2, alpha=1.0)
    return to.reshaped(sizes, number)


def _sent(node: Any, inputs: list[int], result: int, root: Tensor) -> Tensor:
    """Return what a node sends back to inputs that are no constants, a vector a row."""
    behind = len(node._input_metadata) - result - 1
    with torch.enable_grad():
        found = node(*[None] * result, root, *[None] * behind)
        found = (found,) if isinstance(found, Tensor) else found
        sent = [x for x, i in zip(found, inputs, strict=True) if i >= 0]
        flat = [torch.view_as_real(x) if x.is_complex() else x for x in sent]
        flat = [x.reshape(len(x), -1) for x in flat]
        return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is saved for backward is none of its tensors
def _roots(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, count: int
) -> Tensor:
    """Return a root for each entry of a row, the same in all rows; of all, weighed."""
    n, *sizes = shape
    units = torch.eye(count, dtype=torch.float32, device=device)
    places = torch.cat((units, uneven(units[:1])))
    if dtype.is_complex:
        places = torch.view_as_complex(places.view(count + 1, -1, 2))
    roots = places.to(dtype).view(count + 1, 1, *sizes).expand(-1, n, *sizes)
    return torch.cat((roots, torch.stack(_weighed(roots[count]))))


def _weighed(plain: Tensor) -> list[Tensor]:
    """Return rows by the power of each, of its sixteen, and of sixteen of those."""
    found, size = [by_powers(plain)], POWERS
    while size < len(plain):
        blocks = by_powers(torch.ones(-(-len(plain) // size), device=plain.device))
        each = blocks.repeat_interleave(size)[: len(plain)].to(plain)
        found.append(plain * each.view(-1, *(1 for _ in plain.shape[1:])))
        size *= POWERS
    return found


def _apart(plain: Tensor, *weighed: Tensor) -> bool:
    """Whether what has been sent back of weighed roots is that of plain ones."""
    pairs = zip(_weighed(plain), weighed, strict=True)
    return all([torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in pairs])


def _joint(to: Program, live: list[int], width: int) -> int:
    """Add the entries of all inputs side by side."""
    number, start = -1, 0
    for i in live:
        count = math.prod(to.sizes[i] or ())
        flat = to.reshaped((count,), i)
        if len(live) == 1:
            return flat
        number = to.add(Kind.PLACED, (width,), flat, number, start=start, step=1)
        start += count
    return number
