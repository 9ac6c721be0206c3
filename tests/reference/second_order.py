"""R_1 to second order by dense curvature in the noise, differentiable in parameters."""

import torch
from torch.utils import _pytree

from tests.reference.enumeration import replace_sites


def second_order_form(model, shapes, batch, loss, *, linearized):
    """``sum sigma2/2 [d^2 R / d noise^2]_jj``, each noise one element of a mask.

    Puts a settable noise in the place of each dropout module of ``model``.

    Args:
        model: The model, each of whose sites is used once.
        shapes: The shape of each site's mask.
        batch: Inputs and targets.
        loss: Function of both.
        linearized: Whether to take ``J' H J``, the network as linear after the sites.
    """
    placed = replace_sites(model)
    noises = [torch.ones(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    for (place, _), noise in zip(placed, noises, strict=True):
        place.noise = noise
    leaves, structure = _pytree.tree_flatten(model(batch[0]))
    flat = torch.cat([x.flatten() for x in leaves])

    def risk(values):
        parts = values.split([x.numel() for x in leaves])
        filled = [v.view(x.shape) for v, x in zip(parts, leaves, strict=True)]
        return loss(_pytree.tree_unflatten(filled, structure), batch[1])

    total = 0
    for noise, (_, p) in zip(noises, placed, strict=True):
        if linearized:
            jacobian = torch.stack([_slope(f, noise).flatten() for f in flat])
            slope = _slope(risk(flat), flat)
            hessian = torch.stack([_slope(g, flat) for g in slope])
            diagonal = torch.einsum("aj,ab,bj->j", jacobian, hessian, jacobian)
        else:
            slope = _slope(risk(flat), noise).flatten()
            rows = [_slope(g, noise).flatten() for g in slope]
            diagonal = torch.stack([row[j] for j, row in enumerate(rows)])
        total = total + p / (1 - p) / 2 * diagonal.sum()
    return total


def _slope(value, at):
    (found,) = torch.autograd.grad(value, at, create_graph=True, materialize_grads=True)
    return found
