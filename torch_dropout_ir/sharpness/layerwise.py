r"""The trace of one batch's curvature, layer by layer.

.. math:: \mathrm{tr} H = \mathrm{tr} G + \mathrm{tr} R, \qquad
    \mathrm{tr} G = \sum_i \sum_c \lVert \nabla_\theta \langle s_{ic}, f_i \rangle
    \rVert^2, \qquad \sum_c s_{ic} s_{ic}^\top = \frac{\partial^2 \ell}{\partial f_i^2}

Semantics:

* One backward pass an output gives ``tr G`` of the layers whose action is known and has
  been checked against autograd; other parameters add ``E |J' v|^2``, with ``v`` drawn
  from the loss's Hessian.
* The residual ``R`` is the curvature of the network under the loss's gradient, held
  fixed. Only the diagonal block of a layer matters, and it is probed alone, with
  parameters drawn for each sample. A block that a normal probe does not move is zero.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torch_dropout_ir.arrivals import graph_nodes
from torch_dropout_ir.functional import Batch, batch_size
from torch_dropout_ir.leaves import flatten
from torch_dropout_ir.loss_cuts import cut
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.output_hessian import WIDEST, HessianRoots, holding
from torch_dropout_ir.output_products import HessianProduct, Root
from torch_dropout_ir.sharpness.residual import Block, Residual, halved
from torch_dropout_ir.sharpness.surface import Surface
from torch_dropout_ir.sharpness.uses import Use, Uses
from torch_dropout_ir.softmax_roots import SoftmaxRoots

_ROUNDING: Final = 64.0  # times the precision: what sums of so much may be off


class NotSplit(Exception):
    """The loss or the outputs do not allow for the split: why, as a sentence."""


class Layerwise:
    """One batch, run forward once, inside ``surface.held``.

    Attributes:
        loss: The loss, with a kind that holds of it.
        uses: Uses of the parameters whose action is known.
        known: Places of these among all that were seen; looked for where not given.
        others: Leaves of the other parameters, by name.
        width: Number of outputs of a sample.
        sampled: Whether exact roots are not to be had, for there are many.
        coupled: Whether the residual's blocks are of the parameters themselves, as
            samples see each other in it.

    Raises:
        NotSplit: If the outputs are no tensor, or the loss couples samples.
    """

    def __init__(
        self,
        surface: Surface,
        batch: Batch,
        place: int,
        seed: int | None,
        known: list[int] | None = None,
        whole: bool = True,
    ) -> None:
        self._targets = batch[1]
        leaves = {n: x.detach().requires_grad_() for n, x in surface.params.items()}
        names = {id(x): n for n, x in leaves.items()}
        try:
            samples = batch_size(batch)
        except TypeError as err:
            raise NotSplit("the samples of its inputs cannot be told apart") from err
        with Uses(surface.model, samples, names) as seen:
            outputs = surface.outputs(leaves, batch, place, seed)
        value = surface.checked(surface.loss_of(outputs, batch[1]), place)
        outputs, curve = _read(outputs, value, leaves, surface.loss)
        self._outputs, self._product = outputs, curve
        self._softmax = _softmax_roots(curve, samples)
        own = surface.loss.of_logits(outputs) if whole else surface.loss
        if curve is not None and curve.terms and curve.terms.log_softmax is None:
            own = dataclasses.replace(own, kind="elementwise")
        if self._softmax is None:
            loss = holding(own, outputs.detach(), batch[1], curve)
            if loss is None:
                raise NotSplit(
                    "the loss couples samples, or is not known and has many outputs"
                )
            own = loss
        self.loss = own
        if known is None:
            apart = outputs.shape[0] == samples
            with surface.backward():
                known = self._explained(seen.found, leaves) if apart else []
        self.known, self.uses = known, [seen.found[i] for i in known]
        names_known = {use.name for use in self.uses}
        self.coupled, self._leaves = False, leaves
        self.others = {n: x for n, x in leaves.items() if n not in names_known}
        self.width, self.sampled = outputs[0].numel(), self._softmax is not None

    def _pull(self, root: Tensor, targets: list[Tensor]) -> list[Tensor]:
        return list(
            torch.autograd.grad(
                self._outputs, targets, root, retain_graph=True, materialize_grads=True
            )
        )

    def _explained(self, seen: list[Use], leaves: dict[str, Tensor]) -> list[int]:
        """Places of uses that explain all of a parameter's derivative, by sample."""
        # A second use may have no first derivative here, but a second one.
        edges = _edges(self._outputs)
        places = [i for i, x in enumerate(seen) if edges.get(id(leaves[x.name])) == 1]
        if not places:
            return []
        found = [seen[i] for i in places]
        root = torch.randn_like(self._outputs)
        at = self._pull(root, [use.delta for use in found])
        whole = self._pull(root, [leaves[use.name] for use in found])
        tolerance = torch.finfo(root.dtype).eps ** 0.5
        half = halved(root)
        root = root.clone()  # what reaches the last layer is `root` itself
        root[half] = 0
        alone = self._pull(root, [use.delta for use in found])
        explained: dict[str, int] = {}
        for i, use, delta, g, one in zip(places, found, at, whole, alone, strict=True):
            rows, live = use.part.split(one), use.part.split(delta)[~half]
            # Neither do other samples reach these, nor these the others.
            apart = not bool(rows[half].any()) and bool(
                (rows[~half] - live).norm() <= tolerance * live.norm()
            )
            if apart and _same(use, delta, g, tolerance):
                explained.setdefault(use.name, i)
        return list(explained.values())

    def gauss_newton(self, roots: Iterable[Root]) -> Tensor:
        """``sum_i |J_i' s_i|^2`` over the known uses, for each root in turn, 0-d."""
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        deltas = list({id(use.delta): use.delta for use in self.uses}.values())
        for root, sign in roots if deltas else ():
            found = dict(zip(map(id, deltas), self._pull(root, deltas), strict=True))
            for use in self.uses:
                rows = use.squared_norms(found[id(use.delta)])
                total += (rows * sign).sum().cpu()
        return total

    def sampled_elsewhere(self, roots: Iterable[Root]) -> Tensor:
        """``|J' v|^2`` over the other parameters, 0-d."""
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        targets = list(self.others.values())
        for root, sign in roots if targets else ():
            # A sign by sample does not survive the sum over samples.
            parts = [(root, sign)] if isinstance(sign, float) else _by_sign(root, sign)
            for part, one in parts:
                squares = [g.double().square().sum() for g in self._pull(part, targets)]
                total += one * torch.stack(squares).sum().cpu()
        return total

    def roots(self) -> HessianRoots:
        """Roots of the loss's Hessian in the outputs, exact and random ones."""
        f = self._outputs.detach()
        return HessianRoots(self.loss, f, self._targets, self._product)

    def sampler(self) -> Callable[[], Sequence[Root]]:
        """What draws random roots of it."""
        return self.roots().sample if self._softmax is None else self._softmax.sample

    def blocks(self) -> list[Block]:
        """One block a known layer, and one a module of the other parameters."""
        layers: dict[int, list[Use]] = {}
        for use in () if self.coupled else self.uses:
            layers.setdefault(id(use.delta), []).append(use)
        found = [
            block
            for layer in layers.values()
            for block in Block(owner(layer[0].name), layer, [layer[0].delta]).split()
        ]
        whole = self._leaves if self.coupled else self.others
        groups = itertools.groupby(whole.items(), lambda item: owner(item[0]))
        return found + [
            Block(name, [], [x for _, x in group]) for name, group in groups
        ]

    def residual(self, blocks: list[Block]) -> Residual:
        """Build the graph of the residual's products."""
        if self._product is not None:
            slope = self._product.gradient.detach()
        else:
            f = self._outputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.loss(f, self._targets), f)
        targets = [x for block in blocks for x in block.targets]
        gradients = torch.autograd.grad(
            self._outputs,
            targets,
            slope,
            create_graph=True,
            retain_graph=True,
            materialize_grads=True,
        )
        return Residual(dict(zip(map(id, targets), gradients, strict=True)))


def _read(
    outputs: Any, value: Tensor, leaves: dict[str, Tensor], loss: Loss
) -> tuple[Tensor, HessianProduct | None]:
    """Return the outputs that a loss is of, and products where it is not a known one.

    Of several tensors they are that through which all of the loss goes, as the logits
    that a model returns beside a loss of its own.

    Raises:
        NotSplit: If there is none.
    """
    found = outputs
    if not isinstance(outputs, Tensor):
        ends = {get_gradient_edge(x).node for x in leaves.values()}
        found = cut(value, flatten(outputs)[0], ends)
    if found is None or found.ndim < 1 or found.is_complex():
        raise NotSplit("the outputs are no tensor with samples in front")
    known = loss.kind != "general"
    return found, None if known else HessianProduct.within(value, found)


def _softmax_roots(product: HessianProduct | None, samples: int) -> SoftmaxRoots | None:
    """Return random roots of the many outputs of a softmax by sample, if it is one."""
    f, terms = (product.at, product.terms) if product else (None, None)
    if f is None or f.shape[0] != samples or f[0].numel() <= WIDEST:
        return None
    if product is None or terms is None or terms.log_softmax is None:
        return None
    v = torch.randn_like(f)
    v[half := halved(v)] = 0
    apart = not bool(product(v)[half].any())
    return SoftmaxRoots(product, terms) if apart else None


def owner(name: str) -> str:
    """Return the name of the module that a parameter is of."""
    return name.rpartition(".")[0]


def _same(use: Use, delta: Tensor, g: Tensor, tolerance: float) -> bool:
    """Whether a use gives the derivative ``g`` of its parameter, but for rounding."""
    error = (use.summed(delta) - g.reshape(-1)).norm()
    if error <= tolerance * g.norm():
        return True
    # Of a bias before a softmax over positions, or a mean over them, nothing is left.
    size = use.summed(delta.abs()).norm()
    return bool(error <= _ROUNDING * torch.finfo(g.dtype).eps * size)


def _edges(outputs: Tensor) -> dict[int, int]:
    """Count the edges of the graph that lead to each leaf, by its identity."""
    ends = [
        n for node in graph_nodes([outputs.grad_fn]) for n, _ in node.next_functions
    ]
    return collections.Counter(
        id(node.variable) for node in ends if hasattr(node, "variable")
    )


def _by_sign(root: Tensor, sign: Tensor) -> Iterator[tuple[Tensor, float]]:
    shape = (-1, *(1,) * (root.ndim - 1))
    for one in (1.0, -1.0):
        if bool((part := (sign == one)).any()):
            yield root * part.view(shape), one
