"""Batch normalization after a layer: part of the layer's weights, and out of them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_dropout_ir.condensation.rewire import narrow, parameter
from torch_dropout_ir.condensation.rows import row_norms

_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def is_foldable(module: nn.Module | None) -> bool:
    """Whether a module is, in evaluation mode, an affine map of each channel."""
    if type(module) not in _NORMS or not isinstance(module, _BatchNorm):
        return False
    return bool(module.affine) and module.running_var is not None


def scale_of(norm: nn.Module) -> Tensor:
    """What a batch normalization multiplies each channel by, in float64."""
    assert isinstance(norm, _BatchNorm) and norm.running_var is not None
    return norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()


def folded(weights: Tensor, biased: bool, norm: nn.Module) -> Tensor:
    r"""Return the input weights that act where a batch normalization follows.

    .. math:: (s w,\; s (b - \mu) + \beta),
        \quad s = \gamma / \sqrt{\sigma^2 + \epsilon}

    ``[m, d + 1]`` in float64, their last column the bias, from ``weights`` whose last
    column is the bias where they are ``biased``.
    """
    rows, scale = weights.double(), scale_of(norm)
    bias = rows[:, -1] if biased else torch.zeros_like(scale)
    shift = scale * (bias - norm.running_mean) + norm.bias  # type: ignore[operator]
    rows = rows[:, :-1] if biased else rows
    return torch.cat((scale[:, None] * rows, shift[:, None]), 1)


def narrow_both(
    module: nn.Module, norm: nn.Module, rows: Tensor, weights: Tensor, labels: Tensor
) -> None:
    """Give a layer and the batch normalization behind it these neurons.

    Of each cluster the neuron of the largest folded weights keeps its direction before
    normalization, its mean and its variance, which are what training goes on from;
    scale and shift become those with which the two act as they should.

    ``rows`` are folded weights of the few, ``[k, d + 1]``, ``weights`` those of the
    many, ``[m, d + 1]``, and ``labels`` the cluster of each, -1 for none.
    """
    norms = row_norms(weights[:, :-1])
    clusters = labels == torch.arange(len(rows), device=labels.device)[:, None]
    chosen = torch.where(clusters, norms, -1.0).argmax(1)
    ratio = row_norms(rows[:, :-1]) / norms[chosen]
    ratio = torch.where(norms[chosen] > 0, ratio, 1.0)
    scale = scale_of(norm)[chosen] * ratio
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    raw = rows[:, :-1] * inverse[:, None]
    mean, var = (x[chosen].clone() for x in (norm.running_mean, norm.running_var))  # type: ignore[index]
    bias = torch.zeros_like(scale)
    if isinstance(module.bias, Tensor):
        bias = module.bias[chosen].double()
        raw = torch.cat((raw, bias[:, None]), 1)
    shift = rows[:, -1] - scale * (bias - mean)
    assert isinstance(norm, _BatchNorm)
    norm.weight = parameter(norm.weight[chosen] * ratio, norm.weight)
    norm.bias = parameter(shift, norm.bias)
    norm.running_mean, norm.running_var = mean, var
    norm.num_features = len(rows)
    narrow(module, raw)
