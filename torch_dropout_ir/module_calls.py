"""Floor 1: which module of a model makes a call of one of torch's functions."""

from __future__ import annotations

import contextlib
import functools
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_dropout_ir.hooks import after_call, before_call, give_back
from torch_dropout_ir.sites import Site
from torch_dropout_ir.tracing import checkpointed

if TYPE_CHECKING:
    from typing_extensions import Self

# Modes of such models are on no stack: to look on would cost more than the pass.
_ABSENT: Final = threading.local()
_BACKWARD: Final = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
# Private names; a torch without them has no innermost mode.
_COUNT: Final = getattr(torch._C, "_len_torch_function_stack", None)
_AT: Final = getattr(torch._C, "_get_function_stack_at", None)
Watch: TypeAlias = Callable[[str, tuple[Any, ...], dict[str, Any]], object]
LOOKED_INTO: Final = frozenset(("grad", "backward", "multi_head_attention_forward"))


class ModuleCalls(TorchFunctionMode):
    """A mode that knows which module of a model makes a call.

    Blocks of the model that are compiled run uncompiled in it.

    Attributes:
        again: Whether something ran that may be computed again in a backward pass.
        absent: Whether it is on no stack, and sees no call.
        differentiates: Whether a module took derivatives in its forward pass.
        watch: Is told each call before it is made: name, arguments, keywords.
    """

    trains = False
    watch: Watch | None = None

    def __init__(self, named: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.absent = not named
        scripted = torch.jit.ScriptModule  # takes no hooks
        self._modules = [m for _, m in named if not isinstance(m, scripted)]
        self._names = {id(m): name for name, m in named}
        self._running: list[tuple[nn.Module, dict[str, int]]] = []
        self._undo: list[Callable[[], object]] = []
        self._on = False
        self.again = False
        self.differentiates = False

    def __enter__(self) -> Self:
        try:
            self._enter()
        except KeyboardInterrupt:
            self._on = innermost() is self
            self.__exit__()
            raise
        return self

    def _enter(self) -> None:
        if self.absent:
            _ABSENT.modes = (*_absent(), self)
            return
        for module in self._modules:  # around hooks of the user's, which may call too
            before_call(module, self._begin, self._undo)
            after_call(module, self._end, self._undo, first=True, always=True)
        if _any_compiled(self._modules):  # graphs have no place for masks
            stack = contextlib.ExitStack()
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*when there are global hooks")
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._undo.append(stack.close)
        super().__enter__()
        self._on = True

    def __exit__(self, *error: Any) -> None:
        if self.absent:
            _ABSENT.modes = tuple([x for x in _absent() if x is not self])
            return
        self.rest()
        give_back(self._undo)

    def rest(self) -> None:
        """Hand nothing over until the context ends; it is the innermost mode now.

        Every property that is read of a tensor is a call, so that looking on costs more
        than small passes do.
        """
        if self._on:
            self._on = False
            super().__exit__(None, None, None)

    def look_on(self, watch: Watch) -> Callable[[], None]:
        """Tell one more of each call before it is made; return what ends that."""
        others = self.watch

        def both(*call: Any) -> None:
            assert others is not None
            others(*call)
            watch(*call)

        self.watch = watch if others is None else both
        return functools.partial(setattr, self, "watch", others)

    def _begin(self, module: nn.Module, _: Any) -> None:
        self._running.append((module, {}))
        self._runs_again()

    def _runs_again(self) -> bool:
        """Whether a block is checkpointed; the older kind runs without autograd."""
        inside = checkpointed()
        self.again = self.again or inside or not torch.is_grad_enabled()
        return inside

    def _end(self, module: nn.Module, _: Any, __: Any) -> None:
        if self._running and self._running[-1][0] is module:
            self._running.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _BACKWARD:
            self.differentiates = self.differentiates or bool(self._running)
            # What is computed again in it is computed with the mode on.
            with on_again(self):
                return _inside(func, self)(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if self.watch is not None:
            self.watch(name, args, kwargs or {})
        if name == "multi_head_attention_forward":
            return _inside(func, self)(*args, **(kwargs or {}))
        return self._call(name, func, args, kwargs or {})

    def _call(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Make a call of one of torch's functions; subclasses put theirs in place."""
        return func(*args, **kwargs)

    def _site(
        self, function: str, p: float, kind: type[nn.Module] | None = None
    ) -> Site:
        if not self._running:
            return Site(f":{function}#0", nn.Identity(), kind, p)
        module, calls = self._running[-1]
        number = calls.get(function, 0)
        calls[function] = number + 1
        return Site(f"{self._names[id(module)]}:{function}#{number}", module, kind, p)


def _any_compiled(modules: Sequence[nn.Module]) -> bool:
    """Whether modules are compiled by themselves."""
    if torch.compiler.is_compiling():
        return False
    kinds = ("_orig_mod", "_compiled_call_impl")
    return any([vars(m).get(kinds[1]) or kinds[0] in m._modules for m in modules])


@contextlib.contextmanager
def on_again(mode: TorchFunctionMode) -> Iterator[None]:
    """Switch a mode on inside a call that it has been handed."""
    TorchFunctionMode.__enter__(mode)
    try:
        yield
    finally:
        TorchFunctionMode.__exit__(mode, None, None, None)


def measuring() -> bool:
    """Whether a pass is a measurement: it is none of the script's."""
    return any(isinstance(mode, ModuleCalls) and not mode.trains for mode in _modes())


def innermost() -> ModuleCalls | None:
    """Return the mode that sees a call first, if it is one of these."""
    count = _COUNT() if _COUNT and _AT else 0
    mode = _AT(count - 1) if count and _AT else None
    return mode if isinstance(mode, ModuleCalls) else None


def replaced() -> bool:
    """Whether something stands in the place of dropout's noise."""
    return any(isinstance(mode, ModuleCalls) for mode in _modes())


def _modes() -> list[TorchFunctionMode]:
    stack = getattr(torch.overrides, "_get_current_function_mode_stack", list)
    return [*_absent(), *stack()]


def _absent() -> tuple[TorchFunctionMode, ...]:
    return getattr(_ABSENT, "modes", ())


def _inside(func: Any, mode: TorchFunctionMode) -> Callable[..., Any]:
    """Return a Python function of torch's whose own calls of dropout reach the mode.

    Within a mode the mode is off, and with it on again the function would come back.
    """
    if not isinstance(func, types.FunctionType):
        return func

    def reaching(inner: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: mode.__torch_function__(inner, (), args, kwargs)

    own: dict[str, Any] = {}
    if func not in _BACKWARD:
        own["dropout"] = reaching(F.dropout)
        own["scaled_dot_product_attention"] = reaching(F.scaled_dot_product_attention)
    return unchecked(func, own)


def unchecked(func: Any, own: dict[str, Any]) -> Callable[..., Any]:
    """Return a Python function of torch's that asks no mode whether to run.

    ``own`` is what some of its global names mean in it instead.
    """
    own = {
        "has_torch_function": lambda _: False,
        "has_torch_function_unary": lambda _: False,
        **own,
    }
    found = types.FunctionType(
        func.__code__, {**func.__globals__, **own}, func.__name__, func.__defaults__
    )
    found.__kwdefaults__ = func.__kwdefaults__
    return found
