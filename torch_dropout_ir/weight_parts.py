"""Floor 1: gradients in weights as products that are made some rows at a time.

The gradient in the weight of a linear layer is a product of what went in and of the
derivative in what came out, and that of a convolution is much the same. Both are often
smaller than the weight, and norms and inner products need a few rows of the gradient at
a time: the gradient itself is not made.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_dropout_ir import tracing
from torch_dropout_ir.arrivals import graph_nodes

_ENTRIES: Final = 2**16  # of a gradient that are made together
_convolution: Final = torch.ops.aten.convolution.default
_of_convolution: Final = torch.ops.aten.convolution_backward.default
Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]


def geometry_of(
    spatial: int, sizes: Sequence[Any], groups: int, transposed: bool = False
) -> Geometry:
    """Return what aten's convolution takes behind input, weight and bias.

    Args:
        spatial: Number of dimensions beside samples and channels.
        sizes: Stride, padding, dilation and output padding, each one number or several.
        groups: Number of groups.
        transposed: Whether it is the transposed convolution.
    """
    stride, padding, dilation, more = (
        [s] * spatial if isinstance(s, int) else [*s] * (spatial // len(s))
        for s in sizes
    )
    return stride, padding, dilation, transposed, more, groups


class Factors:
    """The gradient in one weight, not made yet.

    Args:
        g: Derivative in the layer's output.
        x: The layer's input.
        weight: The weight, ``[o, ...]``; its values do not count.
        geometry: Of a convolution: stride, padding, dilation, False, zeros, groups.
    """

    def __init__(
        self, g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry | None
    ) -> None:
        self._g, self._x, self._geometry = g, x, geometry
        self._like = weight.detach()

    def __getitem__(self, part: slice) -> Tensor:
        given = self._g[:, part], self._x, self._like[part], self._geometry
        found = slopes(*given, [False, True, False])[1]
        assert found is not None
        return found

    def smaller(self) -> Tensor | Factors:
        """Return the gradient itself where that takes less memory."""
        own = self._g.nbytes + self._x.nbytes
        return self if own < self._like.nbytes else self[:]


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Go through the rows of a weight a few at a time."""
    count = len(weight) if weight.ndim else 1
    step = max(1, _ENTRIES * count // max(1, weight.numel()))
    return (slice(i, i + step) for i in range(0, count, step))


def slope_of_rows(g: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """Return ``g W``, the derivative in rows ``x``, laid out in memory as those are.

    So is torch's own. Its kernel for the derivative of batch normalization misreads the
    strides that a single sample of tokens has otherwise.
    """
    turned = x.stride() == (1, len(x))
    return (weight.T @ g.T).T if turned else g @ weight


def mapped(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None
) -> Tensor:
    """Return what a layer makes of ``x``.

    Args:
        x: Rows, ``[T, d]``, or ``[N, C, ...]`` for a convolution.
        weight: The weight.
        bias: The bias.
        geometry: Of a convolution; None for a linear layer.
    """
    if geometry is None:
        return F.linear(x, weight, bias)
    return _convolution(x, weight, bias, *geometry)


def slopes(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry | None,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the derivatives in input, weight and bias of such a layer.

    Args:
        g: The derivative in what it made.
        x: As :func:`mapped` has it.
        weight: Likewise.
        geometry: Likewise.
        needed: Which of the three; None stands for the others.
    """
    if geometry is None:
        return [
            slope_of_rows(g, weight, x) if needed[0] else None,
            g.T @ x if needed[1] else None,
            g.sum(0) if needed[2] else None,
        ]
    return [*_of_convolution(g, x, weight, [g.shape[1]], *geometry, [*needed])]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry | None,
        give: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.give = geometry, give
        return mapped(x, weight, bias, geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        in_x, in_weight, in_bias = ctx.needs_input_grad[:3]
        found = slopes(g, x, weight, ctx.geometry, [in_x, False, in_bias])
        if in_weight:
            found[1] = ctx.give(Factors(g, x, weight, ctx.geometry))
        return *found, None, None


class WeightParts(TorchFunctionMode):
    """Gives the gradients in weights away as factors, in a pass inside the context.

    Weights that a pass uses once, in a linear layer or an ungrouped convolution, are
    given so; for others, and until :meth:`settle` is called, all is as it is.

    Args:
        targets: The tensors in which derivatives are taken.
        receive: Called with the number of a tensor and the factors of its gradient;
            ``torch.autograd.grad`` then returns None for it. None: nothing is given.
    """

    def __init__(
        self,
        targets: Sequence[Tensor],
        receive: Callable[[int, Factors], None] | None,
    ) -> None:
        super().__init__()
        # A hook of the user's is called with the gradient, and may change it.
        plain = ((i, x) for i, x in enumerate(targets) if not x._backward_hooks)
        self._numbers = {id(x): i for i, x in plain if receive}
        self._receive = receive
        self._given: set[int] = set()

    def settle(self, value: Tensor) -> None:
        """Find the weights that are used once on the way to what is differentiated."""
        ends = collections.Counter(
            self._numbers.get(id(getattr(end, "variable", None)))
            for node in graph_nodes([value.grad_fn] if value.grad_fn else [])
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
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        own = _OWN.get(func) if tracing.eager() else None
        # A block that runs twice must save the same both times: torch's own then.
        again = tracing.checkpointed() or tracing.recomputes()
        if own is not None and torch.is_grad_enabled() and not again:
            found = own(self, *args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)

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
        rows = input.reshape(-1, input.shape[-1])
        found: Tensor = _Layer.apply(rows, weight, bias, None, self._giver(i))
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
        found: Tensor = _Layer.apply(input, weight, bias, geometry, self._giver(i))
        return found


_OWN: Final[dict[Callable[..., Any], Callable[..., Tensor | None]]] = {
    F.linear: WeightParts._linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), WeightParts._convolved),
}
