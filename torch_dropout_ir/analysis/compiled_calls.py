"""Calls of compiled models from outside: compiled in place, or in a wrapper."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

_CALL = "_compiled_call_impl"


def compiled_in_place(model: nn.Module) -> bool:
    """Whether the model's own call is compiled: its hooks are part of the graph."""
    return getattr(model, _CALL, None) is not None


def compiled(model: nn.Module) -> nn.Module | None:
    """Return what is called in a model's place, compiled; None where nothing is.

    That is the model itself, or what ``torch.compile(model)`` has made of it, wherever
    that may be: all objects are looked through, some ten milliseconds' work. Of several
    it is the latest.
    """
    if compiled_in_place(model):
        return model
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    kind = getattr(compiler, "OptimizedModule", None)
    # `isinstance` would ask objects that only pretend to have a class.
    seen = (x for age in (2, 1, 0) for x in gc.get_objects(age))  # the oldest first
    made = [x for x in seen if type(x) is kind] if kind else []
    inside = [x._orig_mod for x in made]
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inside = [x.module if isinstance(x, parallel) else x for x in inside]
    found = [x for x, own in zip(made, inside, strict=True) if own is model]
    return found[-1] if found else None


class CompiledCall:
    """Stands in the place of a compiled call, and tells before and after each.

    ``before`` is called with the model, arguments and those by name; ``after`` with
    model, arguments and outputs, None where the call has failed. ``owner`` has to live
    as long as the model does. Copies and pickles of the model are not compiled, and
    have none.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[..., None],
        after: Callable[..., None],
        owner: object,
    ) -> None:
        self._model = model
        self._call: Callable[..., Any] = getattr(model, _CALL)
        self._before, self._after = before, after
        self._owner = owner
        setattr(model, _CALL, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        self._before(self._model, args, kwargs)
        outputs = None
        try:
            outputs = self._call(*args, **kwargs)
        finally:
            self._after(self._model, args, outputs)
        return outputs

    def leave(self) -> None:
        """Put the compiled call back, unless the script has compiled anew."""
        if getattr(self._model, _CALL, None) is self:
            setattr(self._model, _CALL, self._call)
