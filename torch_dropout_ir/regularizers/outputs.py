"""What of a model's outputs the loss reads, and the loss as a function of that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.arguments import check_differentiable
from torch_dropout_ir.arrivals import (
    graph_nodes,
    once_differentiable,
    root_of,
    uneven,
)
from torch_dropout_ir.composed import differentiated_once
from torch_dropout_ir.leaves import flatten
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.normalization import differentiable
from torch_dropout_ir.output_products import TWICE, HessianProduct, explain
from torch_dropout_ir.output_scales import (
    alike,
    closed_diagonal,
    is_logistic,
    with_root,
)
from torch_dropout_ir.regularizers.coupling import even_root
from torch_dropout_ir.regularizers.loss_graph import bends, joins_rows
from torch_dropout_ir.row_powers import by_powers, weighs_alike

_PIECEWISE: Final = (
    "expected a loss with a second derivative, got one that is piecewise {}: its "
    "second derivative is 0 at all outputs, and so would be every second-order form of "
    "R_1. Use `monte_carlo`."
)


@dataclasses.dataclass
class OutputsRead:
    """The tensors among a model's outputs that its loss depends on.

    Attributes:
        tensors: Those tensors, with their graph.
        risk: The loss as a function of them.
        loss: The loss ``(outputs, targets)`` of the one tensor, with what is known of
            its curvature; None where there are several.
        places: Where they are among the leaves of the outputs.
        targets: The targets, where the outputs are one tensor.
    """

    tensors: list[Tensor]
    risk: Callable[[Sequence[Tensor]], Tensor]
    loss: Loss | None
    places: Sequence[int] = (0,)
    targets: Any = None

    @property
    def single(self) -> Tensor:
        """The one tensor, without its graph."""
        return self.tensors[0].detach()

    @property
    def known(self) -> bool:
        """Whether the Hessian is known in closed form, of one that is not zero."""
        if self.loss is None:
            return False
        return self.loss.kind in ("squared", "cross_entropy") or is_logistic(self.loss)

    @property
    def closed(self) -> bool:
        """Whether the Hessian is known in closed form, be it zero."""
        if self.known or self.loss is None:
            return self.known
        own = closed_diagonal(self.loss) is not None
        return own and alike(self.tensors[0], self.targets)

    def product(self) -> HessianProduct | None:
        """Run the loss for products with its Hessian, where it reads one tensor."""
        if self.loss is None:
            return None
        return HessianProduct(self.loss, self.single, self.targets)

    def couples(self, dims: int = 1, product: HessianProduct | None = None) -> bool:
        """Return whether the gradient at one sample depends on another's outputs."""
        if self.loss is not None and self.loss.kind != "general":
            # Without a batch dimension rows are the classes of one sample.
            return self.loss.kind == "cross_entropy" and self.tensors[0].ndim < 2
        product = product or self.product()
        if product and dims == 1:
            told = joins_rows(product.at, product.nodes)
            if told is not None:
                return told
        counts = {x.shape[:dims].numel() for x in self.tensors if x.ndim >= dims}
        if len(counts) != 1 or any(x.ndim < dims for x in self.tensors):
            return True
        at, slopes = self.differentiated(product)
        live = [s for s in slopes if s.requires_grad]
        if not live:
            return False
        roots = [even_root(s, dims, i * s.numel()) for i, s in enumerate(live)]
        plain = _curved(live, at, roots)
        weighed = _curved(live, at, [by_powers(r, dims) for r in roots])
        return any(
            p is not None and w is not None and not weighs_alike(p, w, dims)
            for p, w in zip(plain, weighed, strict=True)
        )

    def differentiated(
        self, product: HessianProduct | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the leaves that the loss is taken of, and its gradient in them."""
        if product is not None:
            return [product.at], [product.gradient]
        at = [x.detach().requires_grad_() for x in self.tensors]
        return at, self.slopes(at)

    def risk_twice(self, at: Sequence[Tensor]) -> Tensor:
        """Return the loss, by operations that torch can differentiate twice."""
        value = self.risk(at)
        nodes = graph_nodes([value.grad_fn] if value.grad_fn else [])
        if not differentiated_once([node.name() for node in nodes]):
            return value
        with differentiable(thrice=False):
            return self.risk(at)

    def slopes(self, at: Sequence[Tensor], create_graph: bool = True) -> list[Tensor]:
        """Return the gradient of the loss in each tensor, zeros where it has none."""
        with torch.enable_grad():
            value = self.risk_twice(at) if create_graph else self.risk(at)
            check_differentiable(value, "outputs")
            root = root_of(value) if create_graph else None
            found = torch.autograd.grad(
                value, list(at), root, create_graph=create_graph, allow_unused=True
            )
        pairs = zip(found, at, strict=True)
        return [torch.zeros_like(x) if g is None else g for g, x in pairs]


def read_outputs(outputs: Any, loss: Loss, targets: Any) -> OutputsRead:
    """Return the tensors that the loss reads, and the loss as a function of them.

    Raises:
        TypeError: If the outputs hold no floating-point tensor, or are several where
            the loss takes one.
        ValueError: If the loss reads none of them.
    """  # noqa: DOC502 (`_read_of` raises)
    if isinstance(outputs, Tensor) and outputs.is_floating_point():
        return OutputsRead(
            [outputs],
            lambda x: loss(x[0], targets),
            with_root(loss.at(outputs), targets, outputs),
            targets=targets,
        )
    loss.check_outputs(outputs)
    leaves, rebuild = real_leaves(outputs)
    places = [
        i
        for i, x in enumerate(leaves)
        if isinstance(x, Tensor) and x.is_floating_point()
    ]

    def risk_at(chosen: Sequence[int]) -> Callable[[Sequence[Tensor]], Tensor]:
        def risk(tensors: Sequence[Tensor]) -> Tensor:
            filled = list(leaves)
            for i, x in zip(chosen, tensors, strict=True):
                filled[i] = x
            return loss(rebuild(filled), targets)

        return risk

    if not places:
        got = getattr(outputs, "dtype", type(outputs).__name__)
        raise TypeError(
            "expected the model to return a floating-point tensor, or a tuple, mapping "
            f"or object with some, got {got}. Wrap the model in one that "
            "returns its logits."
        )
    copies = [leaves[i].detach().requires_grad_() for i in places]
    read = _read_of(copies, places, risk_at(places))
    risk = risk_at(read)
    alone = Loss(lambda f, _: risk([f]), "general", loss.reduction)
    one = alone if len(read) == 1 else None
    return OutputsRead([leaves[i] for i in read], risk, one, read)


def _read_of(
    copies: list[Tensor], places: list[int], risk: Callable[[Sequence[Tensor]], Tensor]
) -> list[int]:
    """Return the places of those tensors that a loss depends on; raise if none."""
    with torch.enable_grad():
        found = torch.autograd.grad(risk(copies), copies, allow_unused=True)
    read = [i for i, g in zip(places, found, strict=True) if g is not None]
    if not read:
        raise ValueError(
            "expected a loss of the tensors that the model returned, got one that "
            "reads none of them, but perhaps what a method or a closure has kept"
        )
    return read


def real_leaves(outputs: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Return what :func:`flatten` does, complex tensors as pairs of real numbers."""
    leaves, rebuild = flatten(outputs)
    pairs = [isinstance(x, Tensor) and x.is_complex() for x in leaves]

    def put_together(filled: list[Any]) -> Any:
        both = zip(filled, pairs, strict=True)
        return rebuild([torch.view_as_complex(x) if pair else x for x, pair in both])

    both = zip(leaves, pairs, strict=True)
    real = [torch.view_as_real(x.resolve_conj()) if pair else x for x, pair in both]
    return real, put_together


def _curved(
    slopes: Sequence[Tensor], at: Sequence[Tensor], roots: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Differentiate the loss's gradient once more; None where nothing depends."""
    try:
        return torch.autograd.grad(
            slopes, at, roots, allow_unused=True, retain_graph=True
        )
    except RuntimeError as err:
        explain(err)
        raise


def check_curvature(read: OutputsRead) -> bool:
    """Return whether a loss has a second derivative, if it be 0; or raise."""
    if read.known:
        return True
    at, slopes = read.differentiated(read.product())
    if once_differentiable(slopes):
        raise ValueError(TWICE.format("it is once differentiable"))
    live = [s for s in slopes if s.requires_grad]
    steps = [uneven(s, i * s.numel()) for i, s in enumerate(live)]
    if live:
        found = _curved(live, at, steps)
        if any(g is not None and bool(g.any()) for g in found):
            return True
    flat = not any(bool(s.any()) for s in slopes)
    jumps = False
    for side in (1e3, -1e3):
        far = [(x.detach() + side * (1 + x.detach().abs())) for x in at]
        try:
            others = read.slopes([x.requires_grad_() for x in far], create_graph=False)
        except (RuntimeError, ValueError):  # no place for outputs: nothing to learn
            continue
        if any(not torch.equal(a, b) for a, b in zip(slopes, others, strict=True)):
            with torch.enable_grad():
                # It fits so well that no derivatives are left, or not at all.
                if flat or bends(read.risk(at)):
                    return True
            raise ValueError(_PIECEWISE.format("linear"))
        a, b = read.risk(far), read.risk(at)
        jumps = jumps or (flat and bool(a.isfinite() and b.isfinite() and a != b))
    if jumps:
        raise ValueError(_PIECEWISE.format("constant"))
    return False
