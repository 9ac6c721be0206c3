"""R_1 of any network by the Gauss-Newton form, one backward pass a sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torch_dropout_ir.functional import Batch
from torch_dropout_ir.losses import Loss, resolve_loss
from torch_dropout_ir.output_hessian import Root, hessian_roots, hessian_sampler
from torch_dropout_ir.regularizers.clean_pass import CleanPass, clean_pass
from torch_dropout_ir.regularizers.estimate import Estimate
from torch_dropout_ir.sites import mask_shape, unobservable


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
    two and more in deep networks. For a loss that is linear in the outputs (an absolute
    error) it is zero, whatever R_1 is.

    Args:
        model: The network, whose output is one tensor with the batch in front.
        batch: ``(inputs, targets)``; targets may be None where the loss's Hessian does
            not depend on them (squared losses, cross-entropy).
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        num_samples: Backward passes with sampled outputs; None for the exact sum.

    Returns:
        The estimate with the part of each site. The standard error is that of the
        sampling of outputs; with one sample it includes the spread between the data
        and is an upper bound.

    Raises:
        TypeError: If the model's output is no tensor.
        ValueError: If ``num_samples`` is below 1, a site drops everything, or
            cross-entropy is taken of outputs without batch dimension.
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
    resolved = resolve_loss(loss)
    with clean_pass(model, batch[0]) as clean:
        return estimate(model, clean, batch[1], resolved, num_samples)


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
    """
    _check(clean, loss)
    detached = clean.outputs.detach()
    coupled = bool(clean.uses) and clean.couples_samples()
    passes: Iterable[Iterable[Root]]
    if num_samples is None:
        passes = [_apart(coupled, hessian_roots(loss, detached, targets))]
    else:
        draw = hessian_sampler(loss, detached, targets)
        passes = (draw() for _ in range(num_samples))
    draws = [_forms(clean, roots) for roots in passes]
    per_site = {
        name: torch.stack([_total(draw, name, detached) for draw in draws]).mean()
        for name in {site.name: None for site, _, _ in clean.uses}
    }
    value = sum(per_site.values(), detached.new_zeros(()))
    error = _standard_error(draws, detached, num_samples, coupled)
    closed = num_samples is None and clean.last_layer is not None
    nothing = not clean.uses and not unobservable(model)
    exact = nothing or (closed and loss.is_quadratic)
    return Estimate(value, per_site, error, exact, num_samples or 0)


def _check(clean: CleanPass, loss: Loss) -> None:
    if clean.unreachable:
        raise RuntimeError(
            "gauss_newton: derivatives cannot reach the sites "
            f"{list(clean.unreachable)}, which run under torch.no_grad or reentrant "
            "checkpointing. Use `monte_carlo`, or checkpoint with use_reentrant=False."
        )
    if loss.kind == "cross_entropy" and clean.outputs.ndim < 2:
        raise ValueError(
            "gauss_newton: expected outputs with a batch dimension, got shape "
            f"{list(clean.outputs.shape)}"
        )


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


def _forms(clean: CleanPass, roots: Iterable[Root]) -> list[tuple[str, Tensor]]:
    """Quadratic form of each use, summed over units: one entry a leading index."""
    forms: list[tuple[str, Tensor]] = []
    for root, sign in roots:
        for (site, h, _), g in zip(clean.uses, clean.gradients(root), strict=True):
            if g is None:
                continue
            shared = (h * g).sum_to_size(mask_shape(site.module, h.shape))
            rows = shared.square().reshape(shared.shape[0] if shared.ndim else 1, -1)
            forms.append((site.name, site.variance / 2 * sign * rows.sum(-1)))
    return forms


def _total(draw: list[tuple[str, Tensor]], name: str, like: Tensor) -> Tensor:
    parts = [form.sum() for site, form in draw if site == name]
    return torch.stack(parts).sum() if parts else like.new_zeros(())


def _standard_error(
    draws: list[list[tuple[str, Tensor]]],
    outputs: Tensor,
    num_samples: int | None,
    coupled: bool,
) -> Tensor:
    """Standard error over draws; by sample where each has its own independent draws."""
    if num_samples is None or not draws or not draws[0]:
        return outputs.new_zeros(())
    samples = outputs.shape[0] if outputs.ndim else 1
    by_sample = all(form.shape[0] == samples for draw in draws for _, form in draw)
    if by_sample and not coupled:
        rows = torch.stack([torch.stack([f for _, f in draw]).sum(0) for draw in draws])
        if num_samples == 1:
            return (
                samples**0.5 * rows[0].std()
                if samples > 1
                else rows.new_tensor(float("nan"))
            )
        return (rows.var(0).sum() / num_samples).sqrt()
    totals = torch.stack([
        sum((f.sum() for _, f in d), outputs.new_zeros(())) for d in draws
    ])
    return (
        totals.std() / num_samples**0.5
        if num_samples > 1
        else totals.new_tensor(float("nan"))
    )
