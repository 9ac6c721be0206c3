"""Whether a measure's pass is the one that the script has made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.analysis.followed_loss import inside, memory, versions
from torch_dropout_ir.analysis.sharded import is_sharded
from torch_dropout_ir.leaves import flatten

_OTHER_PARAMETERS: Final = (
    "the script made the pass with other parameters than the model's own (as "
    "`torch.func.functional_call` does): this is of the model's own on that batch"
)
OTHER_PASS: Final = (
    "run again on the same inputs the model did something else: it depends on what it "
    "has counted or carries on from pass to pass, and this is of a later pass"
)
TRAINS: Final = (
    "the optimizer steps inside the model's own call, which to make again would be "
    "training: attach to the part of the model that is called there"
)
_WRITTEN: Final = (
    "the parameters were written on between the pass and this step (as by a step of "
    "another optimizer, or where weights are put back): this is of what they are now"
)
_OTHER_MODE: Final = (
    "modules have gone from training to evaluation mode or back since the pass: this "
    "is of the model as it is now"
)
_CLOSE: Final = 0.01  # of the norm: kernels may differ, and autocast rounds


class OwnPass:
    """What the script's pass was made with, as the model is at its end."""

    def __init__(self, model: nn.Module, outputs: Any) -> None:
        self._parameters, self._written = _identities(model), written(model)
        self._modes = [getattr(m, "training", False) for m in model.modules()]
        self._outputs = _states(flatten(outputs)[0])

    def unlike(self, model: nn.Module) -> str:
        """Say how the model is another one now; empty where nothing tells."""
        now = _identities(model)
        if self._parameters and now and self._parameters != now:
            return _OTHER_PARAMETERS
        if now and written(model) != self._written:
            return _WRITTEN
        if [getattr(m, "training", False) for m in model.modules()] != self._modes:
            return _OTHER_MODE
        return ""

    def differs(self, outputs: Any, again: Any) -> str:
        """Return words if a second pass has returned something else; empty if not.

        Outputs that are not known, or were written on since, are not looked at.
        """
        leaves = flatten(outputs)[0]
        if _states(leaves) != self._outputs:
            return ""
        pairs = zip(leaves, flatten(again)[0], strict=False)
        return "" if all(_alike(x, y) for x, y in pairs) else OTHER_PASS


def not_again(given: Any, before: list[int]) -> str:
    """Return why a second pass on arguments would be another one; empty if it is not.

    ``before`` is what :func:`versions` said of them before the pass.
    """
    if any(inside(given, Iterator)):
        return "the last pass has used up its inputs: they are a generator"
    if any(x.is_nested for x in inside(given, Tensor)):
        return "the inputs of the last pass are nested tensors, which take no mask"
    if versions(given) != before:
        return (
            "the inputs of the last pass were changed in place before the optimizer "
            "stepped: on what they are now the model does something else"
        )
    return ""


def _identities(model: nn.Module) -> list[int]:
    """Which tensors the parameters are; none of a sharded model, which changes them."""
    own = list(model.parameters())
    return [] if any(map(is_sharded, own)) else [id(x) for x in own]


def written(model: nn.Module) -> list[Any]:
    """What tells that a parameter was written on, or is elsewhere (``x.data = ``)."""
    own = list(model.parameters())
    return [versions(own), *map(memory, own)]


def _states(leaves: list[Any]) -> list[Any]:
    return [[id(x) for x in leaves], versions(leaves)]


def _alike(x: Any, y: Any) -> bool:
    both = isinstance(x, Tensor) and isinstance(y, Tensor)
    if not both or not x.is_floating_point() or x.is_nested or y.is_nested:
        return True
    if x.shape != y.shape:
        return False
    with torch.no_grad():
        norm = torch.linalg.vector_norm
        away = norm((x - y).float()), norm(x.float())
    return not bool(away[0] > _CLOSE * away[1])  # of what is no number nothing tells
