"""Steps of a traced graph that treat each neuron by itself."""

from __future__ import annotations

import enum
from typing import Final

import torch
import torch.nn.functional as F
from torch import fx, nn


class Passing(enum.Enum):
    """How a step passes neurons on."""

    HOMOGENEOUS = enum.auto()
    POINTWISE = enum.auto()
    FLATTEN = enum.auto()
    SHAPE = enum.auto()


# fmt: off
_HOMOGENEOUS: Final = (
    nn.ReLU, nn.LeakyReLU, nn.RReLU, nn.Identity,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)
_POOLS: Final = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)
_POINTWISE: Final = (
    nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.CELU, nn.Softplus,
    nn.Softsign, nn.Mish, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid,
    nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Threshold,
)
_HOMOGENEOUS_CALLS: Final = {
    torch.relu, torch.relu_, F.relu, F.leaky_relu, F.dropout, F.dropout1d, F.dropout2d,
    F.dropout3d, "relu", "relu_", "contiguous",
}
_POOL_CALLS: Final = {
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
}
_POINTWISE_CALLS: Final = {
    torch.tanh, torch.sigmoid, torch.sin, torch.cos, torch.exp, torch.square, torch.abs,
    F.tanh, F.sigmoid, F.gelu, F.silu, F.elu, F.selu, F.celu, F.softplus, F.softsign,
    F.mish, F.hardtanh, F.hardswish, F.hardsigmoid, F.relu6, F.logsigmoid,
    "tanh", "sigmoid", "sin", "cos", "exp", "square", "abs", "tanh_", "sigmoid_",
}
# fmt: on


def passing(
    user: fx.Node, came_from: fx.Node, module: nn.Module | None, channels: bool
) -> Passing | str:
    """Return how a step of the graph passes neurons on, or why it does not, in words.

    The step calls ``module``, if it calls one, with what it read from ``came_from``.
    Neurons are ``channels`` (dimension 1), or else the last dimension.
    """
    if user.op == "output":
        return "it is an output of the model"
    if _reads_the_shape(user):
        return Passing.SHAPE
    if _flattens(user, module):
        return Passing.FLATTEN
    target = type(module) if module is not None else user.target
    if isinstance(module, _HOMOGENEOUS) or target in _HOMOGENEOUS_CALLS:
        return Passing.HOMOGENEOUS
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return Passing.HOMOGENEOUS
    if channels and (isinstance(module, _POOLS) or target in _POOL_CALLS):
        return Passing.HOMOGENEOUS
    alone = user.all_input_nodes == [came_from]
    if alone and (isinstance(module, _POINTWISE) or target in _POINTWISE_CALLS):
        return Passing.POINTWISE
    name = getattr(target, "__name__", target)
    return f"{name} (`{user.target if module else user.name}`) follows it"


def _reads_the_shape(user: fx.Node) -> bool:
    if user.op == "call_method" and user.target in ("size", "dim"):
        return True
    return user.target is getattr and user.args[1:] in (("shape",), ("ndim",))


def _flattens(user: fx.Node, module: nn.Module | None) -> bool:
    """Whether all dimensions but the first become one, whatever their sizes are."""
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    if user.target in (torch.flatten, "flatten"):
        given = dict(zip(("start_dim", "end_dim"), user.args[1:], strict=False))
        given |= user.kwargs
        start, end = given.get("start_dim"), given.get("end_dim")
        return bool(start == 1) and end in (None, -1)
    if user.op == "call_method" and user.target in ("view", "reshape"):
        return len(user.args) == 3 and bool(user.args[2] == -1)
    return False
