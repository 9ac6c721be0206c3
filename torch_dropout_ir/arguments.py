"""What a user gives, checked by name before anything is computed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def check_module(function: str, model: Any, name: str = "model") -> None:
    """Raise a TypeError if what is to be a model is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}: expected `{name}` to be an nn.Module, got "
            f"{type(model).__name__}"
        )


def check_count(function: str, name: str, value: Any, least: int) -> None:
    """Raise if a number of draws, steps or products is none.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is below ``least``.

    Example:
        >>> check_count("trace", "num_matvecs", 5.5, 2)
        Traceback (most recent call last):
        TypeError: trace: expected `num_matvecs` to be an integer, got 5.5. Round it.
    """
    known = type(value) is int  # an abstract class takes its time
    if not known and (
        isinstance(value, bool) or not isinstance(value, numbers.Integral)
    ):
        hint = " Round it." if isinstance(value, numbers.Real) else ""
        hint = "" if isinstance(value, bool) else hint
        raise TypeError(
            f"{function}: expected `{name}` to be an integer, got {value!r}.{hint}"
        )
    if value < least:
        raise ValueError(f"{function}: expected `{name}` >= {least}, got {value}")


def check_even(function: str, name: str, value: Any) -> None:
    """Raise if a number of draws cannot be taken in pairs."""
    check_count(function, name, value, 2)
    if value % 2:
        raise ValueError(f"{function}: expected an even `{name}`, got {value}")


def check_flag(function: str, name: str, value: Any) -> None:
    """Raise a TypeError if what switches something on or off is no bool."""
    if not isinstance(value, bool):
        raise TypeError(
            f"{function}: expected `{name}` to be True or False, got {value!r}"
        )


def check_choice(
    function: str, name: str, value: Any, choices: tuple[str, ...]
) -> None:
    """Raise a ValueError if a word is none of those that are known."""
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        known = f"{', '.join(others)} or {last}"
        raise ValueError(f"{function}: expected `{name}` to be {known}, got {value!r}")


def check_real(
    function: str,
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    finite: bool = True,
) -> None:
    """Raise if a number is not real, or out of range; NaN always is.

    A tensor of one element counts as its number; infinity may be in range where
    ``finite`` is False.
    """  # noqa: DOC501 (the first line says it)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{function}: expected `{name}` to be a real number, got {value!r} of "
            f"type {type(value).__name__}"
        )
    number = float(value)
    inside = number >= least and (number > above or above == -math.inf)
    if inside and (math.isfinite(number) or (not finite and number == math.inf)):
        return
    range_ = f" > {above:g}" if above > -math.inf else ""
    range_ = f" >= {least:g}" if least > -math.inf else range_
    kind = "a finite" if finite else "a real"
    raise ValueError(f"{function}: expected {kind} `{name}`{range_}, got {value}")


def check_state(function: str, state: Any, keys: tuple[str, ...], op: Any) -> None:
    """Refuse what no earlier run on an operator has left to go on from.

    Raises:
        TypeError: If it is no dictionary.
        ValueError: If one of the ``keys`` is not in it, or it is of another size.

    Example:
        >>> check_state("trace", {}, ("method",), torch.eye(2))
        Traceback (most recent call last):
        ValueError: trace: expected the `state` of an earlier result of trace, got a
            dictionary without ['method']. Without one it starts anew.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{function}: expected the `state` of an earlier result of {function}, got "
            f"{type(state).__name__}"
        )
    if missing := [key for key in keys if key not in state]:
        raise ValueError(
            f"{function}: expected the `state` of an earlier result of {function}, got "
            f"a dictionary without {missing}. Without one it starts anew."
        )
    size = len(state["rest"]) if "rest" in state else state.get("size")
    if size not in (None, op.shape[0]):  # None: of an older version
        raise ValueError(
            f"{function}: expected a `state` of the same operator, {op.shape[0]} "
            f"numbers a vector, got one of {size}"
        )


def check_operator(function: str, op: Any) -> None:
    """Raise a TypeError of what multiplies no tensor."""
    array = hasattr(op, "__array__") and not isinstance(op, Tensor)
    if array or not hasattr(op, "shape"):
        raise TypeError(
            f"{function}: expected an operator with `@` and `shape`, or a tensor, got "
            f"{type(op).__name__}. Of an array torch.as_tensor makes one."
        )


def check_square(function: str, op: Any) -> None:
    """Refuse matrices not square, or not of real numbers; believe operators."""
    check_operator(function, op)
    if not isinstance(op, Tensor):
        return
    square = op.ndim == 2 and op.shape[0] == op.shape[1]
    if not (square and op.is_floating_point()):
        raise ValueError(
            f"{function}: expected a square matrix of floating-point numbers, got "
            f"shape {list(op.shape)} of {op.dtype}"
        )


def check_symmetric(function: str, op: Any) -> None:
    """Refuse what :func:`check_square` refuses, and what is not symmetric."""
    check_square(function, op)
    if not isinstance(op, Tensor):
        return
    apart, whole = (float(x.norm(dtype=torch.float64)) for x in (op - op.T, op))
    if apart > 0.01 * whole:
        raise ValueError(
            f"{function}: expected a symmetric matrix, got one that differs from its "
            f"transpose by {apart:.2g} of {whole:.2g} in norm"
        )


def in_order(
    function: str, name: str, given: Any, params: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return tensors by name of a parameter, in the order of ``params``.

    More names than theirs do not count.

    Raises:
        TypeError: If it is no dictionary, or what it holds are no real tensors.
        ValueError: If a name is missing, or a shape is another.

    Example:
        >>> import torch
        >>> in_order("op", "v", {"bias": torch.ones(2)}, {"bias": torch.ones(3)})
        Traceback (most recent call last):
        ValueError: op: expected `v` to have the shapes of the parameters, got [2] for
            'bias', which has [3]
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{function}: expected `{name}` to be a dictionary of tensors by the names "
            f"of the parameters, got {type(given).__name__}"
        )
    if missing := [n for n in params if n not in given]:
        raise ValueError(
            f"{function}: expected `{name}` to have every parameter, got none for "
            f"{missing}. What does not count is zero: torch.zeros_like of it."
        )
    for n, x in params.items():
        if not isinstance(given[n], Tensor) or given[n].is_complex():
            kind = f" of {given[n].dtype}" if isinstance(given[n], Tensor) else ""
            raise TypeError(
                f"{function}: expected `{name}` to hold tensors of real numbers, got "
                f"{type(given[n]).__name__}{kind} for {n!r}"
            )
        if given[n].shape != x.shape:
            raise ValueError(
                f"{function}: expected `{name}` to have the shapes of the parameters, "
                f"got {list(given[n].shape)} for {n!r}, which has {list(x.shape)}"
            )
    return {n: given[n] for n in params}


def check_derivatives() -> None:
    """Raise a RuntimeError under ``torch.inference_mode``."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "expected autograd to be at hand, got torch.inference_mode, whose tensors "
            "have no derivatives. Leave it, or use torch.no_grad."
        )


def check_differentiable(value: Tensor, of: str, function: str = "") -> None:
    """Raise a ValueError if autograd sees nothing ``of`` which a loss depends on."""
    if not value.requires_grad:
        said = f"{function}: " if function else ""
        raise ValueError(
            f"{said}expected a loss that can be differentiated in the {of}, got one "
            "whose value is cut off from them (detached, rounded or an argmax)"
        )
