"""R_1 of dropout straight before the last linear layer, one unit dropped at a time."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree

from torch_dropout_ir import tracing
from torch_dropout_ir.losses import Loss, resolve_loss
from torch_dropout_ir.regularizers.estimate import is_quadratic
from torch_dropout_ir.regularizers.last_layer import (
    ROWS_MEET,
    check_layer,
    check_rows,
    computed,
    last_layer,
    softmax_and_scale,
    sum_by_rows,
)
from torch_dropout_ir.regularizers.outputs import read_outputs
from torch_dropout_ir.sites import noise_variance

# Of a block, one for each of its units, samples and outputs: a cache holds that.
_ELEMENTS: Final = 2**16


def leave_one_out(
    features: Tensor,
    weight: Tensor,
    p: float,
    *,
    outputs: Tensor,
    targets: Any,
    loss: Any,
) -> Tensor:
    r"""Return R_1 of dropout on the input of the last linear layer, unit by unit.

    .. math::
        R_1 \approx \frac{p}{1 - p} \sum_i \sum_j \left[
        \ell_i(f_i - o_{ij}) - \ell_i(f_i)
        + \langle \nabla \ell_i(f_i), o_{ij} \rangle \right],
        \qquad o_{ij} = w_j h_{ij}

    the Bregman divergence of the loss, reduction included, between the outputs without
    unit ``j`` and those with it. Exact for squared losses at every ``p``, where it is
    :func:`last_layer`, and for any loss as ``p`` goes to 0: dropping takes a whole unit
    away, which the quadratic form does not see. In the units of the loss.

    No pass through the network; ``O(N D C)`` time, memory of the inputs and a block.
    Differentiable in ``features``, ``weight`` and ``outputs``. Losses other than
    squared ones and cross-entropy are called once a unit, in their own precision.

    Args:
        features: Inputs of the last layer before dropout, ``[..., D]``.
        weight: Weight of the last layer, ``[C, D]``.
        p: Probability of dropping, in ``[0, 1)``. The paper's ``p`` is our ``1 - p``.
        outputs: Network outputs without dropout, ``[..., C]``.
        targets: The targets.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable
            ``(outputs, targets) -> scalar``, a sum (or mean) of terms of one row of the
            outputs each.

    Returns:
        Scalar with the dtype and device of ``features``; not finite where they are not.

    Raises:
        TypeError: If ``features``, ``weight`` or ``outputs`` is no real tensor.
        ValueError: If ``p`` is outside ``[0, 1)``, shapes disagree, there is no sample,
            or the loss couples rows.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Lemma 1, for squared losses;
        Bregman, *The relaxation method of finding the common point of convex sets*,
        1967, for the divergence.

    Example:
        >>> h, w = torch.ones(4, 3), torch.ones(2, 3)
        >>> y = torch.zeros(4, 2)
        >>> leave_one_out(h, w, 0.5, outputs=h @ w.T, targets=y, loss="mse").item()
        3.0
    """  # noqa: DOC502 (`check_layer` raises)
    resolved = resolve_loss(loss)
    check_layer("leave_one_out", features, weight, outputs)
    variance = noise_variance(p)
    if resolved.kind == "squared":
        return last_layer(features, weight, p, loss=resolved, targets=targets)
    resolved = resolved.at(outputs.reshape(-1, outputs.shape[-1]))
    if tracing.eager() and is_quadratic(resolved, outputs.detach(), targets):
        resolved = dataclasses.replace(resolved, kind="elementwise")
        return last_layer(
            features, weight, p, loss=resolved, outputs=outputs, targets=targets
        )
    if resolved.kind == "cross_entropy":
        return variance * _softmax_form(resolved, features, weight, outputs, targets)
    check_rows(read_outputs(outputs, resolved, targets))

    def widened(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.to(wide) if x.is_floating_point() else x

    # A small difference of losses: half precision would round it away.
    tensors, narrow = (features, weight, outputs, targets), outputs.dtype
    wide = _pytree.tree_map_only(Tensor, widened, tensors)
    return variance * _general_form(resolved, *wide).to(narrow)


def _softmax_form(
    loss: Loss, features: Tensor, weight: Tensor, outputs: Tensor, targets: Any
) -> Tensor:
    """Sum of ``log sum_c s_c exp(-o_c) + s'o``: the loss is logsumexp and linear."""
    softmax, scale = softmax_and_scale(loss, outputs, targets)
    rows = features.reshape(features.shape[:-1].numel(), features.shape[-1])
    logits = outputs.reshape(-1, weight.shape[0])

    # The two terms cancel to second order in the unit's share of the outputs.
    def form(h: Tensor, f: Tensor, s: Tensor, a: Tensor, w: Tensor) -> Tensor:
        h, s, w = h.double(), s.double(), w.double()
        without = f.double().log_softmax(-1)[:, None] - h[:, :, None] * w.T
        divergence = without.logsumexp(-1) + h * (s @ w)
        return (divergence.sum(-1) @ a.double().squeeze(-1)).to(f.dtype)

    units = max(1, _ELEMENTS // weight.shape[0])
    parts = [
        sum_by_rows(form, units, h, logits, softmax, scale, whole=(w,))
        for h, w in zip(rows.split(units, 1), weight.split(units, 1), strict=True)
    ]
    return torch.stack(parts).sum()


def _general_form(
    loss: Loss, features: Tensor, weight: Tensor, outputs: Tensor, targets: Any
) -> Tensor:
    """One evaluation of the loss a unit; all samples lose that unit at once."""
    f = outputs if outputs.requires_grad else outputs.detach().requires_grad_()
    differentiable = torch.is_grad_enabled() and outputs.requires_grad
    contribution = features @ weight.T
    if tracing.eager():
        _check_rows_apart(loss, outputs, outputs - contribution, targets)
    with torch.enable_grad():
        value = loss(f, targets)
        (slope,) = torch.autograd.grad(value, f, create_graph=differentiable)
    if not differentiable:
        value = value.detach()

    def without(h: Tensor, w: Tensor) -> Tensor:
        return loss(outputs - h[..., None] * w, targets)

    total = (slope * contribution).sum()
    for h, w in zip(features.unbind(-1), weight.unbind(1), strict=True):
        part = computed(differentiable and tracing.eager(), without, h, w)
        total = total + (part - value)
    return total


@torch.no_grad()
def _check_rows_apart(loss: Loss, a: Tensor, b: Tensor, targets: Any) -> None:
    """Raise where rows meet between two outputs, as in a hinge not met at one."""
    rows = torch.arange(a.shape[:-1].numel(), device=a.device)
    plain = loss(a, targets) + loss(b, targets)
    for digit in range(max(1, (len(rows) - 1).bit_length())):  # one of two rows each
        own = (rows >> digit) % 2 == 0
        own = own.view(*a.shape[:-1], 1)
        exchanged = torch.where(own, a, b), torch.where(own, b, a)
        off = plain - sum(loss(x, targets) for x in exchanged)
        if off.abs() > torch.finfo(a.dtype).eps ** (2 / 3) * plain.abs():
            raise ValueError(ROWS_MEET)
