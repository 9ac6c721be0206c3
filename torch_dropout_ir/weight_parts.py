"""Floor 1: a pass that gives the gradients in weights away as factors."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_dropout_ir import tracing
from torch_dropout_ir.arrivals import graph_nodes
from torch_dropout_ir.gradient_factors import (
    Factors,
    Geometry,
    geometry_of,
    mapped,
    slopes,
)


class Drawn(NamedTuple):
    """Of what is made again in a pass back: what it was made of, and how.

    Activations hold what they return, or, as GELU, what they were given. What dropout
    makes of it is then made again from a bit an element, and GELU's result from that.
    """

    inputs: Tensor
    again: Callable[[Tensor], Tensor]
    version: int


class _Factored(torch.autograd.Function):
    """A layer whose gradient in the weight is given away as factors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Any,
        geometry: Geometry | None,
        give: Any,
        drawn: Drawn | None,
    ) -> Tensor:
        ctx.save_for_backward(x if drawn is None else drawn.inputs, weight)
        ctx.geometry, ctx.give = geometry, give
        ctx.drawn = drawn and drawn.again
        return mapped(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        # First: where it is looked at and let go of, nothing else is there yet.
        given = ctx.give(_factors(ctx, g, x, weight)) if needed[1] else None
        x, wanted = _rows(ctx, g, x, weight), [needed[0], False, needed[2]]
        in_x, _, in_bias = slopes(g, x, weight, ctx.geometry, wanted)
        return in_x, given, in_bias, None, None, None


def factored(node: Any) -> bool:
    """Whether a node gives its gradient in a weight away as factors."""
    return getattr(node, "_forward_cls", None) is _Factored


def _factors(ctx: Any, g: Tensor, x: Tensor, weight: Tensor) -> Factors:
    made = x if ctx.drawn is None else ctx.drawn(x)
    return Factors(g, _rows(ctx, g, made, weight), weight, ctx.geometry)


def _rows(ctx: Any, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return what a linear layer was given as rows."""
    return x if ctx.geometry else x.view(len(g), weight.shape[1])


class WeightParts(TorchFunctionMode):
    """Gives the gradients in weights away as factors, in a pass inside the context.

    Weights that a pass uses once, in a linear layer or an ungrouped convolution, are
    given so; for others, and until :meth:`settle` is called, all is as it is.
    ``receive`` is called with the number of a target and the factors of its gradient,
    and ``torch.autograd.grad`` then returns None for it; None gives nothing. Inputs of
    linear layers may be made again, once, where that holds less (``remake``); what they
    are made of is held, to see if it was written on (``watch``).

    Attributes:
        plain: Numbers of the tensors without hooks, by identity; none of them once a
            hook has been registered in the pass, or a node asked for that takes them:
            it may change what is sent back.
    """

    def __init__(
        self,
        targets: Sequence[Tensor],
        receive: Callable[[int, Factors], None] | None,
        remake: bool = False,
        watch: bool = True,
    ) -> None:
        super().__init__()
        # A hook of the user's is called with the gradient, and may change it.
        self.plain = {id(x): i for i, x in enumerate(targets) if not x._backward_hooks}
        self._numbers = self.plain if receive else {}
        self._receive = receive
        self._remake = remake
        self._watch = watch
        self._given: set[int] = set()
        self._taken: list[Drawn] = []

    def note(self, y: Tensor, h: Tensor, again: Callable[[Tensor], Tensor]) -> None:
        """Take note of what a site has made of its input, in rows, and how."""
        if self._remake and h.is_contiguous():
            self._noted(y, h, again)

    def _noted(self, y: Tensor, h: Tensor, again: Callable[[Tensor], Tensor]) -> None:
        of = self._drawn(h) or Drawn(h.detach(), lambda x: x, h._version)
        before = of.again  # without what it is made of
        new = of._replace(again=lambda x: again(before(x)))
        y._drawn = new, y._version  # type: ignore[attr-defined]

    def overwritten(self) -> bool:
        """Whether an input of a site that is held was written on in the pass."""
        taken, self._taken = self._taken, []  # what goes as derivatives come
        return any(each.inputs._version != each.version for each in taken)

    def _drawn(self, input: Tensor) -> Drawn | None:
        """Return what a tensor is made again of, if nobody has written on it."""
        drawn, version = getattr(input, "_drawn", (None, 0))
        return drawn if version == input._version else None

    def _taken_of(self, input: Tensor) -> Drawn | None:
        """Return the same for a layer's input."""
        drawn = self._drawn(input)
        if drawn is not None and self._watch:
            self._taken.append(drawn)
        return drawn

    def settle(self, value: Tensor) -> None:
        """Find the weights that are used once on the way to what is differentiated."""
        with tracing.unasked():
            last = value.grad_fn
        ends = collections.Counter(
            self._numbers.get(id(getattr(end, "variable", None)))
            for node in graph_nodes([last] if last else [])
            for end, _ in node.next_functions
        )
        self._given = {i for i, count in ends.items() if count == 1 and i is not None}

    def _giver(self, i: int) -> Callable[[Factors], Tensor | None]:
        def give(factors: Factors) -> Tensor | None:
            if self._receive is None or i not in self._given:
                return factors[:]
            self._receive(i, factors)
            return None

        return give

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in HOOKS:
            self.plain = {}
        if func in _HOLD_INPUT and self._remake:
            return self._activated(func, args, kwargs)
        own = _OWN.get(func)
        # A block that runs twice must save the same both times: torch's own then.
        if own and torch.is_grad_enabled() and not tracing.runs_twice():
            found = own(self, *args, **kwargs) if tracing.eager() else None
            if found is not None:
                return found
        return func(*args, **kwargs)

    def _activated(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        """Run a function that holds its input, of which its result is made again."""
        found: Tensor = func(*args, **kwargs)
        x, *rest = args
        if found is not x and x.is_contiguous() and torch.is_grad_enabled():
            self._noted(found, x, lambda x: func(x, *rest, **kwargs))
        return found

    def _number(self, input: Tensor, weight: Tensor) -> int | None:
        plain = all(type(x) in (Tensor, nn.Parameter) for x in (input, weight))
        same = plain and input.dtype == weight.dtype and weight.is_floating_point()
        if not same or torch.is_autocast_enabled(input.device.type):
            return None
        return self._numbers.get(id(weight))

    def _linear(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor | None:
        i = self._number(input, weight)
        if i is None or input.ndim < 2 or weight.ndim != 2:
            return None
        rows = input.flatten(0, -2)
        found: Tensor = _Factored.apply(
            rows, weight, bias, None, self._giver(i), self._taken_of(input)
        )
        return found if input.ndim == 2 else found.view(*input.shape[:-1], len(weight))

    def _convolved(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        i = self._number(input, weight)
        whole = not isinstance(padding, str) and input.ndim == weight.ndim
        if i is None or groups != 1 or not whole:
            return None
        geometry = geometry_of(input.ndim - 2, (stride, padding, dilation, 0), 1)
        return _Factored.apply(input, weight, bias, geometry, self._giver(i), None)


_OWN: Final[dict[Callable[..., Any], Callable[..., Tensor | None]]] = {
    F.linear: WeightParts._linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), WeightParts._convolved),
}
# Hooks are registered on tensors, and on nodes, as modules do their older ones.
_NODE: Final[Any] = Tensor.grad_fn.__get__  # type: ignore[union-attr]
HOOKS: Final = frozenset((Tensor.register_hook, _NODE))
# Functions of single elements that hold what they are given, not what they return.
_HOLD_INPUT: Final = frozenset((
    F.celu, F.elu, F.gelu, F.hardswish, F.leaky_relu, F.mish, F.selu, F.silu,
    F.softplus,
))  # fmt: skip
