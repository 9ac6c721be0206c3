"""Input weights of a layer's neurons, whatever the layer, and of all of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.arguments import check_count, check_module
from torch_dropout_ir.condensation.acting import acting, affine
from torch_dropout_ir.condensation.recurrent import RECURRENT, recurrent_parts
from torch_dropout_ir.condensation.rows import Rows, Weights

CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PROJECTIONS: Final = ("query", "key", "value")


def input_weights(
    module: nn.Module,
    view: str = "filter",
    *,
    num_heads: int | None = None,
    head: int | None = None,
) -> Tensor:
    """Return the input weights of a layer's neurons, one a row.

    A neuron's bias is appended where the layer has biases. Parametrized weights (weight
    and spectral normalization, low-rank updates) are taken as they act, and no buffer
    of theirs moves; so are those of a subclass of Linear with a forward of its own.

    What a row is, by layer and ``view``:

    * Linear, that of PyTorch Geometric and the ``Conv1D`` of Hugging Face's GPT-2:
      ``"filter"``, the weights of one output. ``"query"``, ``"key"`` and ``"value"``
      are the thirds of a fused projection, in this order.
    * Convolutions, transposed too, group by group: ``"filter"``, the kernels of one
      output channel over the input channels that it reads; ``"kernel"``, each pair of
      output and input channel by itself, without bias (the view of the paper's
      ResNet-18 figures); ``"input_channel"``, all kernels that read one input channel,
      without bias.
    * MultiheadAttention: ``"query"``, ``"key"``, ``"value"``, the outputs of one
      projection; ``"filter"``, the three on top of one another.
    * LSTM, GRU, RNN and their cells: ``"input"``, ``"forget"``, ``"cell"``,
      ``"output"``, ``"reset"``, ``"update"``, ``"new"``, one gate's units, each with
      its weights on the input, on the hidden state and its biases as they add up (an
      RNN's are ``"unit"``; a ``"projection"`` has weights on the cells' outputs);
      ``"filter"``, all gates; ``"l1.forget"`` and ``"l0_reverse.forget"`` name a layer
      other than the first, of which there is no ``"filter"``.
    * Embedding: ``"filter"``, the vector of one token; ``"feature"``, one coordinate
      over all tokens.

    Args:
        module: The layer.
        view: What counts as a neuron, as above.
        num_heads: Heads into which the rows of a projection fall, for ``head`` of a
            linear layer; attention modules know theirs.
        head: Return the rows of this head alone: in the ``"filter"`` of attention those
            of its query, its key and its value.

    Returns:
        Matrix ``[neurons, d]`` in the graph of the module's parameters.

    Raises:
        NotImplementedError: If the layer is of another kind.
        TypeError: If it is no module, or ``num_heads`` or ``head`` no integer.
        ValueError: If the layer has no such view or head.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Definition 1.

    Example:
        >>> input_weights(nn.Linear(4, 3)).shape
        torch.Size([3, 5])
        >>> input_weights(nn.Conv2d(4, 3, 5), view="kernel").shape
        torch.Size([12, 25])
        >>> attention = nn.MultiheadAttention(8, num_heads=2)
        >>> input_weights(attention, "query", head=1).shape
        torch.Size([4, 9])
    """  # noqa: DOC502 (raised by `_views`)
    check_module("input_weights", module, "module")
    for name, count in (("num_heads", num_heads), ("head", head)):
        if count is not None:
            check_count("input_weights", name, count, 0)
    with acting(module):
        views = _views(module)
        if view not in views:
            raise ValueError(
                f"input_weights: expected `view` of {type(module).__name__} to be one "
                f"of {tuple(views)}, got {view!r}"
            )
        rows = whole(views[view])
    if head is None:
        return rows
    if not isinstance(module, nn.MultiheadAttention):
        return _head(rows, head, num_heads, view)
    parts = rows.chunk(3 if view == "filter" else 1)
    return torch.cat([_head(x, head, module.num_heads, view) for x in parts])


def whole(rows: Weights) -> Tensor:
    """Return the matrix of rows, put together where they are not."""
    return rows.whole() if isinstance(rows, Rows) else rows


def layer_parts(module: nn.Module) -> dict[str, Weights]:
    """Return input weights ``[neurons, d]`` of each set of like neurons of a layer.

    By part, ``""`` for a layer of one part; the module's children do not count. Biases
    are put beside weights when rows are taken, where the layer has them apart.
    """
    own = module.parameters(recurse=False)
    if not _known(module) or any(x.is_complex() for x in own):
        return {}
    with acting(module):
        views = _views(module)
    if isinstance(module, nn.MultiheadAttention):
        return {name: views[name] for name in _PROJECTIONS}
    if isinstance(module, RECURRENT):
        return {n: w for n, w in views.items() if n != "filter"}
    return {"": views["filter"]}


def _known(module: nn.Module) -> bool:
    layers = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.MultiheadAttention)
    kinds = (*layers, *RECURRENT, nn.Embedding)
    known = isinstance(module, kinds) or _is_turned(module) or _is_of_graphs(module)
    return known and not any(
        nn.parameter.is_lazy(x) for x in module.parameters(recurse=False)
    )


def _is_turned(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2, whose weight is ``[in, out]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_of_graphs(module: nn.Module) -> bool:
    """Whether it is the linear layer of PyTorch Geometric, which is none of torch's."""
    named = type(module).__name__ == "Linear" and hasattr(module, "in_channels")
    return named and isinstance(getattr(module, "weight", None), Tensor)


def _views(module: nn.Module) -> dict[str, Weights]:
    """Every view of a layer, by name."""
    if not _known(module):
        raise NotImplementedError(
            f"input_weights: {type(module).__name__} is not supported"
            f"{' before its first call' if 'Lazy' in type(module).__name__ else ''}. "
            "Supported: Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, "
            "MultiheadAttention, RNN, LSTM, GRU and their cells, Embedding. Pass a "
            "matrix [neurons, d] of your own to the functions of this module instead."
        )
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module)
    if isinstance(module, RECURRENT):
        return {**recurrent_parts(module)}
    if isinstance(module, nn.Embedding):
        return {"filter": module.weight, "feature": module.weight.T}
    if _is_turned(module):
        return _linear(module.weight.T, module.bias)  # type: ignore[arg-type]
    if isinstance(module, nn.Linear):
        return _linear(*affine(module))
    if _is_of_graphs(module):
        return _linear(module.weight, module.bias)  # type: ignore[arg-type]
    assert isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
    return _convolution(module)


def _linear(weight: Tensor, bias: Tensor | None) -> dict[str, Weights]:
    """The views of a linear layer."""
    views = {"filter": _with_bias(weight, bias)}
    if len(weight) % 3 == 0:
        views |= _projections(weight.chunk(3), bias)
    return views


def _projections(weights: Iterable[Tensor], bias: Tensor | None) -> dict[str, Weights]:
    """The three projections, by name; their biases are one after the other."""
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    rows = map(_with_bias, weights, biases)
    return dict(zip(_PROJECTIONS, rows, strict=True))


def by_group(module: nn.Module) -> Tensor:
    """Return the weight of a convolution as ``[groups, out, in, positions]``."""
    weight = module.weight
    assert isinstance(weight, Tensor) and isinstance(module.groups, int)
    grouped = weight.unflatten(0, (module.groups, -1)).flatten(3)
    if isinstance(module, TRANSPOSED):
        grouped = grouped.transpose(1, 2)
    return grouped


def _convolution(module: nn.Module) -> dict[str, Weights]:
    """The three views of a convolution."""
    grouped = by_group(module)
    filters = grouped.flatten(2).flatten(0, 1)
    return {
        "filter": _with_bias(filters, module.bias),  # type: ignore[arg-type]
        "kernel": grouped.flatten(0, 2),
        "input_channel": grouped.transpose(1, 2).flatten(2).flatten(0, 1),
    }


def _attention(module: nn.MultiheadAttention) -> dict[str, Weights]:
    if module.in_proj_weight is None:
        weights = [module.get_parameter(f"{n[0]}_proj_weight") for n in _PROJECTIONS]
    else:
        weights = list(module.in_proj_weight.chunk(3))
    bias = module.in_proj_bias
    views = _projections(weights, bias)
    if module.in_proj_weight is not None:
        views["filter"] = _with_bias(module.in_proj_weight, bias)
    elif len({w.shape[1] for w in weights}) == 1:
        views["filter"] = _with_bias(torch.cat(weights), bias)
    return views


def _with_bias(weight: Tensor, bias: Tensor | None) -> Weights:
    return weight if bias is None else Rows(weight, bias)


def _head(rows: Tensor, head: int, num_heads: int | None, view: str) -> Tensor:
    if num_heads is None or num_heads < 1 or rows.shape[0] % num_heads:
        raise ValueError(
            f"input_weights: expected `num_heads` to divide the {rows.shape[0]} rows "
            f"of the view {view!r}, got {num_heads}"
        )
    if not 0 <= head < num_heads:
        raise ValueError(
            f"input_weights: expected `head` in [0, {num_heads}), got {head}"
        )
    return rows.unflatten(0, (num_heads, -1))[head]


def named_input_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Go through the input weights of all layers of a model, as ``named_parameters``.

    Layers are those of :func:`input_weights`. A layer that holds several sets of
    neurons gives each under ``<layer>:<part>``: ``attention:query``, ``lstm:forget``.
    A weight that layers share (an embedding tied to the last layer, a module used in
    two places) is given once, under its first name.

    Args:
        model: The model.

    Yields:
        Name, and input weights ``[neurons, d]``.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(name, list(w.shape)) for name, w in named_input_weights(net)]
        [('0', [8, 5]), ('2', [2, 9])]
    """
    for name, rows in named_rows(model):
        yield name, whole(rows)


def named_rows(model: nn.Module) -> Iterator[tuple[str, Weights]]:
    """Yield the same without copies where biases are apart: rows to be taken."""
    seen: set[tuple[int, ...]] = set()
    for name, module in model.named_modules():
        weights = tuple(id(x) for x in _own_parameters(module) if x.ndim > 1)
        if not weights or weights in seen:
            continue
        try:
            parts = layer_parts(module)
        except NotImplementedError:
            continue
        if parts:
            seen.add(weights)
        for part, rows in parts.items():
            yield f"{name}:{part}" if part else name, rows


def _own_parameters(module: nn.Module) -> Iterator[Tensor]:
    """The module's parameters, its parametrizations' among them."""
    yield from module.parameters(recurse=False)
    if nn.utils.parametrize.is_parametrized(module):
        yield from module.parametrizations.parameters()  # type: ignore[union-attr]
