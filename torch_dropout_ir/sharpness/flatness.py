"""Flatness and sharpness by how far, or how steeply, the loss rises."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.arguments import check_count, check_real
from torch_dropout_ir.sharpness.directions import checked_direction
from torch_dropout_ir.sharpness.frozen import Masks
from torch_dropout_ir.sharpness.landscape import moved
from torch_dropout_ir.sharpness.surface import Surface
from torch_dropout_ir.vectors import Params, norm, to_params

_FIRST: Final = 2.0**-10  # first step, as a share of the norm of the parameters
_HALVINGS: Final = 60
_PLACES: Final = 16  # between nothing and what is above: it may be so earlier


@dataclasses.dataclass(frozen=True)
class IntervalFlatness:
    """Where the loss reaches a level on either side, along a unit direction.

    Attributes:
        left: Nearest place below 0 found at the level; minus infinity if none.
        right: Nearest place above 0 found at the level; infinity if none.
        width: ``right - left``.
        floor_used: Whether the level is the floor, as the loss is smaller than that.
        level: The level.
    """

    left: float
    right: float
    width: float
    floor_used: bool
    level: float


def interval_flatness(
    model: nn.Module,
    loss: Any,
    batches: Any,
    direction: Params,
    factor: float = 2.0,
    *,
    floor: float = 1e-6,
    reach: float = 1e6,
    rtol: float = 1e-4,
    masks: Masks = "off",
) -> IntervalFlatness:
    r"""Return the width of the valley along a direction.

    .. math:: F_v = \theta_v^r - \theta_v^l, \qquad
        R_S(\theta + \theta_v^{l,r} v) = c \, R_S(\theta)

    From a thousandth of the parameters' norm on, the step doubles until the level is
    passed; of sixteen places on the way the first above it is taken, and bisected: the
    nearest crossing, unless the loss passes the level twice between two of them. A loss
    that is not finite counts as above.

    Args:
        model: The model, at a minimum; left as it is.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        batches: One batch ``(inputs, targets)``, or a list or loader of batches.
        direction: Direction by parameter name; its length does not count.
        factor: The level, as a multiple of the loss; above 1.
        floor: Least loss that is multiplied: at zero loss the level would be the loss.
        reach: Farthest place to look, in norms of the parameters.
        rtol: Relative accuracy of the places.
        masks: As for :func:`hessian`.

    Returns:
        Both places, in the units of the parameters, and the width between them.

    Raises:
        ValueError: If ``direction`` is zero or lacks a parameter, ``factor`` is not
            above 1, ``floor``, ``reach`` or ``rtol`` not positive, or the loss is
            negative or not finite.
        TypeError: If one of the numbers is none.

    References:
        Feng & Tu, *The inverse variance-flatness relation in stochastic gradient
        descent*, PNAS 118 (2021).

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> batch = torch.ones(1, 1), net(torch.ones(1, 1)).detach() + 1
        >>> found = interval_flatness(
        ...     net, "mse", batch, {"weight": torch.ones(1, 1)}, factor=4.0
        ... )  # (w - 1)^2 = 4 at -1 and 3
        >>> round(found.left, 3), round(found.right, 3)
        (-1.0, 3.0)
    """  # noqa: DOC502 (the checks raise)
    check_real("interval_flatness", "factor", factor, above=1)
    for name, value in (("floor", floor), ("reach", reach), ("rtol", rtol)):
        check_real("interval_flatness", name, value, above=0)
    surface = Surface("interval_flatness", model, loss, batches, masks=masks)
    d = checked_direction("interval_flatness", direction, surface.params)
    length = norm(d)
    here = surface.value(surface.params)
    if not math.isfinite(here) or here < 0:
        raise ValueError(
            f"interval_flatness: expected a finite loss from 0 on, got {here}"
        )
    level = factor * max(here, floor)
    scale = norm(surface.params) or 1.0

    def above(t: float) -> bool:
        found = surface.value(moved(surface, (t / length, d)))
        return not found < level

    right = _crossing(above, _FIRST * scale, reach * scale, rtol)
    left = -_crossing(lambda t: above(-t), _FIRST * scale, reach * scale, rtol)
    return IntervalFlatness(left, right, right - left, here < floor, level)


def _crossing(
    above: Callable[[float], bool], first: float, farthest: float, rtol: float
) -> float:
    """Bracket from the inside, look on the way, then bisect; infinity if none."""
    high = first
    if above(high):
        for _ in range(_HALVINGS):
            if not above(high / 2):
                break
            high /= 2
    else:
        high *= 2
        while not above(high):
            high *= 2
            if high > farthest:
                return math.inf
    places = [high * k / _PLACES for k in range(1, _PLACES)]
    high = next((t for t in places if above(t)), high)
    low = max((t for t in places if t < high), default=0.0)
    while high - low > rtol * high:
        middle = (low + high) / 2
        if not low < middle < high:  # two neighbouring numbers
            break
        low, high = (low, middle) if above(middle) else (middle, high)
    return (low + high) / 2


@dataclasses.dataclass(frozen=True)
class Ascent:
    r"""How much the loss rises within a ball.

    Attributes:
        value: Rise of the loss, :math:`R(\theta + \epsilon) - R(\theta)`.
        loss: The loss at the parameters.
        ascended: The loss after the ascent.
        direction: The perturbation, by parameter name.
    """

    value: float
    loss: float
    ascended: float
    direction: dict[str, Tensor]


def sam_sharpness(
    model: nn.Module,
    loss: Any,
    batches: Any,
    rho: float = 0.05,
    *,
    masks: Masks = "off",
) -> Ascent:
    r"""Return how much the loss rises by one step of gradient ascent.

    .. math:: R_S(\theta + \rho \, g / \lVert g \rVert) - R_S(\theta), \qquad
        g = \nabla R_S(\theta)

    To first order the largest rise within a ball of radius ``rho``: what
    sharpness-aware minimization adds to the loss.

    Args:
        model: The model; left as it is.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        batches: One batch ``(inputs, targets)``, or a list or loader of batches.
        rho: Radius of the ball, positive.
        masks: As for :func:`hessian`.

    Returns:
        The rise, and what it is made of; 0 where the gradient is zero.

    Raises:
        ValueError: If ``rho`` is not positive.
        TypeError: If it is no number.

    References:
        Foret et al., *Sharpness-aware minimization*, ICLR 2021, eq. (2).

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> batch = torch.ones(1, 1), net(torch.ones(1, 1)).detach() + 1
        >>> round(sam_sharpness(net, "mse", batch, rho=1.0).value, 4)  # 2^2 - 1^2
        3.0
    """  # noqa: DOC502 (`_ascend` raises)
    surface = Surface("sam_sharpness", model, loss, batches, masks=masks)
    return _ascend(surface, rho, 1, adaptive=False)


def adaptive_sharpness(
    model: nn.Module,
    loss: Any,
    batches: Any,
    rho: float = 0.5,
    num_steps: int = 1,
    *,
    masks: Masks = "off",
) -> Ascent:
    r"""Return how much the loss rises within a ball that scales with the parameters.

    .. math:: \max_{\lVert T^{-1} \epsilon \rVert \le \rho} R_S(\theta + \epsilon)
        - R_S(\theta), \qquad T = \mathrm{diag} |\theta|

    Rescaling weights without changing the function, as ReLU networks allow, leaves it
    unchanged. One step is adaptive SAM's; more climb on, each of ``2 rho / num_steps``,
    and are brought back into the ball: the highest loss on the way counts.

    Args:
        model: The model; left as it is.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        batches: One batch ``(inputs, targets)``, or a list or loader of batches.
        rho: Radius of the ball, positive.
        num_steps: Steps of projected gradient ascent, from 1 on.
        masks: As for :func:`hessian`.

    Returns:
        The rise, and what it is made of.

    Raises:
        ValueError: If ``rho`` is not positive or ``num_steps`` below 1.
        TypeError: If one is no number, or ``num_steps`` no integer.

    References:
        Kwon et al., *ASAM: adaptive sharpness-aware minimization*, ICML 2021, eq. (4).

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> batch = torch.ones(1, 1), 2 * net(torch.ones(1, 1)).detach()
        >>> found = adaptive_sharpness(net, "mse", batch, rho=1.0)  # to w (1 - 1) = 0
        >>> round(found.ascended / found.loss, 4)
        4.0
    """  # noqa: DOC502 (`_ascend` raises)
    surface = Surface("adaptive_sharpness", model, loss, batches, masks=masks)
    return _ascend(surface, rho, num_steps, adaptive=True)


def _ascend(surface: Surface, rho: float, num_steps: int, *, adaptive: bool) -> Ascent:
    check_real(surface.caller, "rho", rho, above=0)
    check_count(surface.caller, "num_steps", num_steps, 1)
    start = surface.params
    scales = {n: x.abs() if adaptive else torch.ones_like(x) for n, x in start.items()}
    length = rho if num_steps == 1 else 2 * rho / num_steps
    here = surface.value(start)
    best, highest = {n: torch.zeros_like(x) for n, x in start.items()}, here
    scaled = dict(best)  # the perturbation in units of the scales
    for _ in range(num_steps):
        at = _plus(start, scales, scaled)
        mean = torch.stack([surface.gradient(s, at) for s in surface.seeds]).mean(0)
        slope = {n: g * scales[n] for n, g in to_params(mean, start).items()}
        steepness = norm(slope)
        if not steepness:
            break
        scaled = {n: x + slope[n] * (length / steepness) for n, x in scaled.items()}
        shrink = min(1.0, rho / norm(scaled))
        scaled = {n: x * shrink for n, x in scaled.items()}
        reached = surface.value(_plus(start, scales, scaled))
        if reached > highest or num_steps == 1:
            best, highest = {n: x * scales[n] for n, x in scaled.items()}, reached
    return Ascent(highest - here, here, highest, best)


def _plus(start: Params, scales: Params, scaled: Params) -> dict[str, Tensor]:
    return {n: x + scales[n] * scaled[n] for n, x in start.items()}
