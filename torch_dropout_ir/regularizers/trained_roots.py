"""The Gauss-Newton form as a training loss: roots of the Hessian with their graph."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from torch_dropout_ir.losses import Loss
from torch_dropout_ir.output_scales import cross_entropy_scale, squared_scale
from torch_dropout_ir.regularizers.clean_pass import CleanPass
from torch_dropout_ir.regularizers.outputs import OutputsRead
from torch_dropout_ir.regularizers.site_forms import Form, by_row

# Losses whose Hessian has a root that is a function of the outputs.
ROOTED: Final = ("squared", "cross_entropy")


def drawn_form(clean: CleanPass, read: OutputsRead, targets: Any) -> list[Form]:
    r"""Return one draw of the Gauss-Newton forms, to be differentiated in parameters.

    With :math:`S_i S_i^\top = H_i` and signs :math:`z` on the outputs, :math:`E[(h_j
    [J^\top S z]_j)^2] = h_j^2 [J^\top H J]_{jj}`, whatever the parameters: so is the
    mean of the gradient that of the form, where :math:`S` has its own. One pass
    backward and its graph, of which products with the Hessian would need three.

    Args:
        clean: The pass without noise, with its graph.
        read: What the loss reads of it; its kind is one of ``ROOTED``.
        targets: The targets.

    Returns:
        The forms, use by use.
    """
    assert read.loss is not None
    outputs = read.tensors[0]
    root = _root(read.loss, outputs, targets)
    found = torch.autograd.grad(
        outputs, clean.deltas, root, create_graph=True, allow_unused=True
    )
    return [
        by_row(site, site.variance / 2 * (h * g).sum_to_size(shape).square())
        for (site, h, _), g in zip(clean.uses, found, strict=True)
        if g is not None
        for shape in [site.mask_shape(h.shape)]
    ]


def _root(loss: Loss, f: Tensor, targets: Any) -> Tensor:
    """Return a root of each sample's Hessian times signs, a function of the outputs."""
    signs = _signs(f.detach())
    if loss.kind == "squared":
        return squared_scale(loss, f.shape, targets) ** 0.5 * signs
    # diag(r) - s r' with r the root of s: its square is diag(s) - s s'.
    classes = 1 if f.ndim > 1 else 0
    logs = f.log_softmax(classes)
    spread = (logs / 2).exp() * signs
    root = spread - logs.exp() * spread.sum(classes, keepdim=True)
    return cross_entropy_scale(loss, f, targets).sqrt() * root


def _signs(like: Tensor) -> Tensor:
    return torch.empty_like(like).bernoulli_(0.5).mul_(2).sub_(1)
