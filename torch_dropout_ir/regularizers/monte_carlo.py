"""R_1 of anything by its definition: average over masks."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from torch_dropout_ir.arguments import check_count, check_real
from torch_dropout_ir.functional import Batch
from torch_dropout_ir.losses import resolve_loss
from torch_dropout_ir.regularizers.checks import as_pair, check_finite, noise_left_out
from torch_dropout_ir.regularizers.estimate import Estimate
from torch_dropout_ir.regularizers.excess import TOO_ALIKE, ExcessRisk
from torch_dropout_ir.regularizers.path_parts import Parts, PathParts
from torch_dropout_ir.written_parameters import unwritten

_AT_A_TIME: Final = 8
# Fewer draws show their spread too badly to stop on it; where they do not suffice to
# fit their linear part, whose spread is another, some more.
_FIRST_LOOK: Final = 24
_FIRST_WITHOUT_FIT: Final = 64


def monte_carlo(
    model: nn.Module,
    batch: Batch,
    loss: Any,
    *,
    num_masks: int = 64,
    rtol: float | None = None,
    per_site: bool = False,
) -> Estimate:
    r"""Return R_1 by its definition, averaged over random masks.

    .. math::
        R_1 = E_\eta[R_{drop}(\theta, \eta)] - R_S(\theta)
        \approx \frac{1}{K} \sum_k R_{drop}(\theta, \eta_k) - R_S(\theta)
        - \beta_{-k} \sum_j g_j h_j \eta_{kj}

    Unbiased for every model and loss, as far as the noise is that of dropout sites. Of
    other noise, known kinds are switched off, and what is not known is drawn afresh for
    each mask, the same in both losses, at one more pass a mask. Both are taken on the
    same batch. The last term has mean zero: :math:`g` is the derivative of ``R_S`` in
    the inputs :math:`h` of the sites, and :math:`\beta_{-k}` is fitted to the other
    masks. It takes away most of the variance where dropout is a small perturbation,
    and fades where it is not.

    A mean that stops on its own size is biased: where it is large by chance, it stops
    sooner. With ``rtol`` that bias, some :math:`2\,\mathrm{rtol}^2` of R_1, is taken
    off as the draws tell it, and what is left is of higher order.

    The parts of the sites are what each adds along the path from no noise to all of it,

    .. math::
        R_1 = \sum_s E \int_0^1 \langle h_s \eta_s, g_s(t \eta) \rangle \, dt

    with the derivative :math:`g_s(t \eta)` in what site ``s`` passes on where a share
    ``t`` of all noise acts: they add up to R_1, whatever model and loss, and are those
    of second order where the noise is small. They are of as many masks of their own,
    each with a ``t`` of its own.

    Costs a forward pass a mask, and two forward and one backward pass; with parts as
    many more forward and backward passes. Memory is that of a training step and, beside
    it, the linear part: an element for each of a mask (and what the loss keeps of the
    outputs, which a training step lets go sooner).

    Args:
        model: The model; left as it is. Of its outputs only the loss takes notice.
        batch: ``(inputs, targets)``.
        loss: ``"mse"``, ``"cross_entropy"``, a loss module or a callable.
        num_masks: Number of masks, at least 2; with ``rtol`` the most to spend.
        rtol: If given, stop as soon as the standard error is at most this share of the
            magnitude of the estimate, looked at every 8 masks from the 24th on.
        per_site: Whether to take the parts of the sites too. A single site's is R_1.

    Returns:
        The estimate with its standard error, NaN where the masks hardly differ (``p``
        near 0 or 1, few units and few masks); ``per_site`` is empty unless asked for,
        ``converged`` says whether ``rtol`` was reached.

    Raises:
        TypeError: If ``batch`` is no pair, ``num_masks`` no integer,
            or ``rtol`` no number.
        ValueError: If ``num_masks`` is below 2 (one mask has no standard error),
            ``rtol`` is not positive, the batch is empty, or the estimate or a part is
            not finite.
        RuntimeError: If parts are asked for of sites that derivatives do not reach.

    References:
        Zhang & Xu, *Implicit regularization of dropout*, Lemma 1; Owen, *Monte Carlo
        theory, methods and examples*, 2013, section 8.9, for control variates; Aumann &
        Shapley, *Values of non-atomic games*, 1974, for parts along a path.

    Example:
        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
        >>> x, y = torch.ones(64, 3), torch.zeros(64, 1)
        >>> found = monte_carlo(net, (x, y), "mse", num_masks=400)
        >>> exact = gauss_newton(net, (x, y), "mse", num_samples=None)
        >>> bool((found.value - exact.value).abs() < 5 * found.standard_error)
        True
    """  # noqa: DOC502 (`as_pair` raises)
    check_count("monte_carlo", "num_masks", num_masks, 2)
    if rtol is not None:
        check_real("monte_carlo", "rtol", rtol, above=0, finite=False)
    batch = as_pair(batch)
    with unwritten(model):
        resolved = resolve_loss(loss)
        excess = ExcessRisk(model, batch, resolved)
        value, error, reached = _average(excess, num_masks, rtol)
        parts = Parts({}, {})
        if per_site:
            path = PathParts(model, batch, resolved, excess.first)
            parts = path.parts(value, error, excess.num_masks)
    check_finite("monte_carlo", value, model, batch[0])
    converged = reached or rtol is None
    noisy, seen = excess.noisy or bool(excess.seen.silenced), excess.seen
    notes = noise_left_out(model, noisy, seen.met, drawn=excess.noisy, cut=seen.cut)
    if not excess.knows_its_error:
        notes = (*notes, TOO_ALIKE)
    return Estimate(
        value, parts.values, error, False, excess.num_masks, converged, notes,
        parts.errors,
    )  # fmt: skip


def _average(
    excess: ExcessRisk, num_masks: int, rtol: float | None
) -> tuple[Tensor, Tensor, bool]:
    """Draw masks; return the mean, its error, and whether that reached ``rtol``."""
    looked, reached = False, False
    while excess.num_masks < num_masks and not reached:
        least = _AT_A_TIME if excess.num_masks else _FIRST_LOOK
        left = num_masks - excess.num_masks
        excess.draw(left if rtol is None else min(least, left))
        value, error = excess.mean()
        fits = excess.can_fit or excess.num_masks >= _FIRST_WITHOUT_FIT
        if rtol is not None and fits:
            # At the first look there was no choice, hence no bias.
            stopped = value - excess.stopping_bias() if looked else value
            reached = bool(error <= rtol * torch.minimum(value.abs(), stopped.abs()))
            value, looked = stopped if reached else value, True
    return value, error, reached
