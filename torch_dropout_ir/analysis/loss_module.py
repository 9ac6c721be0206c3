"""The loss module of a script: from the outputs of its model to one number."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from torch_dropout_ir.analysis.followed_loss import At, leading_to
from torch_dropout_ir.analysis.loss_calls import LossCalls


class LossModule:
    """Looks for the module that is called with outputs and targets: it is the loss.

    One that reads more of the outputs than it is called with (it has kept a part of
    them, or a closure has) is no function of these two; its calls are followed instead.
    """

    def __init__(self, outputs: Any, calls: LossCalls) -> None:
        self._outputs = outputs
        self._calls = calls
        self._begun: dict[int, int] = {}  # calls listed before, by the module
        self._seen: tuple[nn.Module, Any, At | None] | None = None

    def look(self) -> Callable[[], None]:
        """Look at the calls of all modules; return what ends that."""
        stack = contextlib.ExitStack()
        stack.callback(register_module_forward_pre_hook(_weakly(self._begin)).remove)
        stack.callback(register_module_forward_hook(_weakly(self._end)).remove)
        return stack.close

    def loss(self, followed: bool) -> tuple[nn.Module, Any] | None:
        """Return a copy of the module, and its targets.

        None where there is no such module, the script has trained on another number
        (while calls ``followed`` tell of a loss as well), it may have changed in the
        call, or it holds what cannot be copied, as a tensor with its graph.
        """
        if self._seen is None:
            return None
        module, targets, at = self._seen
        # Buffers of a script's own may have moved in the call; torch's are weights.
        still = isinstance(module, nn.modules.loss._Loss) or not [*module.buffers()]
        own = still and at == self._calls.trained
        if followed and at is not None and not own:
            return None
        try:
            return copy.deepcopy(module), targets  # its buffers are the script's
        except Exception:
            return None

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._seen is not None or len(args) != 2:
            return  # one that takes more is followed as a function is
        same = args[0] is self._outputs or self._calls.returned(args[0])
        if same and not self._calls.lost(args[0]):
            self._begun[id(module)] = len(self._calls.steps)

    def _end(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        before = self._begun.pop(id(module), None)
        if before is None or self._seen is not None or self._calls.lost(args[0]):
            return
        number = isinstance(result, Tensor) and result.numel() == 1
        if not number or not result.requires_grad:
            return
        at = self._calls.at(result)
        if at is None or all(k >= before for k in leading_to(at, self._calls.steps)):
            self._seen = module, args[1], at
            self._calls.of_module = weakref.ref(result)


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that calls a bound method as long as its object lives."""
    weak = weakref.WeakMethod(method)

    def hook(*call: Any) -> None:
        if (living := weak()) is not None:
            living(*call)

    return hook
