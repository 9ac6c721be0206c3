"""Floor 1: products with the Hessian of a loss in the outputs, whatever the loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torch_dropout_ir import ops
from torch_dropout_ir.arguments import check_derivatives, check_differentiable
from torch_dropout_ir.arrivals import once_differentiable, root_of
from torch_dropout_ir.composed import differentiated_once
from torch_dropout_ir.entry_curvature import EntryCurvature, entry_curvature
from torch_dropout_ir.loss_terms import Nodes, Terms, nodes_of, terms_of
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.normalization import differentiable
from torch_dropout_ir.sample_blocks import Blocks, blocks_of
from torch_dropout_ir.tracing import derivatives, of_each

Root = tuple[Tensor, "Tensor | float"]
Rows: TypeAlias = "Tensor | slice"
ALL: Final = slice(None)
WIDE: Final = (torch.float32, torch.float64)
_DRAWN_IN_ONE: Final = 2**14  # above that torch's own kernels have threads
_FEW: Final = 2**14  # numbers of which normal ones take no longer than a mask
# Numbers in jets of all samples, and outputs of each, of which blocks take no more time
# than a product and two passes back; outputs of which they take less than a softmax and
# a diagonal.
_SMALL: Final = 2**12
_WIDEST: Final = 16
_NARROW: Final = 4
# Of roots of the positive part of a Hessian, and of its negative one.
SIGNS: Final = (1.0, -1.0)
TWICE: Final = (
    "expected a loss with a second derivative, got one whose derivative torch cannot "
    "differentiate again ({}). Use `monte_carlo`."
)


class HessianProduct:
    """``v -> H v`` in the outputs, differentiable in ``outputs``.

    The Hessian is symmetric, so its product is the reverse derivative of the gradient.
    The loss runs once, forward, and backward when its gradient is first asked for.

    Attributes:
        at: The outputs, as the leaf of the loss's graph where they have no graph.
        value: The loss.

    Raises:
        ValueError: If the loss cannot be differentiated.
    """

    def __init__(self, loss: Loss, outputs: Tensor, targets: Any) -> None:
        check_derivatives()
        self._trained = outputs.requires_grad
        self._seen: Nodes = {}
        self._slope: Tensor | None = None
        self._run: Callable[[], Tensor] | None
        self.at = outputs if self._trained else outputs.detach().requires_grad_()
        run = self._run = functools.partial(loss, self.at, targets)
        with torch.enable_grad():
            self.value = run()
        check_differentiable(self.value, "outputs")

    @classmethod
    def within(cls, value: Tensor, outputs: Tensor) -> HessianProduct:
        """Return the products of a loss that a model made itself, by its graph.

        ``outputs`` are in that graph, and all of it that is not constant goes through
        them. It is not run again.
        """
        found = cls.__new__(cls)
        found._trained, found._seen, found._slope = False, {}, None
        found.at, found.value, found._run = outputs, value, None
        return found

    @functools.cached_property
    def nodes(self) -> Nodes:
        """The nodes of the graph of the loss, each after those it leads to."""
        self._seen = nodes_of(self.value, self.at.grad_fn)
        once = differentiated_once([name for name, _ in self._seen.values()])
        if once and self._run is not None:
            with torch.enable_grad(), differentiable(thrice=False):
                self.value = self._run()
            self._seen = nodes_of(self.value, self.at.grad_fn)
        return self._seen

    @functools.cached_property
    def blocks(self) -> Blocks | None:
        """Each sample's Hessian, of few outputs where the graph tells.

        No derivative is taken for it; by the compiled kernel alone.
        """
        f = self.at
        if self._trained or not f.ndim or not few(f) or type(f) is not Tensor:
            return None
        width = f.shape[1:].numel()
        if width > _WIDEST or len(f) * (width + 1) * (width + 2) > 2 * _SMALL:
            return None
        if width > _NARROW and self.terms and self.terms.log_softmax is not None:
            return None
        return blocks_of(f, self.nodes)

    @functools.cached_property
    def terms(self) -> Terms | None:
        """Of what entries the graph shows the loss to be a sum of terms."""
        return None if self._trained else terms_of(self.value, self.at, self._seen)

    @functools.cached_property
    def entries(self) -> EntryCurvature | None:
        """Second derivatives in the entries of the terms, where the graph tells.

        No derivative is differentiated for them. Of few outputs one takes less time.
        """
        plain = type(self.at) is Tensor and self.at.numel() > _DRAWN_IN_ONE
        if not plain or self.terms is None:
            return None
        node = self.terms.log_softmax
        edge = get_gradient_edge(self.at) if node is None else GradientEdge(node, 0)
        return entry_curvature(self.value, edge, self.terms, self.nodes)

    def leads_to(self, nodes: set[Any]) -> bool:
        """Whether the graph of the loss has one of some nodes."""
        told = self.blocks is not None or self.terms is not None
        return not nodes.isdisjoint(self._seen if told else self.nodes)

    @property
    def gradient(self) -> Tensor:
        """The gradient of the loss in the outputs, with its graph."""
        if self._slope is None:
            self._slope = self._differentiate()
        return self._slope

    def _differentiate(self) -> Tensor:
        own = None
        if self.terms is None:  # else there is no function that is not known
            nodes = self.nodes  # which may run the loss again
            own = root_of(self.value, nodes)
        value = self.value
        root = torch.ones_like(value) if own is None else own
        (slope,) = derivatives(value, (self.at,), root, True, create_graph=True)
        if own is not None and once_differentiable([slope]):
            raise ValueError(TWICE.format("it is once differentiable"))
        return torch.zeros_like(self.at) if slope is None else slope

    def __call__(self, v: Tensor, keep: bool = True) -> Tensor:
        """Return the product with a tensor; ``keep=False`` lets the graph go."""
        graph = self._trained
        keep = keep or graph or self._run is None
        found = derivative_again(self.gradient, self.at, v, keep, graph)
        return torch.zeros_like(v) if found is None else found

    def each(self, vectors: Tensor) -> Tensor:
        """Return the products with several, at once where the loss's derivatives can.

        They have a leading index, and no graph.
        """
        try:
            found = of_each(
                lambda v: derivatives(self.gradient, (self.at,), v, keep=True)[0],
                vectors,
            )
        except RuntimeError:  # a derivative that looks at values, or that is missing
            return torch.stack([self(v).detach() for v in vectors])
        return torch.zeros_like(vectors) if found is None else found


def derivative_again(
    slope: Tensor,
    at: Tensor | GradientEdge,
    v: Tensor,
    keep: bool = True,
    create_graph: bool = False,
) -> Tensor | None:
    """Return the derivative of a gradient along ``v``; None where it has none."""
    if not slope.requires_grad:  # the loss is linear
        return None
    ends: Any = [at]
    try:
        (found,) = derivatives(slope, ends, v, keep, create_graph=create_graph)
    except RuntimeError as err:
        explain(err)
        raise
    return found


def explain(err: RuntimeError) -> None:
    """Raise a ValueError where an error says that a loss has no second derivative."""
    if "derivative" in str(err) or "differentiate twice" in str(err):
        raise ValueError(TWICE.format(err)) from err


class ProductRoots:
    r"""Pairs of roots, whose squares differ by the Hessian on average.

    With signs :math:`z` on the outputs, :math:`E[z (H z)^\top] = H`, whatever the
    Hessian is: indefinite, or between samples. For :math:`r_\pm = (a z \pm H z / a) /
    2` it is :math:`r_+ r_+^\top - r_- r_-^\top`, up to a skew part. One product a draw;
    it spreads more than roots of blocks do, the more the fewer outputs the curvature is
    in. The product's graph is kept where there are several draws.

    Attributes:
        like: The outputs.
        curved: Whether a draw has shown that the Hessian is not zero.
    """

    def __init__(self, product: HessianProduct, keep: bool) -> None:
        self._product = product
        self._keep = keep
        self.like = product.at.detach()
        self.curved = False

    def sample(self, rows: Rows = ALL) -> list[Root]:
        """Return a pair of roots, drawn for the samples ``rows``, with their signs.

        It is a single one of zeros where the product is zero.
        """
        z = signed(torch.ones_like(self.like))
        found = self._product(z, self._keep)
        # Of equal length, lest one of them be lost in the other's rounding.
        length = (float(found.norm()) / found.numel() ** 0.5) ** 0.5
        if not length:
            return [(of_rows(found, rows), 1.0)]
        self.curved = True
        mean, half = of_rows(z, rows) * (length / 2), of_rows(found, rows)
        half = half / (2 * length)
        return [(mean + half, 1.0), (mean - half, -1.0)]


def signs_of(part: Tensor) -> tuple[float, ...]:
    """Return the signs that there are in a part of a Hessian; none where it is zero.

    What float rounding makes of a zero eigenvalue is no negative part, and what is not
    finite is a positive one, to be found in the result.
    """
    least, most = map(float, part.aminmax())
    rounding = -1e-6 * max(most, -least)
    signs = () if most <= 0 else (1.0,)
    return (*signs, -1.0) if least < 0 and not least > rounding else signs


def magnitudes(values: Tensor, sign: float) -> Tensor:
    """Return the square roots of what has a sign, 0 in the place of what has not."""
    return (values if sign > 0 else -values).clamp(min=0).sqrt_()


def signed(x: Tensor) -> Tensor:
    """Return magnitudes with random signs."""
    if x.numel() <= _FEW:
        return x.copysign(torch.randn_like(x))
    kept, _ = ops.draw(x, 0.5, None)  # twice as much, or nothing
    return kept.sub_(x)


def with_signs(
    roots: Sequence[Tensor], like: Tensor
) -> tuple[list[Root], tuple[float, ...]]:
    """Return roots of the part of each sign, zeros where there is none, and the signs.

    ``roots`` are those of the compiled kernels, of either sign, shaped as ``like``
    but for dimensions that have been joined.
    """
    pairs = [(x, s) for x, s in zip(roots, SIGNS, strict=True) if x.numel()]
    found: list[Root] = [
        (x if x.shape == like.shape else x.view(like.shape), sign) for x, sign in pairs
    ]
    signs = tuple([sign for _, sign in pairs])
    return found or [(torch.zeros_like(like), SIGNS[0])], signs


def few(outputs: Tensor) -> bool:
    """Whether the roots of outputs are drawn in one compiled operation of ours."""
    here = ops.COMPILED and outputs.is_cpu and outputs.dtype in WIDE
    return here and outputs.numel() <= _DRAWN_IN_ONE


def of_rows(x: Tensor, rows: Rows) -> Tensor:
    """Return some rows, or the tensor itself where those are all."""
    return x if rows is ALL else x[rows]
