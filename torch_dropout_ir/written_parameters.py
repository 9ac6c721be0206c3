"""Floor 1: parameters stay as they are while we measure, whoever writes on them.

Semantics:

* Key encoders that follow by momentum, annealed temperatures and constraints are kept
  in parameters. Every pass of ours begins with them as they were before the first.
* Which they are is seen as a pass writes: a copy is made of what is about to change,
  and of nothing else. It is not seen of scripted code and of what NumPy writes.
* Layers of torch as they are write on no parameter, embeddings with ``max_norm`` apart,
  and are not looked at.
* One thread measures at a time. Where another one steps an optimizer meanwhile, there
  is no model that the numbers would be of.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from torch_dropout_ir.hooks import after_call, before_call
from torch_dropout_ir.module_calls import innermost
from torch_dropout_ir.sites import uncompiled
from torch_dropout_ir.survey import Survey
from torch_dropout_ir.tracing import mapped, unasked
from torch_dropout_ir.turns import in_turn

_ASSIGN: Final = ("__set__", "__setitem__")
_EMBED: Final = ("embedding", "embedding_bag")


class _Kept(dict[int, tuple[Tensor, Tensor, Tensor]]):
    """Parameters as they were, by identity: tensors, and copies of the values."""

    def add(self, x: Tensor) -> None:
        if id(x) not in self:
            self[id(x)] = x, x.data, x.detach().clone()

    def now(self) -> _Kept:
        found = _Kept()
        for x, _, _ in self.values():
            found.add(x)
        return found

    @torch.no_grad()
    def give_back(self) -> None:
        for x, data, was in self.values():
            x.data = data
            data.copy_(was)


class _Writes(TorchFunctionMode):
    """Calls ``keep`` with each parameter that a call is about to write on."""

    def __init__(self, model: nn.Module, keep: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._model, self._keep = model, keep

    @functools.cached_property
    def _in_memory(self) -> dict[int, list[Tensor]]:
        """The parameters that have been made, by where in memory they begin."""
        found: dict[int, list[Tensor]] = {}
        for x in filter(is_plain, self._model.parameters()):
            found.setdefault(x.untyped_storage().data_ptr(), []).append(x)
        return found

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        self.see(getattr(func, "__name__", ""), args, named)
        return func(*args, **named)

    def see(self, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if given := written_by(name, args, named):
            with unasked():
                self._look(given)

    def begin(self) -> Callable[[], None]:
        """See calls from now on, by a mode that is there if it may; return the end."""
        mode = innermost()
        if mode is None:
            self.__enter__()
            return functools.partial(self.__exit__, None, None, None)
        return mode.look_on(self.see)

    def _look(self, given: list[Tensor]) -> None:
        for x in given:
            if not mapped(x) and is_plain(x):
                place = x.untyped_storage().data_ptr()
                for written in self._in_memory.get(place, ()):
                    self._keep(written)


def written_by(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that a call is given, if it writes on one of them."""
    if name in _EMBED:
        norm = named.get("max_norm", (*args, None, None, None, None)[3])
        writes = norm is not None
    else:
        writes = _by_name(name) or "out" in named or bool(named.get("inplace"))
    given = tree_leaves((args, named)) if writes else ()
    return [x for x in given if isinstance(x, Tensor)]


@functools.lru_cache
def _by_name(name: str) -> bool:
    """Whether a function of a name writes on what it is given."""
    if name.startswith("__"):
        return name in _ASSIGN or name.startswith("__i")
    return name.endswith("_")


def is_plain(x: Tensor) -> bool:
    """Whether the values of a parameter are in memory of its own, one by one."""
    return not is_lazy(x) and type(x.data) is Tensor and not x.is_sparse


def unwritten(
    model: nn.Module,
    known: Iterable[Tensor] | None = None,
    stays: Literal["nothing", "first", "last"] = "nothing",
    survey: Survey | None = None,
) -> contextlib.AbstractContextManager[Any]:
    """Return the context of passes that begin with the parameters as they were.

    They are given back at the end. No other thread measures inside. ``known`` are those
    that passes write on: it is not asked whether one writes. ``stays`` tells which pass
    is one of training, whose writing stays.
    """
    looks = known is None and (survey or Survey.of(model)).may_write
    others = known is None and threading.active_count() > 1
    if not (looks or known or others):
        return in_turn()  # as most
    return _unwritten(uncompiled(model), known or (), looks, stays, others)


@contextlib.contextmanager
def _unwritten(
    model: nn.Module,
    known: Iterable[Tensor],
    looks: bool,
    stays: Literal["nothing", "first", "last"],
    others: bool,
) -> Iterator[None]:
    kept = _Kept()
    with in_turn():
        for x in known:
            kept.add(x)
        before = _versions(model) if others else {}
        acts = looks or bool(kept)
        over = _given_back(model, kept, looks, stays) if acts else kept.give_back
        try:
            yield
        except RuntimeError:  # of autograd, that says less
            _check_still(model, before, kept)
            raise
        else:
            _check_still(model, before, kept)
        finally:
            over()


def _versions(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Return plain parameters, and how often they have been written on, by name."""
    named = ((n, x) for n, x in model.named_parameters() if is_plain(x))
    return {n: (x, x._version) for n, x in named if not x.is_inference()}


def _check_still(
    model: nn.Module, before: dict[str, tuple[Tensor, int]], kept: _Kept
) -> None:
    """Refuse what was measured while another thread trained."""
    for name, (x, version) in before.items():
        if x._version != version and id(x) not in kept:
            raise RuntimeError(
                f"expected the parameters of {type(model).__name__} to stay as they "
                f"are while it is measured, got {name!r} written on by another thread: "
                "the numbers would be of no model. Measure between steps, or a copy "
                "(`copy.deepcopy`)."
            )


def _given_back(
    model: nn.Module,
    kept: _Kept,
    looks: bool,
    stays: Literal["nothing", "first", "last"],
) -> Callable[[], None]:
    """Begin each pass with the parameters as they were; return what ends that."""
    after: list[_Kept] = []
    running: list[Callable[[], None]] = []
    own = threading.get_ident()

    def begin(*_: Any) -> None:
        if threading.get_ident() != own:
            return
        if kept:
            kept.give_back()
        if looks:
            running.append(_Writes(model, kept.add).begin())

    def end(*_: Any) -> None:
        if threading.get_ident() != own:
            return
        if running:
            running.pop()()
        if stays == "last" or (stays == "first" and not after):
            after[:] = [kept.now()]

    hooks = before_call(model, begin), after_call(model, end, always=True)

    def over() -> None:
        while running:  # it was broken off
            end()
        for remove in hooks:
            remove()
        for values in filter(None, (kept, *after)):
            values.give_back()

    return over
