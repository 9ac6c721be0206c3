r"""A penalty on the gradient of a loss, which is differentiated twice.

The derivative of :math:`\frac{\epsilon}{4} \lVert g \rVert^2` is
:math:`\frac{\epsilon}{2} H g`, a product with the Hessian. Where a loss depends on
nothing but the model's parameters it is made with the value: the graph of both
derivatives is let go of as it runs, and may be that of a part of the batch at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_dropout_ir import tracing
from torch_dropout_ir.arrivals import arrivals, graph_nodes, last_nodes, parts_given
from torch_dropout_ir.functional import Batch, call, parameters
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.regularizers.checks import check_differentiable
from torch_dropout_ir.regularizers.gradient_norm import learning_rates
from torch_dropout_ir.regularizers.inner_products import weighted_inner
from torch_dropout_ir.regularizers.known_gradient import with_gradient
from torch_dropout_ir.regularizers.masked_rows import MaskedRows
from torch_dropout_ir.regularizers.outputs import OutputsRead
from torch_dropout_ir.sharpness.derivatives import LeanDerivatives
from torch_dropout_ir.sharpness.frozen import TwiceDifferentiable
from torch_dropout_ir.sharpness.linear import added_into

_ONCE: Final = (
    "modified_loss: expected a model and a loss that torch can differentiate twice, "
    "got an operator whose derivative has none ({}), as those of `nn.EmbeddingBag`, "
    "CTC and the margin losses. Write it in others (`nn.Embedding` and a mean), or "
    "use `kind='L1'` or 'L4' with `r1='monte_carlo'`."
)
# Nodes of a gradient's graph that raise when the penalty is differentiated.
_ABSENT: Final = ("NotImplemented", "EmbeddingBagBackwardBackward")
_KNOWN: Final = ("EmbeddingBag", "Ctc", "Margin")
_VIEWS: Final = ("View", "Transpose", "TBackward", "Permute", "Expand", "Alias")
# A graph that is let go of as its derivative runs, over what the pass made.
_GRAPH: Final = 3


def _lacking(risk: Tensor) -> str:
    """Say which operators of a loss, by the names of their derivatives, it may be."""
    names = {
        node.name() for node in graph_nodes([risk.grad_fn] if risk.grad_fn else [])
    }
    known = {name for name in names if any(word in name for word in _KNOWN)}
    found = known or {name for name in names if "AccumulateGrad" not in name}
    return " or ".join(sorted(found))


@contextlib.contextmanager
def twice_differentiable() -> Iterator[TwiceDifferentiable]:
    """Run nothing that has no second derivative, or a wrong one."""
    with (
        sdpa_kernel(SDPBackend.MATH),
        TwiceDifferentiable() as operations,
        torch.compiler.set_stance("force_eager"),
    ):
        yield operations


def with_penalty(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    lr: float | Mapping[str, float],
    *,
    weight: float,
    sign: float,
    move_buffers: bool,
    max_bytes: int | None,
) -> Tensor:
    r"""Return a risk under dropout with a penalty on its gradient, at the same masks.

    .. math::
        w R_{drop} + s \frac{\epsilon}{4} \lVert \nabla R_{drop} \rVert^2

    Args:
        model: The model.
        batch: The batch.
        loss: The loss.
        lr: One coefficient, or one a parameter name.
        weight: :math:`w`.
        sign: :math:`s`.
        move_buffers: Whether running statistics move, as in a step of training.
        max_bytes: Memory of a graph of second derivatives, beyond which it is made of
            parts of the batch, if samples do not meet; None keeps the graph of all.

    Returns:
        Scalar, to be differentiated in the parameters.

    Raises:
        ValueError: If ``lr`` lacks a parameter, or the loss depends on none.
        NotImplementedError: If torch cannot differentiate the gradient again.
    """  # noqa: DOC502 (raised by the checks)
    named = parameters(model)
    params, rates = list(named.values()), learning_rates(lr, list(named))
    rows = MaskedRows(model, batch, loss, move_buffers)
    with twice_differentiable() as operations:
        outputs = call(model, batch[0], move_buffers=move_buffers)
        risk = loss(outputs, batch[1])
    check_differentiable("modified_loss", risk)
    made = _made_of(risk, params)
    if made is None or max_bytes is None:
        penalty = sign * _penalty(_slopes(risk, params), rates)
        return penalty + weight * risk if weight else penalty
    slopes: list[Tensor | None]
    large = _GRAPH * made > max_bytes and made >= sum(x.nbytes for x in params)
    if large and not operations.again and rows.apart(outputs, risk):
        slopes = [*torch.autograd.grad(risk, params, allow_unused=True)]
        total = _Total(params, slopes, rates, weight, sign)
        if not all(total.add_part(part) for part in rows.parts()):
            total = _Total(params, slopes, rates, weight, sign)
            with rows.again(), twice_differentiable():
                whole = loss(call(model, batch[0]), batch[1])
            total.add(_slopes(whole, params))
    else:
        found = _slopes(risk, params)
        slopes = [None if g is None else g.detach() for g in found]
        total = _Total(params, slopes, rates, weight, sign)
        total.add(found)
    value = sign * _penalty(slopes, rates)
    value = value + weight * risk.detach() if weight else value
    return with_gradient(value, params, total.gradient)


class _Total:
    """The gradient of a risk and of a penalty on that, added up.

    Args:
        params: The parameters.
        slopes: The gradient of the risk, None where there is none.
        rates: Coefficient of each parameter.
        weight: Factor of the risk.
        sign: Factor of the penalty.

    Attributes:
        gradient: What has been added up.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        slopes: Sequence[Tensor | None],
        rates: Sequence[float],
        weight: float,
        sign: float,
    ) -> None:
        self.gradient = [None if g is None else g * weight for g in slopes]
        self._params = params
        most = max(rates)
        self._scale = sign * most / 2
        # At one rate for all, the gradient itself: nothing else of its size.
        self._at = {
            i: g if r == most else g * (r / most)
            for i, (g, r) in enumerate(zip(slopes, rates, strict=True))
            if g is not None and r
        }

    def add(self, slopes: Sequence[Tensor | None]) -> None:
        """Add a product with the Hessian, as the derivative of a gradient.

        Args:
            slopes: The gradient with its graph, which is let go of.
        """
        starts = {
            i: get_gradient_edge(g)
            for i, g in enumerate(slopes)
            if i in self._at and g is not None and g.requires_grad
        }
        self._add(starts)

    def add_part(
        self, part: contextlib.AbstractContextManager[OutputsRead | None]
    ) -> bool:
        """Add the product of a part of the batch, if it is what it was."""
        starts = {}

        def note(i: int, g: Tensor) -> None:  # its value is let go of
            if i in self._at and g.requires_grad:
                starts[i] = get_gradient_edge(g)

        with twice_differentiable(), LeanDerivatives(), part as read:
            if read is None:
                return False
            risk = read.risk(read.tensors)
            with arrivals(self._params, note):
                _slopes(risk, self._params)
            self._add(starts)
        return True

    def _add(self, starts: Mapping[int, GradientEdge]) -> None:
        if not starts:
            return
        edges, at = list(starts.values()), [self._at[i] for i in starts]
        last = last_nodes(graph_nodes([edge.node for edge in edges]), self._params)

        def receive(i: int, g: Tensor) -> None:
            total = self.gradient[i]
            assert total is not None
            total.add_(g.detach(), alpha=self._scale)

        pairs = zip(self._params, self.gradient, strict=True)
        own, sums = zip(*[(x, s) for x, s in pairs if s is not None], strict=True)
        with parts_given(last, receive), added_into(own, sums, self._scale):
            rest = torch.autograd.grad(edges, self._params, at, allow_unused=True)
        for i, g in enumerate(rest):
            if g is not None:
                receive(i, g)


def _made_of(risk: Tensor, params: Sequence[Tensor]) -> int | None:
    """Return the bytes that a loss's graph has made.

    None where parameters are not all that can be learned by it, or where the derivative
    is not to be taken before a factor is known: of half precision, and with hooks.
    """
    kinds = {x.device.type for x in params}
    if not tracing.eager() or any(torch.is_autocast_enabled(kind) for kind in kinds):
        return None
    exact = (torch.float32, torch.float64)
    if any(x.dtype not in exact or x._backward_hooks for x in params):
        return None
    own, made = {id(x) for x in params}, 0
    for node in graph_nodes([risk.grad_fn] if risk.grad_fn else []):
        leaf = getattr(node, "variable", None)
        kinds_made = [x.dtype for x in node._input_metadata]
        if any(x.is_floating_point and x not in exact for x in kinds_made):
            return None
        if leaf is not None and id(leaf) not in own:
            return None
        if leaf is None and not any(word in node.name() for word in _VIEWS):
            made += sum(
                math.prod(x.shape) * x.dtype.itemsize for x in node._input_metadata
            )
    return made


def _slopes(risk: Tensor, params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradient with its graph.

    Raises:
        NotImplementedError: If torch cannot differentiate it again.
    """
    # A root that requires a gradient: without one, torch takes a loss that can be
    # differentiated once for a linear one, and says nothing.
    root = torch.ones_like(risk).requires_grad_()
    try:
        found = torch.autograd.grad(
            risk, params, root, create_graph=True, allow_unused=True
        )
    except NotImplementedError as err:
        raise NotImplementedError(_ONCE.format(err)) from err
    ends = [g.grad_fn for g in found if g is not None and g.grad_fn]
    for node in graph_nodes(ends):
        if any(part in node.name() for part in _ABSENT):  # raises when it is run
            raise NotImplementedError(_ONCE.format(_lacking(risk)))
    return found


def _penalty(slopes: Sequence[Tensor | None], rates: Sequence[float]) -> Tensor:
    """Return ``(lr / 4) ||g||^2``."""
    pairs = [(r, g) for r, g in zip(rates, slopes, strict=True) if g is not None]
    own, known = zip(*pairs, strict=True)
    return weighted_inner(own, known, known)
