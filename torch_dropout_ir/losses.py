r"""Floor 1: the user's loss, and its Hessian in the outputs.

Semantics:

* A regularizer is in the units of the user's loss, so it is defined through that
  loss's own Hessian :math:`H_i = \partial^2 \ell / \partial f_i^2` in the outputs of
  sample ``i``, with the user's reduction folded in.
* ``"mse"`` is :func:`torch.nn.functional.mse_loss` (the mean over all ``n d'``
  entries, without 1/2) and ``"cross_entropy"`` is
  :func:`torch.nn.functional.cross_entropy`. The paper's risk is
  :func:`half_squared_error`.
* Mean-squared error and plain cross-entropy have closed forms; for any other callable
  the blocks :math:`H_i` come from products with the second derivative, exact as long
  as the loss is a sum (or mean) of terms of one sample each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LossFunction = Callable[[Any, Any], Tensor]
Root = tuple[Tensor, "Tensor | float"]


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    r"""Return the paper's risk of a batch.

    .. math:: R_S = \frac{1}{2n} \sum_i \lVert f(x_i) - y_i \rVert^2

    Args:
        outputs: Network outputs, ``[n, ...]``.
        targets: Targets of the same shape.

    Returns:
        Scalar.

    Raises:
        ValueError: If the shapes differ.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, section III.

    Example:
        >>> half_squared_error(torch.ones(4, 2), torch.zeros(4, 2))
        tensor(1.)
    """
    if outputs.shape != targets.shape:
        raise ValueError(
            "half_squared_error: expected `targets` of the shape of `outputs`, got "
            f"{list(targets.shape)} and {list(outputs.shape)}"
        )
    return (outputs - targets).square().sum() / (2 * outputs.shape[0])


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss ``(outputs, targets) -> scalar`` with what is known of its curvature.

    Attributes:
        function: The callable.
        kind: ``"squared"`` where the Hessian is a multiple of the identity,
            ``"cross_entropy"`` where it is that of plain cross-entropy, else
            ``"general"``.
        reduction: ``"mean"`` or ``"sum"`` over the samples.
    """

    function: LossFunction
    kind: Literal["squared", "cross_entropy", "general"] = "general"
    reduction: Literal["mean", "sum"] = "mean"

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Evaluate the loss.

        Returns:
            Scalar.

        Raises:
            ValueError: If the result is no scalar.
        """
        value = self.function(outputs, targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = list(value.shape) if isinstance(value, Tensor) else type(value)
            raise ValueError(
                f"expected `loss(outputs, targets)` to return a scalar, got {got}. "
                "Use a reduction of 'mean' or 'sum'."
            )
        return value.reshape(())

    @property
    def is_quadratic(self) -> bool:
        """Whether the Hessian in the outputs is known to be constant."""
        return self.kind == "squared"


def resolve_loss(loss: Any) -> Loss:
    """Read the user's ``loss`` argument.

    Args:
        loss: ``"mse"``, ``"cross_entropy"``, a loss module, or a callable
            ``(outputs, targets) -> scalar``.

    Returns:
        The loss with its kind.

    Raises:
        ValueError: If ``loss`` is another string, or a module without reduction.
        TypeError: If ``loss`` cannot be called.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        named = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}
        if loss not in named:
            raise ValueError(
                "expected `loss` to be 'mse', 'cross_entropy', a module or a callable "
                f"`(outputs, targets) -> scalar`, got {loss!r}"
            )
        loss = named[loss]
    if not callable(loss):
        raise TypeError(
            "expected `loss` to be 'mse', 'cross_entropy', a module or a callable "
            f"`(outputs, targets) -> scalar`, got {type(loss).__name__}"
        )
    keywords = getattr(loss, "keywords", {})  # of a functools.partial
    reduction = keywords.get("reduction", getattr(loss, "reduction", "mean"))
    if reduction not in ("mean", "sum", "batchmean"):
        raise ValueError(
            f"expected a loss with reduction 'mean' or 'sum', got {reduction!r}: the "
            "regularizer of an unreduced loss is not defined"
        )
    return Loss(loss, _kind(loss), "sum" if reduction == "sum" else "mean")


def _kind(loss: Any) -> Literal["squared", "cross_entropy", "general"]:
    if loss in (F.mse_loss, half_squared_error) or type(loss) is nn.MSELoss:
        return "squared"
    # Log-probabilities are their own log-softmax: there NLL is cross-entropy.
    if loss in (F.cross_entropy, F.nll_loss):
        return "cross_entropy"
    if type(loss) in (nn.CrossEntropyLoss, nn.NLLLoss) and loss.weight is None:
        return "cross_entropy"
    return "general"


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
    gradient = torch.func.grad(lambda f: loss(f, targets))
    pull = torch.func.vjp(gradient, outputs)[1]
    return lambda v: cast("Tensor", pull(v)[0])


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
