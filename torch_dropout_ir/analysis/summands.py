"""Sums of which some terms are followed: a loss less what is added to it.

Semantics:

* Where of two numbers that are added up one is not followed, as a penalty on parameters
  or on a gradient, the sum stands for the other one, and is a part of the loss.
* What a script makes of a part is followed where it is made of each term alike.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from torch_dropout_ir.analysis.followed_loss import LOST, TIMES, UNKNOWN, At, Step

Origins = list[tuple[Tensor, At | None]]  # what a call is given, and where it is from
_SUMS: Final = ("add", "sub", "subtract")
_DIVIDES: Final = ("div", "divide", "true_divide")
_ALIKE: Final = (*TIMES, *_DIVIDES, "neg", "sum", "mean", "clone", "to", "float")


def followed_term(call: Step, into: Origins) -> At | Step | None:
    """Return the followed one of two numbers that a call adds up, or what makes it.

    None where a call does something else, or neither is followed.
    """
    name = getattr(call.function, "__name__", "")
    if name not in _SUMS or call.kwargs or not _two_numbers(into):
        return None
    (_, first), (_, second) = into
    at = second if first in UNKNOWN else first
    if at is None or at == LOST:
        return None
    at = at._replace(part=True)
    if first in UNKNOWN and name != "add":
        return Step(torch.neg, (at,), {}, call.differentiated)
    return at


def bends(call: Step, into: Origins) -> bool:
    """Whether a call makes of a part what it would not make of each term alike."""
    if not any(at is not None and at.part for _, at in into):
        return False
    name = getattr(call.function, "__name__", "")
    if name in _SUMS:
        return not _two_numbers(into) and len(into) > 1
    followed = [x for x, at in into if at is not None]
    first = call.args[0] if call.args else call.kwargs.get("input")
    above = name not in _DIVIDES or first is followed[0]
    return name not in _ALIKE or len(followed) > 1 or not above


def _two_numbers(into: Origins) -> bool:
    return len(into) == 2 and all(x.numel() == 1 for x, _ in into)
