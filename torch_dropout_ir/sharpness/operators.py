"""Curvature of the loss as an operator on parameter dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_dropout_ir.functional import (
    Batch,
    as_batches,
    batch_size,
    parameters,
    risk,
)
from torch_dropout_ir.losses import Loss, resolve_loss
from torch_dropout_ir.vectors import Params, to_params, to_vector

Vector = TypeVar("Vector", Tensor, Params)
Product = Callable[[Params], dict[str, Tensor]]


class HessianOperator:
    """The Hessian of ``R_S`` at the parameters that the model had at construction.

    ``op @ v`` takes a dictionary with the names and shapes of the parameters, or a flat
    vector ``[P]`` in the same order, and returns the like.

    Attributes:
        params: Copies of the parameters at which the Hessian is taken.
        num_matvecs: Products computed so far.
    """

    def __init__(self, model: nn.Module, loss: Loss, batches: Any) -> None:
        self.params: dict[str, Tensor] = {
            name: x.detach().clone() for name, x in parameters(model).items()
        }
        self.num_matvecs = 0
        self._gradient = torch.func.grad(risk(model, loss))
        self._summed = loss.reduction == "sum"
        self._batches: Iterable[Batch] = as_batches(batches)
        self._cached: Product | None = None
        if isinstance(self._batches, list) and len(self._batches) == 1:
            self._cached = self._linearize(self._batches[0])

    def _linearize(self, batch: Batch) -> Product:
        """Return the product of one batch: the gradient's own reverse derivative."""
        # Fused attention has no second derivative; the math kernel has.
        with sdpa_kernel(SDPBackend.MATH):
            product = torch.func.vjp(
                lambda params: self._gradient(params, batch), self.params
            )[1]
        return lambda v: cast("dict[str, Tensor]", product(dict(v))[0])

    @torch.no_grad()
    def _mean_product(self, v: Params) -> dict[str, Tensor]:
        if self._cached is not None:
            return self._cached(v)
        total = {name: torch.zeros_like(x) for name, x in self.params.items()}
        weight = 0.0
        for batch in self._batches:
            share = 1.0 if self._summed else float(batch_size(batch))
            for name, piece in self._linearize(batch)(v).items():
                total[name].add_(piece, alpha=share)
            weight += share
        if not weight:
            raise ValueError("hessian: expected at least one batch, got none")
        divisor = 1.0 if self._summed else weight
        return {name: x / divisor for name, x in total.items()}

    def __matmul__(self, v: Vector) -> Vector:
        self.num_matvecs += 1
        if isinstance(v, Tensor):
            if v.shape != (self.shape[1],):
                raise ValueError(
                    f"hessian: expected a vector of shape [{self.shape[1]}], got "
                    f"{list(v.shape)}"
                )
            return to_vector(self._mean_product(to_params(v, self.params)))
        self._check_names(v)
        return cast("Vector", self._mean_product(v))

    def _check_names(self, v: Mapping[str, Tensor]) -> None:
        wrong = [
            name
            for name in {**self.params, **v}
            if name not in v
            or name not in self.params
            or v[name].shape != self.params[name].shape
        ]
        if wrong:
            raise ValueError(
                "hessian: expected a dictionary with the names and shapes of the "
                f"parameters; these are missing, foreign or misshapen: {wrong}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)`` with ``P`` the number of parameters."""
        size = sum(x.numel() for x in self.params.values())
        return size, size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of flat vectors."""
        return to_vector({n: x.new_empty(0) for n, x in self.params.items()}).dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(iter(self.params.values())).device

    def dense(self) -> Tensor:
        """Return the matrix ``[P, P]``, at the cost of ``P`` products.

        Returns:
            The Hessian in the order of the parameters.
        """
        eye = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return torch.stack([self @ column for column in eye], 1)


def hessian(model: nn.Module, loss: Any, batches: Any) -> HessianOperator:
    r"""Return the Hessian of ``R_S``, the loss with dropout off, as an operator.

    .. math:: H = \frac{\partial^2}{\partial \theta^2} R_S(\theta), \qquad
        R_S(\theta) = \frac{1}{N} \sum_b n_b \, \ell_b(\theta)

    Batches are weighted by their number of samples, so ragged ones are exact for losses
    that are plain means (or sums) over samples; class weights and ignored targets are
    no such means. Batch
    normalization keeps the mode it has; its running statistics do not move. One batch
    is linearized once, and each product costs about one backward pass; several are
    streamed, one at a time in memory.

    Args:
        model: The model; left as it is.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable
            ``(outputs, targets) -> scalar``, the mean (or sum) over samples.
        batches: One batch ``(inputs, targets)``, or a list or loader of batches.

    Returns:
        The operator, with ``@``, ``shape``, ``num_matvecs`` and ``dense()``.

    References:
        Pearlmutter, *Fast exact multiplication by the Hessian*, 1994; Zhang & Xu,
        *Implicit regularization of dropout*, section VII.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> op = hessian(net, "mse", (torch.eye(2), torch.zeros(2, 1)))
        >>> op.dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    return HessianOperator(model, resolve_loss(loss), batches)
