"""Calls that write on tensors: what they would do without that."""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_dropout_ir.analysis.followed_loss import At, Step

_TORCHS: Final = ("input", "weight", "bias", "running_mean", "running_var")
_FUNCTIONALS: Final = ("input", "running_mean", "running_var", "weight", "bias")
# Normalizations, their arguments, and whether they take a batch's own statistics.
_NORMALIZES: Final[dict[Any, tuple[tuple[str, ...], str, bool]]] = {
    F.batch_norm: (_FUNCTIONALS, "training", False),
    F.instance_norm: (_FUNCTIONALS, "use_input_stats", True),
    torch.batch_norm: (_TORCHS, "training", False),
    torch.instance_norm: (_TORCHS, "use_input_stats", True),
}
_OPTIONS: Final = ("momentum", "eps", "cudnn_enabled")
_WRITES: Final = ("add_", "sub_", "mul_", "div_", "masked_fill_")


def without_statistics(call: Step) -> Step:
    """Return a call that gives the same and writes on no statistics.

    Normalization by a batch's own mean and variance reads no running ones, but moves
    those it is given.
    """
    if call.function not in _NORMALIZES:
        return call
    names, own, default = _NORMALIZES[call.function]
    given = dict(zip((*names, own, *_OPTIONS), call.args, strict=False)) | call.kwargs
    if given.get(own, default):
        given |= dict.fromkeys(("running_mean", "running_var"))
    return call._replace(args=(), kwargs=given)


def writes(call: Step) -> bool:
    """Whether a call writes on a tensor that is there, as far as its name tells."""
    name, kwargs = getattr(call.function, "__name__", ""), call.kwargs
    in_place = name.endswith("_") and not name.endswith("__")
    # `__iadd__` is the writing form of `__add__`; `__invert__` is of nothing.
    by_operator = name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}")
    written = in_place or by_operator or name == "__setitem__"
    return written or bool(kwargs.get("inplace")) or kwargs.get("out") is not None


def without_writing(call: Step, known: At | None) -> Step | None:
    """Return a call that makes what another is about to write, as ``loss += ...``.

    ``known`` is where what is written on comes from; None where it is none of the
    outputs', and its value is kept. None of a call that writes otherwise.
    """
    if call.kwargs.get("out") is not None or not writes(call):
        return None
    if not call.args or not isinstance(call.args[0], Tensor):
        return None  # on the tensors of a list, as optimizers do
    x, rest = call.args[0], call.args[1:]
    if known is None:
        if x.requires_grad or x.numel() != 1:
            return None  # a sum over several passes, or what may be large
        x = x.detach().clone()
    func, name = call.function, getattr(call.function, "__name__", "")
    if name in _WRITES:
        plain = getattr(Tensor, name[:-1])
    else:

        @functools.wraps(func)
        def plain(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x = x.clone()
            func(x, *args, **kwargs)
            return x

    return call._replace(function=plain, args=(x, *rest))
