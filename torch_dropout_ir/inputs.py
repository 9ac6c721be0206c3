"""Floor 1: the arguments of a call of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree

from torch_dropout_ir.leaves import flatten


class Inputs:
    """The arguments of one call of a model, positional ones and those by keyword."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs

    @classmethod
    def of(cls, inputs: Any) -> Inputs:
        """Read a batch's inputs in any of the forms that :func:`call` takes."""
        if type(inputs) is Tensor:  # first: to ask an abstract class takes its time
            return cls((inputs,), {})
        if isinstance(inputs, cls):
            return inputs
        if isinstance(inputs, Mapping):
            return cls((), inputs)
        if isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence):
            return cls(tuple(inputs), {})
        return cls((inputs,), {})

    def renewed(self) -> Inputs:
        """Return the same tensors in lists, mappings and objects of their own.

        On those a model may write, as ``data.x = ...`` on a graph.
        """
        given = (*self.args, *self.kwargs.values())
        if all([isinstance(x, Tensor) for x in given]):
            return self  # as most are
        named = {name: _renewed(x) for name, x in self.kwargs.items()}
        return type(self)(tuple(map(_renewed, self.args)), named)

    def cut_off(self) -> Inputs:
        """Return the same arguments, each tensor without the graph that has made it.

        That graph is gone when the script has gone back through it.
        """
        leaves, rebuild = flatten((self.args, dict(self.kwargs)))
        if not any(map(_made, leaves)):
            return self  # as most are
        return type(self)(*rebuild(list(map(_cut_off, leaves))))

    def leaves(self) -> list[Any]:
        """Return what the arguments hold, objects opened."""
        return flatten((self.args, dict(self.kwargs)))[0]

    def copied(self) -> Inputs:
        """Return the same arguments with a copy of each tensor."""
        both = self.args, dict(self.kwargs)
        return type(self)(*_pytree.tree_map_only(Tensor, Tensor.clone, both))

    def call(self, run: Callable[..., Any]) -> Any:
        """Return what ``run(args, kwargs)`` makes of the call."""
        return run(self.args, self.kwargs)

    def first_tensor(self) -> Tensor:
        """Return the first tensor; its first dimension is the batch."""
        leaves = _pytree.tree_leaves((self.args, dict(self.kwargs)))
        if not (tensors := [x for x in leaves if isinstance(x, Tensor)]):
            raise TypeError("expected a batch whose inputs hold a tensor, got none")
        return tensors[0]


class SeveralInputs(Inputs):
    """The arguments of several calls of a model, whose outputs are taken together.

    Attributes:
        args: Of each call, its positional arguments and those by name.
        kwargs: None.
    """

    @classmethod
    def of_calls(cls, calls: Iterable[Inputs]) -> SeveralInputs:
        """Take the arguments of some calls together, in their order."""
        return cls(tuple((x.args, dict(x.kwargs)) for x in calls), {})

    def call(self, run: Callable[..., Any]) -> tuple[Any, ...]:
        """Return what ``run(args, kwargs)`` makes of each call."""
        return tuple(run(args, kwargs) for args, kwargs in self.args)


def _made(x: Any) -> bool:
    return isinstance(x, Tensor) and x.grad_fn is not None


def _cut_off(x: Any) -> Any:
    return x.detach().requires_grad_() if _made(x) else x


def _renewed(x: Any) -> Any:
    if type(x) in (list, tuple):
        return type(x)(map(_renewed, x))
    if type(x) is dict:
        return {key: _renewed(value) for key, value in x.items()}
    if isinstance(x, MutableMapping):
        return copy.copy(x)
    leaves, rebuild = flatten(x)
    return rebuild(leaves)
