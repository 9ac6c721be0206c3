"""Floor 1: losses that take a derivative in the outputs, as a gradient penalty does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.leaves import flatten

# What torch says where a derivative is taken in what is no part of a graph.
_NO_GRAPH: Final = ("does not require grad", "not have been used in the graph")
_OF_OTHERS: Final = (
    "expected a loss that takes derivatives in the outputs alone, got one that takes "
    "them in something else, as in the inputs or parameters ({}): what is measured is "
    "a function of outputs and targets. Leave that term out, or take `gradient_norm`, "
    "`modified_loss` with 'L2', 'L3' or 'regu', or 'L1' with r1='monte_carlo', which "
    "run the model as training does."
)


def lacks_graph(err: Exception) -> bool:
    """Whether an error is that of a derivative in what is no part of a graph."""
    return isinstance(err, RuntimeError) and any(x in str(err) for x in _NO_GRAPH)


def with_graph(
    loss: Callable[[Any, Any], Tensor], outputs: Any, targets: Any
) -> Tensor:
    """Return the value of a loss that takes a derivative in outputs without a graph.

    Without a graph where autograd is off; outputs that have one keep it.

    Raises:
        RuntimeError: If it takes a derivative in something else.
    """
    leaves, rebuild = flatten(outputs)
    at = [_differentiable(x) for x in leaves]
    try:
        with torch.enable_grad():
            value = loss(rebuild(at), targets)
    except RuntimeError as err:
        if lacks_graph(err):
            raise RuntimeError(_OF_OTHERS.format(err)) from err
        raise
    return value if torch.is_grad_enabled() else value.detach()


def _differentiable(x: Any) -> Any:
    """Return a tensor of real numbers as one that requires a gradient."""
    if isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad:
        return x.detach().requires_grad_()
    return x
