"""Floor 1: the Hessian of a loss in each sample's outputs, read off its graph.

Semantics:

* Where each operation of the graph keeps the rows of the outputs apart until all are
  added up, the Hessian is a block for each row, made by the chain rule of what the
  graph has saved: no derivative of the loss is taken by autograd.
* So it is where sums over all rows are bent, and no row read beside them. There is more
  of the Hessian then, between rows.
* An operation without a rule is asked for its own derivatives.
* A graph with an operation that joins rows otherwise is not told.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_dropout_ir.jet_derivatives import by_derivatives
from torch_dropout_ir.jet_moments import OF_PAIRS
from torch_dropout_ir.jet_places import SEVERAL
from torch_dropout_ir.jet_program import NotToldError, Program, told
from torch_dropout_ir.jet_rules import RULES
from torch_dropout_ir.loss_terms import Nodes, is_end
from torch_dropout_ir.registration import loss_blocks


class Blocks(NamedTuple):
    """The Hessian of a loss in the outputs of each sample.

    Attributes:
        columns: Column ``c`` of each block at the index ``c``, ``[K, n, K]``.
        couples: Whether there is more of it, between samples.
    """

    columns: Tensor
    couples: bool


def blocks_of(outputs: Tensor, nodes: Nodes) -> Blocks | None:
    """Return the Hessian of a loss in each sample's outputs, where its graph tells."""
    with torch.no_grad():
        try:
            program = program_of(outputs, nodes)
        # A torch that names otherwise what a node has saved; a complex number in it.
        except (NotToldError, AttributeError, TypeError):
            return None
        except RuntimeError as err:
            if "modified by an inplace" in str(err):
                raise
            return None  # a derivative that torch lacks
        if not program.readable:
            return None
        found = loss_blocks(outputs, program.steps, program.numbers, program.values)
        # 0 times infinity: where constants lead on autograd does not multiply.
        return Blocks(found, program.couples) if math.isfinite(found.sum()) else None


def program_of(outputs: Tensor, nodes: Nodes) -> Program:
    """Return a graph of known operations, of which none joins rows, as a program."""
    program = Program(outputs.shape)
    found: dict[Any, int] = {}  # by node and result
    pairs: set[Any] = set()  # those of complex numbers
    number = -1
    for node, (name, edges) in nodes.items():
        if not edges:
            if is_end(node, outputs):
                found[node, 0] = 0
            continue
        inputs = [found.get(edge, -1) for edge in edges]
        if max(inputs) < 0:  # a constant
            continue
        program.begin(inputs)
        of_pairs = bool(pairs) and not pairs.isdisjoint(edges)
        rule = (OF_PAIRS if of_pairs else RULES).get(name)
        if rule is None:
            for k in _read(node, nodes):
                number = by_derivatives(program, node, inputs, k)
                found[node, k] = number
                if node._input_metadata[k].dtype.is_complex:
                    pairs.add((node, k))
            continue
        number = rule(program, node, inputs)
        count = len(node._input_metadata) if name in SEVERAL else 1
        for k in range(count):  # the last of which has the number
            found[node, k] = number - count + 1 + k
    told(number >= 0)
    return program


def _read(node: Any, nodes: Nodes) -> list[int]:
    """Return which results of a node others read; the first of the last node."""
    edges = [edge for _, edges in nodes.values() for edge in edges]
    return sorted({k for child, k in edges if child is node}) or [0]
