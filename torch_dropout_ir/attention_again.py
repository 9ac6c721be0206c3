r"""Floor 1: attention whose weights are made again for each derivative.

Semantics:

* torch's attention with second derivatives keeps its weights, of which a text has as
  many as pairs of its symbols. Inside the context each derivative, of any order, keeps
  what attention was given and makes the weights again, some samples and queries at a
  time. Few weights are torch's own.
* A derivative in what was given is a function of that and of the derivative in the
  result: :math:`(q, k, v, g) \mapsto J(q, k, v)^\top g`, which is differentiated
  likewise. The first two have formulas, which hold less than a graph of them would.
  What has a row for each query (queries, results) is made of parts; keys and values,
  which all queries read, receive the sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch_dropout_ir import tracing
from torch_dropout_ir.composed import composed

# Weights that are there at once, of at least one query.
_WEIGHTS: Final = 2**16
Part = tuple[slice, slice]  # samples and queries
Call = Callable[..., tuple[Tensor, ...]]
Weigh = Callable[[Part, Tensor, Tensor], Tensor]


class AttentionAgain(TorchFunctionMode):
    """Makes the weights of attention again where they are needed.

    What torch differentiates once is put together from what it differentiates twice.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            attention = Attention.of(*args, **kwargs)
            found = None if attention is None else attention.again()
        else:
            found = composed(func, args, kwargs)
        return func(*args, **kwargs) if found is None else found


class Attention(NamedTuple):
    """Attention of many weights.

    Attributes:
        given: Queries, keys and values.
        weights: The shape of its weights.
        weigh: Makes those of a part.
        factor: What products of queries and keys are multiplied with.
    """

    given: tuple[Tensor, Tensor, Tensor]
    weights: tuple[int, ...]
    weigh: Weigh
    factor: float

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Attention | None:
        """Return it; None of few weights, or what is left to torch's own."""
        given = query, key, value
        weights = (*query.shape[:-1], key.shape[-2])
        samples = {x.shape[0] if x.ndim > 2 else 0 for x in given}
        if samples != {len(query)} or torch.Size(weights).numel() <= _WEIGHTS:
            return None
        half = query.dtype.itemsize < 4 or torch.is_autocast_enabled(query.device.type)
        if dropout_p or enable_gqa or half or not tracing.eager():
            return None
        if attn_mask is not None:
            if is_causal or type(attn_mask) is not Tensor or attn_mask.requires_grad:
                return None
            attn_mask = attn_mask.expand(weights)
        weigh = functools.partial(_weights, attn_mask, is_causal, scale)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        return cls(given, weights, weigh, factor)

    def again(self) -> Tensor:
        """Return the result, whose derivatives make the weights again."""
        weigh = self.weigh  # what is given is saved by autograd alone
        function = Parted(
            lambda part, q, k, v: (weigh(part, q, k) @ v,),
            (True, False, False), (True,),
            (functools.partial(_slopes, weigh, self.factor),
             functools.partial(_curvatures, weigh, self.factor)),
        )  # fmt: skip
        (found,) = KeepsGiven.apply(function, self.weights, *self.given)
        return found


class Parted(NamedTuple):
    """A function of some samples and queries.

    Attributes:
        call: Returns the results of a part.
        given: Whether an argument has a row for each query.
        made: Whether a result has; else it is a sum over queries.
        known: Calls of its derivatives, as far as there are formulas.
    """

    call: Call
    given: tuple[bool, ...]
    made: tuple[bool, ...]
    known: tuple[Call, ...] = ()

    def pulled(self) -> Parted:
        """Return the derivative of a sum of the results, each times a tensor."""
        generic = functools.partial(_pulled, self.call, len(self.given))
        call, *more = self.known or (generic,)
        return Parted(call, self.given + self.made, self.given, tuple(more))

    def whole(self, weights: tuple[int, ...], given: Sequence[Tensor]) -> list[Tensor]:
        """Return the results of all, a part at a time, of weights of a shape."""
        samples, queries = weights[0], weights[-2]
        found: list[Tensor] = []
        for part in _parts(weights):
            pairs = zip(given, self.given, strict=True)
            own = self.call(part, *[_of(part, x.detach(), each) for x, each in pairs])
            if not found:
                pairs = zip(own, self.made, strict=True)
                found = [
                    y.new_zeros(
                        samples, *y.shape[1:-2], queries if each else y.shape[-2],
                        y.shape[-1],
                    )
                    for y, each in pairs
                ]  # fmt: skip
            for whole, y, each in zip(found, own, self.made, strict=True):
                _of(part, whole, each).add_(y)
        return found


def _weights(
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    part: Part,
    q: Tensor,
    k: Tensor,
) -> Tensor:
    if mask is not None:
        mask = _of(part, mask, True)
    elif is_causal:
        mask = q.new_ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
        mask = mask.tril(part[1].start)
    return attention_weights(q, k, mask, False, scale)


def _slopes(
    weigh: Weigh, factor: float, part: Part, *given: Tensor
) -> tuple[Tensor, ...]:
    r"""Return the derivatives of :math:`g \cdot P v` in ``q, k, v``."""
    q, k, v, g = given
    p = weigh(part, q, k)
    s = factor * _of_scores(p, g @ v.mT)
    return s @ k, s.mT @ q, p.mT @ g


def _curvatures(
    weigh: Weigh, factor: float, part: Part, *given: Tensor
) -> tuple[Tensor, ...]:
    r"""Return those of :math:`a \cdot D_q + b \cdot D_k + c \cdot D_v` of the slopes.

    With the weights :math:`P`, the slope :math:`E = g v^\top` in them and
    :math:`W = \alpha (a k^\top + q b^\top)` that of the sum in the scores' slope
    :math:`P (E - r)`, :math:`r = \sum P E` and :math:`w = \sum P W` a query: the slope
    in :math:`E` is :math:`P (W - w)`, in :math:`P` it is :math:`W (E - r) - w E + g
    c^\top`.
    """
    q, k, v, g, a, b, c = given
    p, e = weigh(part, q, k), g @ v.mT
    w = factor * (a @ k.mT + q @ b.mT)
    y = _of_scores(p, w)
    s = factor * _of_scores(p, e)
    e = w * (e - (p * e).sum(-1, True)) - (p * w).sum(-1, True) * e + g @ c.mT
    t = factor * _of_scores(p, e)
    return t @ k + s @ b, t.mT @ q + s.mT @ a, y.mT @ g, y @ v + p @ c


def _of_scores(p: Tensor, g: Tensor) -> Tensor:
    """Return the derivative in scores from that in the weights that they make."""
    return p * (g - (p * g).sum(-1, keepdim=True))


def _pulled(call: Call, count: int, part: Part, *given: Tensor) -> tuple[Tensor, ...]:
    """Return the derivative in the first arguments, the others times the results."""
    again = torch.is_grad_enabled()  # whether this is differentiated too
    with torch.enable_grad():
        at = [
            x if x.requires_grad else x.detach().requires_grad_() for x in given[:count]
        ]
        return torch.autograd.grad(
            call(part, *at), at, given[count:], create_graph=again,
            materialize_grads=True, allow_unused=True,
        )  # fmt: skip


class KeepsGiven(torch.autograd.Function):
    """A function that keeps what it is given."""

    @staticmethod
    def forward(
        ctx: Any, function: Parted, weights: tuple[int, ...], *given: Tensor
    ) -> tuple[Tensor, ...]:
        """Return what the function returns of all, a part at a time."""
        ctx.function, ctx.weights = function, weights
        ctx.save_for_backward(*given)
        return tuple(function.whole(weights, given))

    @staticmethod
    def backward(ctx: Any, *roots: Tensor) -> tuple[Any, ...]:
        """Return the derivatives in what was given, as such a function."""
        given = *ctx.saved_tensors, *roots
        return None, None, *KeepsGiven.apply(ctx.function.pulled(), ctx.weights, *given)


def _of(part: Part, x: Tensor, each: bool) -> Tensor:
    """Return the samples of a part, and its queries where each has a row."""
    samples, queries = part
    return x[samples, ..., queries, :] if each else x[samples]


def _parts(weights: tuple[int, ...]) -> Iterator[Part]:
    """Yield parts of the samples and queries with no more weights than there may be."""
    samples, queries = weights[0], weights[-2]
    one = torch.Size(weights[1:]).numel()
    some = max(1, _WEIGHTS // one)
    step = min(queries, max(1, _WEIGHTS * queries // one))
    for sample in range(0, samples, some):
        for query in range(0, queries, step):
            yield slice(sample, sample + some), slice(query, query + step)


def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Return ``softmax(q k' scale + mask)``; 0 in rows that attend to nothing."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    # Before the product, or half precision overflows.
    scores = (query * factor) @ key.transpose(-2, -1)
    if mask is not None and type(mask) is not Tensor:
        # Dynamo comes with it, which takes as long to import as all else together.
        from torch.nn.attention.bias import CausalBias

        if isinstance(mask, CausalBias):
            mask = mask._materialize(query.device)
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
