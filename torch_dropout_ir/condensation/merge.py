"""The smaller network that a condensed one is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_dropout_ir.arguments import check_flag, check_module, check_real
from torch_dropout_ir.condensation.cover import check_cover, effective_neurons
from torch_dropout_ir.condensation.graph import (
    Outgoing,
    num_neurons,
    outgoing_weights,
    weights_read,
)
from torch_dropout_ir.condensation.layers import CONVOLUTIONS, input_weights
from torch_dropout_ir.condensation.orientation import amplitudes
from torch_dropout_ir.condensation.rewire import (
    clusters_of,
    fit,
    folded,
    input_of,
    inputs_of,
    narrow,
    narrow_both,
    read_through,
    replaced,
    restore,
    with_one,
)
from torch_dropout_ir.functional import at_sites, call
from torch_dropout_ir.generators import preserved_rng
from torch_dropout_ir.vectors import full_precision


@dataclasses.dataclass(frozen=True)
class LayerMerge:
    """What became of one layer.

    Attributes:
        before: Its neurons.
        after: Its neurons in the merged model.
        change: Relative change of the outputs that merging it added, or would have.
        reason: Why it was left as it was; empty where it was merged.
    """

    before: int
    after: int
    change: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Merged:
    """A smaller model, and how far it is from the one that it was made of.

    Attributes:
        model: The new model, in evaluation mode.
        relative_change: Norm of the change of its outputs on the example inputs over
            the norm of the outputs.
        largest_change: Largest change of an output.
        layers: What became of each linear and convolutional layer, by name.
    """

    model: nn.Module
    relative_change: float
    largest_change: float
    layers: dict[str, LayerMerge]


@torch.no_grad()
@full_precision()
def merge_condensed(
    model: nn.Module,
    example_inputs: Any,
    threshold: float = 0.95,
    *,
    min_amplitude: float = 0.0,
    max_change: float | None = None,
    least_squares: bool | None = None,
    layers: Sequence[str] | None = None,
) -> Merged:
    r"""Make the neurons of one orientation one, layer by layer.

    Neurons of a cluster of :func:`effective_neurons` become one neuron, dead ones go.
    Where all between a layer and its readers is positively homogeneous (ReLU, dropout,
    pooling), the one has the mean orientation weighted by amplitude and

    .. math:: a = \sum_j a_j \lVert w_j \rVert / \lVert w \rVert

    which is exact for exactly parallel neurons. Else the one has the mean input weight,
    and the readers' weights (and biases, of linear layers) are those that best give
    back, in least squares over the example inputs, what they read before.

    Layers are merged whose neurons go to linear layers and convolutions only, through
    what treats each neuron by itself; residual sums and parametrized or shared weights
    are reasons against it, which the report gives. A batch normalization right behind
    the layer counts as part of the input weights, as it acts in evaluation mode, and
    has fewer channels after. Each neuron's part in the function is measured by its
    amplitude :math:`\lVert a_j \rVert \lVert w_j \rVert`.

    Args:
        model: The model; left as it is.
        example_inputs: Arguments of the model: a tensor, a tuple, or a mapping. The
            outputs are compared on them, with dropout off; more inputs than merged
            neurons make least squares well posed.
        threshold: Cosine above which neurons are parallel.
        min_amplitude: Share of a layer's largest amplitude below which a neuron goes.
        max_change: Largest relative change of the outputs allowed; a layer whose
            merging would exceed it stays as it was. None: no bound.
        least_squares: True fits for every activation, False for none.
        layers: Names of the layers to merge; all that can be if None.

    Returns:
        The new model, its change, and what became of each layer.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If a share or threshold is out of range, a name in ``layers`` is not
            one of a linear layer or convolution, the model returns no floating-point
            tensor, or one that is empty or not finite.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, section V (condensation).

    Example:
        >>> first = nn.Linear(2, 3, bias=False)
        >>> rows = [[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]
        >>> first.weight.data = torch.tensor(rows)
        >>> net = nn.Sequential(first, nn.ReLU(), nn.Linear(3, 1))
        >>> merged = merge_condensed(net, torch.randn(9, 2))
        >>> merged.model[0].out_features, merged.relative_change < 1e-6
        (2, True)
    """  # noqa: DOC502 (raised by the checks)
    check_module("merge_condensed", model)
    bounds = threshold, min_amplitude
    check_cover("merge_condensed", *bounds)
    graph = outgoing_weights(model)
    _check(graph, max_change, least_squares, layers)
    new = copy.deepcopy(model).eval()
    report: dict[str, LayerMerge] = {}
    # Passes move copies of buffers; merging replaces the buffers themselves.
    with preserved_rng(model), at_sites(new, lambda _, h: h, move_buffers=True):
        expected = _finite(_outputs(new, example_inputs))
        change = (0.0, 0.0)
        for name, found in graph.items():
            source = new.get_submodule(name)
            before = num_neurons(source)
            reason = _against(new, name, found, example_inputs)
            if layers is not None and name not in layers:
                reason = "not among `layers`"
            fitted = not found.homogeneous if least_squares is None else least_squares
            saved = None if reason else replaced(new, _places(name, found))
            added = 0.0
            if saved is not None:
                try:
                    _merge(new, name, found, example_inputs, *bounds, fitted)
                    reached = _difference(_outputs(new, example_inputs), expected)
                    added = reached[0] - change[0]
                    if max_change is not None and not reached[0] <= max_change:
                        reason = f"the outputs would change by {reached[0]:.3g}"
                except Exception as err:  # what the model makes of fewer neurons
                    reason = f"the model does not run with fewer: {err}"
                if reason:
                    restore(new, saved)
                else:
                    change = reached
            report[name] = LayerMerge(before, num_neurons(source), added, reason)
    return Merged(new, *change, report)


def _check(
    graph: dict[str, Outgoing],
    max_change: float | None,
    least_squares: bool | None,
    layers: Sequence[str] | None,
) -> None:
    if max_change is not None:
        check_real("merge_condensed", "max_change", max_change, least=0, finite=False)
    if least_squares is not None:
        check_flag("merge_condensed", "least_squares", least_squares)
    unknown = [name for name in layers or () if name not in graph]
    if unknown:
        raise ValueError(
            f"merge_condensed: expected `layers` among {list(graph)}, got {unknown}"
        )


def _merge(
    model: nn.Module,
    name: str,
    found: Outgoing,
    inputs: Any,
    threshold: float,
    min_amplitude: float,
    fitted: bool,
) -> None:
    """Merge one layer of ``model`` in place."""
    source = model.get_submodule(name)
    weights = input_weights(source)
    norm = model.get_submodule(found.norm) if found.norm else None
    if norm is not None:
        weights = folded(weights, source.bias is not None, norm)
    outgoing = weights_read(dict(model.named_modules()), name, found.consumers)
    size = amplitudes(weights, outgoing.to(weights))
    cover = effective_neurons(weights, threshold, min_amplitude, amplitude=size)
    labels = with_one(cover.labels, size)
    rows, mixing = clusters_of(weights, size, labels, homogeneous=not fitted)
    read = (
        [inputs_of(model, c, inputs, len(weights)) for c in found.consumers]
        if fitted
        else []
    )
    if norm is None:
        narrow(source, rows)
    else:
        narrow_both(source, norm, rows, weights, labels)
    for k, consumer in enumerate(found.consumers):
        module = model.get_submodule(consumer)
        mixture, offset = mixing, None
        if fitted:
            now = inputs_of(model, consumer, inputs, len(rows))
            constant = isinstance(module, nn.Linear) and module.bias is not None
            mixture, offset = fit(now, read[k], mixing, constant=constant)
        read_through(module, mixture.to(weights), offset)


def _places(name: str, found: Outgoing) -> tuple[str, ...]:
    """The modules that merging a layer changes."""
    return (name, *((found.norm,) if found.norm else ()), *found.consumers)


def _against(model: nn.Module, name: str, found: Outgoing, inputs: Any) -> str:
    """Why a layer cannot be merged; empty where it can."""
    if found.reason:
        return found.reason
    users: dict[int, int] = {}
    for module in model.modules():
        for x in module.parameters(recurse=False):
            users[id(x)] = users.get(id(x), 0) + 1
    if found.norm and isinstance(model.get_submodule(name), nn.Linear):
        if input_of(model, found.norm, inputs).ndim != 2:
            return f"`{found.norm}` normalizes another dimension"
    for place in _places(name, found):
        module = model.get_submodule(place)
        plain = place == found.norm or type(module) in (nn.Linear, *CONVOLUTIONS)
        if not plain or module._forward_pre_hooks:
            return f"`{place}` is no plain layer: {type(module).__name__}"
        if getattr(module, "groups", 1) != 1:
            return f"`{place}` is a grouped convolution"
        if any(users[id(x)] > 1 for x in module.parameters(recurse=False)):
            return f"`{place}` shares its weights"
    return ""


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    leaves = tree_leaves(call(model, inputs))
    found = [
        x.double() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()
    ]
    if not found:
        raise ValueError(
            "merge_condensed: expected the model to return a floating-point tensor, "
            f"got {[type(x).__name__ for x in leaves]}"
        )
    return found


def _finite(outputs: list[Tensor]) -> list[Tensor]:
    if not all(x.numel() for x in outputs):
        raise ValueError(
            "merge_condensed: expected `example_inputs` of one sample at least, got "
            f"outputs {[list(x.shape) for x in outputs]}: no change could be measured"
        )
    if all(bool(torch.isfinite(x).all()) for x in outputs):
        return outputs
    raise ValueError(
        "merge_condensed: expected finite outputs on `example_inputs`, got some that "
        "are not: the change could not be measured. Look for NaN in the inputs and in "
        "the model's parameters."
    )


def _difference(outputs: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Relative change in norm, and largest change of an entry."""
    pairs = zip(outputs, expected, strict=True)
    moved = [(a - b.reshape(a.shape)).flatten() for a, b in pairs]
    norm = torch.linalg.vector_norm(torch.cat([x.flatten() for x in expected]))
    change = torch.linalg.vector_norm(torch.cat(moved))
    relative = 0.0 if float(change) == 0 else float(change / norm)
    largest = max((float(x.abs().max()) for x in moved if x.numel()), default=0.0)
    return relative, largest
