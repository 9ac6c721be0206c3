"""A penalty on the gradient of a loss, which is differentiated twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_dropout_ir.arrivals import graph_nodes
from torch_dropout_ir.functional import parameters
from torch_dropout_ir.regularizers.checks import check_differentiable
from torch_dropout_ir.regularizers.gradient_norm import learning_rates
from torch_dropout_ir.regularizers.inner_products import weighted_inner
from torch_dropout_ir.sharpness.frozen import TwiceDifferentiable

_ONCE: Final = (
    "modified_loss: expected a model and a loss that torch can differentiate twice, "
    "got an operator whose derivative has none ({}), as those of `nn.EmbeddingBag`, "
    "CTC and the margin losses. Write it in others (`nn.Embedding` and a mean), or "
    "use `kind='L1'` or 'L4' with `r1='monte_carlo'`."
)
# Nodes of a gradient's graph that raise when the penalty is differentiated.
_ABSENT: Final = ("NotImplemented", "EmbeddingBagBackwardBackward")
_KNOWN: Final = ("EmbeddingBag", "Ctc", "Margin")


def _lacking(risk: Tensor) -> str:
    """Say which operators of a loss, by the names of their derivatives, it may be."""
    names = {
        node.name() for node in graph_nodes([risk.grad_fn] if risk.grad_fn else [])
    }
    known = {name for name in names if any(word in name for word in _KNOWN)}
    found = known or {name for name in names if "AccumulateGrad" not in name}
    return " or ".join(sorted(found))


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

    Raises:
        NotImplementedError: If torch cannot differentiate the gradient again.
    """
    params = parameters(model)
    rates = learning_rates(lr, list(params))
    check_differentiable("modified_loss", risk)
    # A root that requires a gradient: without one, torch takes a loss that can be
    # differentiated once for a linear one, and says nothing.
    root = torch.ones_like(risk).requires_grad_()
    try:
        found = torch.autograd.grad(
            risk, list(params.values()), root, create_graph=True, allow_unused=True
        )
    except NotImplementedError as err:
        raise NotImplementedError(_ONCE.format(err)) from err
    ends = [g.grad_fn for g in found if g is not None and g.grad_fn]
    for node in graph_nodes(ends):
        if any(part in node.name() for part in _ABSENT):  # raises when it is run
            raise NotImplementedError(_ONCE.format(_lacking(risk)))
    pairs = [(r, g) for r, g in zip(rates, found, strict=True) if g is not None]
    if not pairs:
        return risk.new_zeros(())
    own, slopes = zip(*pairs, strict=True)
    return weighted_inner(own, slopes, slopes)
