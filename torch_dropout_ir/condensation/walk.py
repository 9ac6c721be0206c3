"""The layers of a model that have neurons, by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from torch_dropout_ir.condensation.layers import layer_parts, whole
from torch_dropout_ir.condensation.rows import Weights


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
