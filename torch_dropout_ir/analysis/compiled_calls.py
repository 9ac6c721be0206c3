"""Calls of a model that ``model.compile()`` has compiled in place, from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_CALL = "_compiled_call_impl"


def compiled_in_place(model: nn.Module) -> bool:
    """Whether the model's own call is compiled: its hooks are part of the graph."""
    return getattr(model, _CALL, None) is not None


class CompiledCall:
    """Stands in the place of a compiled call, and tells before and after each.

    Copies and pickles of the model are not compiled, and have none.

    Args:
        model: The model, changed in place until :meth:`leave`.
        before: Called with the model, arguments and those by name.
        after: Called with these and the outputs; None where the call has failed.
        owner: What has to live as long as the model does.
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
            self._after(self._model, args, kwargs, outputs)
        return outputs

    def leave(self) -> None:
        """Put the compiled call back, unless the script has compiled anew."""
        if getattr(self._model, _CALL, None) is self:
            setattr(self._model, _CALL, self._call)
