"""R_1 of any network by the Gauss-Newton form, one backward pass a sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.functional import Batch
from torch_dropout_ir.losses import Loss, resolve_loss
from torch_dropout_ir.output_hessian import (
    Root,
    hessian_roots,
    hessian_sampler,
)
from torch_dropout_ir.regularizers.checks import (
    as_pair,
    check_finite,
    check_risk,
    noise_left_out,
)
from torch_dropout_ir.regularizers.clean_pass import CleanPass, clean_pass
from torch_dropout_ir.regularizers.estimate import Estimate
from torch_dropout_ir.regularizers.outputs import (
    OutputsRead,
    check_curvature,
    read_outputs,
)
from torch_dropout_ir.regularizers.site_curvature import SiteCurvature
from torch_dropout_ir.regularizers.site_forms import Form, assemble, by_row
from torch_dropout_ir.sites import unobservable

_MOST_BLOCK_ELEMENTS: Final = 2**24


def gauss_newton(
    model: nn.Module, batch: Batch, loss: Any, *, num_samples: int | None = 1
) -> Estimate:
    r"""Return R_1 from the Gauss-Newton form of the loss at every dropout site.

    .. math::
        R_1 \approx \sum_{\text{sites}} \frac{p}{2 (1 - p)}
        \sum_i \sum_j h_{ij}^2 \, [J_i^\top H_i J_i]_{jj}

    with :math:`J_i` the derivative of the outputs in the site's input on the network
    without noise and :math:`H_i` the loss's Hessian in the outputs. Where a mask is
    shared by the positions of a channel, the square is of the sum over positions.

    Sampled: :math:`v_i` with :math:`E[v_i v_i^\top] = H_i` is sent back to the sites;
    the sum of :math:`(h_{ij} g_{ij})^2` is unbiased for the form. One forward pass,
    and one backward pass a sample whatever the number of sites. Exact sum
    (``num_samples=None``): one backward pass an output of a sample; where samples are
    coupled (batch normalization, message passing), one an output of the batch.

    Equal to ``E[R_drop] - R_S`` for a squared loss and one site whose output goes
    straight into the last linear layer; else its second-order part without the
    curvature of the layers above (``exact`` says which); it can be off by a factor of
    two and more in deep networks.

    Where the loss has no root of its Hessian that could be computed (several outputs,
    very many of them, or a loss that couples samples), signs :math:`z` on the units
    take the place of the sampled outputs: :math:`(z \circ h)^\top J^\top H J (z \circ
    h)`, in three backward passes a sample; the exact sum takes them unit by unit.

    Args:
        model: The network. Of several outputs, those count that the loss reads.
        batch: ``(inputs, targets)``; targets may be None where the loss's Hessian does
            not depend on them (squared losses, cross-entropy).
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        num_samples: Backward passes with sampled outputs; None for the exact sum.

    Returns:
        The estimate with the part of each site. The standard error is that of the
        sampling of outputs; with one sample it includes the spread between the data
        and is an upper bound.

    Raises:
        TypeError: If the model's outputs hold no tensor, or ``batch`` is no pair.
        ValueError: If ``num_samples`` is below 1, the batch is empty, a site drops
            everything, the loss has no second derivative, cross-entropy is taken of
            outputs without batch dimension, or the estimate is not finite.
        RuntimeError: If a site runs without autograd.

    References:
        Wei, Kakade & Ma, *The implicit and explicit regularization effects of
        dropout*, ICML 2020; Zhang & Xu, *Implicit regularization of dropout*, eq. (4).

    Example:
        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1, bias=False))
        >>> x, y = torch.ones(4, 3), torch.zeros(4, 1)
        >>> torch.nn.init.ones_(net[1].weight).shape
        torch.Size([1, 3])
        >>> round(gauss_newton(net, (x, y), "mse", num_samples=None).value.item(), 4)
        3.0
    """  # noqa: DOC502 (a site's `p` is checked by `Site.variance`)
    if num_samples is not None and num_samples < 1:
        raise ValueError(
            f"gauss_newton: expected `num_samples` >= 1 or None, got {num_samples}"
        )
    resolved, (inputs, targets) = resolve_loss(loss), as_pair(batch)
    with clean_pass(model, inputs, twice=resolved.kind == "general") as clean:
        if targets is not None or resolved.kind in ("elementwise", "general"):
            outputs = clean.outputs
            check_risk(
                "gauss_newton", lambda: resolved(outputs, targets), model, inputs
            )
        found = estimate(model, clean, targets, resolved, num_samples)
    check_finite("gauss_newton", found.value, model, inputs)
    return found


def estimate(
    model: nn.Module,
    clean: CleanPass,
    targets: Any,
    loss: Loss,
    num_samples: int | None,
) -> Estimate:
    """Return the Gauss-Newton estimate from a pass that has been run already.

    Args:
        model: The model.
        clean: The pass without noise.
        targets: The targets, or None.
        loss: The loss.
        num_samples: Backward passes with sampled outputs; None for the exact sum.

    Returns:
        The estimate.

    Raises:
        ValueError: If the outputs have no batch dimension that the loss needs.
    """
    clean.check_reachable("gauss_newton")
    read = read_outputs(clean.outputs, loss, targets)
    if loss.kind == "cross_entropy" and read.tensors[0].ndim < 2:
        raise ValueError(
            "gauss_newton: expected outputs with a batch dimension, got shape "
            f"{list(read.tensors[0].shape)}"
        )
    curved = check_curvature(read)
    coupled = bool(clean.uses) and clean.couples_samples(read.tensors)
    if _has_roots(read):
        draws = _from_roots(clean, read, targets, num_samples, coupled)
    else:
        curvature = SiteCurvature(clean, read, linearized=True)
        coupled = bool(clean.uses) and (coupled or read.couples())
        draws = curvature.draws(num_samples, coupled)
    exact = is_exact(model, clean, loss, num_samples)
    like = read.tensors[0].detach()
    found = assemble(clean.names, draws, num_samples, coupled, exact, like)
    notes = (*found.notes, *noise_left_out(model, clean.noisy, bool(clean.uses)))
    if not curved:
        said = "the loss is linear in the outputs: this form is 0; use `second_order`"
        notes = (*notes, said)
    return dataclasses.replace(found, notes=notes)


def is_exact(
    model: nn.Module, clean: CleanPass, loss: Loss, num_samples: int | None
) -> bool:
    """Whether a second-order form is R_1 itself: Lemma 1, or no noise at all."""
    if not clean.uses:
        return not unobservable(model) and not clean.noisy
    return num_samples is None and clean.last_layer is not None and loss.is_quadratic


def _has_roots(read: OutputsRead) -> bool:
    """Whether the Hessian of each sample has a root that can be computed."""
    if read.loss is None:
        return False
    f = read.single
    if read.loss.kind != "general":
        return True
    if f.ndim == 0 or read.couples():
        return False
    return f.numel() * f[0].numel() <= _MOST_BLOCK_ELEMENTS


def _from_roots(
    clean: CleanPass,
    read: OutputsRead,
    targets: Any,
    num_samples: int | None,
    coupled: bool,
) -> list[list[Form]]:
    """Forms of roots of the output Hessian sent back to the sites."""
    assert read.loss is not None  # by `_has_roots`
    passes: Iterable[Iterable[Root]]
    if num_samples is None:
        passes = [_apart(coupled, hessian_roots(read.loss, read.single, targets))]
    else:
        draw = hessian_sampler(read.loss, read.single, targets)
        passes = (draw() for _ in range(num_samples))
    return [_forms(clean, read.tensors[0], roots) for roots in passes]


def _apart(coupled: bool, roots: Iterator[Root]) -> Iterator[Root]:
    """One root for each sample where samples are coupled, else all samples at once."""
    for root, sign in roots:
        if not coupled:
            yield root, sign
            continue
        for i in range(root.shape[0]):
            alone = torch.zeros_like(root)
            alone[i] = root[i]
            yield alone, sign[i] if isinstance(sign, Tensor) else sign


def _forms(clean: CleanPass, outputs: Tensor, roots: Iterable[Root]) -> list[Form]:
    """Quadratic form of each use, summed over units: one entry a leading index."""
    forms: list[Form] = []
    for root, sign in roots:
        found = clean.gradients(outputs, root)
        for (site, h, _), g in zip(clean.uses, found, strict=True):
            if g is None:
                continue
            shared = (h.detach() * g).sum_to_size(site.mask_shape(h.shape))
            name, rows = by_row(site, shared.square())
            forms.append((name, site.variance / 2 * sign * rows))
    return forms
