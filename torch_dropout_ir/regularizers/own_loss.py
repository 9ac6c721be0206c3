"""A loss that the model makes itself, as a function of an output that it made it of."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.loss_terms import (
    ELEMENTWISE,
    LEAF,
    LOSSES,
    OF_LABELS,
    is_linear,
)
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.output_products import HessianProduct
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.outputs import OutputsRead, read_outputs, real_leaves

_OF_LOSSES: Final = LOSSES | OF_LABELS | {"LogSoftmaxBackward0"}
_OF_OUTPUTS: Final = {"TanhBackward0", "SigmoidBackward0", "SoftmaxBackward0"}


def outputs_within(
    clean: CleanPass, loss: Loss, targets: Any
) -> tuple[OutputsRead, HessianProduct] | None:
    """Return the outputs of a model that returns its own loss, and their products.

    They are a tensor that the model returns beside the loss and through which all of
    that goes, as its logits: its second derivative in them is had of the graph of the
    pass. None where the loss is another, or no tensor is such a cut.
    """
    if loss.kind != "general" or isinstance(clean.outputs, Tensor):
        return None
    try:
        read = read_outputs(clean.outputs, loss, targets)
        if any([x.numel() > 1 for x in read.tensors]):
            return None
        with torch.enable_grad():
            value = read.risk(read.tensors)
    except (RuntimeError, TypeError, ValueError):
        return None
    if not value.requires_grad:
        return None
    outputs = _cut(clean, value)
    if outputs is None:
        return None
    own = Loss(lambda *_: value, "general", loss.reduction)
    read = OutputsRead([outputs], lambda _: value, own)
    return read, HessianProduct.within(value, outputs)


def _cut(clean: CleanPass, value: Tensor) -> Tensor | None:
    """Return the output nearest to a loss through which it depends on the sites.

    What a loss makes of another, as the losses of samples, is no output.
    """
    sites, cuts = {edge.node for edge in clean.edges}, []
    for x in real_leaves(clean.outputs)[0]:
        node = x.grad_fn if isinstance(x, Tensor) and x.ndim else None
        if node is not None and len(node._input_metadata) == 1:
            between = _between(value, node, sites)
            if between and (any(map(_is_layer, between)) or _is_made(node, sites)):
                cuts.append((between, x))
    cuts.sort(key=lambda pair: len(pair[0]))
    nearest, found = cuts[0] if cuts else (set(), None)
    for between, x in cuts[1:]:  # each further away than those before
        if any([node.name() in _OF_LOSSES for node in between - nearest]):
            nearest, found = between, x
    return found


def _between(value: Tensor, end: Any, sites: set[Any]) -> set[Any]:
    """Return the nodes between a loss and an output; none if it is no cut."""
    left, seen, met = [value.grad_fn], {end}, False
    while left:
        node = left.pop()
        met = met or node is end
        if node is None or node in seen:
            continue
        if node in sites:
            return set()
        seen.add(node)
        left += [child for child, _ in node.next_functions]
    return seen - {end} if met else set()


def _is_layer(node: Any) -> bool:
    """Whether a node mixes what it is given by a parameter."""
    return node.name() not in ELEMENTWISE and any(
        map(_is_parameter, node.next_functions)
    )


def _is_parameter(edge: tuple[Any, int]) -> bool:
    """Whether a leaf leads to a node, by others that are given nothing else."""
    node = edge[0]
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return type(node) is LEAF


def _is_made(node: Any, sites: set[Any]) -> bool:
    """Whether layers made an output, and nothing that bends as losses do since."""
    left, seen = [node], {None}
    while left:
        node = left.pop()
        if node in seen or node in sites or type(node) is LEAF or _is_layer(node):
            continue
        seen.add(node)
        name, edges = node.name(), node.next_functions
        if not (is_linear(name, edges) or name in _OF_OUTPUTS):
            return False
        left += [child for child, _ in edges]
    return True
