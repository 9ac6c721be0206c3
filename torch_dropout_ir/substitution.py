"""Floor 1: a call of a model with other tensors in the place of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def places(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` by every place of a model that holds one of those named.

    A tensor that two modules hold has two places. A module that stands in the model
    under two names has each of its places once: :func:`torch.func.functional_call`
    takes them for two, and leaves what it has put in on the model.

    Args:
        model: The model.
        tensors: Tensors by name of a parameter or buffer.

    Returns:
        Tensors by name.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> list(places(nn.Sequential(layer, layer), {"0.weight": torch.ones(2, 2)}))
        ['0.weight']
    """
    held: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for named in (module.named_parameters, module.named_buffers):
            held.update(named(prefix, recurse=False, remove_duplicate=False))
    named_alike = {id(held[n]): x for n, x in tensors.items() if n in held}
    found = {n: named_alike[id(x)] for n, x in held.items() if id(x) in named_alike}
    return {**{n: x for n, x in tensors.items() if n not in held}, **found}


def call_with(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call ``model`` with ``tensors`` in the place of its own, and give those back.

    Args:
        model: The model.
        tensors: Tensors by name of a parameter or buffer; the rest stay.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        What the model returns.
    """
    return torch.func.functional_call(
        model, places(model, tensors), args, dict(kwargs), tie_weights=False
    )


@contextlib.contextmanager
def substituted(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put ``tensors`` in the place of a model's own inside the context.

    For what runs forward outside of a call: a checkpointed block in a backward pass.

    Args:
        model: The model.
        tensors: Tensors by name of a parameter or buffer; the rest stay.

    Yields:
        Nothing.
    """
    kept: list[tuple[dict[str, Any], str, Tensor | None]] = []
    try:
        for name, x in places(model, tensors).items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            held: dict[str, Any] = (
                module._parameters if leaf in module._parameters else module._buffers
            )
            kept.append((held, leaf, held[leaf]))
            held[leaf] = x
        yield
    finally:
        for held, leaf, own in reversed(kept):
            held[leaf] = own
