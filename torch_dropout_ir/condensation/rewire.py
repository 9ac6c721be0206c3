"""Fewer neurons in a layer, and readers that read them as they read all.

A batch normalization after the layer is part of its weights meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_dropout_ir.condensation.rows import row_norms, unit_rows
from torch_dropout_ir.functional import call

_MOST_ROWS: Final = 2**16
_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def with_one(labels: Tensor, size: Tensor) -> Tensor:
    """Clusters ``[m]``; where all are dead, the neuron of the largest amplitude is."""
    if not bool((labels >= 0).any()):
        labels = labels.clone()
        labels[int(torch.nan_to_num(size, -1.0).argmax())] = 0
    return labels


def clusters_of(
    weights: Tensor, size: Tensor, labels: Tensor, *, homogeneous: bool
) -> tuple[Tensor, Tensor]:
    """Return one neuron a cluster, and what each neuron is in them.

    Input weights ``[k, d]``, of the ``weights`` ``[m, d]`` means by ``size``
    (amplitudes ``[m]``), and for a ``homogeneous`` activation, where orientations are
    averaged and scaled, the matrix ``[k, m]`` that gives all neurons out of the few.
    ``labels`` are clusters ``[m]``, -1 for the dead; not all are.
    """
    count = int(labels.max()) + 1
    alive = labels >= 0
    member = torch.zeros(count, len(labels), dtype=torch.float64, device=labels.device)
    member[labels[alive], alive.nonzero().squeeze(1)] = 1.0
    share = member * torch.where(alive, size, 0.0).double()
    empty = share.sum(1) == 0  # nothing reads these: the plain mean
    share[empty] = member[empty]
    share /= share.sum(1, keepdim=True)
    sound = torch.where(alive[:, None], weights, 0.0)
    norms = row_norms(sound)
    if not homogeneous:
        return (share @ sound.double()).to(weights.dtype), member
    length = share @ norms
    rows = unit_rows(share @ unit_rows(sound.double())) * length[:, None]
    alone = member.sum(1) == 1
    rows = rows.to(weights.dtype)
    rows[alone] = weights[member[alone].argmax(1)]
    ratio = norms / row_norms(rows)[labels.clamp(min=0)].clamp_(min=1e-300)
    return rows, member * ratio


def replaced(model: nn.Module, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What merging replaces in each of these modules."""
    kept = {}
    for name in names:
        state = model.get_submodule(name).__dict__
        tensors = {k: dict(state[k]) for k in ("_parameters", "_buffers")}
        kept[name] = {**state, **tensors}
    return kept


def restore(model: nn.Module, saved: dict[str, dict[str, Any]]) -> None:
    """Give back what :func:`replaced` has kept."""
    for name, state in saved.items():
        model.get_submodule(name).__dict__.update(state)


def narrow(module: nn.Module, rows: Tensor) -> None:
    """Give a linear layer or convolution these neurons (``[k, d]``, bias last)."""
    bias = module.bias
    if bias is not None:
        rows, last = rows[:, :-1], rows[:, -1]
        module.bias = parameter(last, bias)
    weight = module.weight
    assert isinstance(weight, Tensor)
    shape = (len(rows), *weight.shape[1:])
    module.weight = parameter(rows.reshape(shape), weight)
    setattr(module, _size(module, "out"), len(rows))


def read_through(module: nn.Module, mixing: Tensor, offset: Tensor | None) -> None:
    """Let a reader of ``m`` neurons read ``k``, whose mixture ``[k, m]`` they were.

    Neuron ``j`` is the sum over ``i`` of ``mixing[i, j]`` times the new neuron ``i``,
    plus ``offset[j]``.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    count, neurons = mixing.shape
    spread = weight.unflatten(1, (neurons, -1)) if weight.ndim == 2 else weight
    wide = spread.flatten(2).double()
    fewer = torch.einsum("omp,km->okp", wide, mixing.double())
    if offset is not None:
        assert isinstance(module.bias, Tensor)
        added = wide.sum(2) @ offset.to(wide)
        module.bias = parameter(module.bias + added, module.bias)
    fewer = fewer.reshape(len(weight), count, *spread.shape[2:])
    if weight.ndim == 2:
        fewer = fewer.flatten(1)
    module.weight = parameter(fewer, weight)
    setattr(module, _size(module, "in"), fewer.shape[1])


class _Reached(Exception):
    """Ends a pass at the layer whose inputs are wanted."""


def input_of(model: nn.Module, name: str, inputs: Any) -> Tensor:
    """Return the tensor that a module gets when the model runs on these inputs."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(note)
    try:
        call(model, inputs)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


def inputs_of(model: nn.Module, name: str, inputs: Any, neurons: int) -> Tensor:
    """Return what a layer reads of each neuron, ``[samples, neurons]``, in float64.

    At most 65 536 samples at even distances: positions and samples alike.
    """
    module, seen = model.get_submodule(name), input_of(model, name, inputs)
    if isinstance(module, nn.Linear):
        spread = seen.unflatten(-1, (neurons, -1)).transpose(-1, -2)
    else:
        spread = seen.movedim(seen.ndim - module.weight.ndim + 1, -1)  # type: ignore
    rows = spread.reshape(-1, neurons)
    return rows[:: -(-len(rows) // _MOST_ROWS) or 1].double()


def fit(
    now: Tensor, before: Tensor, mixing: Tensor, *, constant: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the mixture ``[k, m]`` of the few that is nearest to the many, and offset.

    In least squares on activations ``[samples, k]`` and ``[samples, m]``, with offsets
    ``[m]`` where a ``constant`` may be added, else None. Of those that fit equally well
    the nearest to ``mixing``: where samples are few, what they do not show stays.
    """
    before = before - now @ mixing.to(now)
    few = torch.cat((now, torch.ones_like(now[:, :1])), 1) if constant else now
    found = torch.linalg.lstsq(few.cpu(), before.cpu(), rcond=1e-10, driver="gelsd")
    solution = found.solution.to(now)
    count = now.shape[1]
    return mixing.to(now) + solution[:count], solution[count] if constant else None


def _size(module: nn.Module, side: str) -> str:
    return f"{side}_{'features' if isinstance(module, nn.Linear) else 'channels'}"


def parameter(value: Tensor, like: Any) -> nn.Parameter:
    """A parameter of this value, otherwise as the one in whose place it comes."""
    return nn.Parameter(value.detach().to(like).contiguous(), like.requires_grad)


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
