"""Directions through the parameters, scaled to the parts of the network."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from torch_dropout_ir.arguments import check_choice, check_module, in_order
from torch_dropout_ir.vectors import Params, balanced

Part = Literal["filter", "neuron", "layer"]
Vectors = Literal["fixed", "scaled"]
_WRAPPED: Final = re.compile(r"^((module|_orig_mod)\.)+")
_NORMS: Final = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@torch.no_grad()
def filter_normalized_direction(
    model: nn.Module,
    generator: torch.Generator | None = None,
    *,
    per: Part = "filter",
    biases: Vectors = "fixed",
    norms: Vectors = "fixed",
) -> dict[str, Tensor]:
    r"""Draw a random direction with the norm of each filter of the model.

    .. math:: d_f \leftarrow d_f \, \lVert \theta_f \rVert / \lVert d_f \rVert

    Where a filter is zero, so is the direction.

    Args:
        model: The model.
        generator: Source of the draws; torch's default one if None.
        per: What a filter is: ``"filter"``: the kernel of one output channel of
            a convolution, the whole weight of a linear layer, as in the paper;
            ``"neuron"``: the weights of one output of any layer, as Li et al. have it;
            ``"layer"``: a whole parameter.
        biases: Parameters of at most one dimension outside normalization layers:
            ``"fixed"`` gives them no direction, ``"scaled"`` one of their norm.
        norms: The same for the parameters of normalization layers.

    Returns:
        A dictionary with the names and shapes of the parameters.

    Raises:
        ValueError: If an argument is none of those words.
        TypeError: If ``model`` is no module.

    References:
        Li et al., *Visualizing the loss landscape of neural nets*, NeurIPS 2018; Zhang
        & Xu, *Implicit regularization of dropout*, section VII.

    Example:
        >>> direction = filter_normalized_direction(nn.Linear(3, 2))
        >>> sorted(direction), direction["bias"].tolist()
        (['bias', 'weight'], [0.0, 0.0])
    """  # noqa: DOC502 (the checks raise)
    check_module("filter_normalized_direction", model)
    check = functools.partial(check_choice, "filter_normalized_direction")
    check("per", per, ("filter", "neuron", "layer"))
    check("biases", biases, ("fixed", "scaled"))
    check("norms", norms, ("fixed", "scaled"))
    of_norms = {
        id(x)
        for module in model.modules()
        if isinstance(module, _NORMS)
        for x in module.parameters(recurse=False)
    }
    groups = {
        id(module._parameters.get("weight")): module.groups
        for module in model.modules()
        if isinstance(module, _ConvTransposeNd)
    }
    direction = {}
    for name, x in model.named_parameters():
        if not x.requires_grad:
            continue
        fixed = x.ndim < 2 and biases == "fixed"
        if id(x) in of_norms:
            fixed = norms == "fixed"
        d = torch.zeros_like(x)
        if not fixed:
            d.normal_(generator=generator)
            shape, dims = _filters(x, per, groups.get(id(x)))
            d = _scaled(d.view(shape), x.reshape(shape), dims).view(x.shape)
        direction[name] = d
    return direction


def _filters(
    x: Tensor, per: Part, groups: int | None
) -> tuple[torch.Size, tuple[int, ...]]:
    """A shape in which filters lie along some dimensions, and those dimensions."""
    apart = (per == "neuron" and x.ndim > 1) or (per == "filter" and x.ndim > 2)
    if apart and groups:  # transposed: inputs first, and outputs group by group
        shape = torch.Size([groups, x.shape[0] // groups, *x.shape[1:]])
        return shape, (1, *range(3, len(shape)))
    return x.shape, tuple(range(int(apart), x.ndim))


def _scaled(d: Tensor, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    length = torch.linalg.vector_norm(d, dim=dims, keepdim=True)
    scaled, largest = balanced(x, dims)
    wanted = torch.linalg.vector_norm(scaled, dim=dims, keepdim=True) * largest
    del scaled  # as large as the weight
    return (d / torch.where(length > 0, length, 1.0) * wanted).to(d)


def checked_direction(
    caller: str, direction: Mapping[str, Tensor], params: Params
) -> dict[str, Tensor]:
    """Return the user's direction in the order and dtypes of ``params``."""
    # One drawn of a wrapped model has its names.
    if isinstance(direction, Mapping):
        direction = {
            n if n in params else _WRAPPED.sub("", n): x for n, x in direction.items()
        }
    given = in_order(caller, "direction", direction, params)
    found = {n: given[n].detach().to(x) for n, x in params.items()}
    if not all(bool(x.isfinite().all()) for x in found.values()):
        raise ValueError(f"{caller}: expected a finite `direction`")
    if not any(bool(x.any()) for x in found.values()):
        raise ValueError(
            f"{caller}: expected a `direction` that is not zero everywhere. One of "
            "`filter_normalized_direction` is, where all weights are zero or all "
            'parameters are biases or of norms: say `biases="scaled"`.'
        )
    return found
