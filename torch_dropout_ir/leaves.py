"""The tensors in what a model returned, and how they are put back."""

from __future__ import annotations

import contextlib
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

PutBack = Callable[[list[Any]], Any]
_SLOT = types.MemberDescriptorType


class _Key(NamedTuple):
    """Where a dictionary of a class of its own holds something."""

    key: Any


class _Opened(NamedTuple):
    """An object, the names, slots and keys of what it holds, and that."""

    owner: Any
    places: list[Any]
    found: list[Any]
    structure: _pytree.TreeSpec

    def filled(self, new: Any, values: Any) -> None:
        """Give a new object of the kind attributes in the place of the owner's."""
        for place, value in zip(self.places, values, strict=True):
            if isinstance(place, _SLOT):
                place.__set__(new, value)
            elif isinstance(place, _Key):
                _base(type(new)).__setitem__(new, place.key, value)
            else:
                _dictionary(new)[place] = value


def flatten(outputs: Any) -> tuple[list[Any], PutBack]:
    """Return the leaves of what a model returned, and the function that puts them back.

    What torch does not know, a dataclass or any other object with tensors in it (a
    ``torch.distributions.Distribution``), is taken by its attributes, and a dictionary
    of a class of its own by its keys too. Objects may hold each other. None of their
    own code runs: what is put back is in new ones.
    """
    opened = _opened(outputs)
    live = _with_tensors(opened)
    parts = [x for i, x in enumerate(opened) if not i or id(x.owner) in live]
    leaves = [y for x in parts for y in x.found if id(y) not in live]

    def rebuild(filled: list[Any]) -> Any:
        kinds = {id(x.owner): type(x.owner) for x in parts[1:]}
        new = {number: _base(kind).__new__(kind) for number, kind in kinds.items()}
        rest, trees = iter(filled), []
        for x in parts:
            inner = [new[id(y)] if id(y) in new else next(rest) for y in x.found]
            trees.append(_pytree.tree_unflatten(inner, x.structure))
        for x, tree in zip(parts[1:], trees[1:], strict=True):
            x.filled(new[id(x.owner)], tree)
        return trees[0]

    return leaves, rebuild


def numbers(x: Tensor) -> Tensor:
    """Return what a tensor's numbers are in: of a sparse one, those that it has."""
    if x.layout is torch.strided:
        return x
    return x._values() if x.is_sparse else x.values()


def without_graph(outputs: Any) -> Any:
    """Return what a model returned with its tensors cut off from their graph."""
    leaves, rebuild = flatten(outputs)
    return rebuild([x.detach() if isinstance(x, Tensor) else x for x in leaves])


def _opened(outputs: Any) -> list[_Opened]:
    """Return the outputs, as what nobody owns, and each object in them."""
    opened = [_Opened(None, [], *_pytree.tree_flatten(outputs))]
    seen = set()
    for part in opened:  # it grows
        for x in part.found:
            if id(x) not in seen and not _closed(x):
                seen.add(id(x))
                own = _attributes(x)
                inside = _pytree.tree_flatten(list(own.values()))
                opened.append(_Opened(x, list(own), *inside))
    return opened


def _closed(x: Any) -> bool:
    """Whether an object is taken as it is: no new one could stand for it."""
    kind = type(x)
    if isinstance(x, (Tensor, nn.Module, type)) or kind.__module__ == "builtins":
        return True
    if hasattr(kind, "__del__"):  # of something that a new one would not hold
        return True
    try:
        _base(kind).__new__(kind)
    except TypeError:  # it is another container or made in C
        return True
    return False


def _base(kind: type) -> Any:
    """Return the class that makes objects of a kind, and sets their items."""
    return next(x for x in (OrderedDict, dict, object) if issubclass(kind, x))


def _attributes(x: Any) -> dict[Any, Any]:
    """Return what an object holds by name, or by slot or key where it is in one."""
    own = dict(_dictionary(x)) if type(x).__dictoffset__ else {}
    if isinstance(x, dict):
        own.update((_Key(key), dict.__getitem__(x, key)) for key in dict.__iter__(x))
    for kind in type(x).__mro__:
        for slot in vars(kind).values():
            if isinstance(slot, _SLOT):
                with contextlib.suppress(AttributeError):  # it holds nothing
                    own[slot] = slot.__get__(x)
    return own


def _dictionary(x: Any) -> dict[Any, Any]:
    own: dict[Any, Any] = object.__getattribute__(x, "__dict__")
    return own


def _with_tensors(opened: list[_Opened]) -> set[int]:
    """Return the identities of the objects in which there is a tensor, however deep."""
    holders: dict[int, list[Any]] = {}
    for part in opened[1:]:
        for x in part.found:
            holders.setdefault(id(x), []).append(part.owner)
    left = [x for part in opened for x in part.found if isinstance(x, Tensor)]
    live: set[int] = set()
    while left:
        for owner in holders.get(id(left.pop()), ()):
            if id(owner) not in live:
                live.add(id(owner))
                left.append(owner)
    return live
