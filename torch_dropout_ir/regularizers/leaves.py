"""The tensors in what a model returned, and how they are put back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

PutBack = Callable[[list[Any]], Any]


def flatten(outputs: Any) -> tuple[list[Any], PutBack]:
    """Return the leaves of what a model returned, and the function that puts them back.

    A dataclass that torch does not know is taken by its fields, any other object with
    tensors in it (a ``torch.distributions.Distribution``) by its attributes.
    """
    return _flattened(outputs, ())


def _flattened(outputs: Any, around: tuple[int, ...]) -> tuple[list[Any], PutBack]:
    """Flatten what is inside of objects of these identities."""
    found, structure = _pytree.tree_flatten(outputs)
    opened = [_opened(x, around) for x in found]
    leaves = [y for inner, _ in opened for y in inner]

    def rebuild(filled: list[Any]) -> Any:
        rest, parts = iter(filled), []
        for inner, put_back in opened:
            parts.append(put_back([next(rest) for _ in inner]))
        return _pytree.tree_unflatten(parts, structure)

    return leaves, rebuild


def _opened(x: Any, around: tuple[int, ...]) -> tuple[list[Any], PutBack]:
    """Return the leaves of an object, or itself where no tensor is in it."""
    closed = isinstance(x, (Tensor, nn.Module, type)) or not hasattr(x, "__dict__")
    if closed or id(x) in around:
        return [x], lambda filled: filled[0]
    by_fields = dataclasses.is_dataclass(x)
    own = vars(x)
    if by_fields:
        names = [f.name for f in dataclasses.fields(x) if f.init]
        own = {name: getattr(x, name) for name in names}
    leaves, put_back = _flattened(dict(own), (*around, id(x)))
    if not any(isinstance(y, Tensor) for y in leaves):
        return [x], lambda filled: filled[0]

    def rebuild(filled: list[Any]) -> Any:
        if by_fields:
            return dataclasses.replace(x, **put_back(filled))
        new = copy.copy(x)
        vars(new).update(put_back(filled))
        return new

    return leaves, rebuild
