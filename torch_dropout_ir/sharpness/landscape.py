"""The loss along lines and planes through the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_dropout_ir.arguments import check_real
from torch_dropout_ir.sharpness.directions import (
    checked_direction,
    filter_normalized_direction,
)
from torch_dropout_ir.sharpness.frozen import Masks
from torch_dropout_ir.sharpness.surface import Surface
from torch_dropout_ir.vectors import Params

Steps = Tensor | Sequence[float]


def moved(surface: Surface, *steps: tuple[float, Params]) -> dict[str, Tensor]:
    """Return the parameters of ``surface`` after some steps along directions."""
    params = dict(surface.params)
    for alpha, direction in steps:
        params = {n: torch.add(x, direction[n], alpha=alpha) for n, x in params.items()}
    return params


def loss_slice(
    model: nn.Module,
    loss: Any,
    batches: Any,
    alphas: Steps,
    direction: Params | None = None,
    *,
    masks: Masks = "off",
) -> Tensor:
    r"""Return the loss along a line.

    .. math:: L(\alpha) = R_S(\theta + \alpha d)

    Args:
        model: The model; left as it is.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        batches: One batch ``(inputs, targets)``, or a list or loader of batches.
        alphas: Steps along the direction, ``[A]``.
        direction: Direction by parameter name; a random filter-normalized one if None.
        masks: As for :func:`hessian`: dropout off, or frozen masks.

    Returns:
        Losses, float64 ``[A]``.

    Raises:
        ValueError: If ``direction`` lacks a parameter or is zero, there is no step, or
            one is not finite.
        TypeError: If a step is no number.

    References:
        Li et al., *Visualizing the loss landscape of neural nets*, NeurIPS 2018; Zhang
        & Xu, *Implicit regularization of dropout*, Fig. 12.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> batch = torch.ones(1, 1), net(torch.ones(1, 1)).detach()
        >>> loss_slice(net, "mse", batch, [0.0, 2.0], {"weight": torch.ones(1, 1)})
        tensor([0., 4.], dtype=torch.float64)
    """  # noqa: DOC502 (`checked_direction` raises)
    steps = _read("loss_slice", "alphas", alphas)
    surface = Surface("loss_slice", model, loss, batches, masks=masks, copied=False)
    along = filter_normalized_direction(model) if direction is None else direction
    d = checked_direction("loss_slice", along, surface.params)
    return _values(surface, (moved(surface, (a, d)) for a in steps))


def used_up_slice(
    surface: Surface, alphas: Sequence[float], direction: dict[str, Tensor]
) -> Tensor:
    """Return the loss along a line, from no more vectors than ``direction``.

    That is written on, and means nothing afterwards. No step but 0 may be so small that
    rounding loses it beside the parameters.
    """
    at = checked_direction(surface.caller, direction, surface.params)
    reached = 0.0  # steps from the parameters to where `at` is; 0 while it points

    def move(alpha: float) -> Mapping[str, Tensor]:
        nonlocal reached
        if not alpha:
            return surface.params
        for n, x in surface.params.items():
            if reached:
                at[n].sub_(x).div_(reached)
            at[n].mul_(alpha).add_(x)
        reached = alpha
        return at

    return _values(surface, (move(float(a)) for a in alphas))


def loss_plane(
    model: nn.Module,
    loss: Any,
    batches: Any,
    alphas: Steps,
    betas: Steps | None = None,
    directions: tuple[Params, Params] | None = None,
    *,
    masks: Masks = "off",
) -> Tensor:
    r"""Return the loss on a plane.

    .. math:: L(\alpha, \beta) = R_S(\theta + \alpha d + \beta e)

    Args:
        model: The model; left as it is.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        batches: One batch ``(inputs, targets)``, or a list or loader of batches.
        alphas: Steps along the first direction, ``[A]``.
        betas: Steps along the second, ``[B]``; those of the first if None.
        directions: Two directions; random filter-normalized ones if None.
        masks: As for :func:`hessian`.

    Returns:
        Losses, float64 ``[A, B]``.

    Raises:
        ValueError: If a direction lacks a parameter or is zero, there is no step, or
            one is not finite.
        TypeError: If a step is no number, or ``directions`` are not two.

    References:
        Li et al., *Visualizing the loss landscape of neural nets*, NeurIPS 2018.

    Example:
        >>> net, batch = nn.Linear(2, 1), (torch.ones(3, 2), torch.zeros(3, 1))
        >>> loss_plane(net, "mse", batch, [-1.0, 0.0, 1.0], [0.0, 1.0]).shape
        torch.Size([3, 2])
    """  # noqa: DOC502 (`checked_direction` raises)
    first = _read("loss_plane", "alphas", alphas)
    second = first if betas is None else _read("loss_plane", "betas", betas)
    surface = Surface("loss_plane", model, loss, batches, masks=masks, copied=False)
    given: Any = directions
    if directions is None:
        given = [filter_normalized_direction(model) for _ in range(2)]
    elif not isinstance(directions, Sequence) or len(directions) != 2:
        raise TypeError(
            "loss_plane: expected a pair of dictionaries as `directions`, got "
            f"{directions!r:.60}"
        )
    d, e = (checked_direction("loss_plane", x, surface.params) for x in given)
    flat = _values(
        surface, (moved(surface, (a, d), (b, e)) for a in first for b in second)
    )
    return flat.view(len(first), len(second))


def interpolate(
    model_a: nn.Module,
    model_b: nn.Module,
    loss: Any,
    batches: Any,
    alphas: Steps | None = None,
    *,
    masks: Masks = "off",
) -> Tensor:
    r"""Return the loss between two models, and beyond them.

    .. math:: L(\alpha) = R_S((1 - \alpha) \, \theta_a + \alpha \, \theta_b)

    Buffers such as running statistics go along between the two, and stay at the nearer
    end beyond them: a variance must not turn negative.

    Args:
        model_a: The model at ``alpha = 0``; left as it is. Its modes count.
        model_b: The model at ``alpha = 1``, of the same parameters and buffers.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        batches: One batch ``(inputs, targets)``, or a list or loader of batches.
        alphas: Places, ``[A]``; 41 from -0.5 to 1.5 if None.
        masks: As for :func:`hessian`.

    Returns:
        Losses, float64 ``[A]``.

    Raises:
        ValueError: If the models differ in names or shapes, there is no place, or one
            is not finite.
        TypeError: If a place is no number.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Fig. 14; Goodfellow, Vinyals &
        Saxe, *Qualitatively characterizing neural network optimization problems*, 2015.

    Example:
        >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> interpolate(a, b, "mse", (torch.ones(3, 2), torch.zeros(3, 1))).shape
        torch.Size([41])
    """  # noqa: DOC502 (`_read` raises)
    if alphas is None:
        alphas = torch.linspace(-0.5, 1.5, 41, dtype=torch.float64, device="cpu")
    steps = _read("interpolate", "alphas", alphas)
    surface = Surface("interpolate", model_a, loss, batches, masks=masks)
    ends = surface.state(), Surface("interpolate", model_b, loss, batches).state()
    shapes = [{n: x.shape for n, x in end.items()} for end in ends]
    if shapes[0] != shapes[1]:
        apart = sorted(n for n, _ in shapes[0].items() ^ shapes[1].items())
        raise ValueError(
            "interpolate: expected models of the same parameters and buffers; these "
            f"differ in name or shape: {sorted(set(apart))}"
        )
    buffers = {n for n, _ in surface.model.named_buffers()}

    def at(alpha: float) -> dict[str, Tensor]:
        inside = min(1.0, max(0.0, alpha))
        return {
            n: _between(x, ends[1][n], inside if n in buffers else alpha)
            for n, x in ends[0].items()
        }

    return _values(surface, map(at, steps))


def _read(caller: str, name: str, steps: Steps) -> list[float]:
    """Return what the user gave as numbers, or raise."""
    one = isinstance(steps, Tensor) and not steps.ndim
    if one or isinstance(steps, str) or not isinstance(steps, Iterable):
        raise TypeError(
            f"{caller}: expected `{name}` to be a row of numbers, got {steps!r}. One "
            "number goes into a list."
        )
    given = list(steps)
    if not given:
        raise ValueError(f"{caller}: expected `{name}` to have a number, got none")
    for place, step in enumerate(given):
        check_real(caller, f"{name}[{place}]", step)
    return [float(step) for step in given]


def _between(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    if not (a.is_floating_point() or a.is_complex()):
        return b if alpha > 0.5 else a
    return (1 - alpha) * a + alpha * b.to(a)


def _values(surface: Surface, places: Iterable[Mapping[str, Tensor]]) -> Tensor:
    return torch.tensor(
        [surface.value(x) for x in places], dtype=torch.float64, device="cpu"
    )
