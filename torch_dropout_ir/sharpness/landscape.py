"""The loss along a line through the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_dropout_ir.functional import as_batches, batch_size, parameters, risk
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.vectors import Params


@torch.no_grad()
def filter_normalized_direction(
    model: nn.Module, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    r"""Draw a random direction with the norm of each filter of the model.

    .. math:: d_f \leftarrow d_f \, \lVert \theta_f \rVert / \lVert d_f \rVert

    A filter is the kernel of one output channel of a convolution; the whole weight of a
    linear layer, as in the paper. Parameters of one dimension (biases, normalization)
    stay where they are: their direction is zero.

    Args:
        model: The model.
        generator: Source of the draws; torch's default one if None.

    Returns:
        A dictionary with the names and shapes of the parameters.

    References:
        Li et al., *Visualizing the loss landscape of neural nets*, NeurIPS 2018; Zhang
        & Xu, *Implicit regularization of dropout*, section VII.

    Example:
        >>> direction = filter_normalized_direction(nn.Linear(3, 2))
        >>> sorted(direction), direction["bias"].tolist()
        (['bias', 'weight'], [0.0, 0.0])
    """

    def normalized(x: Tensor) -> Tensor:
        if x.ndim < 2:
            return torch.zeros_like(x)
        d = torch.empty_like(x).normal_(generator=generator)
        dims = tuple(range(1, x.ndim)) if x.ndim > 2 else (0, 1)
        length = torch.linalg.vector_norm(d, dim=dims, keepdim=True)
        wanted = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
        return d * wanted / torch.where(length > 0, length, 1.0)

    return {name: normalized(x.detach()) for name, x in parameters(model).items()}


@torch.no_grad()
def loss_slice(
    model: nn.Module,
    loss: Any,
    batches: Any,
    alphas: Tensor | Sequence[float],
    direction: Params | None = None,
) -> Tensor:
    r"""Return the loss along a line.

    .. math:: L(\alpha) = R_S(\theta + \alpha d)

    Args:
        model: The model; left as it is.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        batches: One batch ``(inputs, targets)``, or a list or loader of batches.
        alphas: Steps along the direction, ``[A]``.
        direction: Direction by parameter name; a random filter-normalized one if None.

    Returns:
        Losses, float64 ``[A]``.

    Raises:
        ValueError: If ``direction`` lacks a parameter.

    References:
        Li et al., *Visualizing the loss landscape of neural nets*, NeurIPS 2018; Zhang
        & Xu, *Implicit regularization of dropout*, Fig. 12.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> batch = torch.ones(1, 1), net(torch.ones(1, 1)).detach()
        >>> loss_slice(net, "mse", batch, [0.0, 2.0], {"weight": torch.ones(1, 1)})
        tensor([0., 4.], dtype=torch.float64)
    """
    resolved = resolve_loss(loss)
    evaluate = risk(model, resolved)
    params = {name: x.detach() for name, x in parameters(model).items()}
    along = filter_normalized_direction(model) if direction is None else direction
    if missing := [name for name in params if name not in along]:
        raise ValueError(
            "loss_slice: expected a `direction` with every parameter that requires a "
            f"gradient, got none for {missing}"
        )

    def at(alpha: float) -> float:
        moved = {n: torch.add(x, along[n], alpha=alpha) for n, x in params.items()}
        total = weight = 0.0
        for batch in as_batches(batches):
            share = 1.0 if resolved.reduction == "sum" else float(batch_size(batch))
            total += share * float(evaluate(moved, batch))
            weight += share
        return total if resolved.reduction == "sum" else total / weight

    return torch.tensor([at(float(a)) for a in alphas], dtype=torch.float64)
