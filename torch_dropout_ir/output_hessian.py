r"""Floor 1: the Hessian of a loss in the outputs, its roots and random roots of it.

Mean-squared error and plain cross-entropy have closed forms; for any other callable
the blocks :math:`H_i` of the samples come from products with the second derivative,
exact as long as the loss is a sum (or mean) of terms of one sample each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torch_dropout_ir.losses import Loss, half_squared_error

Root = tuple[Tensor, "Tensor | float"]


def squared_scale(loss: Loss, outputs_shape: torch.Size) -> float:
    """Return ``a`` of ``H_i = a * identity`` for a squared loss."""
    if loss.function is half_squared_error:
        return 1.0 / outputs_shape[0]
    return 2.0 / (outputs_shape.numel() if loss.reduction == "mean" else 1)


def cross_entropy_scale(loss: Loss, outputs: Tensor, targets: Any) -> Tensor:
    """Return ``a_i`` of ``H_i = a_i (diag(s_i) - s_i s_i')``, 1 in place of classes.

    Ignored targets weigh nothing; label smoothing leaves the mass of a target at 1.
    """
    classes = 1 if outputs.ndim > 1 else 0
    mass = torch.ones_like(outputs.detach().narrow(classes, 0, 1))
    count: float | Tensor = float(mass.numel())
    if isinstance(targets, Tensor) and targets.is_floating_point():
        smoothing = getattr(loss.function, "label_smoothing", 0.0)
        mass = (1 - smoothing) * targets.sum(classes, keepdim=True) + smoothing
    elif isinstance(targets, Tensor):
        ignored = getattr(loss.function, "ignore_index", -100)
        mass = (targets != ignored).to(outputs.dtype).unsqueeze(classes)
        count = mass.sum()
    return mass / count if loss.reduction == "mean" else mass


def hessian_product(
    loss: Loss, outputs: Tensor, targets: Any
) -> Callable[[Tensor], Tensor]:
    """Return ``v -> H v`` in the outputs, differentiable in ``outputs``.

    The Hessian is symmetric, so its product is the reverse derivative of the gradient.
    """
    differentiable = outputs.requires_grad
    f = outputs if differentiable else outputs.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(f, targets), f, create_graph=True)

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
        loss: The loss.
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
    for c in range(width):
        place = torch.zeros(width, dtype=outputs.dtype, device=outputs.device)
        place[c] = 1.0
        yield _known_root(loss, outputs, targets, place), 1.0


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
        return column * squared_scale(loss, outputs.shape) ** 0.5
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
        loss: The loss.
        outputs: Network outputs, ``[n, ...]``, without graph.
        targets: The targets; None where the Hessian does not depend on them.

    Returns:
        A function that returns a tensor shaped as ``outputs`` with its sign, and where
        blocks are indefinite a second one for their negative part.
    """
    if loss.kind == "squared":
        scale = squared_scale(loss, outputs.shape) ** 0.5
        return lambda: [(torch.randn_like(outputs) * scale, 1.0)]
    if loss.kind == "cross_entropy":
        return _label_sampler(outputs, cross_entropy_scale(loss, outputs, targets))
    values, vectors = _eigen(loss, outputs, targets)
    # What float rounding makes of a zero eigenvalue is no negative part.
    negative = bool((values < -1e-6 * values.abs().amax()).any())

    def draw() -> list[Root]:
        signs = torch.empty_like(values).bernoulli_(0.5).mul_(2).sub_(1)
        return [
            (
                _combine(vectors, (sign * values).clamp(min=0).sqrt() * signs, outputs),
                sign,
            )
            for sign in ((1.0, -1.0) if negative else (1.0,))
        ]

    return draw


def _combine(vectors: Tensor, weights: Tensor, outputs: Tensor) -> Tensor:
    return (vectors @ weights.unsqueeze(-1)).view(outputs.shape)


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
