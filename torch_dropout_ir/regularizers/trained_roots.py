"""Second-order forms of R_1 as training losses: one draw, of all rows or by parts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from torch_dropout_ir.arrivals import once_differentiable, root_of
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.generators import preserved_rng
from torch_dropout_ir.leaves import without_graph
from torch_dropout_ir.losses import Loss
from torch_dropout_ir.output_scales import cross_entropy_scale, squared_scale, with_root
from torch_dropout_ir.regularizers.clean_pass import CleanPass, clean_pass
from torch_dropout_ir.regularizers.line_pass import Mask, masks_of
from torch_dropout_ir.regularizers.outputs import (
    OutputsRead,
    check_curvature,
    read_outputs,
)
from torch_dropout_ir.regularizers.penalty_products import parts_pay, with_gradient
from torch_dropout_ir.regularizers.row_chunks import RowChunks
from torch_dropout_ir.regularizers.site_curvature import SiteCurvature, drawn_signs
from torch_dropout_ir.regularizers.site_forms import Form, by_sample, not_reached, total

# Losses whose Hessian has a root that is a function of the outputs.
_ROOTED: Final = ("squared", "cross_entropy")
# Besides a first, small one; a double backward holds three times what a step does, a
# product with the Hessian that is differentiated up to eight times.
_PARTS: Final = 3
_OF_PRODUCTS: Final = 8
Of: TypeAlias = tuple[nn.Module, Batch, Loss]


def rooted(loss: Loss, targets: Any) -> bool:
    """Whether a loss is one of those, at outputs that it takes."""
    return with_root(loss, targets).kind in _ROOTED


def drawn_form(
    clean: CleanPass, outputs: Tensor, signs: Tensor, kind: str
) -> list[Form]:
    r"""Return one draw of the Gauss-Newton form, to be differentiated in parameters.

    With :math:`S_i S_i^\top = H_i` and signs :math:`z` on the outputs, :math:`E[(h_j
    [J^\top S z]_j)^2] = h_j^2 [J^\top H J]_{jj}`, whatever the parameters: so is the
    mean of the gradient that of the form, where :math:`S` has its own. One pass
    backward and its graph, of which products with the Hessian would need three.
    ``signs`` are those of :func:`weighted_signs`, of the rows of the pass.
    """
    root = signs if kind == "squared" else _softmax_root(outputs, signs)
    if root_of(outputs) is not None and not root.requires_grad:
        root = root.requires_grad_()
    found = torch.autograd.grad(
        outputs, clean.edges, root, create_graph=True, allow_unused=True
    )
    if once_differentiable(found):
        raise NotImplementedError(
            "modified_loss: expected a model that torch can differentiate twice, got "
            "one with a function that it can differentiate once "
            "(`once_differentiable`). Use `r1='monte_carlo'`."
        )
    return [
        by_sample(site, site.variance / 2 * (h * g).sum_to_size(shape).square(), 0)
        for (site, h, _), g in zip(clean.uses, found, strict=True)
        if g is not None
        for shape in [site.mask_shape(h.shape)]
    ]


def weighted_signs(loss: Loss, f: Tensor, targets: Any) -> Tensor:
    """Draw signs on the outputs, times the root of what a sample's Hessian counts."""
    signs = _signs(f)
    if loss.kind == "squared":
        return squared_scale(loss, f.shape, targets) ** 0.5 * signs
    return cross_entropy_scale(loss, f, targets).sqrt() * signs


def _signs(like: Tensor) -> Tensor:
    return torch.empty_like(like).bernoulli_(0.5).mul_(2).sub_(1)


def _softmax_root(f: Tensor, signs: Tensor) -> Tensor:
    """Return a root of ``diag(s) - s s'`` times signs, a function of the outputs."""
    # diag(r) - s r' with r the root of s; s = r^2, of which nothing more is kept.
    classes = 1 if f.ndim > 1 else 0
    r = (f.log_softmax(classes) / 2).exp()
    return r * (signs - r * (r * signs).sum(classes, keepdim=True))


class TrainedForm(NamedTuple):
    """How a draw of a form is taken: by a root of the Hessian, else by products.

    Attributes:
        linearized: Whether the curvature of the network is left out.
        rooted: The loss, where its Hessian has a root.
        targets: The targets.
    """

    linearized: bool
    rooted: Loss | None
    targets: Any

    @classmethod
    def of(cls, r1: str, read: OutputsRead, targets: Any) -> TrainedForm:
        """Return how ``r1`` is taken of what a loss reads."""
        linearized = r1 == "gauss_newton"
        known = read.loss if linearized else None
        own = known if known is not None and rooted(known, targets) else None
        return cls(linearized, own, targets)

    def drawn(self, read: OutputsRead, masks: Sequence[Mask]) -> list[Tensor]:
        """Draw signs on the outputs, or on the elements of each mask."""
        if self.rooted is None:
            return drawn_signs(masks)
        return [weighted_signs(self.rooted, read.single, self.targets)]

    def at(
        self, clean: CleanPass, read: OutputsRead, drawn: Sequence[Tensor]
    ) -> list[Form]:
        """Return the forms of a pass at the signs of its rows."""
        if self.rooted is not None:
            return drawn_form(clean, read.tensors[0], drawn[0], self.rooted.kind)
        curvature = SiteCurvature(
            clean, read, linearized=self.linearized, create_graph=True
        )
        return curvature.sampled(drawn)


def parted(
    of: Of, r1: str, clean: CleanPass, risk: Tensor, weight: float, max_bytes: int
) -> FormByChunks | None:
    """Return the loss with its form by parts, where that pays and is the same."""
    model, batch, loss = of
    own = [x for x in model.parameters() if x.requires_grad]
    if clean.unreachable or not own:
        return None
    if not parts_pay(risk, [*own, *clean.zeros], max_bytes):
        return None
    read = read_outputs(clean.outputs, loss, batch[1])
    if not RowChunks.least(clean, read) or not check_curvature(read):
        return None
    # A part's curvature would be of a loss of its own, or what else it reads of each.
    if read.couples() or not _of_outputs_alone(read, risk) or clean.later:
        return None
    found = FormByChunks(of, TrainedForm.of(r1, read, batch[1]), clean, weight)
    with preserved_rng(model):  # noise that is no dropout
        return found if found.chunks.apart() else None


def _of_outputs_alone(read: OutputsRead, risk: Tensor) -> bool:
    with torch.enable_grad():
        again = read.risk([x.detach() for x in read.tensors])
    return not again.requires_grad and torch.equal(again, risk.detach())


class FormByChunks:
    """The loss with a form of R_1, made of parts of the batch."""

    def __init__(
        self, of: Of, form: TrainedForm, clean: CleanPass, weight: float
    ) -> None:
        self._model, self._batch, self._loss = model, batch, loss = of
        self._params = [x for x in model.parameters() if x.requires_grad]
        self._form, self._weight, self._names = form, weight, clean.names
        self._masks = masks_of(clean)
        self._read = read_outputs(without_graph(clean.outputs), loss, batch[1])
        self._thrice = form.rooted is None
        self.chunks = RowChunks(
            model, batch[0], clean, self._read, twice=True, trained=True,
            thrice=self._thrice, parts=_OF_PRODUCTS if self._thrice else _PARTS,
        )  # fmt: skip

    def value(self, risk: Tensor) -> Tensor:
        """Return the loss, given without its graph, times its factor, and the form."""
        drawn = self._form.drawn(self._read, self._masks)
        gradient: list[Tensor | None] = [None] * len(self._params)
        reached: list[Form] = []

        def take(clean: CleanPass, read: OutputsRead, rows: Tensor) -> Tensor:
            own = [self.chunks.take(x, rows) for x in drawn]
            found = self._form.at(clean, read, own)
            reached.extend((name, form.detach()) for name, form in found)
            form = part = total(found, read.tensors[0])
            if self._weight:
                part = form + self._weight * read.risk(read.tensors)
            slopes = torch.autograd.grad(part, self._params, allow_unused=True)
            for i, g in enumerate(slopes):
                if g is not None:
                    before = gradient[i]
                    gradient[i] = g if before is None else before + g
            return form.detach()

        with preserved_rng(self._model):
            add_up = self.chunks.add_up(self._params)
            forms = self.chunks.each(take) if add_up else None
            if forms is None:  # other rows than the first meet, or in derivatives alone
                return self._whole(drawn)
        for said in not_reached(self._names, {name for name, _ in reached}):
            warnings.warn(f"modified_loss: R_1: {said}", stacklevel=4)
        value = torch.stack(forms).sum() + self._weight * risk
        return with_gradient(value, self._params, gradient)

    def _whole(self, drawn: Sequence[Tensor]) -> Tensor:
        with clean_pass(
            self._model, self._batch[0], twice=True, thrice=self._thrice, outlives=True
        ) as clean:
            read = read_outputs(clean.outputs, self._loss, self._batch[1])
            form = total(self._form.at(clean, read, drawn), read.tensors[0])
            return form + self._weight * self._loss(clean.outputs, self._batch[1])
