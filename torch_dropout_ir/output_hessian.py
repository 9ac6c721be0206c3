r"""Floor 1: the Hessian of a loss in the outputs, its roots and random roots of it.

Squared errors, cross-entropy and losses of one output each have closed forms; for any
other callable the blocks :math:`H_i` of the samples come from products with the second
derivative, as long as the loss is a sum (or mean) of terms of one sample each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from torch_dropout_ir.arrivals import once_differentiable, root_of
from torch_dropout_ir.kernels import less_a_label_
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.output_scales import (
    cross_entropy_scale,
    even_scale,
    is_convex,
    is_logistic,
    logistic_diagonal,
    squared_scale,
)
from torch_dropout_ir.registration import label_root

Root = tuple[Tensor, "Tensor | float"]
Rows: TypeAlias = "Tensor | slice"
ALL: Final = slice(None)
_WIDE: Final = (torch.float32, torch.float64)
_DRAWN_AT_ONCE: Final = 2**18
_DRAWN_IN_ONE: Final = 2**14  # outputs; above that torch's own kernels have threads


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
        (gradient,) = torch.autograd.grad(value, f, root_of(value), create_graph=True)
    if once_differentiable([gradient]):
        raise ValueError(
            "expected a loss with a second derivative, got one that torch can "
            "differentiate once (`once_differentiable`)"
        )

    def product(v: Tensor) -> Tensor:
        if not gradient.requires_grad:  # the loss is linear in the outputs
            return torch.zeros_like(v)
        (found,) = torch.autograd.grad(
            gradient, f, v, retain_graph=True, create_graph=differentiable,
            materialize_grads=True,
        )  # fmt: skip
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


class HessianRoots:
    r"""Roots of the loss's Hessian in the outputs of all samples, or of some.

    Args:
        loss: The loss, a sum (or mean) of terms of one sample each.
        outputs: Network outputs, ``[n, ...]``, without graph.
        targets: The targets; None where the Hessian does not depend on them.
    """

    def __init__(self, loss: Loss, outputs: Tensor, targets: Any) -> None:
        self._kind = loss.kind
        self._outputs = outputs
        self._vectors: Tensor | None = None
        if loss.kind == "squared":
            self._factor = squared_scale(loss, outputs.shape, targets) ** 0.5
        elif loss.kind == "cross_entropy":
            even = even_scale(loss, outputs, targets)
            self._mass: Tensor | float = (
                cross_entropy_scale(loss, outputs, targets) if even is None else even
            )
        elif loss.kind == "elementwise":
            self._values = _diagonal(loss, outputs, targets)
        else:
            self._values, self._vectors = _eigen(loss, outputs, targets)
        self._signs: tuple[float, ...] = (1.0,)
        if loss.kind in ("elementwise", "general") and not is_convex(loss):
            # What float rounding makes of a zero eigenvalue is no negative part.
            negative = self._values < -1e-6 * self._values.abs().amax()
            self._signs = (1.0, -1.0) if bool(negative.any()) else (1.0,)

    @property
    def like(self) -> Tensor:
        """The outputs that it was made of."""
        return self._outputs

    @property
    def has_one(self) -> bool:
        """Whether what is drawn is one root, and not one more for a negative part."""
        return len(self._signs) == 1

    def exact(self, rows: Rows = ALL) -> Iterator[Root]:
        """Yield ``(s_c, sign_c)`` with ``sum_c sign_c s_c s_c' = H_i`` a sample.

        Args:
            rows: The samples.

        Yields:
            A tensor shaped as their outputs and a sign, a float or one a sample.
        """
        f = _of(self._outputs, rows)
        width = f[0].numel()
        for c in range(width):
            if self._vectors is not None:
                values = _of(self._values, rows)[:, c]
                root = _of(self._vectors, rows)[..., c] * values[:, None].abs().sqrt()
                yield root.view(f.shape), values.sign()
                continue
            place = torch.zeros(width, dtype=f.dtype, device=f.device)
            place[c] = 1.0
            column = place.expand(f.shape[0], -1).reshape(f.shape)
            if self._kind == "elementwise":
                values = _of(self._values, rows)
                sign = values.reshape(f.shape[0], -1)[:, c].sign()
                yield values.abs().sqrt() * column, sign
            elif self._kind == "squared":
                yield column * self._factor, 1.0
            else:
                yield self._softmax_root(f, column, rows), 1.0

    def _softmax_root(self, f: Tensor, column: Tensor, rows: Rows) -> Tensor:
        """Column of a root of ``H_i`` at one output of each sample."""
        classes = 1 if f.ndim > 1 else 0
        softmax = f.softmax(classes)
        weighted = column * softmax.sqrt()
        centred = weighted - softmax * weighted.sum(classes, keepdim=True)
        here = column.sum(classes, keepdim=True) != 0
        return centred * here * self._of_mass(rows) ** 0.5

    def _of_mass(self, rows: Rows) -> Tensor | float:
        """Return what the terms of samples weigh, one number where they do alike."""
        return _of(self._mass, rows) if isinstance(self._mass, Tensor) else self._mass

    def sample(self, rows: Rows = ALL) -> list[Root]:
        r"""Draw ``v`` with :math:`E[v_i v_i^\top] = H_i`.

        Samples draw independently, and so do the outputs of one sample, so that cross
        terms vanish. For cross-entropy ``v`` is the gradient at a label drawn from the
        model's own softmax; for squared losses it is normal; else a random combination
        of the eigenvectors of the block.

        Args:
            rows: The samples.

        Returns:
            A tensor shaped as their outputs with its sign or weight; where blocks are
            indefinite a second one for their negative part.
        """
        f = _of(self._outputs, rows)
        if self._kind == "squared":
            drawn = torch.randn_like(f)
            if f.dtype in _WIDE:  # half precision has no room for the square of it
                return [(drawn, self._factor**2)]
            return [(drawn.mul_(self._factor), 1.0)]
        if self._kind == "cross_entropy":
            mass = self._of_mass(rows)
            if not isinstance(mass, Tensor):
                return [(_less_a_label(f), mass)]
            return [(_less_a_label(f).mul_(mass.sqrt()), 1.0)]
        values = _of(self._values, rows)
        drawn = torch.empty_like(values).bernoulli_(0.5).mul_(2).sub_(1)
        roots: list[Root] = []
        for sign in self._signs:
            weights = (sign * values).clamp(min=0).sqrt() * drawn
            if self._vectors is not None:
                weights = _of(self._vectors, rows) @ weights.unsqueeze(-1)
            roots.append((weights.view(f.shape), sign))
        return roots


def _of(x: Tensor, rows: Rows) -> Tensor:
    return x if rows is ALL else x[rows]


def hessian_roots(loss: Loss, outputs: Tensor, targets: Any) -> Iterator[Root]:
    """Yield ``(s_c, sign_c)`` with ``sum_c sign_c s_c s_c' = H_i`` for each sample."""
    return HessianRoots(loss, outputs, targets).exact()


def _diagonal(loss: Loss, outputs: Tensor, targets: Any) -> Tensor:
    """Diagonal of a diagonal Hessian: its row sums."""
    if is_logistic(loss) and outputs.dtype in _WIDE:
        return logistic_diagonal(loss, outputs, targets)
    return hessian_product(loss, outputs, targets)(torch.ones_like(outputs)).detach()


def _eigen(loss: Loss, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of the blocks; half precision has no such routine."""
    blocks = hessian_blocks(loss, outputs, targets)
    wide = blocks if blocks.dtype == torch.float64 else blocks.float()
    values, vectors = torch.linalg.eigh(wide)
    return values.to(outputs.dtype), vectors.to(outputs.dtype)


def _less_a_label(f: Tensor) -> Tensor:
    """Softmax, less one at a label drawn from it."""
    if f.ndim == 2 and f.is_cpu and f.dtype in _WIDE and f.numel() <= _DRAWN_IN_ONE:
        return label_root(f)
    classes = 1 if f.ndim > 1 else 0
    softmax = f.softmax(classes)
    # Some samples at a time, lest the times take twice the space of the outputs.
    count = max(1, _DRAWN_AT_ONCE * f.shape[0] // max(1, f.numel()))
    for block in softmax.split(count) if f.ndim > 1 and len(f) > count else (softmax,):
        less_a_label_(block, classes)
    return softmax


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
