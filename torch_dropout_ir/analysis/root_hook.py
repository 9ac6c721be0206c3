"""The hook that stays on the module which the script calls.

Semantics:

* Copies carry an idle hook: no value can have itself left out of a dictionary's copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

import torch

from torch_dropout_ir.analysis.delivery import warn
from torch_dropout_ir.tracing import recorded
from torch_dropout_ir.turns import in_turn

_NOT_SCRIPTED: Final = (
    "a model with an analysis cannot be scripted: `analysis.detach()` first, or take "
    "`torch.export.export` or `torch.jit.trace`"
)


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
