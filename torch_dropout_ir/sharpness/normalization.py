r"""Second derivatives of batch normalization in a few passes over its input.

With ``h = r (x - m)`` and ``y = w h + b``, ``g`` the derivative in ``y``, ``<u, v>``
the sum of ``u v`` over a channel, dots for what a product sends back through the
gradient's graph, and running statistics for ``m`` and ``r``,

.. math:: \bar x = w r g, \quad \bar w = \langle g, h \rangle, \quad
    \bar b = \langle g, 1 \rangle, \qquad
    g' = w r \dot x + \dot w h + \dot b, \quad
    x' = r \dot w g, \quad w' = r \langle \dot x, g \rangle

Where ``m`` and ``r`` are those of the batch, with ``n`` entries a channel, ``dh`` is
``r P dx`` with :math:`P u = u - (\langle u, 1 \rangle + \langle u, h \rangle h) / n`,
and ``dr`` is :math:`- r^2 \langle h, dx \rangle / n`. So

.. math:: \bar x = w r P g, \qquad g' = w r P \dot x + \dot w h + \dot b, \quad
    w' = r \langle \dot x, P g \rangle, \\
    q = \dot w g - w r (\langle g, h \rangle \dot x + \langle \dot x, h \rangle g) / n,
    \quad x' = r P q - w r^2 \langle \dot x, P g \rangle h / n

All are sums of ``x``, ``g`` and their dots with one factor a channel. Torch makes each
term a tensor of its own.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir import tracing

Needed = tuple[bool, bool, bool]
Line = tuple[Tensor | None, Tensor | None]
_TWICE: Final = (
    "modified_loss: expected a loss with batch normalization in its penalty to be "
    "differentiated once, got create_graph=True. Pass `max_bytes=None`, which keeps "
    "torch's own graph for that."
)
NORMALIZE: Final = torch.ops.aten.native_batch_norm.default
BACKWARD: Final = torch.ops.aten.native_batch_norm_backward.default


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        training: bool,
        rates: tuple[float, float],
    ) -> Tensor:
        y, *held = NORMALIZE(x, weight, bias, *running, training, *rates)
        mean, variance = running
        if not training and mean is not None and variance is not None:
            held = [mean, (variance + rates[1]).rsqrt()]
        ctx.save_for_backward(x, weight, *held)
        ctx.training = training
        found: Tensor = y
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        given = g, *ctx.saved_tensors, ctx.training, needed
        if torch.is_grad_enabled():
            return *_Derivative.apply(*given), None, None, None
        return *_first(*given), None, None, None


class _Derivative(torch.autograd.Function):
    """The derivatives in input, weight and bias, themselves to be differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        r: Tensor,
        training: bool,
        needed: Needed,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, weight, mean, r)
        ctx.training = training
        ctx.set_materialize_grads(False)
        return _first(g, x, weight, mean, r, training, needed)

    @staticmethod
    def backward(
        ctx: Any, x_dot: Tensor | None, w_dot: Tensor | None, b_dot: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # mean and deviation would be taken for constants
            raise RuntimeError(_TWICE)
        g, x, weight, mean, r = ctx.saved_tensors
        in_g, in_x, in_weight = ctx.needs_input_grad[:3]
        h = Normal(x, mean, r)
        scale = r if weight is None else weight * r
        zero = torch.zeros_like(r)
        dot_h, dot_1, met = zero, zero, zero
        if x_dot is not None:
            (dot_h, dot_1), met = h.along(x_dot), _along(x_dot, g)
        own = zero if w_dot is None else w_dot, zero if b_dot is None else b_dot
        at_g, of_g, of_dot, at_x = own, r * own[0], zero, None
        if ctx.training:
            share = x.shape[1] / x.numel()
            g_h, g_1 = h.along(g)
            met = met - (dot_1 * g_1 + dot_h * g_h) * share
            at_g = own[0] - scale * dot_h * share, own[1] - scale * dot_1 * share
            of_g, of_dot = r * at_g[0], -r * scale * g_h * share
            at_x = (
                -(of_dot * dot_h + of_g * g_h + r * scale * met) * share,
                -(of_dot * dot_1 + of_g * g_1) * share,
            )
        return (
            h.combined(at_g, (scale, x_dot)) if in_g else None,
            h.combined(at_x, (of_g, g), (of_dot, x_dot)) if in_x else None,
            r * met if in_weight else None,
            *(None,) * 4,
        )


def _first(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    r: Tensor,
    training: bool,
    needed: Needed,
) -> tuple[Tensor | None, ...]:
    """First derivatives, in input, weight and bias."""
    mask = [needed[0] and training, *needed[1:]]
    found: list[Tensor | None] = [None, None, None]
    if any(mask):
        given = plain(g), plain(x), weight, None, None, mean, r
        found = [*BACKWARD(*given, True, 0.0, mask)]
    if needed[0] and not training:
        found[0] = g * wide(r if weight is None else weight * r, g)
    return tuple(found)


def _along(u: Tensor, v: Tensor) -> Tensor:
    """``<u, v>``."""
    zero = v.new_zeros(v.shape[1])
    return Normal(v, zero, zero + 1).along(u)[0]


def normalization(
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    rates: tuple[float, float],
) -> Tensor:
    """Return what batch normalization does to ``x``, ``[N, C, ...]``, on a CPU.

    ``running`` are mean and variance to use, or to move by ``rates[0]`` where it
    trains; ``rates[1]`` is added to the variance.
    """
    found: Tensor = _Normalized.apply(x, weight, bias, running, training, rates)
    return found


def normalized_along(
    x: Tensor,
    line: Line,
    ends: Line,
    weight: Tensor | None,
    mean: Tensor,
    r: Tensor,
    training: bool,
) -> Line:
    r"""Return how what batch normalization returns moves where ``x`` moves on a line.

    With :math:`v = r^{-2}`, :math:`\dot v = \frac{2}{n} \langle x - m, \dot x
    \rangle` and :math:`\ddot v = \frac{2}{n} (\langle \dot x - \dot m, \dot x \rangle
    + \langle x - m, \ddot x \rangle)`,

    .. math:: \dot y = w (\dot r r^{-1} h + r (\dot x - \dot m)), \qquad
        \ddot y = w (\ddot r r^{-1} h + 2 \dot r (\dot x - \dot m)
        + r (\ddot x - \ddot m))

    ``line`` has the first and second derivative of ``x`` (``[N, C, ...]``), None for
    zero; those of what is returned go to ``ends``, on those of ``x`` if that is given.
    """
    first, second = line
    w = torch.ones_like(r) if weight is None else weight
    if not training:
        moved = [_scaled(u, w * r, end) for u, end in zip(line, ends, strict=True)]
        return moved[0], moved[1]
    n, h, zero = x.numel() / x.shape[1], Normal(x, mean, r), torch.zeros_like(r)
    (along, total) = (zero, zero) if first is None else h.along(first)
    (along2, total2) = (zero, zero) if second is None else h.along(second)
    spread = zero
    if first is not None:
        spread = Normal(first, total / n, zero + 1).along(first)[0]
    # Over r: of v = r^-2 the derivatives are those of the sums of squares.
    slope = -r * along / n  # r' / r
    bend = 3 * slope.square() - r * along2 / n - r.square() * spread / n  # r'' / r
    # The second first: it reads the first, which is then written on.
    y2 = h.added(
        _scaled(second, w * r, ends[1]),
        (w * bend, -w * r * (2 * slope * total + total2) / n),
        (2 * w * r * slope, first),
    )
    y1 = h.added(_scaled(first, w * r, ends[0]), (w * slope, -w * r * total / n))
    return y1, y2


def _scaled(u: Tensor | None, factor: Tensor, end: Tensor | None) -> Tensor | None:
    return None if u is None else torch.mul(u, wide(factor, u), out=end)


class Normal:
    """What the weight of a layer multiplies: ``h = r (x - m)``, not made."""

    def __init__(self, x: Tensor, mean: Tensor, r: Tensor) -> None:
        self._x, self._mean, self._r = x, mean, r

    def along(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``<u, h>`` and ``<u, 1>``."""
        if not tracing.eager():
            apart = self._x - wide(self._mean, u)
            return _summed(u * apart) * self._r, _summed(u)
        mask = [False, True, True]
        held = None, None, self._mean, self._r
        given = plain(u), plain(self._x)
        _, along, total = BACKWARD(*given, None, *held, True, 0.0, mask)
        return along, total

    def combined(
        self, at: tuple[Tensor, Tensor] | None, *terms: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        """``at_0 h + at_1`` and the terms, each with its factor by channel."""
        found = None
        if at is not None:
            found = _affine(self._x, *self._of_x(at))
        for factor, u in terms:
            if u is not None:
                own = wide(factor, u)
                found = u * own if found is None else found.addcmul_(u, own)
        return torch.zeros_like(self._x) if found is None else found

    def added(
        self,
        to: Tensor | None,
        at: tuple[Tensor, Tensor],
        *terms: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        """The same, added to what is there."""
        if to is None:
            return self.combined(at, *terms)
        factor, constant = self._of_x(at)
        for own, u in ((factor, self._x), *terms):
            if u is not None:
                to.addcmul_(u, wide(own, u))
        return to.add_(wide(constant, to))

    def _of_x(self, at: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return factor and constant that make ``at_0 h + at_1`` of ``x``."""
        factor = at[0] * self._r
        return factor, at[1] - factor * self._mean


def plain(x: Tensor) -> Tensor:
    """Return a tensor whose strides torch's kernel reads as they are.

    Of one sample it misreads two tensors in other orders, where the first dimension,
    along which there is no step, has an unusual stride.
    """
    return x.contiguous() if len(x) == 1 else x


def wide(factor: Tensor, like: Tensor) -> Tensor:
    """One number a channel, to be multiplied with all of it."""
    return factor.view(-1, *(1,) * (like.ndim - 2))


def _summed(u: Tensor) -> Tensor:
    return u.sum([0, *range(2, u.ndim)])


def _affine(x: Tensor, factor: Tensor, constant: Tensor) -> Tensor:
    if not tracing.eager():
        return wide(factor, x) * x + wide(constant, x)
    zero = torch.zeros_like(factor)
    found: Tensor = NORMALIZE(x, factor, constant, zero, zero + 1, False, 0.0, 0.0)[0]
    return found
