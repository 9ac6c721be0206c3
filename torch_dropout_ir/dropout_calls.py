"""Floor 1: dropout that is called as a function, and what stands in its place.

Semantics:

* While the context is active, every call of a dropout function of torch's (and ours)
  by a module of the model is handed over, with the place it was made at: the module
  whose forward pass runs, the function, and the number of the call in that pass.
* Attention with dropout is computed in full, so that what acts on its weights is a site
  like any other.
* Noise that is not multiplicative (alpha dropout, randomized leaky ReLU) and dropout
  inside recurrent kernels is switched off, as it is in evaluation mode.
* The context is that of one thread: a block under checkpointing that is computed again
  on a device's own thread is not in it, and such calls are refused.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from torch_dropout_ir.sites import Site
from torch_dropout_ir.tracing import checkpointed

if TYPE_CHECKING:
    from typing_extensions import Self

SiteFunction = Callable[[Site, Tensor], Tensor]

KINDS: Final[dict[str, type[nn.Module]]] = {
    "dropout": nn.Dropout,
    "dropout_": nn.Dropout,
    "dropout1d": nn.Dropout1d,
    "dropout2d": nn.Dropout2d,
    "dropout3d": nn.Dropout3d,
    "feature_dropout": nn.Dropout2d,
    "feature_dropout_": nn.Dropout2d,
}
_OTHER_NOISE: Final = (
    "alpha_dropout",
    "alpha_dropout_",
    "feature_alpha_dropout",
    "feature_alpha_dropout_",
)
RECURRENT: Final = ("lstm", "gru", "rnn_tanh", "rnn_relu")


class ModuleCalls(TorchFunctionMode):
    """A mode that knows which module of a model makes a call.

    Args:
        model: The model whose modules make the calls.

    Attributes:
        trains: Whether the pass is a step of training, not a measurement.
    """

    trains = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {id(m): name for name, m in model.named_modules()}
        self._running: list[tuple[nn.Module, dict[str, int]]] = []
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> Self:
        before = register_module_forward_pre_hook(self._begin)
        self._hooks.callback(before.remove)
        after = register_module_forward_hook(self._end, always_call=True)
        self._hooks.callback(after.remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def _begin(self, module: nn.Module, _: Any) -> None:
        if id(module) in self._names:
            self._running.append((module, {}))

    def _end(self, module: nn.Module, _: Any, __: Any) -> None:
        if self._running and self._running[-1][0] is module:
            self._running.pop()

    def _site(
        self, function: str, p: float, kind: type[nn.Module] | None = None
    ) -> Site:
        """Return the place of the call that is being made."""
        if not self._running:
            return Site(f":{function}#0", nn.Identity(), kind, p)
        module, calls = self._running[-1]
        number = calls.get(function, 0)
        calls[function] = number + 1
        return Site(f"{self._names[id(module)]}:{function}#{number}", module, kind, p)


class DropoutCalls(ModuleCalls):
    """Hands calls of dropout functions over to ``apply(site, h)``.

    Args:
        model: The model whose modules make the calls.
        apply: Called with the site and what would be dropped; returns what passes on.
        trains: Whether the pass is a step of training, not a measurement.
    """

    def __init__(
        self, model: nn.Module, apply: SiteFunction, trains: bool = False
    ) -> None:
        super().__init__(model)
        self._apply = apply
        self.trains = trains

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in KINDS:
            return self._dropout(name, *args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self._attention(*args, **kwargs)
        if name == "multi_head_attention_forward":
            return inside(func, self)(*args, **kwargs)
        if name in _OTHER_NOISE:
            return args[0] if args else kwargs["input"]
        if name in ("rrelu", "rrelu_"):
            return F.leaky_relu(*_mean_slope(*args, **kwargs))
        if name in RECURRENT:
            args = _without_dropout(args)
        return func(*args, **kwargs)

    def _dropout(
        self,
        name: str,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        **others: Any,
    ) -> Tensor:
        training = others.get("train", training)
        if not training or float(p) <= 0:
            return input
        output = self._apply(self._site(name.rstrip("_"), float(p), KINDS[name]), input)
        return input.copy_(output) if inplace or name.endswith("_") else output

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        name = "scaled_dot_product_attention"
        if dropout_p <= 0:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, 0.0, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key = key.repeat_interleave(groups, -3)
            value = value.repeat_interleave(groups, -3)
        weights = attention_weights(query, key, attn_mask, is_causal, scale)
        return self._apply(self._site(name, dropout_p, nn.Dropout), weights) @ value

    def _site(
        self, function: str, p: float, kind: type[nn.Module] | None = None
    ) -> Site:
        if checkpointed() and torch.cuda.is_initialized():
            raise RuntimeError(
                f"expected {function} outside of activation checkpointing: on a GPU "
                "its block is computed again out of our sight. Switch checkpointing "
                "off for the measurement."
            )
        return super()._site(function, p, kind)


def measuring() -> bool:
    """Whether a pass is a measurement: it is none of the script's."""
    return any(isinstance(mode, ModuleCalls) and not mode.trains for mode in _modes())


def replaced() -> bool:
    """Whether something stands in the place of dropout's noise."""
    return any(isinstance(mode, ModuleCalls) for mode in _modes())


def _modes() -> list[TorchFunctionMode]:
    stack = getattr(torch.overrides, "_get_current_function_mode_stack", None)
    return [] if stack is None else stack()


def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Return ``softmax(q k' scale + mask)``; 0 in rows that attend to nothing."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-2, -1) * factor
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
        mask = mask.tril()
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    else:
        scores = scores + mask
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def inside(func: Any, mode: TorchFunctionMode) -> Callable[..., Any]:
    """Return a Python function of torch's whose own calls of dropout reach the mode.

    Within a mode the mode is off, and with it on again the function would come back.
    """
    if not isinstance(func, types.FunctionType):
        return func

    def reaching(inner: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: mode.__torch_function__(inner, (), args, kwargs)

    own = {
        "dropout": reaching(F.dropout),
        "scaled_dot_product_attention": reaching(F.scaled_dot_product_attention),
        "has_torch_function": lambda _: False,
    }
    found = types.FunctionType(
        func.__code__, {**func.__globals__, **own}, func.__name__, func.__defaults__
    )
    found.__kwdefaults__ = func.__kwdefaults__
    return found


def _mean_slope(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, *_: Any, **__: Any
) -> tuple[Tensor, float]:
    """Return what randomized leaky ReLU is in evaluation mode."""
    return input, (lower + upper) / 2


def recurrent_dropout(args: tuple[Any, ...]) -> int:
    """Return the place of ``dropout`` in the arguments of a recurrent kernel."""
    # (x, h, weights, biases, layers, dropout, ...), one more where x is packed.
    return 6 if isinstance(args[3], (list, tuple)) else 5


def _without_dropout(args: tuple[Any, ...]) -> tuple[Any, ...]:
    place = recurrent_dropout(args)
    return (*args[:place], 0.0, *args[place + 1 :])
