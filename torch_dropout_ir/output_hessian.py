r"""Floor 1: the Hessian of a loss in the outputs, its roots and random roots of it.

Squared errors, cross-entropy and losses of one output each have closed forms; for any
other callable the blocks :math:`H_i` of the samples come from products with the second
derivative, as long as the loss is a sum (or mean) of terms of one sample each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torch_dropout_ir.losses import Loss, half_squared_error

Root = tuple[Tensor, "Tensor | float"]


def squared_scale(loss: Loss, shape: torch.Size, targets: Any = None) -> float:
    """Return ``a`` of ``H_i = a * identity`` for a squared loss of outputs ``shape``.

    Targets of another shape make torch count an output as often as it is broadcast.
    """
    if getattr(loss.function, "func", loss.function) is half_squared_error:
        return 1.0 / shape[0]
    if loss.reduction == "mean":
        return 2.0 / shape.numel()
    if not isinstance(targets, Tensor) or targets.shape == shape:
        return 2.0
    counted = torch.broadcast_shapes(shape, targets.shape).numel()
    return 2.0 * counted / shape.numel()


def cross_entropy_scale(loss: Loss, outputs: Tensor, targets: Any) -> Tensor:
    """Return ``a_i`` of ``H_i = a_i (diag(s_i) - s_i s_i')``, 1 in place of classes.

    ``a_i`` is the mass of the target: with class weights ``w`` and label smoothing
    ``e`` it is ``(1 - e) w_y + (e / C) sum w``, and the mean is over the ``w_y``.
    Ignored targets weigh nothing.

    Raises:
        ValueError: If the loss weighs classes and ``targets`` is None.
    """
    classes = 1 if outputs.ndim > 1 else 0
    weight = loss.option("weight", None)
    mass = torch.ones_like(outputs.detach().narrow(classes, 0, 1))
    if not isinstance(targets, Tensor):
        if weight is not None:
            raise ValueError(
                "expected `targets`: the Hessian of a cross-entropy with class weights "
                "depends on them, got None"
            )
        return mass / mass.numel() if loss.reduction == "mean" else mass
    if weight is None:
        weight = mass.new_ones(outputs.shape[classes])
    weight = weight.detach().to(mass)
    smoothing = loss.option("label_smoothing", 0.0)
    if targets.is_floating_point():
        weighted = targets.detach().movedim(classes, -1) @ weight
        count: float | Tensor = float(mass.numel())
        known = torch.ones_like(weighted)
    else:
        known = (targets != loss.option("ignore_index", -100)).to(mass)
        weighted = weight[torch.where(known > 0, targets, 0)] * known
        count = weighted.sum()
    mass = (1 - smoothing) * weighted + smoothing * weight.mean() * known
    mass = mass.unsqueeze(classes)
    return mass / count if loss.reduction == "mean" else mass


def hessian_product(
    loss: Loss, outputs: Tensor, targets: Any
) -> Callable[[Tensor], Tensor]:
    """Return ``v -> H v`` in the outputs, differentiable in ``outputs``.

    The Hessian is symmetric, so its product is the reverse derivative of the gradient.

    Raises:
        ValueError: If the loss cannot be differentiated.
    """
    differentiable = outputs.requires_grad
    f = outputs if differentiable else outputs.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(f, targets)
        if not value.requires_grad:
            raise ValueError(
                "expected a loss that can be differentiated in the outputs, got one "
                "whose value is cut off from them (detached, rounded or an argmax)"
            )
        (gradient,) = torch.autograd.grad(value, f, create_graph=True)

    def product(v: Tensor) -> Tensor:
        if not gradient.requires_grad:  # the loss is linear in the outputs
            return torch.zeros_like(v)
        (found,) = torch.autograd.grad(
            gradient, f, v, retain_graph=True, create_graph=differentiable
        )
        return found

    return product


def hessian_blocks(loss: Loss, outputs: Tensor, targets: Any) -> Tensor:
    """Return the Hessian of the loss in each sample's outputs, ``[n, K, K]``.

    ``K`` is the number of outputs of a sample; costs ``K`` products with the second
    derivative of the loss alone, none of the network.
    """
    samples, width = outputs.shape[0], outputs[0].numel()
    product = hessian_product(loss, outputs, targets)
    places = torch.eye(width, dtype=outputs.dtype, device=outputs.device)
    columns = [
        product(place.expand(samples, width).reshape(outputs.shape)) for place in places
    ]
    return torch.stack([c.reshape(samples, width) for c in columns], -1)


def hessian_roots(loss: Loss, outputs: Tensor, targets: Any) -> Iterator[Root]:
    """Yield ``(s_c, sign_c)`` with ``sum_c sign_c s_c s_c' = H_i`` for each sample.

    Args:
        loss: The loss, a sum (or mean) of terms of one sample each.
        outputs: Network outputs, ``[n, ...]``, without graph.
        targets: The targets; None where the Hessian does not depend on them.

    Yields:
        A tensor shaped as ``outputs`` and a sign, a float or ``[n]``.
    """
    width = outputs[0].numel()
    if loss.kind == "general":
        values, vectors = _eigen(loss, outputs, targets)
        for c in range(width):
            root = vectors[..., c] * values[:, c, None].abs().sqrt()
            yield root.view(outputs.shape), values[:, c].sign()
        return
    diagonal = None
    if loss.kind == "elementwise":
        diagonal = _diagonal(loss, outputs, targets).reshape(outputs.shape[0], -1)
    for c in range(width):
        place = torch.zeros(width, dtype=outputs.dtype, device=outputs.device)
        place[c] = 1.0
        if diagonal is None:
            yield _known_root(loss, outputs, targets, place), 1.0
        else:
            root = (diagonal.abs().sqrt() * place).view(outputs.shape)
            yield root, diagonal[:, c].sign()


def _diagonal(loss: Loss, outputs: Tensor, targets: Any) -> Tensor:
    """Diagonal of a diagonal Hessian: its row sums."""
    return hessian_product(loss, outputs, targets)(torch.ones_like(outputs)).detach()


def _eigen(loss: Loss, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of the blocks; half precision has no such routine."""
    blocks = hessian_blocks(loss, outputs, targets)
    wide = blocks if blocks.dtype == torch.float64 else blocks.float()
    values, vectors = torch.linalg.eigh(wide)
    return values.to(outputs.dtype), vectors.to(outputs.dtype)


def _known_root(loss: Loss, outputs: Tensor, targets: Any, place: Tensor) -> Tensor:
    """Column of a root of ``H_i`` at one output of each sample."""
    column = place.expand(outputs.shape[0], -1).reshape(outputs.shape)
    if loss.kind == "squared":
        return column * squared_scale(loss, outputs.shape, targets) ** 0.5
    classes = 1 if outputs.ndim > 1 else 0
    softmax = outputs.softmax(classes)
    scale = cross_entropy_scale(loss, outputs, targets)
    weighted = column * softmax.sqrt()
    return (weighted - softmax * weighted.sum(classes, keepdim=True)) * (
        scale.sqrt() * (column.sum(classes, keepdim=True) != 0)
    )


def hessian_sampler(
    loss: Loss, outputs: Tensor, targets: Any
) -> Callable[[], list[Root]]:
    r"""Return a function that draws ``v`` with :math:`E[v_i v_i^\top] = H_i`.

    Samples draw independently, and so do the outputs of one sample, so that cross terms
    vanish. For cross-entropy ``v`` is the gradient at a label drawn from the model's
    own softmax; for squared losses it is normal; else a random combination of the
    eigenvectors of the block.

    Args:
        loss: The loss, a sum (or mean) of terms of one sample each.
        outputs: Network outputs, ``[n, ...]``, without graph.
        targets: The targets; None where the Hessian does not depend on them.

    Returns:
        A function that returns a tensor shaped as ``outputs`` with its sign, and where
        blocks are indefinite a second one for their negative part.
    """
    if loss.kind == "squared":
        root = squared_scale(loss, outputs.shape, targets) ** 0.5
        return lambda: [(torch.randn_like(outputs) * root, 1.0)]
    if loss.kind == "cross_entropy":
        return _label_sampler(outputs, cross_entropy_scale(loss, outputs, targets))
    if loss.kind == "elementwise":
        values = _diagonal(loss, outputs, targets)
        return _signed_draws(values, lambda weights: weights)
    values, vectors = _eigen(loss, outputs, targets)
    return _signed_draws(
        values, lambda weights: (vectors @ weights.unsqueeze(-1)).view(outputs.shape)
    )


def _signed_draws(
    values: Tensor, combine: Callable[[Tensor], Tensor]
) -> Callable[[], list[Root]]:
    # What float rounding makes of a zero eigenvalue is no negative part.
    negative = bool((values < -1e-6 * values.abs().amax()).any())

    def draw() -> list[Root]:
        signs = torch.empty_like(values).bernoulli_(0.5).mul_(2).sub_(1)
        return [
            (combine((sign * values).clamp(min=0).sqrt() * signs), sign)
            for sign in ((1.0, -1.0) if negative else (1.0,))
        ]

    return draw


def _label_sampler(outputs: Tensor, scale: Tensor) -> Callable[[], list[Root]]:
    classes = 1 if outputs.ndim > 1 else 0
    softmax = outputs.softmax(classes)
    last = softmax.movedim(classes, -1)
    rows = last.reshape(-1, last.shape[-1])

    def draw() -> list[Root]:
        labels = torch.multinomial(rows, 1)
        onehot = torch.zeros_like(rows).scatter_(1, labels, 1.0)
        chosen = onehot.view(last.shape).movedim(-1, classes)
        return [((softmax - chosen) * scale.sqrt(), 1.0)]

    return draw


def holding(loss: Loss, outputs: Tensor, targets: Any) -> Loss | None:
    """Return the loss with a kind whose closed form is its Hessian, found by a probe.

    Args:
        loss: The loss.
        outputs: Network outputs, ``[n, ...]``, without graph.
        targets: The targets.

    Returns:
        The loss; None where no form by sample holds, or it is not known and a sample
        has more than 256 outputs.
    """
    v = torch.randn_like(outputs)
    expected = hessian_product(loss, outputs, targets)(v)
    tolerance = torch.finfo(outputs.dtype).eps ** 0.5
    for kind in dict.fromkeys((loss.kind, "general")):
        candidate = dataclasses.replace(loss, kind=kind)
        if kind == "general" and outputs[0].numel() > 256:
            break
        found = _hessian_times(candidate, outputs, targets, v)
        if (found - expected).norm() <= tolerance * (expected.norm() + 1e-30):
            return candidate
    return None


def _hessian_times(loss: Loss, outputs: Tensor, targets: Any, v: Tensor) -> Tensor:
    """The product with the Hessian that the loss's kind stands for."""
    if loss.kind == "squared":
        return v * squared_scale(loss, outputs.shape, targets)
    if loss.kind == "cross_entropy":
        classes = 1 if outputs.ndim > 1 else 0
        s = outputs.softmax(classes)
        centred = v - (s * v).sum(classes, keepdim=True)
        return cross_entropy_scale(loss, outputs, targets) * s * centred
    total = torch.zeros_like(v)
    for root, sign in hessian_roots(loss, outputs, targets):
        flat = (root * v).reshape(v.shape[0], -1).sum(1) * sign
        total += root * flat.view(-1, *(1,) * (v.ndim - 1))
    return total
