"""The hook that stays on the module which the script calls, compiled or not.

Semantics:

* Copies carry an idle hook: no value can have itself left out of a dictionary's copy.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from torch_dropout_ir.analysis.records import warn
from torch_dropout_ir.analysis.signal_handlers import raised_by_handler
from torch_dropout_ir.tracing import recorded
from torch_dropout_ir.turns import in_turn

_NOT_SCRIPTED: Final = (
    "a model with an analysis cannot be scripted: `analysis.detach()` first, or take "
    "`torch.export.export` or `torch.jit.trace`"
)
_CALL: Final = "_compiled_call_impl"


class RootHook:
    """A hook whose copies do nothing: pickles load where this package is not.

    ``call`` is None where nothing is to be seen; ``owner`` has to live as long as the
    model does; ``missed`` is told the reason where ``call`` fails.
    """

    def __init__(
        self,
        call: Callable[..., None] | None = None,
        owner: object = None,
        missed: Callable[[str], None] | None = None,
    ) -> None:
        self.call = call
        self.owner = owner
        self.missed = missed

    def __call__(self, *args: Any) -> None:
        """Forward to the capture, if there is something to see."""
        if torch.compiler.is_dynamo_compiling():
            return  # before anything that compiled code would depend on
        if self.call is None or recorded():
            return
        try:
            with in_turn() as own:  # a pass beside a measurement waits for its end
                if own:
                    self.call(*args)
        except Exception as err:  # of arguments and results that nothing can walk
            if raised_by_handler(err):
                raise
            reason = f"a pass was not looked at ({type(err).__name__}: {err})"
            if self.missed is not None:
                self.missed(reason)
            warn(f"{reason}; training goes on without it.")

    @property
    def __name__(self) -> str:
        """None: ``torch.jit.script``, which compiles hooks, begins by asking for it."""
        raise AttributeError(_NOT_SCRIPTED)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (contextlib.nullcontext(), "__exit__")


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
