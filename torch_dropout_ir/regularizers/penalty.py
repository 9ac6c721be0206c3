"""A penalty on the gradient of a loss, which is differentiated twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_dropout_ir.functional import parameters
from torch_dropout_ir.regularizers.checks import check_differentiable
from torch_dropout_ir.regularizers.gradient_norm import learning_rates
from torch_dropout_ir.regularizers.inner_products import weighted_inner
from torch_dropout_ir.sharpness.frozen import TwiceDifferentiable


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run nothing that has no second derivative, or a wrong one."""
    with (
        sdpa_kernel(SDPBackend.MATH),
        TwiceDifferentiable(),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


def gradient_penalty(
    model: nn.Module, risk: Tensor, lr: float | Mapping[str, float]
) -> Tensor:
    """Return ``(lr / 4) ||grad risk||^2`` with its graph in the parameters.

    Args:
        model: The model.
        risk: A loss with its graph.
        lr: One coefficient, or one a parameter name.

    Returns:
        Scalar.
    """
    params = parameters(model)
    rates = learning_rates(lr, list(params))
    check_differentiable("modified_loss", risk)
    # A root that requires a gradient: without one, torch takes a loss that can be
    # differentiated once for a linear one, and says nothing.
    root = torch.ones_like(risk).requires_grad_()
    found = torch.autograd.grad(
        risk, list(params.values()), root, create_graph=True, allow_unused=True
    )
    pairs = [(r, g) for r, g in zip(rates, found, strict=True) if g is not None]
    if not pairs:
        return risk.new_zeros(())
    own, slopes = zip(*pairs, strict=True)
    return weighted_inner(own, slopes, slopes)
