"""Floor 1: a model with other tensors in the place of its own, which are given back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.gradient_factors import address
from torch_dropout_ir.leaves import numbers
from torch_dropout_ir.sites import named_modules

_BATCH_NORM: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def places(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` by every place of a model that holds one of those named.

    A tensor that two modules hold has two places. A module that stands in the model
    under two names has each of its places once: :func:`torch.func.functional_call`
    takes them for two, and leaves what it has put in on the model.

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
    """Return what ``model`` makes with ``tensors`` in the place of its own, by name."""
    return torch.func.functional_call(
        model, places(model, tensors), args, dict(kwargs), tie_weights=False
    )


@contextlib.contextmanager
def copied_buffers(
    named: Iterable[tuple[str, nn.Module]], alone: bool = False
) -> Iterator[None]:
    """Put copies in the place of the buffers of some modules inside the context.

    Where torch's layers are ``alone``, batch normalization in training mode keeps its
    own, which it does not read, and does not move them.
    """
    held: list[tuple[dict[str, Any], str, Any]] = []
    for _, m in named:
        if not m._buffers:
            continue
        if alone and m.training and type(m) in _BATCH_NORM:
            held.append((vars(m), "track_running_stats", m.track_running_stats))
        else:
            held += [(m._buffers, k, x) for k, x in m._buffers.items() if x is not None]
    copies = {id(x): x.clone() for _, _, x in held if isinstance(x, Tensor)}
    try:
        for place, name, x in held:
            place[name] = copies.get(id(x), False)
        yield
    finally:
        for place, name, x in held:
            place[name] = x


class ConstantMatrices(contextlib.AbstractContextManager[Any]):
    """The matrices of linear layers, which may be constant inside the context.

    What multiplies one is held for the derivative in it alone. In a model of torch's
    layers alone constants take the place of parameters. Code of others, which may keep,
    compare or ask one, sees its own: there a function is given the constant.

    Attributes:
        sizes: Bytes of each that is constant, by its place in memory.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Module]]) -> None:
        self.sizes: dict[int, int] = {}
        self._named = named
        self._may = True
        self._on = False
        self._held: list[tuple[dict[str, Any], Tensor]] = []

    def begin(self) -> None:
        """Take them for constants from now on."""
        self._on = self._may
        for _, m in self._named if self._may else ():
            x: Any = m._parameters.get("weight")
            if type(m) is nn.Linear and type(x) is nn.Parameter and x.requires_grad:
                self._held.append((m._parameters, x))
                m._parameters["weight"] = x.detach()  # type: ignore[assignment]
                self.sizes[address(x)] = x.nbytes

    def given(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what a product, linear layer or attention is given for ``args``."""
        h = args[0] if args and self._on else None
        if type(h) is not Tensor or not h.requires_grad:
            return args
        return h, *[self._constant(x) for x in args[1:]]

    def _constant(self, x: Any) -> Any:
        """Return a matrix that is a parameter, or part of one, as a constant."""
        if not isinstance(x, Tensor) or x.ndim != 2:
            return x
        own = x if x._base is None else x._base
        if type(own) is not nn.Parameter or not own.requires_grad:
            return x
        self.sizes[address(own)] = own.nbytes
        return x.detach()

    def end(self) -> bool:
        """Take none for constant any more; return whether one was."""
        self._on = self._may = False
        for place, x in self._held:
            place["weight"] = x
        self._held.clear()
        return bool(self.sizes)

    def __exit__(self, *_: object) -> None:
        self.end()


@contextlib.contextmanager
def substituted(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put ``tensors`` in the place of a model's own, by name, inside the context.

    For what runs forward outside of a call: a checkpointed block in a backward pass.
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


def keep_buffers(model: nn.Module) -> Callable[[], None]:
    """Return what gives back buffers that something moves, or replaces, from now on."""
    # Batch normalization writes without counting a version: values are compared.
    kept = _copies(model)

    def back() -> None:
        for place, name, x, value in kept:
            place[name] = x
            rewrite(x, value)

    return back


@torch.no_grad()
def rewrite(x: Tensor, value: Tensor) -> None:
    """Give a tensor back the numbers that it had, if it has others."""
    x, value = numbers(x), numbers(value)
    if not torch.equal(x, value):
        x.copy_(value)


def buffers_moved(model: nn.Module) -> Callable[[], bool]:
    """Return what tells whether something has moved buffers from now on."""
    kept = _copies(model)
    return lambda: any(
        place.get(name) is not x or not torch.equal(numbers(x.detach()), value)
        for place, name, x, value in kept
    )


def _copies(model: nn.Module) -> list[tuple[dict[str, Any], str, Tensor, Tensor]]:
    """Return the place of each buffer, the buffer, and a copy of it."""
    return [
        (m._buffers, name, x, numbers(x.detach()).clone())
        for _, m in named_modules(model)
        for name, x in m._buffers.items()
        if x is not None
    ]


@contextlib.contextmanager
def unmoved_gradients(model: nn.Module) -> Iterator[None]:
    """Keep gradients from a model whose own pass goes back, or sets them to zero."""
    own = [(x, x.grad) for x in model.parameters()]
    # Others than these torch does not take back.
    held = [(x, g) for x, g in own if g is None or g.dtype == x.dtype]
    try:
        for x, _ in held:
            x.grad = None
        yield
    finally:
        for x, g in held:
            x.grad = g


@contextlib.contextmanager
def unmoved_buffers(model: nn.Module) -> Iterator[None]:
    """Give back the values of buffers that something inside the context has moved."""
    back = keep_buffers(model)
    try:
        yield
    finally:
        back()
