"""Floor 1: the Hessian of a loss in each sample's outputs, read off its graph.

Semantics:

* Where each operation of the graph keeps the rows of the outputs apart until all are
  added up, and has a rule, the Hessian is a block for each row, made by the chain rule
  of what the graph has saved: no derivative is taken by autograd.
* A graph with any other operation is not told.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_dropout_ir.jet_places import SEVERAL
from torch_dropout_ir.jet_program import Program
from torch_dropout_ir.jet_rules import RULES
from torch_dropout_ir.loss_terms import LEAF, Nodes
from torch_dropout_ir.registration import loss_blocks


def blocks_of(outputs: Tensor, nodes: Nodes) -> Tensor | None:
    """Return the Hessian of a loss in each sample's outputs, where its graph tells.

    Column ``c`` of each block at the index ``c``, ``[K, n, K]``. ``nodes`` are those
    of the graph, each after those it leads to; the outputs ``[n, ...]`` its leaf.

    Raises:
        RuntimeError: If what the graph has saved was written on since.
    """  # noqa: DOC502 (torch raises)
    if not RULES.keys() >= {name for name, _ in nodes.values()}:
        return None
    with torch.no_grad():
        try:
            program = program_of(outputs, nodes)
        # A torch that names otherwise what a node has saved; a complex number in it.
        except (AttributeError, TypeError):
            return None
        if program is None or not program.readable:
            return None
        found = loss_blocks(outputs, program.steps, program.numbers, program.values)
        # 0 times infinity: where constants lead on autograd does not multiply.
        return found if math.isfinite(found.sum()) else None


def program_of(outputs: Tensor, nodes: Nodes) -> Program | None:
    """Return a graph of known operations as a program; None where rows may meet."""
    program = Program(outputs.shape)
    found: dict[Any, int] = {}  # by node and result
    number: int | None = None
    for node, (name, edges) in nodes.items():
        if not edges:
            if type(node) is LEAF and getattr(node, "variable", None) is outputs:
                found[node, 0] = 0
            continue
        inputs = [found.get(edge, -1) for edge in edges]
        if max(inputs) < 0:  # a constant
            continue
        number = RULES[name](program, node, inputs)
        if number is None:
            return None
        found[node, 0] = number
        if name in SEVERAL:  # the last of which has the number
            count = len(node._input_metadata)
            for k in range(count):
                found[node, k] = number - count + 1 + k
    return None if number is None else program
