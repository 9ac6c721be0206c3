"""One batch's curvature, linearized once: a retained graph that products run through.

A product with the Hessian is the reverse derivative of the gradient's graph. Both
factors of the Gauss-Newton product come from one graph of the outputs: ``J v`` is the
derivative of ``J' u`` in ``u``, in which it is linear.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from torch_dropout_ir.arrivals import (
    Receive,
    arrivals,
    linear_root,
    root_of,
    taken,
)
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.output_products import HessianProduct
from torch_dropout_ir.sharpness.derivatives import LeanDerivatives
from torch_dropout_ir.sharpness.differentiability import depended_on, explained
from torch_dropout_ir.sharpness.linear import added_into, in_roots_alone
from torch_dropout_ir.sharpness.pullback import (
    Pieces,
    Product,
    backward,
    bare_of,
    edge_of,
    nodes_from,
    pullback,
    twice,
)
from torch_dropout_ir.sharpness.surface import Surface
from torch_dropout_ir.tracing import unasked

Kind = Literal["hessian", "ggn"]
_CALL: Final = 2**14  # numbers that are added or so in the time of a call


@dataclasses.dataclass(frozen=True)
class Linearized:
    """Products of one batch.

    Attributes:
        like: The parameters.
        used: Names of those that the loss depends on.
        product: From pieces shaped as the parameters to the like, None for zeros; what
            a second argument is given in parts is left out of the result.
        bytes_each: Memory that the intermediate results of one product take.
        bare: Whether products run nothing of the model's, in a graph of torch's and our
            own nodes alone, and so need not be made inside ``surface.held``.
        work: Numbers that its nodes take, beyond what the call of each is worth.
    """

    like: list[Tensor]
    used: list[str]
    product: Product
    bytes_each: int
    bare: bool
    work: int

    def products(self, rows: Tensor, budget: int) -> Tensor:
        """Return the products with ``rows`` (``[K, P]``), as many at once as fit."""
        if len(rows) == 1:
            return self._alone(rows[0])[None]
        at_once = max(1, min(len(rows), budget // max(1, self.bytes_each)))
        if at_once > 1:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of slow batching rules
                    return self._batched(rows, at_once)
            except RuntimeError:  # an operation cannot be batched, or not rightly
                pass
        found = torch.empty_like(rows)
        for k, row in enumerate(rows):
            found[k] = self._alone(row)
        return found

    def _batched(self, rows: Tensor, at_once: int) -> Tensor:
        found: Tensor = torch.func.vmap(self._one, chunk_size=at_once)(rows)
        # Torch's rule for many at once can be wrong, as that of `cdist` is.
        mix = torch.linspace(1.0, 2.0, len(rows), device="cpu").to(rows)
        error = (self._alone(mix @ rows) - mix @ found).norm()
        if error > torch.finfo(rows.dtype).eps ** 0.5 * found.norm():
            raise RuntimeError("an operation is batched wrongly")
        return found

    def _alone(self, row: Tensor) -> Tensor:
        found = torch.zeros_like(row)
        self.add(row, found)
        return found

    def add(self, row: Tensor, total: Tensor, scale: float = 1.0) -> None:
        """Add the product with ``row`` (``[P]``), times ``scale``, as it is made."""
        parts = total.split([x.numel() for x in self.like])
        sums = [s.view(x.shape) for s, x in zip(parts, self.like, strict=True)]

        def receive(i: int, g: Tensor) -> None:
            sums[i].add_(g.detach(), alpha=scale)

        with added_into(self.like, sums, scale):
            for i, g in enumerate(self._pieces(row, receive)):
                if g is not None:
                    receive(i, g)

    def _one(self, row: Tensor) -> Tensor:
        pieces = zip(self._pieces(row), self.like, strict=True)
        whole = [torch.zeros_like(x) if g is None else g for g, x in pieces]
        return torch.cat([x.reshape(-1) for x in whole]).to(row)

    def _pieces(
        self, row: Tensor, receive: Receive | None = None
    ) -> list[Tensor | None]:
        pieces = [
            piece.view(x.shape).to(x.dtype)
            for piece, x in zip(
                row.split([x.numel() for x in self.like]), self.like, strict=True
            )
        ]
        with explained():
            return self.product(pieces, receive)


def linearize(
    kind: Kind,
    surface: Surface,
    batch: Batch,
    place: int,
    seed: int | None,
    once: bool = False,
) -> Linearized:
    """Return the products of one batch, which keep its graph; inside ``surface.held``.

    With ``once`` there is to be one product alone, of one vector: the graph is let go
    of while it runs, which takes some half of the memory.
    """
    with unasked():
        leaves = {n: x.detach().requires_grad_() for n, x in surface.params.items()}
    build = _hessian if kind == "hessian" else _ggn
    with torch.enable_grad(), _sizes(surface.model) as sizes, LeanDerivatives():
        used, product, nodes = build(surface, leaves, batch, place, seed, once)
    with unasked():
        like = list(leaves.values())
        bare = bare_of(surface, nodes)
        own = 2 * sum(x.numel() * x.element_size() for x in like)
        work = sum(max(0, taken(node) - _CALL) for node in nodes)
    return Linearized(like, used, product, own + 4 * sum(sizes), bare, work)


@contextlib.contextmanager
def _sizes(model: nn.Module) -> Iterator[list[int]]:
    """Collect the bytes of what each module returns inside the context."""
    sizes: list[int] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            with unasked():
                sizes.append(output.numel() * output.element_size())

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                stack.callback(module.register_forward_hook(note).remove)
        yield sizes


def _hessian(
    surface: Surface,
    leaves: dict[str, Tensor],
    batch: Batch,
    place: int,
    seed: int | None,
    once: bool,
) -> tuple[list[str], Product, list[Any]]:
    risk = surface.checked(surface.risk(leaves, batch, place, seed), place)
    targets = list(leaves.values())
    # Where second derivatives start is all that is needed: the values are let go of.
    starts: list[GradientEdge | None] = [None] * len(targets)

    def note(i: int, g: Tensor) -> None:
        starts[i] = edge_of(g)

    with backward(surface, risk), arrivals(targets, note):
        gradients = torch.autograd.grad(
            risk, targets, root_of(risk), create_graph=True, allow_unused=True
        )
    with unasked():
        used = depended_on(risk, leaves, gradients)
        nodes = twice(starts)
        return used, pullback(surface, starts, nodes, targets, once), nodes


def _ggn(
    surface: Surface,
    leaves: dict[str, Tensor],
    batch: Batch,
    place: int,
    seed: int | None,
    once: bool,
) -> tuple[list[str], Product, list[Any]]:
    outputs = surface.outputs(leaves, batch, place, seed)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            "ggn: expected the model to return one tensor, got "
            f"{type(outputs).__name__}. Wrap it in one that returns its logits."
        )
    surface.checked(surface.loss_of(outputs, batch[1]), place)
    curve = HessianProduct(surface.loss, outputs.detach(), batch[1])
    targets = list(leaves.values())
    root = linear_root(outputs)
    with backward(surface, outputs):
        pulled = torch.autograd.grad(
            outputs, targets, root, create_graph=True, allow_unused=True
        )
    starts = [edge_of(g) for g in pulled]
    used = depended_on(outputs, leaves, pulled)
    nodes = twice(starts)
    push = pullback(surface, starts, nodes, [root])
    end = edge_of(outputs)
    forward = nodes_from([end])
    pull = pullback(surface, [end], forward, targets, once)

    def product(v: Pieces, receive: Receive | None = None) -> list[Tensor | None]:
        with in_roots_alone(targets):
            (pushed,) = push(v, None)
        if pushed is None:
            return [None] * len(targets)
        return pull([curve(pushed)], receive)

    return used, product, list({*nodes, *forward})
