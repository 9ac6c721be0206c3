"""Inputs of which no estimate can be made, said by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_dropout_ir.functional import Inputs
from torch_dropout_ir.sites import unobservable


def check_batch(inputs: Any) -> None:
    """Raise if a batch has no sample, or derivatives are out of reach.

    Raises:
        ValueError: If a tensor among the inputs has no element in its first dimension.
        RuntimeError: Under ``torch.inference_mode``.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "expected autograd to be at hand, got torch.inference_mode, whose tensors "
            "have no derivatives. Leave it, or use torch.no_grad."
        )
    arguments = Inputs.of(inputs)
    for value in (*arguments.args, *arguments.kwargs.values()):
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == 0:
            raise ValueError(
                "expected a batch with at least one sample, got an input of shape "
                f"{list(value.shape)}"
            )


def check_risk(
    name: str, value: Callable[[], Tensor], model: nn.Module, inputs: Any
) -> None:
    """Raise if the loss is not finite: its derivatives may still be, or zero.

    Args:
        name: The function that is about to take them.
        value: Gives the loss.
        model: The model.
        inputs: Its inputs.

    Raises:
        ValueError: If the loss is NaN or infinite.
    """  # noqa: DOC502 (`check_finite` raises)
    with torch.no_grad():
        check_finite(name, value().detach(), model, inputs)


def check_finite(name: str, value: Tensor, model: nn.Module, inputs: Any) -> None:
    """Raise if an estimate is not finite, and say where that comes from.

    Args:
        name: The function that made the estimate.
        value: The estimate.
        model: The model.
        inputs: Its inputs.

    Raises:
        ValueError: If ``value`` is NaN or infinite.
    """
    if bool(torch.isfinite(value)):
        return
    arguments = Inputs.of(inputs)
    places = {
        **{f"parameter `{n}`": x for n, x in model.named_parameters()},
        **{f"buffer `{n}`": x for n, x in model.named_buffers()},
        **{f"input {i}": x for i, x in enumerate(arguments.args)},
        **{f"input `{n}`": x for n, x in arguments.kwargs.items()},
    }
    wrong = [
        place
        for place, x in places.items()
        if isinstance(x, Tensor)
        and x.is_floating_point()
        and not torch.isfinite(x).all()
    ]
    where = (
        ", ".join(wrong)
        if wrong
        else "the outputs or the loss (overflow, targets, or a mean over none)"
    )
    raise ValueError(
        f"{name}: expected a finite estimate, got {float(value)}; not finite: {where}"
    )


def noise_left_out(model: nn.Module, noisy: bool) -> tuple[str, ...]:
    """Return what is to be said of noise that an estimate does not hold.

    Args:
        model: The model.
        noisy: Whether a pass drew random numbers, or had noise switched off in it.
    """
    known = unobservable(model)
    said = tuple(f"`{name}` is not in it: {why}" for name, why in known.items())
    if noisy and not known:
        return ("the model draws noise besides its sites, which is not in it",)
    return said
